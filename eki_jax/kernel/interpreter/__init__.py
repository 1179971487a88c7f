"""Models evaluated from their traces, with matrices of low rank that no function of JAX's would take.

A model is traced with arrays for its parameters, and the trace is then evaluated equation by equation with other values
in the places of its matrices. So it may be written in any way, by hand or with any library: a layer is whatever
multiplies.
"""

from __future__ import annotations

from eki_jax.kernel.interpreter.calls import interpreted as interpreted
from eki_jax.kernel.interpreter.calls import on_devices as on_devices
from eki_jax.kernel.interpreter.disturbing import Disturber as Disturber
from eki_jax.kernel.interpreter.disturbing import Held as Held
from eki_jax.kernel.interpreter.disturbing import Mixing as Mixing
from eki_jax.kernel.interpreter.disturbing import Passed as Passed
from eki_jax.kernel.interpreter.disturbing import Point as Point
from eki_jax.kernel.interpreter.disturbing import Read as Read
from eki_jax.kernel.interpreter.narrowing import narrowed as narrowed
from eki_jax.kernel.interpreter.numbering import Numbering as Numbering
from eki_jax.kernel.interpreter.products import Roles as Roles
from eki_jax.kernel.interpreter.values import Perturbed as Perturbed
from eki_jax.kernel.interpreter.values import Tagged as Tagged
from eki_jax.kernel.interpreter.values import leaf_name as leaf_name
from eki_jax.kernel.interpreter.watching import Addition as Addition
from eki_jax.kernel.interpreter.watching import Use as Use
from eki_jax.kernel.interpreter.watching import Watcher as Watcher
