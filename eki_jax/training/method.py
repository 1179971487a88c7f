"""What the training loop wants of an optimizer, and every solver of the library as that."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eki_jax._checks import a_prior, a_solver, arrays, function, offers, pair, traceable, whole
from eki_jax._types import Array, Batch, Ensemble, ForwardFn, Params, Prior
from eki_jax.ensembles.drawing import perturb, sample_around, sample_ensemble
from eki_jax.kernel.axes import Axis
from eki_jax.kernel.particles import ensemble_size
from eki_jax.solvers.protocol import Solver, makes_its_particles
from eki_jax.solvers.stateful import StatefulState
from eki_jax.training.metrics import Accuracy, classification_accuracy, particle_accuracy


class Method(NamedTuple):
    """An optimizer as the loop needs it.

    Attributes:
        init: function ``init(key) -> state``.
        step: function ``step(state, key, (x, targets)) -> (state, metrics)``; metrics is a dict of scalars.
        accuracy: function ``accuracy(state, x, labels) -> Accuracy``.
        redraw: function ``redraw(state, key, J) -> state`` called before every epoch but the first, or None.
        ensemble_size: function ``ensemble_size(epoch) -> J``, for ensembles that grow; epochs count from 0.
        passes: function ``passes(J)``: forward passes that a step spends on a sample with J particles.
        compiled_loop: flag; False lets :func:`fit` call the step once a batch, in the place of one compiled loop over
            the batches. The numbers are the same. Gradients of convolutions are ten times slower in a loop on
            processors.
        estimate: function ``estimate(state) -> params``: the one particle to predict with; by default the state itself.
        check: function ``check(x, labels, name)`` that raises for data that do not fit the model; None for no check.
    """

    init: Callable[[Array], Any]
    step: Callable[[Any, Array, Batch], tuple[Any, dict[str, Array]]]
    accuracy: Callable[[Any, Array, Array], Accuracy]
    redraw: Callable[[Any, Array, int], Any] | None = None
    ensemble_size: Callable[[int], int] = lambda epoch: 1
    passes: Callable[[int], int] = lambda particles: particles
    compiled_loop: bool = True
    estimate: Callable[[Any], Params] = lambda state: state
    check: Callable[[Any, Any, str], None] | None = None


def ensemble_method(
    solver: Solver,
    forward: ForwardFn,
    prior: Prior,
    particles: int | Callable[[int], int],
    *,
    resample: bool = False,
    step_noise: bool = False,
    axis_name: str | None = None,
) -> Method:
    """A solver with the paper's randomizations, as the loop wants it.

    Args:
        solver: any solver of the library, such as :func:`eki_jax.euler` (EKI) or :func:`eki_jax.nesterov` (MEKI).
        forward: function ``forward(params, x) -> outputs`` of one particle, for predictions; or, for a solver of
            :func:`eki_jax.stateful` whose model has a state, ``forward(params, x, state=state) -> (outputs, state)``,
            the model as it predicts. It is given the state of the solver's model, and what it makes of it is dropped.
        prior: distribution of the first ensemble, of the noise, and of the first mean of a solver that makes its own
            particles.
        particles: number of particles J, or a function of the epoch for an ensemble that grows (then with
            ``resample``).
        resample: flag; True redraws the particles around their mean between epochs: EKI(R).
        step_noise: flag; True disturbs the particles (momenta) after every step with covariance ``sqrt(h) C_0``:
            MEKI(R).
        axis_name: mapped axis over which the particles are spread.

    Returns:
        A :class:`Method`.

    Raises:
        TypeError: ``solver``, ``forward``, ``prior`` or ``particles`` of another kind; ``resample`` or ``step_noise``
            with a solver that makes its own particles around one mean, which has none that could be moved; from
            ``accuracy`` and ``check``, a ``forward`` with a state for a solver whose model has none.
        ValueError: a growing ensemble without ``resample``; from ``init``, a solver that makes another number of
            particles.

    >>> import jax, jax.numpy as jnp
    >>> import eki_jax
    >>> solver = eki_jax.euler(lambda u, x: x @ u, eki_jax.squared_error())
    >>> method = ensemble_method(solver, lambda u, x: x @ u, eki_jax.gaussian(jnp.zeros(3), 1.0), 10)
    >>> method.init(jax.random.key(0)).ensemble.shape
    (10, 3)
    """
    a_solver("solver", solver)
    words = ("state",) if _takes(forward, "state") else ()
    function("forward", forward, "a model, forward(params, x) -> outputs", arguments=2, keywords=words)
    a_prior("prior", prior)
    if not callable(particles):
        whole("particles", particles, or_="a function of the epoch")
    size = particles if callable(particles) else lambda epoch: particles
    if callable(particles) and not resample:
        raise ValueError("resample: False for an ensemble that grows; new particles are drawn around the mean")
    if makes_its_particles(solver):
        for name, wanted in (("resample", resample), ("step_noise", step_noise)):
            if wanted:
                raise TypeError(f"{name}: True for a solver that makes its own particles anew; wanted False")
        return _around_a_mean(solver, forward, prior, size, Axis(axis_name))

    def init(key: Array) -> Any:
        return solver.init(sample_ensemble(key, prior, size(0), axis_name=axis_name))

    def step(state: Any, key: Array, batch: Batch) -> tuple[Any, dict[str, Array]]:
        state, info = solver.step(state, batch)
        if step_noise:
            ensemble = solver.ensemble(state)
            h = info.step_size / ensemble_size(ensemble, axis_name=axis_name)
            noisy = perturb(key, ensemble, prior, jnp.where(jnp.isfinite(h), h, 0) ** 0.25, axis_name=axis_name)
            state = solver.with_ensemble(state, noisy)
        return state, metrics_of(info)

    def redraw(state: Any, key: Array, particles: int) -> Any:
        drawn = sample_around(key, solver.estimate(state), prior, particles, axis_name=axis_name)
        return _continued(solver.init(drawn), state)

    def accuracy(state: Any, x: Array, labels: Array) -> Accuracy:
        return classification_accuracy(
            _predictor(forward, _model_state(state)), positions(solver, state), x, labels, axis_name=axis_name
        )

    return Method(
        init,
        step,
        accuracy,
        redraw if resample else None,
        size,
        passes=solver.passes,
        estimate=solver.estimate,
        check=_labels_of(forward, prior, init, axis_name),
    )


def check_method(method: Any) -> Method:
    """``method``, a training method.

    Raises:
        TypeError: anything else.
    """
    names = ("init", "step", "accuracy", "ensemble_size", "passes", "estimate")
    return offers("method", method, names, "a training method, such as ensemble_method makes")


def metrics_of(info: Any) -> dict[str, Array]:
    """The scalars of a step's info, under the names of a run's history."""
    values = {name: value for name, value in info._asdict().items() if value is not None and jnp.ndim(value) == 0}
    return {"train_loss": values.pop("loss"), **values}


def positions(solver: Solver, state: Any) -> Ensemble:
    """The particles to predict with: ``state.position`` where a state has it, else where outputs are wanted."""
    return state.position if hasattr(state, "position") else solver.ensemble(state)


def _around_a_mean(solver: Solver, forward: ForwardFn, prior: Prior, size: Callable[[int], int], axis: Axis) -> Method:
    """A method of a solver whose particles are drawn around one mean in every step."""

    def init(key: Array) -> Any:
        mean, deviations = jax.random.split(key)
        state = solver.init(prior.sample(mean), deviations)
        found = jax.tree.leaves(jax.eval_shape(solver.ensemble, state))[0].shape[0] * axis.size
        if found != size(0):
            raise ValueError(f"particles: {size(0)} for a solver that makes {found}; wanted the same number")
        return state

    def step(state: Any, key: Array, batch: Batch) -> tuple[Any, dict[str, Array]]:
        del key  # the state's own key and count make the deviations
        state, info = solver.step(state, batch)
        return state, metrics_of(info)

    def accuracy(state: Any, x: Array, labels: Array) -> Accuracy:
        return particle_accuracy(_predictor(forward, _model_state(state)), solver.estimate(state), x, labels)

    return Method(
        init,
        step,
        accuracy,
        None,
        size,
        passes=solver.passes,
        estimate=solver.estimate,
        check=_labels_of(forward, prior, init, axis.name),
    )


def _continued(fresh: Any, state: Any) -> Any:
    """A fresh state whose scalars, that is counts and times, go on from those of ``state``; so does a model's state."""
    continued = jax.tree.map(lambda new, old: old if jnp.ndim(new) == 0 else new, fresh, state)
    return continued._replace(model_state=state.model_state) if isinstance(state, StatefulState) else continued


