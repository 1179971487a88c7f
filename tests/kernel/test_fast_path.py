"""The fast path: every choice gives the same numbers, in place, in chunks, without copies of the ensemble."""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from eki_jax import direction, drift_norm, euler, losses, nesterov, priors
from eki_jax.compact import compact, compact_euler, expand
from eki_jax.ensembles import resample_around_mean, sample_ensemble
from eki_jax.kernel import blocks, products
from eki_jax.kernel import evaluate as evaluation
from eki_jax.losses import cross_entropy, supported_outputs
from eki_jax.losses.support import evaluate_support

J, BATCH, CLASSES = 256, 40, 10
WIDTHS = ((196, 24), (24,), (24, CLASSES), (CLASSES,))


def network(params: Any, x: Any) -> Any:
    w, b, v, c = params
    return jax.nn.softmax(jax.nn.relu(x @ w + b) @ v + c)


def dense_ensemble(size: int = J, dtype: Any = jnp.float32) -> Any:
    keys = jax.random.split(jax.random.key(0), len(WIDTHS))
    return tuple(0.3 * jax.random.normal(k, (size, *shape), dtype) for k, shape in zip(keys, WIDTHS, strict=True))


def batch() -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(BATCH, 196)), jnp.float32), jnp.asarray(rng.integers(0, CLASSES, BATCH))


def compiled_step(solver: Any) -> Any:
    state = jax.eval_shape(lambda: solver.init(dense_ensemble()))
    return jax.jit(solver.step, donate_argnums=0).lower(state, jax.eval_shape(batch)).compile()


def ensemble_bytes() -> int:
    return 4 * J * sum(math.prod(shape) for shape in WIDTHS)


def array_bytes(text: str) -> dict[str, int]:
    """Of every kind of instruction in a compiled program: the bytes of its largest result."""
    widths = {"f32": 4, "bf16": 2, "s32": 4, "pred": 1}
    largest: dict[str, int] = {}
    for dtype, dims, kind in re.findall(r"= (\w+)\[([\d,]*)\]\S* ([\w-]+)\(", text):
        size = widths.get(dtype, 8) * math.prod(int(n) for n in dims.split(",") if n)
        largest[kind] = max(largest.get(kind, 0), size)
    return largest


# ------------------------------------------------------------------------------------------------ same numbers


@pytest.mark.parametrize("contraction", ["outputs", "particles"])
@pytest.mark.parametrize("columns", [70, 128, 1000])
def test_blocks_equal_the_double_loop(
    x64: None, monkeypatch: pytest.MonkeyPatch, contraction: Any, columns: int
) -> None:
    """Blocks of any width equal the double loop.

    Widths that divide the leaf's 210 columns, leave a remainder, and exceed it.
    """
    rng = np.random.default_rng(1)
    ensemble = {"w": jnp.asarray(rng.normal(size=(6, 21, 10)) + 2), "b": jnp.asarray(rng.normal(size=(6, 3)))}
    outputs, cotangents = (jnp.asarray(rng.normal(size=(6, 4))) for _ in range(2))
    monkeypatch.setattr(products, "block_width", lambda anomalies, ensemble: columns)
    found = direction(ensemble, outputs, cotangents, contraction=contraction)
    np.testing.assert_allclose(oracle.rows(found), oracle.direction(ensemble, outputs, cotangents), rtol=1e-10)


def test_the_cheaper_contraction_is_compiled() -> None:
    """The cheaper contraction is the one that is compiled."""

    def operations(size: int, outputs: int, parameters: int, contraction: Any) -> float:
        u, g = jnp.zeros((size, parameters)), jnp.zeros((size, outputs))
        compiled = jax.jit(lambda *a: direction(*a, contraction=contraction)).lower(u, g, g).compile()
        return compiled.cost_analysis()["flops"]

    for shape in ((300, 20, 60), (40, 300, 60)):
        chosen, both = operations(*shape, None), [operations(*shape, c) for c in ("outputs", "particles")]
        assert chosen == min(both) < 0.5 * max(both)


def test_the_norm_does_not_form_d() -> None:
    """The norm does not form D where outputs are fewer than particles."""
    z = jnp.asarray(np.random.default_rng(0).normal(size=(400, 8)), jnp.float32)
    text = jax.jit(drift_norm).lower(z, z).compile().as_text()
    entry = text[text.index("ENTRY") :]
    assert "f32[400,400]" not in entry  # only in the branch for sums that cancel
    np.testing.assert_allclose(drift_norm(z, z), np.linalg.norm(oracle.drift(z, z)), rtol=1e-4)


