"""nnx modules in training mode, with several inputs, and with an ``nnx.State`` as parameters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import eki_jax
from eki_jax import natural
from eki_jax.flax import nnx_forward
from eki_jax.training import ensemble_method, fit

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (32, 4))
LABELS = (X[:, 0] > 0).astype(jnp.int32)


class Classifier(nnx.Module):
    """Dense layers with dropout and batch normalization, as the examples of flax have them."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.drops = nnx.List([nnx.Dropout(0.5, rngs=rngs)])
        self.last = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.last(self.drops[0](nnx.relu(self.norm(self.first(x)))))


class Called(nnx.Module):
    """A classifier under a transformation of flax."""

    def __init__(self, how: Any, rngs: nnx.Rngs) -> None:
        self.inner, self.how = Classifier(rngs), how

    def __call__(self, x: Any) -> Any:
        return self.how(lambda inner, x: inner(x))(self.inner, x)


class Two(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.a, self.b = nnx.Linear(3, 2, rngs=rngs), nnx.Linear(2, 2, rngs=rngs)

    def __call__(self, a: Any, b: Any, *, scale: float = 1.0) -> Any:
        return scale * (self.a(a) - 2 * self.b(b))


def made(kind: Any = Classifier, *arguments: Any) -> Any:
    return kind(*arguments, rngs=nnx.Rngs(0, dropout=1))


def params_of(module: Any) -> Any:
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def test_training_mode_is_refused_at_once() -> None:
    """One error names the layers, and says eval() and what to pass; a module that is in evaluation mode passes."""
    words = (
        r"Classifier draws random numbers at drops/0, the same in every call, and writes to norm/mean, norm/var, which "
        r"would be lost, in this mode; wanted module\.eval\(\) first, or rngs=True .* and mutable=True"
    )
    module = made()
    with pytest.raises(ValueError, match=words):
        nnx_forward(module, X)
    forward, _ = nnx_forward(module)
    for run in (
        forward,
        jax.jit(forward),
        lambda p, x: eki_jax.evaluate(forward, jax.tree.map(lambda leaf: leaf[None], p), x),
    ):
        with pytest.raises(ValueError, match=words):
            run(params_of(module), X)
    module.eval()
    forward, _ = nnx_forward(module, X)
    np.testing.assert_allclose(forward(params_of(module), X), module(X), rtol=1e-5)


def test_each_of_the_two_is_refused_alone() -> None:
    module = made()
    with pytest.raises(ValueError, match=r"Classifier draws random numbers at drops/0(?!.*writes).*rngs=True"):
        nnx_forward(module, X, mutable=True)
    with pytest.raises(ValueError, match=r"Classifier writes to norm/mean, norm/var(?!.*draws).*mutable=True"):
        nnx_forward(module, X, rngs=True)
    with pytest.raises(ValueError, match="Classifier writes to norm/mean"):
        nnx_forward(module, X, rngs=True, mutable=nnx.Cache)


@pytest.mark.parametrize("how", [nnx.jit, nnx.remat])
def test_transformations_do_not_hide_the_mode(how: Any) -> None:
    """What a compiled or rematerialised call hands on unchanged is not taken for written, and what it writes is."""
    module = made(Called, how)
    with pytest.raises(ValueError, match=r"draws random numbers at inner/drops/0.*writes to inner/norm/mean"):
        nnx_forward(module, X)
    module.eval()
    forward, _ = nnx_forward(module, X)
    np.testing.assert_allclose(forward(params_of(module), X), module.inner(X), rtol=1e-5, atol=1e-6)


def test_streams_that_nothing_is_made_of() -> None:
    """A recurrent layer counts up a stream for its carry of zeros; no output is made of it, and it passes."""
    module = nnx.RNN(nnx.GRUCell(4, 3, rngs=nnx.Rngs(0)))
    forward, _ = nnx_forward(module, X[None])
    np.testing.assert_allclose(forward(params_of(module), X[None]), module(X[None]), rtol=1e-5, atol=1e-6)


def test_streams_begin_anew_from_the_key() -> None:
    """The same key the same mask, another key another one; two layers of one stream have masks of their own."""

    class Noisy(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.scale = nnx.Param(jnp.ones(()))
            self.one, self.two = nnx.Dropout(0.5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return jnp.stack([self.one(self.scale * x), self.two(self.scale * x)])

    module, ones = made(Noisy), jnp.ones((30, 20))
    forward, _ = nnx_forward(module, ones, rngs=True)
    params = params_of(module)
    first, again, other = (forward(params, ones, key=jax.random.key(k)) for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first[0], first[1])
    assert not np.array_equal(first, other)
    assert 0.4 < float((first > 0).mean()) < 0.6
    assert int(module.one.rngs.count[...]) == 0  # the caller's module is as it was


def test_statistics_in_and_out() -> None:
    """With mutable a forward takes the statistics and returns the next; evaluation mode reads them and keeps them."""
    module = made()
    forward, template, state = nnx_forward(module, X, rngs=True, mutable=nnx.BatchStat)
    params = params_of(module)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda leaf: leaf.shape, template)
    np.testing.assert_array_equal(state["norm"]["var"], jnp.ones(8))
    _, after = forward(params, X, key=KEY, state=state)
    hidden = X @ params["first"]["kernel"] + params["first"]["bias"]
    np.testing.assert_allclose(after["norm"]["mean"], 0.1 * hidden.mean(axis=0), rtol=1e-4, atol=1e-6)
    module.eval()
    predict, _, _ = nnx_forward(module, X, mutable=True)
    outputs, same = predict(params, X, state=after)
    jax.tree.map(np.testing.assert_array_equal, same, after)
    nnx.update(module, nnx.State(after))
    np.testing.assert_allclose(outputs, module(X), rtol=1e-5, atol=1e-6)


def test_a_module_in_training_mode_learns() -> None:
    """What the issue's classifier came to: with statistics learned evaluation is as good as training."""
    module = made()
    forward, template, first = nnx_forward(module, X, rngs=True, mutable=True)
    module.eval()
    predict, _, _ = nnx_forward(module, X, mutable=True)
    make = lambda f: eki_jax.euler(f, natural.softmax_cross_entropy(), eki_jax.frobenius_step_size(3.0))
    solver = eki_jax.stateful(make, forward, key=KEY, state=first, common=True)
    prior = eki_jax.gaussian(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), template), 0.5)
    data = ((X, LABELS), (X, LABELS))
    method = ensemble_method(solver, predict, prior, 60)
    result = fit(method, *data, batch_size=16, epochs=8, key=jax.random.key(3), progress=False)
    assert result.history[-1]["test_accuracy_mean"] > 0.9
    assert float(jnp.abs(result.state.model_state["norm"]["mean"]).max()) > 0.01


