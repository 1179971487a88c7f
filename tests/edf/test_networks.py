"""The networks of the EDF experiments: parameter counts, and layers against flax's own."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.edf.networks import PatchConvolution, ResNet, TwoConvolutions, max_pool, resnet56, resnet110
from benchmarks.edf.training import build


def count(tree: object) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def shapes(module: nn.Module, x: jax.ShapeDtypeStruct, **options: bool) -> dict:
    return jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros(x.shape), **options))


def counted_by_hand(blocks: int, classes: int) -> int:
    """3x3 kernels without biases, a scale and a shift after each, and the last layer."""
    kernels = [(3, 16), *[(16, 16)] * (2 * blocks)]
    kernels += [(16, 32), *[(32, 32)] * (2 * blocks - 1), (32, 64), *[(64, 64)] * (2 * blocks - 1)]
    return sum(9 * a * b + 2 * b for a, b in kernels) + 64 * classes + classes


@pytest.mark.parametrize(
    ("module", "blocks", "expected"),
    [
        (ResNet(20), 3, 269_722),
        (resnet56(), 9, 853_018),
        (resnet110(), 18, 1_727_962),
        (resnet110(100), 18, 1_733_812),
    ],
)
def test_residual_networks_have_their_sizes(module: ResNet, blocks: int, expected: int) -> None:
    """Residual networks have the published sizes. He et al. (2016), table 6: 0.27, 0.85 and 1.7 million."""
    variables = shapes(module, jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32), train=False)
    assert count(variables["params"]) == expected == counted_by_hand(blocks, module.classes)


@pytest.mark.slow
def test_residual_network_normalises() -> None:
    """A residual network normalises and remembers."""
    x = np.random.default_rng(0).normal(2.0, 3.0, size=(4, 8, 8, 3)).astype(np.float32)
    model = build(ResNet(8), x, 0, batch_norm=True)
    logits, statistics = jax.jit(model.train)(model.params, model.statistics, x)
    assert logits.shape == (4, 10)
    moved = jax.tree.map(lambda new, old: float(np.abs(new - old).max()), statistics, model.statistics)
    assert min(jax.tree.leaves(moved)) > 1e-3
    predicted = jax.jit(model.logits)(model.params, model.statistics, x)
    assert np.abs(np.asarray(predicted) - np.asarray(logits)).max() > 1e-3


def test_residual_network_of_another_depth() -> None:
    """A residual network of another depth is refused."""
    with pytest.raises(ValueError, match=r"depth: 57; wanted 6 n \+ 2"):
        shapes(ResNet(57), jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32), train=False)


@pytest.mark.parametrize(("width", "size"), [(3, (6, 8)), (5, (7, 5))])
def test_the_patch_convolution_is_a_convolution(width: int, size: tuple[int, int]) -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, *size, 3)), jnp.float32)
    module = PatchConvolution(4, width)
    params = module.init(jax.random.key(0), x)["params"]["Dense_0"]
    reference = nn.Conv(4, (width, width), padding="SAME")
    kernel = params["kernel"].reshape(width, width, 3, 4)
    expected = reference.apply({"params": {"kernel": kernel, "bias": params["bias"]}}, x)
    found = module.apply({"params": {"Dense_0": params}}, x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [(6, 8), (7, 5)])
def test_max_pool_is_flaxs(size: tuple[int, int]) -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, *size, 3)), jnp.float32)
    np.testing.assert_array_equal(max_pool(x), nn.max_pool(x, (2, 2), strides=(2, 2)))


def test_two_convolutions_are_the_papers() -> None:
    """The network of two convolutions has the paper's layers.

    Convolution, ReLU, max pooling, twice; then two fully connected layers.
    """
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 3)), jnp.float32)
    module = TwoConvolutions((4, 5), 6, classes=7)
    params = module.init(jax.random.key(0), x)["params"]
    out = x
    for name in ("PatchConvolution_0", "PatchConvolution_1"):
        layer = PatchConvolution(params[name]["Dense_0"]["bias"].size)
        out = nn.max_pool(nn.relu(layer.apply({"params": params[name]}, out)), (2, 2), strides=(2, 2))
    out = nn.relu(out.reshape(2, -1) @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"])
    expected = out @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"]
    np.testing.assert_allclose(module.apply({"params": params}, x), expected, rtol=1e-5, atol=1e-6)
    assert expected.shape == (2, 7)