@pytest.mark.parametrize("chunk_size", [None, 1, 3, 4, 100])
def test_chunks_of_particles_change_nothing(chunk_size: int | None) -> None:
    ensemble, (x, labels) = dense_ensemble(8), batch()
    whole = jax.vmap(network, in_axes=(0, None))(ensemble, x)
    np.testing.assert_allclose(evaluation.evaluate(network, ensemble, x, chunk_size=chunk_size), whole, atol=1e-6)
    entries, reduced = evaluate_support(network, cross_entropy(), ensemble, x, labels, chunk_size=chunk_size)
    wanted, of_entries = supported_outputs(cross_entropy(), whole, labels)
    np.testing.assert_allclose(entries, wanted, atol=1e-6)
    assert reduced(wanted, labels) == of_entries(wanted, labels)


def test_targets_are_chunked_with_particles() -> None:
    """Targets of each particle are chunked with it."""
    ensemble, x = jnp.arange(5.0)[:, None], jnp.ones(1)
    targets = jnp.arange(5)[:, None] % 2
    forward = lambda u, x: jnp.stack([u, 10 * u], axis=-1)
    entries, _ = evaluate_support(forward, cross_entropy(), ensemble, x, targets, targets_axis=0, chunk_size=2)
    np.testing.assert_array_equal(entries[:, 0], [0, 10, 2, 30, 4])


