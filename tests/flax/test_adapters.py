"""The flax adapters and networks: values, shapes and parameter counts."""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from eki_jax import flax as models

MNIST, COLOUR, ROWS = (2, 28, 28, 1), (2, 32, 32, 3), (2, 28, 28)


def conv(inputs, outputs):
    return 9 * inputs * outputs + outputs


def dense(inputs, outputs):
    return inputs * outputs + outputs


def chain(layer, widths):
    return sum(layer(a, b) for a, b in itertools.pairwise(widths))


COUNTS = {
    "dnn1": (models.dnn1(), MNIST, 7_850),
    "dnn2": (models.dnn2(), MNIST, 79_510),
    "dnn3": (models.dnn3(), MNIST, 266_610),
    "dnn4": (models.dnn4(), MNIST, 573_910),
    # 28 -> pool 4, stride 2 -> 13 -> pool 4, stride 2 -> 5 -> pool 2 -> 2: 12 channels of 2 x 2 feed the output.
    "cnn_mnist": (models.cnn_mnist(), MNIST, chain(conv, (1, 16, 16, 16, 16, 12, 12)) + dense(48, 10)),
    # 32 -> 16 -> 8 -> 1: as many features as the last convolution has channels.
    "cnn1": (models.cnn1(), COLOUR, chain(conv, (3, 16, 16, 16, 16, 32, 32)) + chain(dense, (32, 500, 10))),
    "cnn2": (
        models.cnn2(),
        COLOUR,
        chain(conv, (3, 16, 16, 16, 32, 32, 32, 48, 48, 64)) + chain(dense, (64, 500, 10)),
    ),
    "cnn3": (
        models.cnn3(),
        COLOUR,
        chain(conv, (3, 16, 16, 32, 32, 32, *5 * (48,), 64, 64, 96, 96, 96)) + chain(dense, (96, 500, 10)),
    ),
    # Two layers of W_h (32 x 32), W_x (32 x 28) and two biases, then 32 -> 10.
    "rnn": (models.TanhRNN(), ROWS, 2 * (32 * 32 + 32 * 28 + 2 * 32) + dense(32, 10)),
    "rnn-series": (models.TanhRNN(layers=1, outputs=1), (2, 5, 1), 32 * 32 + 32 + 2 * 32 + dense(32, 1)),
}


def draw(template, key=0):
    leaves, structure = jax.tree.flatten(template)
    keys = jax.random.split(jax.random.key(key), len(leaves))
    values = [0.2 * jax.random.normal(k, s.shape, s.dtype) for k, s in zip(keys, leaves, strict=True)]
    return structure.unflatten(values)


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    module, shape, expected = COUNTS[name]
    _, template = models.linen_forward(module, jnp.zeros(shape))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(template)) == expected


@pytest.mark.parametrize("name", [name for name in COUNTS if not name.startswith("rnn")])
def test_docstrings_state_the_counts(name):
    assert f"{COUNTS[name][2]:,} parameters" in getattr(models, name).__doc__


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_leaves_follow_the_flax_names(name):
    module, shape, _ = COUNTS[name]
    _, template = models.linen_forward(module, jnp.zeros(shape))
    for path, leaf in jax.tree_util.tree_leaves_with_path(template):
        assert path[-1].key in ("kernel", "bias")
        assert (path[-1].key == "bias") == (leaf.ndim == 1)


