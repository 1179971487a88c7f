"""Saving a run and going on with it, through orbax (the extra ``checkpoint``)."""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from eki_jax._checks import function, traceable, whole


class Damaged(ValueError):
    """A checkpoint that cannot be read; the message says why."""


class Checkpoints:
    """The checkpoints of one run in a folder; the last two are kept.

    One that cannot be read is set aside, as ``N.damaged``, with a warning, and the one before it is taken.

    Args:
        directory: folder of the checkpoints; made if it is not there.
        settings: description of the run; a checkpoint of other settings is refused.

    Raises:
        ImportError: orbax is not installed.
        TypeError: ``directory`` is no path, ``settings`` are no dictionary that JSON knows.
        ValueError: ``directory`` is a file.

    >>> import tempfile, jax.numpy as jnp
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     checkpoints = Checkpoints(folder, {"problem": "toy"})
    ...     checkpoints.save(1, {"w": jnp.array([1.0, 2.0])}, notes={"loss": 0.5})
    ...     state, notes = checkpoints.restore(lambda notes: {"w": jnp.zeros(2)})
    ...     checkpoints.close()
    >>> state["w"].tolist(), notes
    ([1.0, 2.0], {'loss': 0.5})
    """

    def __init__(self, directory: Path | str, settings: dict[str, Any] | None = None) -> None:
        self._orbax = _orbax()
        if not isinstance(directory, str | Path):
            raise TypeError(f"directory: {directory!r}; wanted a path")
        if settings is not None and not isinstance(settings, dict):
            raise TypeError(f"settings: {settings!r}; wanted a dictionary")
        self._settings = _serializable("settings", settings or {})
        self._directory = Path(directory).resolve()
        if self._directory.exists() and not self._directory.is_dir():
            raise ValueError(f"directory: {self._directory} is a file; wanted a folder, or a name for a new one")
        options = self._orbax.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        handlers = {"state": self._orbax.StandardCheckpointHandler(), "about": self._orbax.JsonCheckpointHandler()}
        self._manager = self._orbax.CheckpointManager(self._directory, options=options, item_handlers=handlers)

    @property
    def latest(self) -> int | None:
        """The number of the last whole checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, number: int, state: Any, notes: Any = None) -> None:
        """Write a checkpoint; it is whole or not there at all.

        Args:
            number: number of the checkpoint, growing; that of the epochs done, say.
            state: pytree of arrays, on any number of devices.
            notes: notes that JSON knows, kept beside the state.

        Raises:
            TypeError: ``number`` is no whole number, ``state`` has leaves that are no arrays, or JSON does not know the
                notes.
            ValueError: ``number`` < 0, or a state without arrays.
            OSError: it cannot be written, as where no space is left; the ones before are whole.
        """
        number = whole("number", number, 0)
        _serializable("notes", notes)
        if not jax.tree.leaves(traceable("state", state)):
            raise ValueError(f"state: {state!r}, which has no arrays; wanted one at least")
        args = self._orbax.args
        about = {"settings": self._settings, "notes": notes}
        try:
            with _unlogged():
                self._manager.save(
                    number, args=args.Composite(state=args.StandardSave(state), about=args.JsonSave(about)), force=True
                )
        except (OSError, ValueError) as error:
            raise OSError(f"{self._directory}: checkpoint {number} cannot be written: {_line(error)}") from error

    def notes(self) -> Any:
        """The notes of the last checkpoint that can be read.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it belongs to a run of other settings; the message says which differ. Or none can be read.
        """
        return next(notes for _, notes in self._readable())

    def restore(self, like: Any) -> tuple[Any, Any]:
        """The last checkpoint that can be read.

        Args:
            like: function of the notes that returns what the state looks like: a pytree of arrays or
                ``jax.ShapeDtypeStruct``; with shardings in them the state is placed accordingly.

        Returns:
            ``(state, notes)``.

        Raises:
            FileNotFoundError: there is no checkpoint.
            ValueError: it is of other settings, or its arrays have other shapes or dtypes; or none can be read.
        """
        for number, notes in self._readable():
            try:
                return self._state(number, like(notes)), notes
            except Damaged as error:
                self._set_aside(number, error)
        raise AssertionError("unreachable")

    def _readable(self) -> Iterator[tuple[int, Any]]:
        """Numbers and notes of the checkpoints, the last one first, of those whose notes can be read."""
        if self.latest is None:
            raise FileNotFoundError(f"{self._directory}: no checkpoint there; wanted one to resume from")
        while (number := self.latest) is not None:
            try:
                yield number, self._about(number)
            except Damaged as error:
                self._set_aside(number, error)
        raise ValueError(f"{self._directory}: all checkpoints are damaged; remove the folder to begin anew")

    def _about(self, number: int) -> Any:
        args = self._orbax.args
        try:
            about = self._manager.restore(number, args=args.Composite(about=args.JsonRestore()))["about"]
            settings, notes = about["settings"], about["notes"]
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise Damaged(f"its notes: {error}") from error
        _check_settings(self._directory, settings, self._settings)
        return notes

    def _state(self, number: int, wanted: Any) -> Any:
        args = self._orbax.args
        template = jax.tree.map(_abstract, wanted)
        try:
            saved = self._manager.item_metadata(number)["state"]
            found = {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in _paths(saved)}
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise Damaged(f"its arrays' shapes: {error}") from error
        if not found:
            raise Damaged("its arrays' shapes are missing")
        self._check_shapes(number, found, wanted)
        try:
            return self._manager.restore(number, args=args.Composite(state=args.StandardRestore(template)))["state"]
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise Damaged(f"its arrays: {error}") from error

    def _set_aside(self, number: int, error: Damaged) -> None:
        folder = self._directory / str(number)
        if jax.process_count() > 1:  # all processes would have to agree
            raise ValueError(f"{folder}: damaged, {_line(error)}; remove it to go on from the one before") from error
        place = self._directory / f"{number}.damaged"
        while place.exists():
            place = place.with_name(place.name + "-")
        folder.rename(place)
        self._manager.reload()
        before = "none is left" if self.latest is None else f"going on from checkpoint {self.latest}"
        warnings.warn(f"{folder}: damaged, {_line(error)}; set aside as {place.name}, {before}", stacklevel=5)

    def close(self) -> None:
        """Wait until everything is written."""
        self._manager.close()

    def _check_shapes(self, number: int, found: dict[str, Any], wanted: Any) -> None:
        # orbax pads or cuts arrays of another shape without a word
        for path, leaf in _paths(wanted):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            if name not in found:
                trouble = f"it has no {name!r}"
            else:
                shape, dtype = tuple(found[name].shape), np.dtype(found[name].dtype)
                if (shape, dtype) == (tuple(leaf.shape), np.dtype(leaf.dtype)):
                    continue
                trouble = f"{name!r} is {dtype}{list(shape)}; wanted {leaf.dtype}{list(leaf.shape)}"
            raise ValueError(f"{self._directory}: checkpoint {number} is not of this problem: {trouble}")


def abstract(fn: Callable[..., Any], *args: Any) -> Any:
    """Shapes, dtypes and shardings of what ``fn(*args)`` returns, without running it: what a checkpoint is restored as.

    Args:
        fn: function of global arrays, such as the ``init`` of a sharded solver; it is compiled.
        *args: arguments of the function.

    Returns:
        A pytree of :class:`jax.ShapeDtypeStruct` with their shardings.

    Raises:
        TypeError: ``fn`` is no function of the arguments, or these are no arrays.

    >>> import jax.numpy as jnp
    >>> abstract(jnp.zeros_like, jnp.ones(3)).shape
    (3,)
    """
    function("fn", fn, "a function of arrays", arguments=len(args))
    traceable("args", args)
    compiled = jax.jit(fn).lower(*args).compile()
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        jax.eval_shape(fn, *args),
        compiled.output_shardings,
    )


def _serializable(name: str, value: Any) -> Any:
    try:
        json.dumps(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: {error}; wanted what JSON knows") from None
    return value


@contextlib.contextmanager
def _unlogged() -> Iterator[None]:
    """No log of an error that is raised as well."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def _line(error: Exception) -> str:
    """An error of other packages, which may be long, as part of a line."""
    text = " ".join(str(error).split())
    return text if len(text) <= 160 else f"{text[:157]}..."


def _paths(tree: Any) -> list[Any]:
    return jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: hasattr(leaf, "shape"))


def _abstract(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))


def _check_settings(directory: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    names = sorted(set(saved) | set(wanted))
    different = [f"{n}: {saved.get(n)!r}, now {wanted.get(n)!r}" for n in names if saved.get(n) != wanted.get(n)]
    if different:
        raise ValueError(f"{directory}: a checkpoint of another run ({'; '.join(different)})")


def _orbax() -> Any:
    try:
        return importlib.import_module("orbax.checkpoint")
    except ImportError as error:
        raise ImportError("checkpoints need orbax: pip install 'eki_jax[checkpoint]'") from error
