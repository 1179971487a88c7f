"""Models that people bring: every cell of the zoo's table, and each of the inputs that once came back wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import eki_jax
from benchmarks.harness import store
from benchmarks.harness.tables import where
from benchmarks.models import cli, in_linen, measures, table
from benchmarks.models.entry import CLASSES, SQUARES, Model, taught
from benchmarks.models.inputs import vectors
from benchmarks.models.zoo import MODELS, model
from eki_jax import natural
from eki_jax.flax import linen_forward, low_rank_forward, nnx_forward

ROOT = Path(__file__).parents[2]
SMOKE, CPU = measures.PRESETS["smoke"], measures.PRESETS["cpu"]
SLOW = pytest.mark.slow


def check(name: str, api: str, column: str, sizes: measures.Sizes = SMOKE) -> dict[str, Any]:
    """A cell that is right."""
    entry = model(name, api)
    cell = measures.measure(entry, entry.make(), column, sizes)
    assert measures.trouble(entry, column, cell) == ""
    return cell


@pytest.mark.parametrize(
    ("column", "name", "api"),
    [
        ("euler", "spiking units", "linen"),
        ("natural", "dropout, training mode", "nnx"),
        ("equal", "experts, top-1 routing", "plain"),
    ],
)
def test_a_cell_is_right(column: str, name: str, api: str) -> None:
    """One or two models for each column; the slow tests have all of them."""
    check(name, api, column)


@SLOW
@pytest.mark.parametrize("entry", MODELS, ids=table.cell_name)
def test_all_cells_are_right(entry: Model) -> None:
    instance = entry.make()
    for column in measures.COLUMNS:
        cell = measures.measure(entry, instance, column, CPU)
        assert measures.trouble(entry, column, cell) == "", column


@SLOW
@pytest.mark.parametrize(
    "entry", [entry for entry in MODELS if entry.has_gradient and not entry.warns], ids=table.cell_name
)
def test_noise_per_sample_finds_gradients(entry: Model) -> None:
    """Deviations per sample: as near as localized steps have to be; less where samples meet in their batch's means.

    They are refused for models in bfloat16, which are the ones that warn.
    """
    instance = entry.make()

    @jax.jit
    def both(params: Any) -> Any:
        direction_of = natural.value_and_natural_direction(
            instance.outputs, instance.loss, 500, 0.05, deviations=natural.per_sample()
        )
        return direction_of(params, instance.batch, jax.random.key(3))[1], jax.grad(instance.loss_at)(params)

    found, wanted = (
        np.concatenate([np.ravel(leaf).astype(np.float32) for leaf in jax.tree.leaves(tree)])
        for tree in both(instance.params)
    )
    cosine = found @ wanted / (np.linalg.norm(found) * np.linalg.norm(wanted))
    assert cosine > (0.6 if entry.name == "batch norm, training mode" else entry.cosine)


# What measures and judges.


def test_wrong_cells_are_called_wrong() -> None:
    """Numbers beyond their bounds, numbers that are missing, warnings and errors that nobody expects."""
    entry = Model("a", "plain", lambda: None)  # type: ignore[arg-type,return-value]
    fine: dict[str, dict[str, Any]] = {
        "leaves": {"low rank": 1, "plain": 2, "formed": 0, "local": 3, "leaves": 3},
        "euler": {"ratio": 0.2},
        "natural": {"ratio": 0.1, "peak": 0.9},
        "equal": {"step": 1e-6, "outputs": 1e-7, "moved": True},
        "cosine": {"localized": 0.95},
        "sharded": {"step": 1e-7},
    }
    worse: dict[str, dict[str, Any]] = {
        "leaves": {"plain": 1},
        "euler": {"ratio": 0.6},
        "natural": {"peak": 1.01},
        "equal": {"step": 1e-4},
        "cosine": {"localized": 0.84},
        "sharded": {"step": 1e-4},
    }
    assert list(fine) == list(measures.COLUMNS)
    for column, cell in fine.items():
        right = {**cell, "warnings": []}
        judged = partial(measures.trouble, entry, column)
        assert judged(right) == ""
        assert judged(right | worse[column]) != ""
        assert judged(right | {"warnings": ["keeps 7 bits"]}) == "warns: keeps 7 bits"
        assert measures.trouble(entry._replace(warns="7 bits"), column, right | {"warnings": ["keeps 7 bits"]}) == ""
        refused = {"error": "TypeError: no, because", "warnings": []}
        assert "wanted numbers" in judged(refused)
        expecting = entry._replace(refuses={column: "because"})
        assert measures.trouble(expecting, column, refused) == ""
        assert "wanted because" in measures.trouble(expecting, column, right)
        for name, value in cell.items():
            if isinstance(value, float):
                assert judged(right | {name: math.nan}) != "", name
                assert judged(right | {name: None}) != "", name


@pytest.mark.benchmarks
def test_a_low_rank_that_is_off_is_found() -> None:
    """The comparison of low rank with explicit particles fails where the latter are others."""
    entry = model("dense network", "plain")
    instance = entry.make()
    wrong = instance._replace(forward=_one_row_off(instance.forward))
    cell = measures.measure(entry, wrong, "equal", SMOKE)
    assert "wanted at most" in measures.trouble(entry, "equal", cell)


def _one_row_off(forward: Any) -> Any:
    """A model that is another one where all particles are evaluated together, as only the explicit ones are."""
    calls: list[None] = []

    def changed(params: Any, x: Any) -> Any:
        calls.append(None)
        return forward(params, x) * (1.01 if len(calls) == 1 else 1.0)

    return changed


@pytest.mark.benchmarks
def test_the_command_prints_the_table(tmp_path: Path, capsys: Any) -> None:
    """It names what it measured, writes the numbers, and keeps them for the next call."""
    command = ["--preset", "smoke", "--json", str(tmp_path / "zoo.jsonl"), "--model", "called twice", "--api", "plain"]
    assert cli.main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| model | API |")
    assert lines[2].startswith("| called twice | plain | 32 | 2, 2, 0 | 4 of 4 |")
    files = {"files": ["zoo.jsonl", "zoo.md"]}
    assert json.loads(lines[-1]) == {"experiment": "models", "preset": "smoke", "models": 1, "wrong": [], **files}
    result = store.read(tmp_path / "zoo.jsonl")
    result["cells"]["called twice (plain)"]["found"]["natural"]["peak"] = None
    store.write(tmp_path / "zoo.jsonl", result)
    assert cli.main([*command, "--draw"]) == 1
    assert "**wrong**" in capsys.readouterr().out
    assert cli.main(["--model", "no such"]) == 2


def test_the_pages_table_is_that_of_the_run() -> None:
    """Every model of the zoo has its line, made from the numbers, and none is wrong."""
    result = store.read(ROOT / "benchmarks/results/models.jsonl")
    page = (ROOT / "docs/models.md").read_text()
    assert f"{table.table(result)}\n\n{where(result)}" in page
    assert set(result["cells"]) == {table.cell_name(entry) for entry in MODELS}
    assert table.troubles(result) == []
    assert result["preset"] == "cpu"


# The inputs of the first table of the issue, one by one.


class Pair(nn.Module):
    """Two experts, stacked by ``nn.vmap`` over a Dense, and their sum."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        stacked = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=2)
        return stacked(3)(x).sum(axis=0)


