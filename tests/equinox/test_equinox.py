"""Equinox modules as models: values, training, keys, states, and what is refused."""

from __future__ import annotations

import functools
import subprocess
import sys
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eki_jax
from eki_jax import equinox as adapter
from eki_jax import natural, sharding
from eki_jax.equinox import equinox_forward
from eki_jax.training import ensemble_method, fit

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (32, 4))
LABELS = (X[:, 0] > 0).astype(jnp.int32)
LOSS = eki_jax.squared_error()


def params_of(module: Any) -> Any:
    return eqx.filter(module, eqx.is_inexact_array)


class Convolutional(eqx.Module):
    """A small network of images, as equinox's examples have them."""

    layers: list[Any]

    def __init__(self, key: Any) -> None:
        first, last = jax.random.split(key)
        self.layers = [
            eqx.nn.Conv2d(1, 3, 3, key=first),
            jax.nn.relu,
            eqx.nn.MaxPool2d(2, 2),
            jnp.ravel,
            eqx.nn.Linear(12, 2, key=last),
        ]

    def __call__(self, x: Any) -> Any:
        for layer in self.layers:
            x = layer(x)
        return x


class Recurrent(eqx.Module):
    """A cell scanned over time, and a readout."""

    cell: eqx.nn.GRUCell
    readout: eqx.nn.Linear

    def __init__(self, key: Any) -> None:
        first, last = jax.random.split(key)
        self.cell, self.readout = eqx.nn.GRUCell(2, 3, key=first), eqx.nn.Linear(3, 1, key=last)

    def __call__(self, x: Any) -> Any:
        hidden, _ = jax.lax.scan(lambda h, x: (self.cell(x, h), None), jnp.zeros(3), x)
        return self.readout(hidden)


class Classifier(eqx.Module):
    """Dense layers with dropout and batch normalization, as equinox's documentation has them."""

    first: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    drop: eqx.nn.Dropout
    last: eqx.nn.Linear

    def __init__(self, key: Any, name: str = "batch") -> None:
        first, last = jax.random.split(key)
        self.first, self.last = eqx.nn.Linear(4, 8, key=first), eqx.nn.Linear(8, 2, key=last)
        self.norm = eqx.nn.BatchNorm(8, axis_name=name, momentum=0.9, mode="batch")
        self.drop = eqx.nn.Dropout(0.5)

    def __call__(self, x: Any, state: Any, *, key: Any = None) -> Any:
        x, state = self.norm(self.first(x), state)
        return self.last(self.drop(jax.nn.relu(x), key=key)), state


class Two(eqx.Module):
    a: eqx.nn.Linear
    b: eqx.nn.Linear

    def __init__(self, key: Any) -> None:
        first, last = jax.random.split(key)
        self.a, self.b = eqx.nn.Linear(3, 2, key=first), eqx.nn.Linear(2, 2, key=last)

    def __call__(self, a: Any, b: Any, scale: float = 1.0) -> Any:
        return scale * (self.a(a) - 2 * self.b(b))

    def other(self, a: Any) -> Any:
        return self.a(a)


MODELS = {
    "mlp": (functools.partial(eqx.nn.MLP, 4, 3, 6, 2), X),
    "cnn": (lambda key: Convolutional(key), jax.random.normal(KEY, (8, 1, 6, 6))),
    "gru": (lambda key: Recurrent(key), jax.random.normal(KEY, (8, 5, 2))),
}


