"""The one protocol of all solvers, their settings, and what every ensemble's step ends with."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections import namedtuple
from collections.abc import Callable
from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np

from eki_jax._checks import ABOVE_ONE, NOT_NEGATIVE, arrays, is_known, one_of, pair, random_key, real, traceable, whole
from eki_jax._types import Array, Batch, Ensemble, ForwardFn, Params
from eki_jax.kernel.axes import Axes, Axis
from eki_jax.kernel.costs import Communication
from eki_jax.kernel.health import OUTLIER_CUT, finite_particles, near_particles
from eki_jax.kernel.once import compiled_once
from eki_jax.kernel.particles import local_size
from eki_jax.kernel.precision import check_precision
from eki_jax.kernel.products import Contraction, Products
from eki_jax.solvers.failures import FailurePolicy, keep_failed
from eki_jax.solvers.reasons import Reason, first_reason


class Info(NamedTuple):
    """Numbers of one step that a person wants to see; all of them from before the step moved anything.

    The last five are there for every solver of the library.

    Attributes:
        losses: losses of this device's particles, shape (J,).
        step_size: dt, in units of the vector field's time; the paper's h is dt / J.
        drift_norm: norm of the drift, the paper's ||D||_F.
        spread: root mean square distance of a particle from the mean, sqrt(tr C(u)), in parameter units.
        is_finite: flag, True where no particle had failed and the step was taken, or had nothing left to do.
        failed: number of particles that took no part, int32: their parameters, outputs or loss were not finite, or
            they were beyond the cut (``outlier_cut`` of :class:`SharedSettings`).
        loss: mean loss of the particles that did not fail, on all devices, a scalar.
        moved: flag, True where the step was taken; False where it was refused, and the state is what it was.
        reason: code of :class:`eki_jax.Reason` that says why the step was refused, int32; 0 where it was taken.
    """

    losses: Array
    step_size: Array
    drift_norm: Array
    spread: Array
    is_finite: Array
    failed: Array
    loss: Array
    moved: Array
    reason: Array


def extended(info: Any, prefix: str, **more: Any) -> Any:
    """Numbers of a step and some more, as a class of the first one's name behind a prefix.

    >>> from typing import NamedTuple
    >>> class Numbers(NamedTuple):
    ...     loss: float
    >>> extended(Numbers(0.5), "More", refreshed=True)
    MoreNumbers(loss=0.5, refreshed=True)
    """
    return _info_class(prefix + type(info).__name__, (*info._fields, *more))(*info, *more.values())


@functools.cache
def _info_class(name: str, fields: tuple[str, ...]) -> Any:
    return namedtuple(name, fields)


class Solver(NamedTuple):
    """A method as eight pure functions; every solver of the library is one.

    Attributes:
        init: function ``init(ensemble) -> state``, from particles of shape (J, ...). A solver that makes its own
            particles around one (:func:`eki_jax.natural.natural_gradient`) has ``init(params, key) -> state``.
        step: function ``step(state, (x, targets)) -> (state, info)``: evaluates the model and updates.
        update: function ``update(state, outputs, targets) -> (state, info)`` for models that run somewhere else:
            evaluate ``ensemble(state)`` there and hand in the outputs, shape (J, ...).
        ensemble: function ``ensemble(state) -> (J, ...)``: where the outputs of the next step are wanted.
        estimate: function ``estimate(state) -> params``: the one particle to predict with, the mean of the positions.
        with_ensemble: function ``with_ensemble(state, ensemble) -> state``: the state with other particles, after
            noise for example; the count of steps goes on.
        done: function ``done(state) -> bool array``: whether a method that has an end, such as tempering, reached it.
        passes: function ``passes(J) -> int``: forward passes that a step spends on a sample.
    """

    init: Callable[..., Any]
    step: Callable[[Any, Batch], tuple[Any, Any]]
    update: Callable[[Any, Any, Any], tuple[Any, Any]]
    ensemble: Callable[[Any], Ensemble]
    estimate: Callable[[Any], Params]
    with_ensemble: Callable[[Any, Ensemble], Any]
    done: Callable[[Any], Array]
    passes: Callable[[int], int]


class SharedSettings(TypedDict, total=False):
    """Keywords of every solver that moves an ensemble.

    Attributes:
        axis_name: mapped axis over which the particles are spread (vmap, pmap, shard_map); None on one device.
        failures: policy for particles that turn non-finite, see :mod:`eki_jax.failures`; by default
            :func:`eki_jax.keep_failed`.
        targets_axis: axis of the particles in the targets: 0 where every particle has its own (perturbed data), shape
            (J, ...); else None.
        outlier_cut: largest squared misfit of a particle that takes part, as a multiple of the median, > 1; those
            beyond count as failed. The misfit is the length of the cotangents (of whitened residuals in a Kalman step);
            the outputs have to be as far from all others'. By default 10^6, residuals a thousand times as long; None
            for no cut.
        chunk_size: number of particles evaluated at a time; by default from a memory budget.
        precision: precision of the kernel's matrix products, as in :func:`jax.numpy.matmul`; or ``"bf16"``: products in
            bfloat16 with float32 sums, in the kernel and in the model that a step evaluates (see
            :func:`eki_jax.evaluate`). The state stays in its own dtype.
    """

    axis_name: str | None
    failures: FailurePolicy
    targets_axis: int | None
    outlier_cut: Any
    chunk_size: int | None
    precision: Any


class Settings(SharedSettings, total=False):
    """Keywords of every discretization of the flow: those of :class:`SharedSettings` and two of the kernel.

    Attributes:
        contraction: order of the kernel's products, see :func:`eki_jax.direction`; by default the cheaper one.
        communication: layout in which devices share their particles, see :func:`eki_jax.direction`; by default the
            cheapest.
    """

    contraction: Contraction | None
    communication: Communication | None


class Options(NamedTuple):
    """The settings of a solver with their defaults filled in; see :class:`Settings`."""

    axis_name: str | None = None
    failures: FailurePolicy = keep_failed()
    targets_axis: int | None = None
    outlier_cut: Any = OUTLIER_CUT
    chunk_size: int | None = None
    precision: Any = None
    contraction: Contraction | None = None
    communication: Communication | None = None

    @classmethod
    def of(cls, settings: Any, known: type = Settings) -> Options:
        """``settings`` checked; raises TypeError for a keyword that ``known`` does not have."""
        check_settings(settings, known)
        options = cls(**settings)
        check_precision(options.precision)
        one_of("targets_axis", options.targets_axis, (0, None))
        if options.outlier_cut is not None:
            real("outlier_cut", options.outlier_cut, ABOVE_ONE, or_="None for no cut")
        if options.chunk_size is not None:
            whole("chunk_size", options.chunk_size, or_="None for a memory budget")
        if not isinstance(options.failures, FailurePolicy):
            raise TypeError(f"failures: {options.failures!r}; wanted a FailurePolicy, such as keep_failed()")
        return options

    @property
    def axis(self) -> Axis:
        """Devices over which the particles are spread."""
        return Axis(self.axis_name)


def take_step(
    products: Products,
    trees: tuple[Ensemble, ...],
    blocks: Callable[..., tuple[Array, ...]],
    losses: Array,
    step_size: Array,
    norm: Array,
    healthy: Array,
    count: Array,
    options: Options,
    *refusals: tuple[Reason, Any],
) -> tuple[tuple[Ensemble, ...], Info]:
    """The last part of every ensemble's step: the walk over the blocks, what failed, and what is reported.

    Args:
        products: kernel's products with the ensemble.
        trees: ensemble and companions of the state; a companion may have another leading axis.
        blocks: function of the direction's block and those of the trees.
        losses: losses of this device's particles, shape (J,).
        step_size: dt.
        norm: norm of the drift.
        healthy: flags of the particles that take part, shape (J,).
        count: number of steps taken before.
        options: settings of the solver.
        *refusals: reasons of the method's own to refuse the step, with their flags; they go before the common ones.
    """

    def stored(d: Array, *old: Array) -> tuple[Array, ...]:
        new = blocks(d, *(block.astype(d.dtype) for block in old))
        return tuple(block.astype(before.dtype) for block, before in zip(new, old, strict=False))

    axis = options.axis
    failed = axis.sum(jnp.sum(~healthy, dtype=jnp.int32))
    number = len(healthy) * axis.size - failed
    reason = first_reason(
        *refusals,
        (Reason.FEW_PARTICLES, number < 2),
        (Reason.SETTING, ~NOT_NEGATIVE.holds(step_size)),
        (Reason.NOT_FINITE, ~jnp.isfinite(step_size * norm)),
    )
    ok = reason == 0
    moved, variance = products.map_blocks(stored, *trees, when=ok)
    moved = tuple(
        options.failures.apply(tree, healthy, count, options.axis_name)
        if local_size(tree, name="ensemble") == len(healthy)
        else tree
        for tree in moved
    )
    total = axis.sum(jnp.sum(jnp.where(healthy, losses, 0)))
    fine = (ok | (reason == Reason.ENDED)) & (failed == 0)
    loss = total / number.astype(losses.dtype)  # NaN where every particle failed
    # The root of 0 has no derivative; a collapsed ensemble is to have one, 0.
    spread = jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1)), 0)
    return moved, Info(losses, step_size, norm, spread, fine, failed, loss, ok, reason)


def health(outputs: Any, cotangents: Any, losses: Array, trees: tuple[Ensemble, ...], options: Options) -> Array:
    """Which of this device's particles take part in a step, shape (J,).

    Args:
        outputs: outputs of the particles, arrays of shape (J, ...).
        cotangents: gradients of the loss with respect to them.
        losses: losses of the particles, shape (J,).
        trees: ensemble and companions of the state; of one with another leading axis all particles are made.
        options: settings of the solver.
    """
    own = [tree for tree in trees if local_size(tree, name="ensemble") == len(losses)]
    shared = [jnp.isfinite(leaf).all() for tree in trees for leaf in jax.tree.leaves(tree) if len(leaf) != len(losses)]
    healthy = finite_particles((outputs, cotangents, losses, own))
    for flag in shared:
        healthy &= flag
    return healthy & near_particles(outputs, cotangents, healthy, options.outlier_cut, Axes(options.axis))


def bad_targets(targets: Any, targets_axis: int | None) -> Array:
    """Whether the targets of all particles are not finite; a particle that alone has such targets has failed."""
    floating = [leaf for leaf in jax.tree.leaves(targets) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)]
    flags = [jnp.logical_not(jnp.isfinite(leaf).all()) for leaf in floating if targets_axis is None]
    return jnp.stack(flags).any() if flags else jnp.zeros((), bool)


def compiled(solver: Solver) -> Solver:
    """``solver`` with functions that are compiled once for each shape, however they are called.

    See :func:`eki_jax.kernel.once.compiled_once`. What no compiled function takes is named before.
    """
    init, step, update = compiled_once(solver.init), compiled_once(solver.step), compiled_once(solver.update)

    @functools.wraps(solver.init)
    def checked_init(*start: Any) -> Any:
        name = "ensemble" if len(start) == 1 else "params"
        for value in start[:1]:
            warn_of_rounding(name, arrays(name, value))
            check_placed(name, value)
        for value in start[1:]:
            random_key("key", value)
        return init(*start)

    def checked_step(state: Any, batch: Batch) -> tuple[Any, Any]:
        return step(state, traceable("batch", pair("batch", batch)))

    def checked_update(state: Any, outputs: Any, targets: Any) -> tuple[Any, Any]:
        return update(state, arrays("outputs", outputs), traceable("targets", targets))

    return Solver(
        checked_init,
        checked_step,
        checked_update,
        compiled_once(solver.ensemble),
        compiled_once(solver.estimate),
        compiled_once(solver.with_ensemble),
        compiled_once(solver.done),
        solver.passes,
    )


def check_placed(name: str, tree: Any) -> None:
    """Raise ValueError for arrays over a mesh of Explicit axes, whose loops and slices a step could not take.

    Args:
        name: name of the tree in an error.
        tree: pytree of arrays.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        mesh = getattr(getattr(leaf, "sharding", None), "mesh", None) if is_known(leaf) else None
        if mesh is not None and jax.sharding.AxisType.Explicit in mesh.axis_types and not leaf.is_fully_replicated:
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)}: over a mesh of Explicit axes {mesh.axis_names}; wanted one of "
                "Auto axes, and sharding.shard_solver(solver, eki_jax.sharding.make_mesh()) to spread a step"
            )