@pytest.mark.parametrize("adapter", [linen_forward, pytest.param(low_rank_forward, marks=SLOW)])
def test_stacked_experts_keep_their_slices(adapter: Any) -> None:
    """Outputs have the model's shape, each expert its own deviation, and the loss that is reported is the true one."""
    x = jax.random.normal(jax.random.key(0), (64, 4))
    forward, _ = adapter(Pair(), x)
    instance = taught(forward, lambda key: Pair().init(key, x)["params"], x)
    solver = natural.natural_gradient(forward, SQUARES, 30, damping=1e-2)
    state = solver.init(instance.params, jax.random.key(1))
    explicit = jax.vmap(lambda params: Pair().apply({"params": params}, x))(solver.ensemble(state))
    assert explicit.shape == (30, 64, 3)
    step = jax.jit(solver.step)
    wanted, _ = jax.jit(solver.update)(state, explicit, instance.batch[1])
    found, info = step(state, instance.batch)
    for a, b in zip(jax.tree.leaves(found.position), jax.tree.leaves(wanted.position), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(info.loss, SQUARES(explicit.mean(axis=0), instance.batch[1]), rtol=1e-5)
    assert float(instance.loss_at(found.position)) < 0.8 * float(instance.loss_at(instance.params))


@pytest.mark.parametrize("api", ["plain", *(pytest.param(api, marks=SLOW) for api in ("linen", "nnx", "equinox"))])
def test_a_dictionary_is_read_leaf_by_leaf(api: str) -> None:
    """The outputs' samples come first in every leaf, so that localized slopes are each sample's own."""
    instance = model("dictionary of outputs", api).make()
    assert measures.cosines(instance, SMOKE)["localized"] > 0.99


LOCAL = [
    ("compiled layers", "plain"),
    ("rematerialised layers", "plain"),
    ("mapped over samples", "plain"),
    ("matrix on the left", "plain"),
    ("called twice", "plain"),
    ("compiled layers", "linen"),
    ("rematerialised layers", "linen"),
    ("compiled layers", "nnx"),
    ("rematerialised layers", "nnx"),
    ("compiled layers", "equinox"),
    ("called twice", "equinox"),
]


@pytest.mark.parametrize(("name", "api"), [*LOCAL[:6], *(pytest.param(*pair, marks=SLOW) for pair in LOCAL[6:])])
def test_layers_stay_local_however_written(name: str, api: str) -> None:
    """``jax.jit``, ``jax.checkpoint``, ``jax.vmap``, ``w @ x`` and a second call leave every leaf local, or say so."""
    instance = model(name, api).make()
    described = natural.describe(instance.outputs, instance.params, instance.batch[0])
    assert {leaf.localized for leaf in described.leaves} <= {"local", "as its layer"}
    assert described.lost == ()


@SLOW
@pytest.mark.parametrize(("name", "api"), LOCAL)
def test_their_directions_are_the_gradient(name: str, api: str) -> None:
    assert check(name, api, "cosine")["localized"] > 0.99


@pytest.mark.parametrize("api", ["linen", *(pytest.param(api, marks=SLOW) for api in ("nnx", "equinox"))])
def test_a_transformers_matrices_are_local(api: str) -> None:
    """Attention's matrices and the dense layers': all that are multiplied at few enough places of a sample."""
    instance = model("decoder transformer, tied", api).make()
    described = natural.describe(instance.outputs, instance.params, instance.batch[0])
    matrices = [leaf for leaf in described.leaves if "kernel" in leaf.name or "_proj" in leaf.name]
    assert len(matrices) >= 4
    assert {(leaf.deviation, leaf.localized) for leaf in matrices} == {("low rank", "local")}


@pytest.mark.parametrize(
    ("name", "api", "matrix"),
    [
        ("cross-attention", "linen", "kernel"),
        ("layer over several axes", "linen", "kernel"),
        ("OptimizedLSTMCell", "nnx", "kernel"),
        ("subclass of a layer", "nnx", "kernel"),
        ("transposed convolution", "equinox", "weight"),
        pytest.param("dilated convolution", "equinox", "weight", marks=SLOW),
        pytest.param("cross-attention", "nnx", "kernel", marks=SLOW),
        pytest.param("layer over several axes", "nnx", "kernel", marks=SLOW),
        pytest.param("OptimizedLSTMCell", "linen", "kernel", marks=SLOW),
        pytest.param("subclass of a layer", "linen", "kernel", marks=SLOW),
        pytest.param("subclass of a layer", "equinox", "weight", marks=SLOW),
    ],
)
def test_stock_layers_are_of_low_rank(name: str, api: str, matrix: str) -> None:
    """No leaf is refused, and no matrix is formed."""
    instance = model(name, api).make()
    described = natural.describe(instance.outputs, instance.params, instance.batch[0])
    kinds = {leaf.deviation for leaf in described.leaves if matrix in leaf.name}
    assert kinds == {"low rank"}


def test_training_mode_is_refused_or_has_a_key() -> None:
    """nnx modules in training mode: an error that says ``.eval()``; with a key, another mask for each."""
    module = nnx.Sequential(nnx.Linear(4, 6, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1)))
    forward, template = nnx_forward(module)
    params = eki_jax.xavier(template).sample(jax.random.key(0))
    with pytest.raises(ValueError, match=r"\.eval\(\)"):
        forward(params, vectors())
    keyed, _ = nnx_forward(module, rngs=True)
    one, two, again = (keyed(params, vectors(), key=jax.random.key(k)) for k in (0, 1, 0))
    assert (one == 0).any()
    assert (one != two).any()
    np.testing.assert_array_equal(one, again)