@pytest.mark.parametrize("name", ["mlp", "cnn", pytest.param("gru", marks=pytest.mark.slow)])
def test_models_train(name: str) -> None:
    """A forward map is the module on every sample, and an ensemble of modules learns what another one does."""
    make, x = MODELS[name]
    module, teacher = make(key=jax.random.key(2)), make(key=jax.random.key(3))
    forward, template = equinox_forward(module, x)
    params = params_of(module)
    assert jax.tree.structure(template) == jax.tree.structure(params)
    np.testing.assert_allclose(forward(params, x), jnp.stack([module(one) for one in x]), rtol=1e-4, atol=1e-5)
    targets = forward(jax.tree.map(lambda leaf: 2 * leaf, params_of(teacher)), x)
    solver = eki_jax.euler(forward, LOSS)
    start = solver.init(eki_jax.sample_ensemble(KEY, eki_jax.gaussian(params, 0.3), 40))
    state, infos = jax.jit(lambda s: jax.lax.scan(lambda s, _: solver.step(s, (x, targets)), s, length=25))(start)
    assert float(infos.loss[-1]) < 0.35 * float(infos.loss[0])
    estimate = solver.estimate(state)
    assert type(estimate) is type(module)
    assert LOSS(jax.vmap(eqx.combine(estimate, module))(x), targets) < 0.35 * LOSS(jax.vmap(module)(x), targets)


