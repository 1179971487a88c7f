"""The training loop: one compiled scan an epoch, checkpoints, and what a person sees of it."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from eki_jax._checks import pair, random_key, traceable, whole
from eki_jax._types import Array
from eki_jax.kernel.particles import local_size
from eki_jax.solvers.refusals import Refusals
from eki_jax.training.checkpoints import abstract
from eki_jax.training.method import Method, check_method
from eki_jax.training.recording import Recorder, progress_bar


def epoch(method: Method, batch_size: int) -> Callable[[Any, Array, Array, Array], tuple[Any, dict[str, Array]]]:
    """One pass over the data, without replacement, as one scan.

    Args:
        method: training method whose step is taken.
        batch_size: number of samples in a step; those that do not fill the last batch wait for the next epoch's
            shuffle.

    Returns:
        ``run(state, key, x, targets) -> (state, metrics)``, pure; metrics are stacked over the steps. Compile it with
        ``jax.jit(run, donate_argnums=0)`` and the state is updated in place.

    Raises:
        TypeError: ``method`` is no training method, ``batch_size`` no whole number; from ``run``: no random key.
        ValueError: from ``run``: an empty data set, a batch larger than it, arrays of different lengths.

    >>> import jax.numpy as jnp
    >>> import eki_jax
    >>> from eki_jax.training import ensemble_method
    >>> forward = lambda u, x: x @ u
    >>> solver = eki_jax.euler(forward, eki_jax.squared_error())
    >>> method = ensemble_method(solver, forward, eki_jax.gaussian(jnp.zeros(2), 1.0), 20)
    >>> x = jax.random.normal(jax.random.key(1), (64, 2))
    >>> run = jax.jit(epoch(method, batch_size=16))
    >>> state, metrics = run(method.init(jax.random.key(0)), jax.random.key(2), x, x @ jnp.array([1.0, -2.0]))
    >>> metrics["train_loss"].shape
    (4,)
    """
    check_method(method)
    whole("batch_size", batch_size)

    def run(state: Any, key: Array, x: Array, targets: Array) -> tuple[Any, dict[str, Array]]:
        random_key("key", key)
        samples = check_data(x, targets, batch_size)
        x, targets = jax.tree.map(jnp.asarray, x), jnp.asarray(targets)  # NumPy's could not be indexed while tracing
        body = lambda state, inputs: _batch_step(method, state, inputs, x, targets)
        return lax.scan(body, state, _order(key, samples, batch_size))

    return run


def _one_by_one(method: Method, batch_size: int) -> Callable[[Any, Array, Array, Array], tuple[Any, dict[str, Array]]]:
    """What :func:`epoch` does, with a compiled step in the place of a compiled loop."""
    step = jax.jit(lambda *arguments: _batch_step(method, *arguments), donate_argnums=0)

    def run(state: Any, key: Array, x: Array, targets: Array) -> tuple[Any, dict[str, Array]]:
        metrics = []
        for inputs in zip(*_order(key, local_size(x, name="x"), batch_size), strict=True):
            state, step_metrics = step(state, inputs, x, targets)
            metrics.append(step_metrics)
        return state, jax.tree.map(lambda *values: jnp.stack(values), *metrics)

    return run


def _order(key: Array, samples: int, batch_size: int) -> tuple[Array, Array]:
    """The samples of every batch of an epoch, shape (steps, batch_size), and a key for every step."""
    steps = samples // batch_size
    order = jax.random.permutation(jax.random.fold_in(key, 0), samples)[: steps * batch_size]
    return order.reshape(steps, batch_size), jax.random.split(jax.random.fold_in(key, 1), steps)


def _batch_step(
    method: Method, state: Any, inputs: tuple[Array, Array], x: Array, targets: Array
) -> tuple[Any, dict[str, Array]]:
    indices, key = inputs
    return method.step(state, key, jax.tree.map(lambda leaf: leaf[indices], (x, targets)))


def check_data(x: Any, targets: Any, batch_size: int, *, name: str = "train") -> int:
    """The number of samples; raises ValueError where there are too few for a batch, or x and targets disagree."""
    samples = local_size(traceable(name, x), name=name)
    traceable(name, targets)
    whole("batch_size", batch_size)
    if jnp.shape(targets)[:1] != (samples,):
        raise ValueError(f"{name}: {samples} inputs but targets of shape {jnp.shape(targets)}; wanted one an input")
    if samples == 0:
        raise ValueError(f"{name}: an empty data set; wanted at least one sample")
    if not 1 <= batch_size <= samples:
        raise ValueError(f"batch_size: {batch_size} for {samples} samples; wanted 1 to {samples}")
    return samples


class Result(NamedTuple):
    """What :func:`fit` returns.

    Attributes:
        state: state of the method after the last epoch.
        history: one dict an epoch: accuracies, seconds, losses, step sizes, forward passes so far.
        interrupted: flag, True where it stopped early because it was asked to.
    """

    state: Any
    history: list[dict[str, Any]]
    interrupted: bool


def fit(
    method: Method,
    train: tuple[Any, Any],
    test: tuple[Any, Any],
    *,
    batch_size: int,
    epochs: int,
    key: Array,
    directory: Path | str | None = None,
    settings: dict[str, Any] | None = None,
    resume: bool = False,
    checkpoint_every: int = 1,
    progress: bool = True,
    most_refusals: int = 3,
) -> Result:
    """Train a classifier, and leave behind what a person wants to see of it.

    The state after n epochs depends on ``key`` and n only, so that a run resumed from a checkpoint continues bit for
    bit (on the same machine and number of devices). Ctrl-C ends the epoch that runs, saves, and returns; a second one
    stops at once, with the last checkpoint whole.

    Args:
        method: training method, such as :func:`ensemble_method` makes.
        train: pair ``(x, labels)`` to train on, shapes (N, ...) and (N,); x may be a pytree of such arrays.
        test: pair ``(x, labels)`` for the accuracy after every epoch.
        batch_size: number of samples in a step.
        epochs: number of passes over the data in all, those of a resumed run included.
        key: JAX random key of everything random in the run.
        directory: folder that gets ``settings.json``, ``metrics.jsonl`` (a line an epoch), ``accuracy.png`` and
            ``checkpoints/``; nothing is written if None. The picture needs matplotlib and the checkpoints need orbax.
            One process at a time may write to it.
        settings: description of the run, saved with the checkpoints; a checkpoint of other settings is refused.
        resume: flag; True goes on from the last checkpoint in ``directory``.
        checkpoint_every: number of epochs between checkpoints; 0 for the last epoch's alone.
        progress: flag; True shows a bar with the accuracy and the time left, or, without rich, a line an epoch.
        most_refusals: number of steps refused in a row (``info.reason``) after which the run stops.

    Returns:
        A :class:`Result`. Its history says how many steps of an epoch were refused; a warning says so at the end.

    Raises:
        StepRefused: ``most_refusals`` steps in a row were refused; it names the reason and the remedy. What was learned
            before is in ``directory``.
        ValueError: data or batch size that do not fit; ``epochs`` < 1; ``directory`` holds a run already and ``resume``
            is False, or another process writes to it; with ``resume``, a checkpoint of other settings.
        FileNotFoundError: ``resume`` and ``directory`` holds no run.
    """
    check_method(method)
    epochs, batch_size = whole("epochs", epochs), whole("batch_size", batch_size)
    random_key("key", key)
    whole("most_refusals", most_refusals)
    for name, data, least in (("train", train, batch_size), ("test", test, 1)):
        check_data(*pair(name, data, "(x, labels)"), least, name=name)
        if method.check is not None:
            method.check(*data, name)
    arrays, samples = jax.device_put((*train, *test)), local_size(train[0], name="train")
    run = (
        jax.jit(epoch(method, batch_size), donate_argnums=0)
        if method.compiled_loop
        else _one_by_one(method, batch_size)
    )
    measure = jax.jit(method.accuracy)
    redraw = _redrawer(method)
    refusals = Refusals(most_refusals)
    with contextlib.ExitStack() as stack:
        recorder = stack.enter_context(Recorder(directory, settings or {}, resume, checkpoint_every))
        state, history = recorder.restore(lambda done: abstract(_resized(method, done), key))
        if state is None:
            state = jax.jit(method.init)(_folded(key, 0))
        recorder.begin(max(epochs, len(history)))
        stop = stack.enter_context(_deferred_interrupt())
        show = stack.enter_context(progress_bar(progress, len(history), epochs))
        for index in range(len(history), epochs):
            started = time.perf_counter()
            epoch_key = _folded(key, index + 1)
            state = redraw(state, _folded(epoch_key, 2), index)
            state, metrics = run(state, epoch_key, *arrays[:2])
            accuracy = jax.device_get(measure(state, *arrays[2:]))
            seconds = time.perf_counter() - started
            size = method.ensemble_size(index)
            before = history[-1]["forward_passes"] if history else 0
            steps = samples // batch_size
            history.append(
                {
                    "epoch": index + 1,
                    "test_accuracy_mean": round(float(accuracy.mean), 6),
                    "test_accuracy_best": round(float(accuracy.best), 6),
                    "test_accuracy_ensemble": round(float(accuracy.ensemble), 6),
                    "particles": size,
                    "forward_passes": before + method.passes(size) * steps * batch_size,
                    "seconds": seconds,
                    **refusals.counted(values := jax.device_get(metrics)),
                    **{name: float(np.mean(value)) for name, value in values.items() if name != "reason"},
                }
            )
            stopping = stop() or refusals.too_many
            recorder.save(state, history, last=stopping or index + 1 == epochs)
            show(history[-1])
            if stopping:
                break
    refusals.tell(directory=directory)
    return Result(state, history, len(history) < epochs)


def _folded(key: Array, number: int) -> Array:
    """A key for a number, which is put on the device in so many words, as a guard against transfers wants it."""
    return jax.random.fold_in(key, jax.device_put(np.uint32(number)))


def _redrawer(method: Method) -> Callable[[Any, Array, int], Any]:
    """``redraw(state, key, epoch)`` before an epoch; in place while J stays."""
    if method.redraw is None:
        return lambda state, key, index: state
    in_place = jax.jit(method.redraw, static_argnums=2, donate_argnums=0)
    growing = jax.jit(method.redraw, static_argnums=2)  # XLA cannot reuse a buffer of another size

    def redraw(state: Any, key: Array, index: int) -> Any:
        if index == 0:
            return state
        size = method.ensemble_size(index)
        return (in_place if size == method.ensemble_size(index - 1) else growing)(state, key, size)

    return redraw


def _resized(method: Method, epochs_done: int) -> Callable[[Array], Any]:
    """``init`` as it would be for the J of the last of ``epochs_done`` epochs: the shapes of a checkpoint."""

    def init(key: Array) -> Any:
        state = method.init(key)
        if method.redraw is None or epochs_done < 2:
            return state
        return method.redraw(state, key, method.ensemble_size(epochs_done - 1))

    return init


@contextlib.contextmanager
def _deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Let a first Ctrl-C, or the system's request to end, wait for the end of the epoch; a second one interrupts."""
    asked = False

    def handler(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        with contextlib.suppress(OSError):  # not by print(), which this may have interrupted
            os.write(2, b"\nstopping after this epoch, which will be saved; press Ctrl-C again to stop at once\n")

    before: dict[signal.Signals, Any] = {}
    try:
        for one in (signal.SIGINT, signal.SIGTERM):
            before[one] = signal.signal(one, handler)
    except ValueError:  # not in the main thread: leave the signals to whoever has them
        yield lambda: False
        return
    try:
        yield lambda: asked
    finally:
        for one, previous in before.items():
            signal.signal(one, previous)