@pytest.mark.parametrize("api", ["linen", pytest.param("nnx", marks=SLOW)])
def test_statistics_follow_the_steps(api: str) -> None:
    """The solver's state has the running statistics, moved towards those of the mean particle's activations."""
    instance = model("batch norm, training mode", api).make()
    solver = instance.solver(lambda forward: eki_jax.euler(forward, instance.loss))
    ensemble = eki_jax.sample_ensemble(jax.random.key(0), eki_jax.gaussian(instance.params, 0.1), 8)
    state, _ = solver.step(solver.init(ensemble), instance.batch)
    _, wanted = instance.forward(solver.estimate(state), instance.batch[0], state=instance.state)
    for found, new, old in zip(*map(jax.tree.leaves, (state.model_state, wanted, instance.state)), strict=True):
        np.testing.assert_allclose(found, new, rtol=1e-5, atol=1e-6)
        assert bool(jnp.any(found != old))


def test_linen_takes_flags_and_two_inputs() -> None:
    """``train=``, streams of random numbers, collections that are written and a pair of inputs."""
    for name in ("batch norm, eval mode", "batch norm, training mode", "dropout, training mode", "tuple of inputs"):
        instance = model(name, "linen").make()
        assert bool(jnp.isfinite(instance.loss_at(instance.params)))
    module = in_linen.Dropped()
    with pytest.raises(ValueError, match="rngs"):
        linen_forward(module, vectors(), train=True)
    with pytest.raises(ValueError, match="batch_stats"):
        linen_forward(in_linen.BatchNormed(), vectors(), train=True)