@pytest.mark.parametrize("name", ["dnn2", "cnn_mnist", "rnn"])
def test_networks_return_probabilities_and_logits(name):
    module, shape, _ = COUNTS[name]
    x = jax.random.normal(jax.random.key(1), shape)
    forward, template = models.linen_forward(module, x)
    logits, _ = models.linen_forward(module, x, method="logits")
    params = draw(template)
    probabilities = forward(params, x)
    assert probabilities.shape == (2, 10)
    np.testing.assert_allclose(probabilities.sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(jax.nn.softmax(logits(params, x)), probabilities, rtol=1e-5)


def test_dense_network_equals_its_formula():
    x = jax.random.normal(jax.random.key(1), (4, 2, 3))
    forward, template = models.linen_forward(models.dense_network((5, 3)), x)
    params = draw(template)
    first, last = params["Dense_0"], params["Dense_1"]
    hidden = jax.nn.relu(x.reshape(4, 6) @ first["kernel"] + first["bias"])
    np.testing.assert_allclose(
        forward(params, x), jax.nn.softmax(hidden @ last["kernel"] + last["bias"]), rtol=1e-5, atol=1e-6
    )


def test_convolutional_network_is_the_tables():
    """A convolutional network activates and pools as the table says."""
    x = jax.random.normal(jax.random.key(1), (2, 6, 6, 1))
    module = models.ConvolutionalNetwork((models.Stage((3,), 4, 2),), (2,), jax.nn.selu)
    forward, template = models.linen_forward(module, x, method="logits")
    params = draw(template)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    kernel = np.asarray(params["Conv_0"]["kernel"])
    maps = sum(padded[:, a : a + 6, b : b + 6] @ kernel[a, b] for a in range(3) for b in range(3))
    maps = np.asarray(jax.nn.selu(maps + params["Conv_0"]["bias"]))
    pooled = np.stack([[maps[:, i : i + 4, j : j + 4].max((1, 2)) for j in (0, 2)] for i in (0, 2)])
    features = pooled.transpose(2, 0, 1, 3).reshape(2, -1)
    expected = features @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]
    np.testing.assert_allclose(forward(params, x), expected, rtol=1e-4, atol=1e-5)


def test_selu_networks_and_relu_for_mnist():
    """SELU networks have 500 hidden units, and ReLU is for MNIST."""
    assert all(net.activation is jax.nn.selu and net.widths == (500, 10) for net in (models.cnn1(), models.cnn3()))
    assert models.cnn_mnist().activation is jax.nn.relu


@pytest.mark.parametrize("layers", [1, 2])
def test_recurrent_network_equals_its_recurrence(layers):
    x = jax.random.normal(jax.random.key(1), (3, 4, 2))
    module = models.TanhRNN(units=5, layers=layers, outputs=2)
    forward, template = models.linen_forward(module, x, method="logits")
    step, _ = models.linen_forward(module, jnp.zeros((3, 5)), x[:, 0], method="step")
    params = draw(template)
    hidden = carried = jnp.zeros((3, 5))
    for t in range(4):
        for layer in (params["cell"][f"layer_{index}"] for index in range(layers)):
            recurrent, drive = layer["recurrent"], layer["input"]
            hidden = jnp.tanh(
                hidden @ recurrent["kernel"] + recurrent["bias"] + x[:, t] @ drive["kernel"] + drive["bias"]
            )
        carried, output = step(params, carried, x[:, t])
    expected = hidden @ params["output"]["kernel"] + params["output"]["bias"]
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(forward(params, x), expected, rtol=1e-5, atol=1e-6)


def test_stacked_layers_have_their_own_states():
    x = jax.random.normal(jax.random.key(1), (3, 4, 2))
    module = models.TanhRNN(units=5, layers=2, outputs=2, stacked=True)
    forward, template = models.linen_forward(module, x, method="logits")
    start = jnp.zeros((3, 5))
    step, _ = models.linen_forward(module, (start, start), x[:, 0], method="step")
    params = draw(template)
    below = above = start
    carried = start, start
    affine = lambda layer, z, q: (
        z @ layer["recurrent"]["kernel"]
        + layer["recurrent"]["bias"]
        + (q @ layer["input"]["kernel"] + layer["input"]["bias"])
    )
    for t in range(4):
        below = jnp.tanh(affine(params["cell"]["layer_0"], below, x[:, t]))
        above = jnp.tanh(affine(params["cell"]["layer_1"], above, below))
        carried, output = step(params, carried, x[:, t])
    expected = above @ params["output"]["kernel"] + params["output"]["bias"]
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(forward(params, x), expected, rtol=1e-5, atol=1e-6)


