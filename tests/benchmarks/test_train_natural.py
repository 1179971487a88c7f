"""The natural-gradient methods and the networks without derivatives, as the training command has them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

pytest.importorskip("sklearn")

from benchmarks import methods, train
from benchmarks.problems import registry
from benchmarks.problems.data import Dataset
from eki_jax import flax as models
from eki_jax import natural
from eki_jax.natural.draws import Cloud
from eki_jax.training import epoch

pytestmark = pytest.mark.benchmarks

SHAPES = {
    "digits": (8, 8, 1),
    "mnist": (28, 28, 1),
    "fashion": (28, 28, 1),
    "cifar10": (32, 32, 3),
    "svhn": (32, 32, 3),
}


def tiny(name: str, samples: int = 16) -> Dataset:
    """Random images of the problem's shape."""
    rng = np.random.default_rng(0)
    shape = (28, 28) if name.endswith("rnn") else (28, 28, 1) if name == "cnn-mnist" else SHAPES[name.split("-")[0]]
    x = rng.standard_normal((samples, *shape)).astype(np.float32)
    y = (np.arange(samples) % 10).astype(np.int32)
    return Dataset(x, y, x[:10], y[:10], 10)


@pytest.mark.parametrize(
    ("shape", "count"),
    [((28, 28, 1), 5_994), ((32, 32, 3), 7_834)],
)
def test_small_cnn_counts_its_parameters(shape: tuple[int, ...], count: int) -> None:
    """The small CNN has the written number of parameters."""
    _, template = models.linen_forward(models.small_cnn(), jnp.zeros((1, *shape)))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(template)) == count
    assert template["Conv_0"]["kernel"].shape == (5, 5, shape[-1], 8)
    assert template["Conv_1"]["kernel"].shape == (5, 5, 8, 16)


@pytest.mark.parametrize("name", [pytest.param("mnist-small-cnn", marks=pytest.mark.slow), "cifar10-small-cnn"])
def test_small_cnn_for_many_is_the_flax_network(name: str) -> None:
    """The small CNN for many particles is the Flax network."""
    problem = registry.build(name, tiny(name))
    every = jax.vmap(problem.prior.sample)(jax.random.split(jax.random.key(0), 3))
    x = problem.train[0][:5]
    wanted = jax.vmap(problem.logits, (0, None))(every, x)
    np.testing.assert_allclose(jax.jit(jax.vmap(problem.particle_logits, (0, None)))(every, x), wanted, atol=1e-4)
    one = jax.tree.map(lambda leaf: leaf[0], every)
    np.testing.assert_allclose(problem.particle_logits(one, x), wanted[0], atol=1e-4)
    if name != "mnist-small-cnn":
        return
    images = jnp.stack([x, x + 1, x * 2])  # every particle its own
    found = jax.vmap(problem.particle_logits)(every, images)
    np.testing.assert_allclose(found, jax.vmap(problem.logits)(every, images), atol=1e-4)


def test_small_cnn_says_what_kernels_multiply() -> None:
    """The small CNN says what its second kernel multiplies.

    The windows times a kernel are the convolution of the pooled first layer.
    """
    problem = registry.build("mnist-small-cnn", tiny("mnist-small-cnn"))
    params, x = problem.prior.sample(jax.random.key(0)), jnp.asarray(problem.train[0][:3])
    cloud = Cloud(natural.low_rank(1), 4)
    _, met, matrix_of = cloud.see(problem.logits, params, x)
    kernel = "['Conv_1']['kernel']"
    assert set(met) == {kernel, "['Dense_0']['kernel']"}
    assert matrix_of == {"['Conv_1']['bias']": kernel, "['Dense_0']['bias']": "['Dense_0']['kernel']"}
    first = linen.Conv(8, (5, 5), padding="VALID").apply({"params": params["Conv_0"]}, x)
    pooled = linen.max_pool(jax.nn.relu(first), (2, 2), (2, 2))
    second = linen.Conv(16, (5, 5), padding="VALID").apply({"params": params["Conv_1"]}, pooled)
    found = met[kernel].rows @ params["Conv_1"]["kernel"].reshape(-1, 16) + params["Conv_1"]["bias"]
    np.testing.assert_allclose(found, second.reshape(3, -1, 16), atol=1e-4)


@pytest.mark.parametrize("name", ["mnist-small-cnn", "mnist-dnn1"])
def test_first_outputs_are_of_order_one(name: str) -> None:
    problem = registry.build(name, tiny(name))
    spread = float(jnp.std(problem.logits(problem.prior.sample(jax.random.key(0)), problem.train[0])))
    assert 0.3 < spread < 5