def test_equinox_has_the_name_low_rank_forward() -> None:
    """The same adapter by the name that flax's has; a stock MLP takes a step of low rank."""
    import equinox as eqx

    from eki_jax.equinox import equinox_forward
    from eki_jax.equinox import low_rank_forward as of_equinox

    assert of_equinox is equinox_forward
    mlp = eqx.nn.MLP(4, 3, 6, 1, key=jax.random.key(0))
    forward, _ = of_equinox(mlp)
    params = eqx.filter(mlp, eqx.is_inexact_array)
    np.testing.assert_allclose(forward(params, vectors()), jax.vmap(mlp)(vectors()), rtol=1e-6)


def test_an_nnx_state_is_moved_as_it_is() -> None:
    """Directions have the parameters' own type, which ``nnx.Optimizer.update`` takes."""
    module = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    forward, _ = nnx_forward(module)
    x, labels = vectors(), jnp.arange(16) % 3
    params = nnx.state(module, nnx.Param)
    direction_of = natural.value_and_natural_direction(forward, CLASSES, 20, damping=1e-2)
    before, direction = direction_of(params, (x, labels), jax.random.key(0))
    assert isinstance(direction, nnx.State)
    optimizer = nnx.Optimizer(module, optax.sgd(1.0), wrt=nnx.Param)
    optimizer.update(module, direction)
    assert float(CLASSES(module(x), labels)) < float(before)


@SLOW
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("decoder transformer, tied", {}),
        ("decoder transformer, tied", {"norm_constraint": 2.0}),
        ("batch norm, training mode", {}),
        ("batch norm, eval mode", {}),
    ],
)
def test_the_defaults_do_not_diverge(name: str, settings: dict[str, Any]) -> None:
    """The transformer and the batch-norm network of the issue: the loss never ends above its start."""
    instance = model(name, "linen").make()
    solver = instance.solver(lambda forward: natural.natural_gradient(forward, instance.loss, **settings))
    start = solver.init(instance.params, jax.random.key(22))
    state, _ = jax.jit(lambda s: jax.lax.scan(lambda s, _: solver.step(s, instance.batch), s, None, 20))(start)
    assert float(instance.loss_at(solver.estimate(state))) < float(instance.loss_at(instance.params))


def sizes_in(jaxpr: Any) -> Iterator[int]:
    """Numbers of every value of a program."""
    for equation in jaxpr.eqns:
        yield from (getattr(variable.aval, "size", 0) for variable in equation.outvars)
        for parameter in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from sizes_in(inner)


def test_localized_sequences_stay_small() -> None:
    """B = 16, T = 32, V = 65: no value has a number for each pair of a sample's outputs."""
    samples, length, classes = 16, 32, 65
    module = nn.Sequential([nn.Embed(classes, 16), nn.tanh, nn.Dense(classes)])
    x = jnp.zeros((samples, length), jnp.int32)
    forward, template = linen_forward(module, x)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), template)
    direction_of = natural.value_and_natural_direction(forward, CLASSES, 20, localized=True)
    sizes = list(sizes_in(jax.make_jaxpr(direction_of)(params, (x, x), jax.random.key(0)).jaxpr))
    outputs = length * classes
    assert max(sizes) >= samples * outputs  # the outputs are among them
    assert max(sizes) < samples * outputs**2 / 10


@SLOW
def test_bfloat16_says_what_it_loses() -> None:
    """Parameters of 8 bits warn that small steps round away, and still train."""
    cell = check("bfloat16 parameters", "plain", "natural")
    assert any("7 bits" in text for text in cell["warnings"])