def test_label_and_one_hot_take_the_same_step() -> None:
    """One label and one-hot labels take the same step.

    The support of 40 numbers a particle against the general path of 400; soft labels take the latter.
    """
    x, labels = batch()
    solver = euler(network, cross_entropy())
    state = solver.init(dense_ensemble())
    by_support, info = solver.step(state, (x, labels))
    general, same = solver.step(state, (x, jax.nn.one_hot(labels, CLASSES)))
    np.testing.assert_allclose(info.drift_norm, same.drift_norm, rtol=1e-4)
    for one, other in zip(by_support.ensemble, general.ensemble, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


def test_a_non_finite_norm_moves_nothing() -> None:
    """A step whose norm is not finite leaves the ensemble."""
    for solver in (
        euler(None, losses.squared_error(), lambda norm, *_: norm * jnp.nan),
        nesterov(None, losses.squared_error(), lambda norm, *_: norm * jnp.nan),
    ):
        state = solver.init(jnp.arange(6.0).reshape(3, 2))
        after, info = solver.update(state, state.ensemble, jnp.zeros(2))
        assert not info.is_finite
        np.testing.assert_array_equal(after.ensemble, state.ensemble)
        np.testing.assert_array_equal(after.position, state.position)


# ---------------------------------------------------------------------------------------------- memory, layout


@pytest.mark.parametrize("precision", [None, "bf16"])
@pytest.mark.parametrize(("make", "copies"), [(euler, 1.3), (nesterov, 2.3)], ids=["euler", "nesterov"])
def test_a_donated_step_stays_in_memory(make: Any, copies: float, precision: str | None) -> None:
    """A donated step stays near the ensemble's memory.

    The compiler's own account of arguments, results and temporaries, less what it reuses.
    """
    compiled = compiled_step(make(network, cross_entropy(), precision=precision))
    memory, state_copies = compiled.memory_analysis(), 1 if make is euler else 2
    assert memory.alias_size_in_bytes >= state_copies * ensemble_bytes()
    peak = memory.temp_size_in_bytes + state_copies * ensemble_bytes()
    assert peak <= copies * ensemble_bytes() + 2 * 4 * J * BATCH * CLASSES
    assert array_bytes(compiled.as_text()).get("copy", 0) < ensemble_bytes() / 4


def test_the_step_forms_nothing_large() -> None:
    """The compiled step transposes no ensemble and keeps no outputs of all classes."""
    text = compiled_step(euler(network, cross_entropy())).as_text()
    assert array_bytes(text).get("transpose", 0) < ensemble_bytes() / 8  # a chunk's, where it is packed
    assert not re.search(rf"\[{J},{BATCH},{CLASSES}\]", text)
    whole = jax.jit(lambda e, x: jax.vmap(network, in_axes=(0, None))(e, x)).lower(dense_ensemble(), batch()[0])
    assert re.search(rf"\[{J},{BATCH},{CLASSES}\]", whole.compile().as_text())  # the pattern would be found


def test_chunks_follow_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks follow the budget and one particle is always allowed."""
    ensemble, (x, _) = dense_ensemble(), batch()
    one = evaluation.activation_bytes(network, ensemble, x)
    assert one >= 4 * BATCH * (24 + CLASSES)
    monkeypatch.setattr(evaluation, "_CACHE_BYTES", 5 * one)
    assert evaluation.default_chunk_size(network, ensemble, x) == 5
    monkeypatch.setattr(evaluation, "_CACHE_BYTES", 1)
    assert evaluation.default_chunk_size(network, ensemble, x) == 1
    monkeypatch.setattr(evaluation, "_CACHE_BYTES", 2**40)
    assert evaluation.default_chunk_size(network, ensemble, x) == ensemble_bytes() // 8 // one


@pytest.mark.parametrize(("total", "width", "wanted"), [(7840, 500, 490), (210, 128, 105), (211, 128, 105), (13, 4, 3)])
def test_block_widths_divide_a_leaf_evenly(total: int, width: int, wanted: int) -> None:
    """Block widths divide a leaf evenly where they can."""
    assert blocks._even_width(total, width) == wanted


# ---------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("contraction", ["outputs", "particles"])
@pytest.mark.parametrize(("precision", "least", "most"), [("highest", 0, 1e-5), ("bf16", 1e-4, 1e-2)])
def test_precision_has_a_measured_error(contraction: Any, precision: str, least: float, most: float) -> None:
    """Against float64; the lower bounds show that bf16 is really used. The offset is removed before rounding."""
    rng = np.random.default_rng(2)
    args = [jnp.asarray(rng.normal(size=(30, n)) + offset, jnp.float32) for n, offset in ((50, 10), (20, 10), (20, 0))]
    found = direction(*args, contraction=contraction, precision=precision)
    wanted = oracle.direction(*args)
    error = np.linalg.norm(np.asarray(found) - wanted) / np.linalg.norm(wanted)
    assert least <= error <= most
    assert found.dtype == jnp.float32


@pytest.mark.slow
def test_compact_follows_euler_in_half_the_memory() -> None:
    """Compact storage follows Euler and halves the memory."""
    x, labels = batch()
    solvers = euler(network, cross_entropy()), compact_euler(network, cross_entropy())
    states = [solver.init(dense_ensemble()) for solver in solvers]
    for _ in range(5):
        states = [solver.step(state, (x, labels))[0] for solver, state in zip(solvers, states, strict=True)]
    wanted, found = oracle.rows(states[0].ensemble), oracle.rows(expand(states[1].ensemble))
    moved = wanted - oracle.rows(dense_ensemble())
    assert np.linalg.norm(found - wanted) < 0.1 * np.linalg.norm(moved)
    assert np.linalg.norm((found - wanted).mean(axis=0)) < 0.03 * np.linalg.norm(moved.mean(axis=0))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(states[1].ensemble.deviations))
    assert size == ensemble_bytes() / 2


def test_a_compact_mean_moves_by_small_steps() -> None:
    """The mean of a compact ensemble moves by less than its bfloat16 spacing.

    At 1000, bfloat16 numbers are 4 apart; steps of a tenth still arrive.
    """
    start = 1000 + jnp.linspace(-1.0, 1.0, 5)[:, None]
    solver = compact_euler(lambda u, x: u, losses.squared_error(), lambda *_: 0.1)
    state, _ = solver.step(solver.init(start), (None, jnp.array([998.0])))
    np.testing.assert_allclose(state.ensemble.mean[0, 0], 1000 - 0.1 * 0.5 * 2, rtol=1e-6)
    assert compact(start.astype(jnp.bfloat16)).mean.dtype == jnp.float32


def test_a_failed_particle_moves_no_compact_one() -> None:
    """A failed particle does not move a compact ensemble."""
    solver = compact_euler(None, losses.squared_error())
    state = solver.init(jnp.arange(6.0).reshape(3, 2))
    outputs = jnp.full((3, 2), jnp.nan)
    after, info = solver.update(state, outputs, jnp.zeros(2))
    assert int(info.failed) == 3
    np.testing.assert_array_equal(expand(after.ensemble), expand(state.ensemble))
    with pytest.raises(TypeError, match="forward: None"):
        solver.step(state, (None, jnp.zeros(2)))


# ------------------------------------------------------------------------------------------------------ drawing


def test_draws_are_those_of_each_key() -> None:
    """Draws are those of each particle's own key.

    Whatever the chunks: numbers come from fold_in(key, particle) and jax.random.normal of the leaf's shape.
    """
    key, template = jax.random.key(3), {"b": jnp.zeros(10), "w": jnp.zeros((7, 10))}
    prior = priors.gaussian(template, 0.5)
    drawn = sample_ensemble(key, prior, 6)
    for particle in range(6):
        keys = jax.random.split(jax.random.fold_in(key, particle), 2)
        for k, name in zip(keys, ("b", "w"), strict=True):
            wanted = 0.5 * jax.random.normal(k, template[name].shape)
            np.testing.assert_allclose(drawn[name][particle], wanted, rtol=1e-6)


def test_draws_do_not_depend_on_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    from eki_jax.ensembles import drawing

    prior = priors.gaussian(jnp.zeros((3, 5)), 1.0)
    ensemble = sample_ensemble(jax.random.key(0), prior, 9)
    redrawn = resample_around_mean(jax.random.key(1), ensemble, prior, 7)
    monkeypatch.setattr(drawing, "_DRAW_BYTES", 150)  # two particles
    np.testing.assert_allclose(sample_ensemble(jax.random.key(0), prior, 9), ensemble, rtol=1e-6)
    np.testing.assert_allclose(resample_around_mean(jax.random.key(1), ensemble, prior, 7), redrawn, atol=1e-6)