def warn_of_rounding(name: str, tree: Any) -> None:
    """Warn of narrow numbers whose rounding is as large as their spread: no step could be seen in them.

    Args:
        name: name of the tree: an "ensemble", whose spread is that over its particles, or the "params" of one.
        tree: pytree of arrays; those that are traced are passed over.

    >>> warn_of_rounding("ensemble", jnp.array([1000.0, 1001.0]))  # float32
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        dtype = jnp.result_type(leaf)
        if not is_known(leaf) or dtype not in (jnp.bfloat16, jnp.float16) or not np.size(leaf):
            continue
        if not getattr(leaf, "is_fully_addressable", True):  # over several processes: none sees it all
            continue
        values = np.asarray(leaf, np.float64)
        spread = values.std(axis=0).max() if name == "ensemble" and values.ndim else np.inf
        if name == "params" or float(jnp.finfo(dtype).eps) * np.abs(values).max() > 0.1 * spread:
            bits = round(-np.log2(float(jnp.finfo(dtype).eps)))
            remedy = "float32, or compact_euler for half the memory" if name == "ensemble" else "float32"
            warnings.warn(
                f"{name}{jax.tree_util.keystr(path)}: {dtype} keeps {bits} bits of a number, so that steps below its "
                f"rounding are lost; wanted {remedy}",
                UserWarning,
                stacklevel=3,
            )


def check_state(state: Any, like: Any, method: str) -> None:
    """Raise TypeError for a state of another solver.

    Args:
        state: state that a step was given.
        like: class of the method's states, or one of them.
        method: name of the method.
    """
    wanted = like if isinstance(like, type) else type(like)
    if not isinstance(state, wanted):
        raise TypeError(f"state: a {type(state).__name__}; wanted the {wanted.__name__} that {method}'s init makes")


def check_settings(settings: Any, known: type) -> None:
    """Raise TypeError for a keyword that the TypedDict ``known`` does not have."""
    names = sorted(known.__optional_keys__)  # type: ignore[attr-defined]  # of a TypedDict
    for name in settings:
        if name not in names:
            raise TypeError(f"{name}: {settings[name]!r}; is no setting of this solver, wanted {', '.join(names)}")


def given(forward: ForwardFn | None) -> ForwardFn:
    """``forward``, or an error that says what to do without one."""
    if forward is None:
        raise TypeError("forward: None; wanted a model for step(), or call update() with the outputs")
    return forward


def check_rows(outputs: Any, size: int) -> None:
    """Raise ValueError unless the outputs have one row for each of this device's ``size`` particles."""
    found = local_size(outputs, name="outputs")
    if found != size:
        raise ValueError(f"outputs: leading axis {found}, but the ensemble has {size} particles; wanted ({size}, ...)")


def makes_its_particles(solver: Solver) -> bool:
    """Whether a solver starts from one particle and a key, so that its state is the same on all devices.

    Such a solver has ``init(params, key)`` in the place of ``init(ensemble)``.
    """
    return len(inspect.signature(solver.init).parameters) > 1


def never_done(state: Any) -> Array:
    """False: what ``done`` says for a method without an end."""
    del state
    return jnp.zeros((), bool)


def one_pass_a_particle(particles: int) -> int:
    """J: what ``passes`` says where a step evaluates each particle once."""
    return particles