@pytest.mark.parametrize("name", ["mnist-sign", "mnist-int8"])
def test_twins_alone_have_derivatives(name: str) -> None:
    """Networks without derivatives have none, and their twins do."""
    problem = registry.build(name, tiny(name))
    params, x = problem.prior.sample(jax.random.key(0)), problem.train[0]
    np.testing.assert_array_equal(problem.straight_through(params, x), problem.logits(params, x))
    for logits, moves in ((problem.logits, False), (problem.straight_through, True)):
        gradient = jax.grad(lambda p, logits=logits: jnp.sum(logits(p, x) ** 2))(params)
        first = gradient["Dense_0"]["kernel"] if name == "mnist-sign" else gradient["kernel_0"]
        assert bool(jnp.any(first != 0)) == moves


def test_int8_network_multiplies_by_integers() -> None:
    """The int8 network multiplies by eight-bit integers only."""
    problem = registry.build("mnist-int8", tiny("mnist-int8"))
    params, x = problem.prior.sample(jax.random.key(0)), problem.train[0]
    rounded = jax.tree.map(models.to_int8, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(rounded)} == {jnp.dtype("int8")}
    again = jax.tree.map(models.from_int8, rounded)
    np.testing.assert_array_equal(problem.logits(params, x), problem.logits(again, x))
    assert not np.array_equal(jax.tree.leaves(again)[-1], jax.tree.leaves(params)[-1])


@pytest.mark.parametrize(
    ("name", "low_rank"),
    [("mnist-sign", True), ("mnist-small-cnn", True), ("mnist-rnn", True), ("mnist-int8", True), ("mnist-int8", False)],
)
def test_natural_methods_step_on_every_kind(name: str, low_rank: bool) -> None:
    """Natural methods step on every kind of network."""
    step_and_compare(name, low_rank)


@pytest.mark.slow
@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("name", registry.names())
def test_natural_methods_step_on_every_problem(name: str, low_rank: bool) -> None:
    step_and_compare(name, low_rank)


def step_and_compare(name: str, low_rank: bool) -> None:
    problem = registry.build(name, tiny(name))
    settings = methods.Natural(damping=0.1)
    # More than the ten outputs: the last layer alone would explain what fewer show, and leave rounding to convolutions.
    method = methods.get("natural-eki-lowrank" if low_rank else "natural-eki", problem, 12, settings=settings)
    state = method.init(jax.random.key(0))
    before = method.estimate(state)
    state, metrics = jax.jit(epoch(method, 8))(state, jax.random.key(1), *problem.train)
    after = method.estimate(state)
    moved = [bool(jnp.any(a != b)) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)]
    assert all(moved)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(after))
    assert metrics["train_loss"].shape == (2,)
    assert not np.any(metrics["failed"])
    assert method.passes(6) == 6 + 2 + (low_rank and problem.is_local)  # two for the loss before and after


def summary_of(capsys: Any) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_low_rank_learns_the_digits(tmp_path: Path, capsys: Any) -> None:
    arguments = ["--method", "natural-eki-lowrank", "--particles", "100", "--batch", "350", "--epochs", "8", "--quiet"]
    assert train.main([*arguments, "--out", str(tmp_path / "run")]) == 0
    summary = summary_of(capsys)
    assert summary["test_accuracy_mean"] >= 0.94
    assert summary["forward_passes"] == 103 * 4 * 350 * 8


@pytest.mark.slow
def test_flags_are_kept_on_resume(tmp_path: Path, capsys: Any) -> None:
    """Flags of the natural methods are kept on resume."""
    arguments = ["--method", "natural-eki", "--particles", "20", "--batch", "700", "--epochs", "1", "--quiet"]
    given = ["--sigma", "0.2", "--damping", "0.03", "--eta", "0.7", "--norm-constraint", "2"]
    assert train.main([*arguments, *given, "--out", str(tmp_path)]) == 0
    first = summary_of(capsys)
    assert [first[name] for name in ("sigma", "damping", "rate", "norm_constraint")] == [0.2, 0.03, 0.7, 2.0]
    row = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert row["sigma"] == pytest.approx(0.2)
    assert row["damping"] == pytest.approx(0.03)
    assert train.main(["--resume", str(tmp_path), "--epochs", "2", "--quiet"]) == 0
    assert summary_of(capsys)["damping"] == 0.03
    assert "--damping 0.03" in json.loads((tmp_path / "result.json").read_text())["command"]


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        ("sigma: -1.0", ["--sigma", "-1"]),
        ("damping: 0.0", ["--damping", "0"]),
        ("rank: 0", ["--rank", "0"]),
        ("norm_constraint: 0.0", ["--norm-constraint", "0"]),
    ],
)
def test_bad_settings_are_said_in_a_line(words: str, flags: list[str], tmp_path: Path, capsys: Any) -> None:
    out = ["--method", "natural-eki-lowrank", "--quiet", "--out", str(tmp_path)]
    assert train.main([*out, *flags]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error
    assert error.count("\n") == 0