class Small(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 6, rngs=rngs)
        self.norm = nnx.BatchNorm(6, use_running_average=True, rngs=rngs)
        self.rest = nnx.List([nnx.Linear(6, 3, rngs=rngs)])

    def logits(self, x):
        return self.rest[0](jax.nn.relu(self.norm(self.first(x))))

    def __call__(self, x):
        return jax.nn.softmax(self.logits(x))


def test_nnx_module_under_jit_and_vmap():
    """An NNX module under jit and vmap equals the module."""
    module = Small(nnx.Rngs(3))
    x = jax.random.normal(jax.random.key(1), (5, 4))
    forward, template = models.nnx_forward(module)
    params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda leaf: leaf.shape, template)
    ensemble = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)
    outputs = jax.jit(jax.vmap(forward, (0, None)))(ensemble, x)
    np.testing.assert_allclose(outputs[0], module(x), rtol=1e-5, atol=1e-6)
    assert not np.allclose(outputs[1], outputs[0])
    logits, _ = models.nnx_forward(module, method="logits")
    np.testing.assert_allclose(logits(params, x), module.logits(x), rtol=1e-5, atol=1e-6)


def test_linen_and_nnx_agree_on_a_dense_layer():
    """Linen and NNX agree on the same dense layer."""
    x = jax.random.normal(jax.random.key(1), (5, 4))
    linen, template = models.linen_forward(nn.Dense(3), x)
    nnx_, nnx_template = models.nnx_forward(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    assert jax.tree.map(lambda s: s.shape, template) == jax.tree.map(lambda s: s.shape, nnx_template)
    params = draw(template)
    np.testing.assert_allclose(linen(params, x), nnx_(params, x), rtol=1e-6)


def test_linen_collections_besides_params():
    """Linen collections besides params are named or given."""
    x = jnp.ones((5, 4))
    norm = nn.BatchNorm(use_running_average=True)
    with pytest.raises(ValueError, match=r"batch_stats.*constants"):
        models.linen_forward(norm, x)
    statistics = {"mean": jnp.full(4, 0.5), "var": jnp.full(4, 4.0)}
    forward, template = models.linen_forward(norm, x, constants={"batch_stats": statistics})
    params = {"scale": jnp.ones(4), "bias": jnp.zeros(4)}
    assert set(template) == set(params)
    np.testing.assert_allclose(forward(params, x), 0.25, rtol=1e-4)


def test_bad_models_are_named():
    with pytest.raises(ValueError, match=r"module: .* no nnx.Param"):
        models.nnx_forward(nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"widths: \(\)"):
        models.dense_network(())
    with pytest.raises(ValueError, match=r"widths\[0\]: 0"):
        models.dense_network((0, 10))


def test_a_network_of_integers_against_numpy() -> None:
    """Weights and biases are whole numbers of steps, whatever lies below a half of one."""
    network = models.Int8Network((5, 3))
    x = jax.random.normal(jax.random.key(1), (4, 2, 2))
    params = jax.jit(network.init)(jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda leaf: leaf + 0.3, params)
    whole = {name: np.clip(np.round(np.asarray(leaf) / models.INT8_STEP), -128, 127) for name, leaf in params.items()}
    hidden = np.asarray(x).reshape(4, 4)
    for index in range(2):
        hidden = hidden @ (whole[f"kernel_{index}"] * models.INT8_STEP) + whole[f"bias_{index}"] * models.INT8_STEP
        hidden = np.maximum(hidden, 0) if index == 0 else hidden
    wanted = np.exp(hidden - hidden.max(axis=1, keepdims=True))
    found = jax.jit(network.apply)({"params": params}, x)
    np.testing.assert_allclose(found, wanted / wanted.sum(axis=1, keepdims=True), rtol=1e-5)


def softmax(z: np.ndarray) -> np.ndarray:
    z = np.exp(z - z.max(axis=1, keepdims=True))
    return z / z.sum(axis=1, keepdims=True)


def test_one_expert_a_sample_against_numpy() -> None:
    """Each sample has the outputs of the expert to which its router's largest number points, and of no other."""
    network = models.ExpertsNetwork(experts=3, width=4, classes=2)
    x = jax.random.normal(jax.random.key(1), (6, 5))
    params = jax.tree.map(lambda leaf: leaf + 0.1, jax.jit(network.init)(jax.random.key(0), x)["params"])
    p = jax.tree.map(np.asarray, params)
    wanted, chosen = [], np.argmax(np.asarray(x) @ p["router"]["kernel"], axis=1)
    assert len(set(chosen)) > 1
    for row, expert in zip(np.asarray(x), chosen, strict=True):
        first, second = p["hidden"]["kernel"].reshape(3, 5, 4), p["last"]["kernel"].reshape(3, 4, 2)
        hidden = np.maximum(row @ first[expert] + p["hidden_biases"]["kernel"][expert], 0)
        wanted.append(hidden @ second[expert] + p["last_biases"]["kernel"][expert])
    found = jax.jit(network.apply)({"params": params}, x)
    np.testing.assert_allclose(found, softmax(np.array(wanted)), rtol=1e-5)


def test_spikes_against_numpy() -> None:
    """Two layers of neurons, step by step."""
    network = models.SpikingNetwork((7, 6, 3), steps=5, leak=0.8)
    x = 2 * jax.random.normal(jax.random.key(1), (4, 5))
    params = jax.tree.map(lambda leaf: leaf + 0.1, jax.jit(network.init)(jax.random.key(0), x)["params"])
    layers = [(np.asarray(params[f"layer_{i}"]["kernel"]), np.asarray(params[f"layer_{i}"]["bias"])) for i in range(3)]
    v, u, fired = np.zeros((4, 7)), np.zeros((4, 6)), np.zeros((4, 6))
    for _ in range(5):
        v = 0.8 * v + np.asarray(x) @ layers[0][0] + layers[0][1]
        spikes = v >= 1
        v, u = v - spikes, 0.8 * u + spikes @ layers[1][0] + layers[1][1]
        spikes = u >= 1
        u, fired = u - spikes, fired + spikes / 5
    assert 0 < fired.mean() < 1
    wanted = softmax(fired @ layers[2][0] + layers[2][1])
    np.testing.assert_allclose(jax.jit(network.apply)({"params": params}, x), wanted, rtol=1e-5)


@pytest.mark.parametrize("network", [models.ExpertsNetwork(3, 4, 2), models.SpikingNetwork((7, 2))])
def test_twins_differ_in_derivatives_alone(network: nn.Module) -> None:
    """What is hidden has a derivative in the twin alone."""
    x = 2 * jax.random.normal(jax.random.key(1), (6, 5))
    twin = network.clone(straight_through=True)
    params = jax.jit(network.init)(jax.random.key(0), x)
    np.testing.assert_allclose(network.apply(params, x), twin.apply(params, x), rtol=1e-6)
    first = "router" if isinstance(network, models.ExpertsNetwork) else "layer_0"
    slope = lambda of: jax.grad(lambda p: of.apply(p, x)[:, 0].sum())(params)["params"][first]["kernel"]
    assert not jnp.any(slope(network))
    assert jnp.any(slope(twin))


def test_discrete_networks_refuse_bad_sizes() -> None:
    with pytest.raises(ValueError, match=r"experts: 0"):
        models.ExpertsNetwork(0, 4, 2)
    with pytest.raises(ValueError, match=r"widths: \(3,\); wanted a hidden layer"):
        models.SpikingNetwork((3,))
    with pytest.raises(ValueError, match=r"leak: 1\.5; wanted a number in \[0, 1\]"):
        models.SpikingNetwork((4, 3), leak=1.5)