def _takes(forward: Any, *keywords: str) -> bool:
    """Whether a model can be called with parameters, inputs and arguments of these names."""
    try:
        signature = inspect.signature(forward)
        signature.bind(None, None, **dict.fromkeys(keywords))
    except (TypeError, ValueError):  # no function, which is told elsewhere, or a built-in one that does not say
        return False
    return set(keywords) <= set(signature.parameters)


def _model_state(state: Any) -> Any:
    """The state of the model in a solver's state, or None."""
    return state.model_state if isinstance(state, StatefulState) else None


def _predictor(forward: Any, model_state: Any) -> ForwardFn:
    """A model as ``forward(params, x) -> outputs``, with its state where it takes one."""
    if not _takes(forward, "state") or (model_state is None and _takes(forward)):
        return forward
    if model_state is None:
        raise TypeError(
            "forward: takes a state, but the solver's model has none; wanted forward(params, x) -> outputs, or a "
            "solver of eki_jax.stateful(make, model, state=...)"
        )
    return lambda params, x: pair("forward: returned", forward(params, x, state=model_state), "(outputs, state)")[0]


def _labels_of(
    forward: Any, prior: Prior, init: Callable[[Array], Any], axis_name: Any
) -> Callable[[Any, Any, str], None]:
    """A check of the labels against the classes of a model with parameters as the prior draws them."""

    def check(x: Any, labels: Any, name: str) -> None:
        key = jax.eval_shape(lambda: jax.random.key(0))
        template, model = jax.eval_shape(prior.sample, key), forward
        if _takes(forward, "state"):
            first = lambda key: _model_state(init(key))
            if axis_name is not None:
                first = jax.vmap(first, in_axes=None, out_axes=None, axis_name=axis_name, axis_size=1)
            template = (template, jax.eval_shape(first, key))
            model = lambda both, x: _predictor(forward, both[1])(both[0], x)
        check_labels(model, template, x, labels, name=name)

    return check


def check_labels(forward: ForwardFn, template: Any, x: Any, labels: Any, *, name: str = "train") -> None:
    """Raise unless every label is one of the classes that ``forward`` has outputs for.

    Raises:
        TypeError: labels that are not integers; ``forward`` is no function, ``template`` or ``x`` are no arrays.
        ValueError: labels out of range, or not one for each input.
    """
    function("forward", forward, "a model, forward(params, x) -> outputs", arguments=2)
    arrays("template", template, some=True)
    traceable(f"{name}: x", x)
    labels = np.asarray(arrays(f"{name}: labels", labels))
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"{name}: labels of dtype {labels.dtype}; wanted integers")
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(x)]
    if any(labels.shape != shape[:1] for shape in shapes):
        found = ", ".join(map(str, shapes))
        raise ValueError(f"{name}: labels of shape {labels.shape} for inputs of shape {found}; wanted one each")
    sample = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *jnp.shape(leaf)[1:]), jnp.result_type(leaf)), x)
    classes = jax.eval_shape(forward, template, sample).shape[-1]
    if labels.size and not (labels.min() >= 0 and labels.max() < classes):
        raise ValueError(f"{name}: labels from {labels.min()} to {labels.max()}; wanted 0 to {classes - 1}")
