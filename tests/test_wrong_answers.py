"""Inputs that were once answered without a word, wrongly: an error that names them, or a refused step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eki_jax
from eki_jax import compact, edf, semi_supervised
from eki_jax.checkpoints import Checkpoints
from eki_jax.flows import square_root_flow

U = jax.random.normal(jax.random.key(0), (8, 3))
X = jax.random.normal(jax.random.key(1), (5, 3))
BATCH = (X, jnp.ones(5))
LOSS = eki_jax.squared_error()
WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "targets_axis": (lambda: eki_jax.euler(forward, LOSS, targets_axis=1), "targets_axis: 1; wanted 0 or None"),
    "a column of steps": (lambda: eki_jax.constant_step_size(jnp.ones((4, 1))), r"step_size: of shape \(4, 1\)"),
    "a negative step": (lambda: eki_jax.constant_step_size(np.float32(-1)), "step_size: -1"),
    "eps without bound": (lambda: eki_jax.frobenius_step_size(1.0, np.inf), "eps: inf; wanted a finite number"),
    "a negative eps": (lambda: eki_jax.frobenius_step_size(2.0, np.float32(-1)), "eps: -1"),
    "a scale of NaN": (lambda: eki_jax.gaussian(jnp.zeros(3), np.nan), "scale: has values that are not finite"),
    "a negative scale": (lambda: eki_jax.gaussian(jnp.zeros(3), -1.0), "scale: -1"),
    "a factor without bound": (
        lambda: eki_jax.gaussian(jnp.zeros(3), factor=np.full((3, 3), np.inf)),
        "factor: has values that are not finite",
    ),
    "noise of another shape": (
        lambda: eki_jax.perturb(jax.random.key(0), U, eki_jax.gaussian(jnp.zeros(1), 1.0), 0.1),
        r"prior: shape \(1,\), but the particles have \(3,\)",
    ),
    "an indefinite precision": (
        lambda: eki_jax.squared_error(np.diag([1.0, -5.0]))(jnp.ones(2), jnp.zeros(2)),
        "precision: least eigenvalue -5",
    ),
    "losses of NaN": (lambda: eki_jax.best_particle(U, jnp.full(8, jnp.nan)), "losses: none is finite"),
    "a node out of range": (lambda: semi_supervised.observed_value(jnp.ones(5), [7]), "nodes: 7 to 7; wanted 0 to 4"),
    "labels that broadcast": (
        lambda: semi_supervised.mean_squared_error(jnp.ones(5), jnp.ones((5, 1))),
        r"shape \(5, 1\)",
    ),
    "a negative rate": (lambda: edf.edf_g(-1.0), "learning_rate: -1"),
    "a rate of NaN": (lambda: edf.edf_g(jnp.nan), "learning_rate: nan"),
    "whole numbers for deviations": (lambda: compact.compact(U, int), "dtype: <class 'int'>; wanted a floating-point"),
    "an imaginary part": (lambda: eki_jax.euler(forward, LOSS).init(U + 1j), "ensemble: dtype complex64"),
    "another solver's state": (
        lambda: eki_jax.euler(forward, LOSS).step(eki_jax.nesterov(forward, LOSS).init(U), BATCH),
        "state: a NesterovState; wanted the EulerState",
    ),
}


def forward(params: Any, x: Any) -> Any:
    return x @ params


@pytest.mark.parametrize("name", WRONG)
def test_it_is_an_error_that_names_it(name: str) -> None:
    call, words = WRONG[name]
    with pytest.raises((TypeError, ValueError), match=words):
        call()


def test_checkpoints_are_in_a_folder_and_counted(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is a file; wanted a folder"):
        Checkpoints(tmp_path / "file")
    checkpoints = Checkpoints(tmp_path / "run")
    with pytest.raises(ValueError, match="-1"):
        checkpoints.save(-1, {"a": jnp.zeros(2)}, notes={})
    checkpoints.close()


def test_a_step_beyond_all_numbers_is_refused() -> None:
    solver = eki_jax.euler(forward, LOSS, eki_jax.constant_step_size(1e38))
    state, info = solver.step(solver.init(U), (X, 1e6 * jnp.ones(5)))
    assert not bool(info.moved)
    assert int(info.reason) == eki_jax.Reason.NOT_FINITE
    np.testing.assert_array_equal(state.position, U)


@pytest.mark.parametrize("targets", [jnp.zeros(5, jnp.int32), jnp.full((5, 3), 7 / 3)], ids=["logits", "soft labels"])
def test_no_probabilities_are_refused(targets: Any) -> None:
    """Logits in the place of probabilities, and labels that sum to seven, are NaN for the loss: no step is taken."""
    model = lambda params, x: jnp.outer(x @ params, jnp.arange(3.0) - 1) if targets.ndim == 1 else jnp.ones((5, 3)) / 3
    solver = eki_jax.euler(model, eki_jax.cross_entropy())
    state, info = solver.step(solver.init(U), (X, targets))
    assert not bool(info.moved)
    assert int(info.failed) == len(U)
    np.testing.assert_array_equal(state.position, U)


def test_flows_leave_a_failed_particle_out() -> None:
    """The others move as if it were not there, and its own row says that it failed."""
    first = lambda params, x: x[:, :1] @ params[:1]
    broken = U.at[2, 1].set(jnp.nan)
    for of in (eki_jax.vector_field(first, LOSS), square_root_flow(first, LOSS)):
        found, wanted = of(0.0, broken, BATCH), of(0.0, jnp.delete(U, 2, axis=0), BATCH)
        assert np.isnan(found[2]).all()
        np.testing.assert_allclose(jnp.delete(found, 2, axis=0), wanted, rtol=1e-4, atol=1e-5)
