"""Linen modules with flags, random streams, collections that they write, and several inputs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import eki_jax
from eki_jax import natural
from eki_jax.flax import linen_forward
from eki_jax.training import ensemble_method, fit

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (32, 4))
LABELS = (X[:, 0] > 0).astype(jnp.int32)


class Classifier(nn.Module):
    """Dense layers with dropout and batch normalization, as the examples of flax have them."""

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        x = nn.Dense(8)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        x = nn.Dropout(0.5, deterministic=not train)(nn.relu(x))
        return nn.Dense(2)(x)


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x: Any, train: bool = True) -> Any:
        return nn.BatchNorm(use_running_average=not train)(x)


class Noisy(nn.Module):
    @nn.compact
    def __call__(self, x: Any, deterministic: bool = False) -> Any:
        return nn.Dropout(0.5, deterministic=deterministic)(nn.Dropout(0.5, deterministic=deterministic)(x))


class Two(nn.Module):
    @nn.compact
    def __call__(self, a: Any, b: Any, *, scale: float = 1.0) -> Any:
        return scale * (nn.Dense(3)(a) - 2 * nn.Dense(3)(b))


class OfDictionary(nn.Module):
    @nn.compact
    def __call__(self, batch: Any) -> Any:
        return nn.Dense(3)(batch["a"]) + nn.Dense(3)(batch["b"][0])


def params_like(template: Any, seed: int = 2) -> Any:
    leaves, structure = jax.tree.flatten(template)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return structure.unflatten([jax.random.normal(k, s.shape) for k, s in zip(keys, leaves, strict=True)])


def test_flags_go_to_every_call() -> None:
    """A keyword that is given once is that of every call, at the start and later."""
    x = X[:, :3]
    forward, template = linen_forward(Two(), x, x, scale=3.0)
    plain, _ = linen_forward(Two(), x, x)
    params = params_like(template)
    np.testing.assert_allclose(forward(params, x, x), 3 * plain(params, x, x), rtol=1e-5)
    constants = {"batch_stats": {"BatchNorm_0": {"mean": jnp.ones(4), "var": 4 * jnp.ones(4)}}}
    reading, _ = linen_forward(Normed(), X, train=False, constants=constants)
    outputs = reading({"BatchNorm_0": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}}, X)
    np.testing.assert_allclose(outputs, (X - 1) / 2, rtol=1e-4, atol=1e-4)


def test_two_inputs_are_a_tuple_of_a_batch() -> None:
    """A solver has one x: a tuple of as many as there were examples is unpacked, with the same numbers."""
    a, b = X[:, :3], X[:, 1:3]
    forward, template = linen_forward(Two(), a, b)
    params = params_like(template)
    wanted = a @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]
    wanted -= 2 * (b @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"])
    np.testing.assert_allclose(forward(params, (a, b)), wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(forward(params, a, b), wanted, rtol=1e-4, atol=1e-5)
    solver = eki_jax.euler(forward, eki_jax.squared_error())
    ensemble = eki_jax.sample_ensemble(KEY, eki_jax.gaussian(template_zeros(template), 1.0), 12)
    _, infos = jax.lax.scan(lambda s, _: solver.step(s, ((a, b), wanted)), solver.init(ensemble), length=20)
    assert float(infos.loss[-1]) < 0.3 * float(infos.loss[0])


def template_zeros(template: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), template)


def test_one_input_that_is_a_pytree() -> None:
    """One example that is a dictionary or a tuple is handed on as it is."""
    batch = {"a": X, "b": (X[:, :2],)}
    forward, template = linen_forward(OfDictionary(), batch)
    params = params_like(template)
    wanted = X @ params["Dense_0"]["kernel"] + X[:, :2] @ params["Dense_1"]["kernel"]
    wanted += params["Dense_0"]["bias"] + params["Dense_1"]["bias"]
    np.testing.assert_allclose(forward(params, batch), wanted, rtol=1e-4, atol=1e-5)


def test_streams_of_random_numbers() -> None:
    """With rngs= a forward takes a key: the same key the same mask, another key another one."""
    ones = jnp.ones((50, 20))
    forward, template = linen_forward(Noisy(), ones, rngs="dropout")
    assert template == {}
    first, again, other = (forward({}, ones, key=jax.random.key(k)) for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert 0.15 < float((first > 0).mean()) < 0.35  # two masks of their own
    assert not np.array_equal(first, other)
    quiet, _ = linen_forward(Noisy(), ones, deterministic=True)
    np.testing.assert_array_equal(quiet({}, ones), ones)


def test_streams_differ() -> None:
    """Each stream has a key of its own, by its name alone."""

    class Draws(nn.Module):
        def __call__(self, x: Any) -> Any:
            return jnp.stack([jax.random.normal(self.make_rng(name)) for name in ("first", "second")])

    forward, _ = linen_forward(Draws(), X, rngs=("first", "second"))
    turned, _ = linen_forward(Draws(), X, rngs=("second", "first"))
    found = forward({}, X, key=KEY)
    assert float(found[0]) != float(found[1])
    np.testing.assert_array_equal(found, turned({}, X, key=KEY))


def test_collections_that_a_call_writes() -> None:
    """With mutable= a forward takes a state and returns the next, which begins as flax has it."""
    forward, template, state = linen_forward(Normed(), X, mutable="batch_stats", train=True)
    np.testing.assert_array_equal(state["batch_stats"]["BatchNorm_0"]["var"], jnp.ones(4))
    params = {"BatchNorm_0": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}}
    assert jax.tree.structure(params) == jax.tree.structure(template)
    outputs, after = forward(params, X, state=state)
    np.testing.assert_allclose(outputs.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(after["batch_stats"]["BatchNorm_0"]["mean"], 0.01 * X.mean(axis=0), rtol=1e-4)
    predict, _, _ = linen_forward(Normed(), X, mutable="batch_stats", train=False)
    outputs, same = predict(params, X, state=after)
    jax.tree.map(np.testing.assert_array_equal, same, after)
    wanted = (X - after["batch_stats"]["BatchNorm_0"]["mean"]) / jnp.sqrt(after["batch_stats"]["BatchNorm_0"]["var"])
    np.testing.assert_allclose(outputs, wanted, rtol=1e-3, atol=1e-3)


def test_shapes_are_examples_enough() -> None:
    """The first state needs no numbers of the inputs, and no parameters are drawn for it."""
    shape = jax.ShapeDtypeStruct(X.shape, X.dtype)
    _, template, state = linen_forward(Classifier(), shape, rngs="dropout", mutable=["batch_stats"], train=True)
    assert template["Dense_0"]["kernel"] == jax.ShapeDtypeStruct((4, 8), jnp.float32)
    np.testing.assert_array_equal(state["batch_stats"]["BatchNorm_0"]["mean"], jnp.zeros(8))


def test_a_module_in_training_mode_learns() -> None:
    """Dropout and batch statistics through the loop: what predicts in evaluation mode has the statistics learned."""
    forward, template, first = linen_forward(Classifier(), X, train=True, rngs="dropout", mutable="batch_stats")
    predict, _, _ = linen_forward(Classifier(), X, train=False, mutable="batch_stats")
    make = lambda f: eki_jax.euler(f, natural.softmax_cross_entropy(), eki_jax.frobenius_step_size(3.0))
    solver = eki_jax.stateful(make, forward, key=KEY, state=first, common=True)
    method = ensemble_method(solver, predict, eki_jax.gaussian(template_zeros(template), 0.5), 60)
    data = ((X, LABELS), (X, LABELS))
    result = fit(method, *data, batch_size=16, epochs=8, key=jax.random.key(3), progress=False)
    assert result.history[-1]["test_accuracy_mean"] > 0.9
    assert result.history[-1]["train_loss"] < 0.6 * result.history[0]["train_loss"]
    assert result.history[-1]["refreshed"] == 1
    statistics = result.state.model_state["batch_stats"]["BatchNorm_0"]
    assert float(jnp.abs(statistics["mean"] - first["batch_stats"]["BatchNorm_0"]["mean"]).max()) > 0.01


class Dropped(nn.Module):
    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        return nn.Dense(1)(nn.Dropout(0.5, deterministic=not train)(nn.Dense(20)(x)))


STEPS = {
    "natural_gradient": lambda f: natural.natural_gradient(
        f, eki_jax.squared_error(), 200, damping=1e-2, deviations=natural.full_rank(1.0)
    ),
    "euler": lambda f: eki_jax.euler(f, eki_jax.squared_error(), eki_jax.frobenius_step_size(1.0)),
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "steps", "common_is_better"), [("natural_gradient", 30, False), ("euler", 100, True)])
def test_whose_masks_are_better(name: str, steps: int, common_is_better: bool) -> None:
    """What the documentation of ``common`` says of natural gradients, and of few particles that move by their own."""
    targets, loss = X[:, :1], eki_jax.squared_error()
    forward, template = linen_forward(Dropped(), X, train=True, rngs="dropout")
    predict, _ = linen_forward(Dropped(), X, train=False)
    params = jax.tree.map(lambda leaf: 0.3 * leaf, params_like(template))

    def learned(solver: Any, key: Any) -> Any:
        start = (params, key)
        if name == "euler":
            start = (eki_jax.sample_ensemble(key, eki_jax.gaussian(params, 0.5), 50),)
        state = solver.init(*start)._replace(key=jax.random.key_data(key))
        state, _ = jax.lax.scan(lambda s, _: solver.step(s, (X, targets)), state, length=steps)
        return loss(predict(solver.estimate(state), X), targets)

    medians = {}
    for common in (True, False):
        solver = eki_jax.stateful(STEPS[name], forward, key=KEY, common=common)
        runs = jax.jit(jax.vmap(lambda key, solver=solver: learned(solver, key)))(jax.random.split(KEY, 6))
        medians[common] = float(jnp.median(runs))
    assert medians[common_is_better] < 0.4 * medians[not common_is_better]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: linen_forward(Noisy(), X), ValueError, "draws random numbers.*rngs='dropout'.*deterministic=True"),
        (
            lambda: linen_forward(Normed(), X, constants={"batch_stats": {"BatchNorm_0": _STATISTICS}}),
            ValueError,
            "writes to the collection 'batch_stats'.*mutable='batch_stats'.*train=False",
        ),
        (lambda: linen_forward(Normed(), X), ValueError, r"collections \['batch_stats'\].*`constants`.*`mutable`"),
        (lambda: linen_forward(Classifier(), X), TypeError, "missing a required argument: 'train'.*train=False"),
        (lambda: linen_forward(Noisy(), X, trian=True), TypeError, "unexpected keyword argument 'trian'"),
        (lambda: linen_forward(Two(), X), TypeError, "missing a required argument: 'b'.*an example of each input"),
        (lambda: linen_forward(Normed(), X, mutable="batch_stat"), ValueError, r"\['batch_stats'\] besides"),
        (
            lambda: linen_forward(nn.Dense(2), X, mutable="batch_stats"),
            ValueError,
            r"mutable: \['batch_stats'\]; wanted",
        ),
        (lambda: linen_forward(Normed(), X, mutable="params"), ValueError, "'params' is in the parameters"),
        (lambda: linen_forward(Noisy(), X, rngs=3), TypeError, "rngs: 3; wanted a name such as 'dropout'"),
    ],
)
def test_what_a_mode_wants_is_said(call: Any, error: type[Exception], words: str) -> None:
    """One error at construction, with what to pass."""
    with pytest.raises(error, match=words):
        call()


_STATISTICS = {"mean": jnp.zeros(4), "var": jnp.ones(4)}


def test_a_key_without_stateful_is_named() -> None:
    """A solver that is given a forward with a key says what gives it one."""
    forward, _ = linen_forward(Noisy(), X, rngs="dropout")
    with pytest.raises(TypeError, match=r"it asks for key=, which eki_jax\.stateful gives"):
        eki_jax.euler(forward, eki_jax.squared_error())


class OfTwo(nn.Module):
    @nn.compact
    def __call__(self, a: Any, b: Any) -> Any:
        return nn.Dense(2)(a) + nn.Dense(2)(b)


def test_a_loop_over_batches_of_two_inputs() -> None:
    """The loop takes batches of a tuple of arrays, leaf by leaf: it is the loop over the arrays side by side."""
    forward, template = linen_forward(OfTwo(), X, X)
    prior = eki_jax.gaussian(template_zeros(template), 0.5)
    pieces = lambda params, x: forward(params, (x[:, :4], x[:, 4:]))
    histories = []
    for model, x in ((forward, (X, X[::-1])), (pieces, jnp.concatenate([X, X[::-1]], axis=1))):
        solver = eki_jax.euler(model, natural.softmax_cross_entropy(), eki_jax.frobenius_step_size(3.0))
        method = ensemble_method(solver, model, prior, 12)
        result = fit(method, (x, LABELS), (x, LABELS), batch_size=16, epochs=2, key=KEY, progress=False)
        histories.append([(epoch["test_accuracy_mean"], round(epoch["train_loss"], 4)) for epoch in result.history])
        with pytest.raises(ValueError, match=r"train: labels of shape \(32,\) for inputs of shape .*\(3, "):
            method.check(jax.tree.map(lambda leaf: leaf[:3], x), LABELS, "train")
    assert histories[0] == histories[1]