@pytest.mark.parametrize("examples", [True, False])
def test_two_inputs_are_a_tuple_of_a_batch(examples: bool) -> None:
    """A solver has one x: a tuple is unpacked where there were as many examples, or a single one would not do."""
    a, b, module = X[:, :3], X[:, :2], made(Two)
    forward, _ = nnx_forward(module, *((a, b) if examples else ()), scale=3.0)
    params, wanted = params_of(module), module(a, b, scale=3.0)
    np.testing.assert_allclose(forward(params, (a, b)), wanted, rtol=1e-5)
    np.testing.assert_allclose(forward(params, a, b), wanted, rtol=1e-5)


def test_intermediate_values_are_no_state() -> None:
    """What a call adds to the module is dropped, and no error."""

    class Sowing(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.layer = nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            self.seen = nnx.Intermediate(x)
            return self.layer(x)

    forward, _, state = nnx_forward(made(Sowing), X, mutable=True)
    outputs, after = forward(params_of(made(Sowing)), X, state=state)
    assert (outputs.shape, state, after) == ((32, 2), {}, {})


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: nnx_forward(made(), X, rngs="dropout"), TypeError, "rngs: 'dropout'; wanted True"),
        (lambda: nnx_forward(made(), X, mutable=3), TypeError, "mutable: 3; wanted True, False or a filter"),
        (lambda: nnx_forward(made(Two), X), TypeError, "missing a required argument: 'b'.*an example of each input"),
        (lambda: nnx_forward(made(Two), X, X, size=3), TypeError, "unexpected keyword argument 'size'"),
    ],
)
def test_bad_arguments(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


LOSS = eki_jax.squared_error()
LINE = (X[:, :3], X[:, :3] @ jnp.array([[1.0], [-2.0], [3.0]]))


def linear() -> Any:
    return nnx.Linear(3, 1, rngs=nnx.Rngs(0))


def test_a_state_as_parameters() -> None:
    """An ensemble, a mean and an estimate of ``nnx.State`` stay of that type, and have a dictionary's numbers."""
    module = linear()
    forward, _ = nnx_forward(module, LINE[0])
    state = nnx.state(module, nnx.Param)
    solver, runs = eki_jax.euler(forward, LOSS), []
    for params in (state, nnx.to_pure_dict(state)):
        start = solver.init(eki_jax.sample_ensemble(KEY, eki_jax.gaussian(params, 1.0), 12))
        after, _ = solver.step(start, LINE)
        assert type(solver.estimate(after)) is type(params)
        runs.append(jax.tree.leaves(solver.estimate(after)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *runs)
    mean = natural.natural_gradient(forward, LOSS, 12, loss_limit=None)
    moved, info = mean.step(mean.init(state, KEY), LINE)
    assert isinstance(moved.position, nnx.State)
    nnx.update(module, moved.position)
    assert eki_jax.squared_error()(module(LINE[0]), LINE[1]) < 0.5 * info.loss


def test_a_state_has_the_prior_of_a_dictionary() -> None:
    """Xavier's deviations go by the names of the leaves, which a state has one level above its arrays."""
    state = nnx.state(made(), nnx.Param)
    found = eki_jax.sample_ensemble(KEY, eki_jax.xavier(state), 5)
    wanted = eki_jax.sample_ensemble(KEY, eki_jax.xavier(nnx.to_pure_dict(state)), 5)
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(found), wanted)
    assert abs(float(found["norm"]["scale"].get_value().mean()) - 1) < 0.3  # scales begin at one


def test_directions_for_an_optimizer_of_nnx() -> None:
    """A direction at ``nnx.state(module, nnx.Param)`` goes into ``nnx.Optimizer.update`` as a gradient does."""
    module = linear()
    forward, _ = nnx_forward(module, LINE[0])
    optimizer = nnx.Optimizer(module, optax.sgd(0.5, momentum=0.5), wrt=nnx.Param)
    f = natural.value_and_natural_direction(forward, LOSS, 12)
    values = []
    for count in range(10):
        params = nnx.state(module, nnx.Param)
        value, direction = f(params, LINE, jax.random.fold_in(KEY, count), count)
        assert isinstance(direction, nnx.State)
        optimizer.update(module, direction)
        values.append(float(value))
    assert values[-1] < 0.01 * values[0]
    np.testing.assert_allclose(module.kernel[...].ravel(), [1.0, -2.0, 3.0], atol=0.1)
