"""Random keys whose draws do not depend on how particles are spread over devices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from eki_jax._checks import random_key
from eki_jax._types import Array


def particle_key(name: str, value: Any) -> Array:
    """A key of JAX's counter-based generator from a key of any kind; itself where it is one.

    The numbers of the others (``rbg``) change with the batch that they are drawn in, so that one device and many would
    draw different ensembles.

    Args:
        name: name of the argument, for an error.
        value: JAX random key of any implementation, new style or raw.

    Raises:
        TypeError: no key.

    >>> key = jax.random.key(0)
    >>> bool(particle_key("key", key) == key), particle_key("key", jax.random.key(0, impl="rbg")).dtype == key.dtype
    (True, True)
    """
    key = random_key(name, value)
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if str(jax.random.key_impl(key)) == "threefry2x32":
        return key
    return jax.random.wrap_key_data(jax.random.bits(key, (2,), jnp.uint32), impl="threefry2x32")