@pytest.mark.parametrize("localized", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["mlp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("cnn", "gru"))])
def test_natural_directions(name: str, localized: bool) -> None:
    """A mean of a module's own type takes steps of low rank, and a direction is of that type too."""
    make, x = MODELS[name]
    module, teacher = make(key=jax.random.key(2)), make(key=jax.random.key(3))
    forward, _ = equinox_forward(module)
    targets = forward(jax.tree.map(lambda leaf: 2 * leaf, params_of(teacher)), x)
    f = natural.value_and_natural_direction(forward, LOSS, 60, damping=1e-3, localized=localized)
    params, values = params_of(module), []
    for count in range(8):
        value, direction = f(params, (x, targets), jax.random.fold_in(KEY, count))
        params = jax.tree.map(lambda p, d: p - 0.7 * d, params, direction)
        values.append(float(value))
    assert type(direction) is type(params) is type(module)
    assert values[-1] < 0.3 * values[0]


def test_whole_batches() -> None:
    """A module that takes batches is called once."""
    seen = []

    class Whole(eqx.Module):
        w: Any

        def __call__(self, x: Any) -> Any:
            seen.append(x.shape)
            return x @ self.w

    forward, _ = equinox_forward(Whole(jnp.ones((4, 2))), per_sample=False)
    np.testing.assert_allclose(forward(Whole(jnp.ones((4, 2))), X), X @ jnp.ones((4, 2)), rtol=1e-5)
    assert seen == [(32, 4)]


@pytest.mark.parametrize("examples", [True, False])
def test_two_inputs_are_a_tuple_of_a_batch(examples: bool) -> None:
    """A solver has one x: a tuple is unpacked where there were as many examples, or a single one would not do."""
    a, b, module = X[:, :3], X[:, :2], Two(KEY)
    forward, _ = equinox_forward(module, *((a, b) if examples else ()), scale=3.0)
    wanted = jax.vmap(lambda a, b: module(a, b, 3.0))(a, b)
    np.testing.assert_allclose(forward(params_of(module), (a, b)), wanted, rtol=1e-5)
    np.testing.assert_allclose(forward(params_of(module), a, b), wanted, rtol=1e-5)
    other, _ = equinox_forward(module, method="other")
    np.testing.assert_allclose(other(params_of(module), a), jax.vmap(module.a)(a), rtol=1e-5)


def test_only_some_leaves_are_parameters() -> None:
    """What the filter does not name stays as it is in the module."""
    module = eqx.nn.Linear(4, 2, key=KEY)
    matrices = lambda leaf: eqx.is_inexact_array(leaf) and leaf.ndim == 2
    forward, template = equinox_forward(module, filter=matrices)
    assert template.bias is None
    params = eqx.filter(module, matrices)
    np.testing.assert_allclose(forward(params, X), jax.vmap(module)(X), rtol=1e-5)


def test_a_key_for_every_sample() -> None:
    """With keyed= each sample has its own mask, the same for the same key."""
    module = eqx.nn.Sequential([eqx.nn.Linear(4, 20, key=KEY), eqx.nn.Dropout(0.5)])
    forward, _ = equinox_forward(module, X, keyed=True)
    params, same = params_of(module), jnp.ones((16, 4))
    first, again, other = (forward(params, same, key=jax.random.key(k)) for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert len(np.unique(np.asarray(first == 0), axis=0)) > 10
    quiet, _ = equinox_forward(eqx.nn.inference_mode(module), X)
    np.testing.assert_allclose(quiet(params, X), jax.vmap(module.layers[0])(X), rtol=1e-5)


def test_statistics_in_and_out() -> None:
    """With a state a forward map takes and returns it, as often as one likes; inference mode keeps it."""
    module, first = eqx.nn.make_with_state(Classifier)(KEY, name="samples")
    forward, _, state = equinox_forward(module, X, keyed=True, state=first, axis_name="samples")
    params = params_of(module)
    for _ in range(2):  # the same state twice, which equinox alone would refuse
        _, after = forward(params, X, key=KEY, state=state)
    mean, _ = after.get(module.norm.batch_state_index)
    np.testing.assert_allclose(mean, 0.1 * jax.vmap(module.first)(X).mean(axis=0), rtol=1e-4, atol=1e-6)
    predict, _, _ = equinox_forward(eqx.nn.inference_mode(module), X, state=first, axis_name="samples")
    _, same = predict(params, X, state=after)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(same), jax.tree.leaves(after))


def test_a_state_of_whole_batches() -> None:
    """The same state may go into a call twice where the module is not mapped either."""

    class Counting(eqx.Module):
        linear: eqx.nn.Linear
        calls: eqx.nn.StateIndex

        def __init__(self, key: Any) -> None:
            self.linear, self.calls = eqx.nn.Linear(4, 2, key=key), eqx.nn.StateIndex(jnp.array(0))

        def __call__(self, x: Any, state: Any) -> Any:
            return jax.vmap(self.linear)(x), state.set(self.calls, state.get(self.calls) + 1)

    module, first = eqx.nn.make_with_state(Counting)(KEY)
    forward, _, state = equinox_forward(module, per_sample=False, state=first)
    counts = [forward(params_of(module), X, state=state)[1].get(module.calls) for _ in range(2)]
    assert [int(count) for count in counts] == [1, 1]


def test_xavier_for_equinox() -> None:
    """Fans of weights that have the outputs first, biases like their weight, scales that start at one."""
    keys = jax.random.split(KEY, 5)
    layers = {
        "linear": eqx.nn.Linear(4, 6, key=keys[0]),
        "conv": [eqx.nn.Conv2d(5, 7, 3, key=keys[1])],
        "norm": eqx.nn.LayerNorm(8),
        "cell": eqx.nn.GRUCell(2, 3, key=keys[2]),
        "stack": eqx.filter_vmap(lambda key: eqx.nn.Linear(4, 6, key=key))(keys[3:]),
        "free": jnp.zeros(9),
    }
    prior = adapter.xavier(params_of(layers))
    factor = jax.tree.map(lambda value: round(1 / value**2, 4), prior.factor)
    assert (factor["linear"].weight, factor["linear"].bias) == (5.0, 5.0)
    assert (factor["conv"][0].weight, factor["conv"][0].bias) == (6.0, 6.0)
    assert (factor["norm"].weight, factor["norm"].bias) == (8.0, 8.0)
    assert (factor["cell"].weight_ih, factor["cell"].weight_hh, factor["cell"].bias) == (5.5, 6.0, 6.0)
    assert (factor["stack"].weight, factor["stack"].bias, factor["free"]) == (5.0, 5.0, 9.0)
    wide = adapter.xavier(params_of(layers), window=True).factor
    assert round(1 / wide["conv"][0].weight ** 2, 4) == 54.0
    np.testing.assert_array_equal(prior.mean["norm"].weight, jnp.ones(8))
    assert all(
        float(jnp.abs(leaf).max()) == 0 for leaf in jax.tree.leaves((prior.mean["conv"], prior.mean["norm"].bias))
    )
    drawn = prior.sample(KEY)
    assert jax.tree.structure(drawn) == jax.tree.structure(params_of(layers))
    with pytest.raises(TypeError, match="window: 3; wanted True or False"):
        adapter.xavier(params_of(layers), window=3)


@pytest.mark.slow
def test_a_module_in_training_mode_learns() -> None:
    """Dropout and batch statistics through the loop, with the statistics learned where it predicts."""
    module, first = eqx.nn.make_with_state(Classifier)(KEY)
    forward, template, state = equinox_forward(module, X, keyed=True, state=first)
    predict, _, _ = equinox_forward(eqx.nn.inference_mode(module), X, state=first)
    make = lambda f: eki_jax.euler(f, natural.softmax_cross_entropy(), eki_jax.frobenius_step_size(3.0))
    solver = eki_jax.stateful(make, forward, key=KEY, state=state, common=True)
    prior = eki_jax.gaussian(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), template), 0.5)
    method, data = ensemble_method(solver, predict, prior, 60), ((X, LABELS), (X, LABELS))
    result = fit(method, *data, batch_size=16, epochs=8, key=jax.random.key(3), progress=False)
    assert result.history[-1]["test_accuracy_mean"] > 0.9
    assert int(result.state.model_state.get(module.norm.batch_counter)) == 16


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda: equinox_forward(eqx.nn.Sequential([eqx.nn.Linear(4, 2, key=KEY), eqx.nn.Dropout(0.5)]), X),
            ValueError,
            r"Sequential asks for a key.*wanted equinox\.nn\.inference_mode\(module\), or keyed=True",
        ),
        (
            lambda: equinox_forward(eqx.nn.make_with_state(Classifier)(KEY)[0], X, keyed=True),
            ValueError,
            "Classifier has layers that keep a state; wanted state=state.*make_with_state",
        ),
        (lambda: equinox_forward(Two(KEY), X), TypeError, "missing a required argument: 'b'.*wanted inputs"),
        (lambda: equinox_forward(Two(KEY), keyed=True), TypeError, "keyed: True, but Two.__call__.* takes no key"),
        (lambda: equinox_forward(Two(KEY), state={}), TypeError, "state: a dict; wanted the state that"),
        (lambda: equinox_forward(Two(KEY), method="third"), TypeError, "has no method 'third'"),
        (lambda: equinox_forward(Two(KEY), filter=3), TypeError, "filter: 3; wanted a function of a leaf"),
        (lambda: equinox_forward(Two(KEY), per_sample=2), TypeError, "per_sample: 2; wanted True or False"),
        (lambda: equinox_forward(eqx.nn.Dropout(0.5)), ValueError, "Dropout has no arrays that are parameters"),
    ],
)
def test_what_is_wanted_is_said(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


def test_one_adapter_for_all_steps() -> None:
    """The name under which low-rank steps look for an adapter is the same function."""
    assert adapter.low_rank_forward is equinox_forward


def test_without_equinox_the_extra_is_named() -> None:
    """The import fails with the command that installs what is missing; the core does not ask for it."""
    script = "import sys; sys.modules['equinox'] = None; import eki_jax; import eki_jax.equinox"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "ImportError: equinox is not installed: pip install 'eki_jax[equinox]'" in done.stderr


def test_parameters_of_another_module() -> None:
    """Of another kind, of other sizes, or of one whose places for a state are its own, with what to do about it."""
    forward, _ = equinox_forward(eqx.nn.MLP(4, 3, 6, 1, key=KEY))
    for params in (params_of(eqx.nn.MLP(4, 3, 6, 2, key=KEY)), {"w": X}):
        with pytest.raises(ValueError, match=rf"params: a {type(params).__name__}, .* at the first node; wanted those"):
            forward(params, X)
    module, other = Classifier(KEY), Classifier(jax.random.key(7))  # without make_with_state
    forward, template, state = equinox_forward(module, keyed=True, state=eqx.nn.State(module))
    with pytest.raises(ValueError, match=r"params: .* at \.norm\.batch_counter; .*jax.tree.unflatten") as caught:
        forward(params_of(other), X, key=KEY, state=state)
    assert "jax.tree.unflatten(jax.tree.structure(template), jax.tree.leaves(params))" in str(caught.value)
    moved = jax.tree.unflatten(jax.tree.structure(template), jax.tree.leaves(params_of(other)))
    outputs, _ = forward(moved, X, key=KEY, state=state)
    assert outputs.shape == (32, 2)
    for wrong in (eqx.nn.State(other), eqx.nn.make_with_state(Classifier)(KEY)[1]):
        with pytest.raises(ValueError, match=r"state: that of another module.*make_with_state"):
            equinox_forward(module, keyed=True, state=wrong)
        with pytest.raises(ValueError, match=r"state: that of another module.*make_with_state"):
            forward(params_of(module), X, key=KEY, state=wrong)


def test_batch_statistics_over_devices() -> None:
    """Means over an axis of ``jax.vmap`` cannot be taken in ``jax.shard_map``; the compiler's partitioner can."""
    module, state = eqx.nn.make_with_state(Classifier)(KEY)
    forward, _, state = equinox_forward(eqx.tree_at(lambda m: m.drop.p, module, 0.0), state=state)
    make = lambda f: eki_jax.euler(f, natural.softmax_cross_entropy(), axis_name="particles")
    one = eki_jax.stateful(make, forward, state=state)
    ensemble = eki_jax.sample_ensemble(KEY, eki_jax.gaussian(params_of(module), 0.1), 8)
    solver = sharding.shard_solver(one, sharding.make_mesh(8))
    with pytest.raises(ValueError, match=r"Classifier takes means over its samples.*wanted .*driver='jit'"):
        solver.step(solver.init(ensemble), (X, LABELS))
    solver = sharding.shard_solver(one, sharding.make_mesh(8), driver="jit")
    assert bool(solver.step(solver.init(ensemble), (X, LABELS))[1].refreshed)


CONVOLUTIONS = {
    "one axis, few outputs": (eqx.nn.Conv1d(6, 2, 5, stride=2, key=KEY), (6, 9)),
    "dilated": (eqx.nn.Conv2d(4, 3, 3, dilation=2, key=KEY), (4, 6, 6)),
    "square": (eqx.nn.Conv2d(3, 3, 3, stride=3, key=KEY), (3, 6, 6)),
    "transposed": (eqx.nn.ConvTranspose2d(6, 2, 4, stride=2, key=KEY), (6, 1, 2)),
    "transposed in groups": (eqx.nn.ConvTranspose1d(6, 2, 5, groups=2, dilation=2, key=KEY), (6, 2)),
    "depthwise": (eqx.nn.Conv2d(2, 4, 3, groups=2, key=KEY), (2, 4, 4)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_are_cut_at_outputs(name: str) -> None:
    """Whatever the sizes of its window, a kernel is of low rank between its outputs and the rest, and local."""
    module, shape = CONVOLUTIONS[name]
    forward, template = equinox_forward(module)
    x = jnp.ones((3, *shape))
    (kernel,) = [leaf for leaf in natural.describe(forward, template, x).leaves if leaf.name == ".weight"]
    assert (kernel.deviation, kernel.localized) == ("low rank", "local")
    left, _ = natural.low_rank(1).draw(KEY, params_of(module)).weight
    assert left.shape == (module.out_channels, 1)


def test_stacked_kernels_are_cut_there_too() -> None:
    """Layers side by side have one axis more in front."""
    stack = eqx.filter_vmap(lambda key: eqx.nn.Conv1d(4, 3, 5, key=key))(jax.random.split(KEY, 2))
    left, right = natural.low_rank(1).draw(KEY, params_of(stack)).weight
    assert (left.shape, right.shape) == ((2, 3, 1), (4, 5, 1))
