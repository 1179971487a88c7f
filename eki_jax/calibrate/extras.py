"""Packages beyond the core, imported when they are needed."""

from __future__ import annotations

import importlib
from typing import Any


def extra(module: str, name: str = "calibrate") -> Any:
    """A module of another package.

    Args:
        module: name of the module.
        name: extra of this package that installs it.

    Raises:
        ImportError: it is not installed; the error names the extra.

    >>> extra("no_such_package.part")
    Traceback (most recent call last):
        ...
    ImportError: no_such_package is not installed: pip install 'eki_jax[calibrate]'
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise ImportError(f"{package} is not installed: pip install 'eki_jax[{name}]'") from error


def special() -> Any:
    """SciPy's special functions, those of the normal distribution among them."""
    return extra("scipy.special")
