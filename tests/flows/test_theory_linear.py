"""The slides' figure: flow, iteration and closed form of a linear problem agree."""

from __future__ import annotations

import pytest

from benchmarks.harness import store
from benchmarks.paper import cli


@pytest.mark.slow
def test_flow_and_iteration_agree(tmp_path):
    """Flow and iteration lie on top of each other."""
    summary = cli.run("linear", "smoke", tmp_path, None, 3)
    found = {(row["name"], row["quantity"]): row["ours"] for row in summary["rows"]}
    for name, gap, order in (("EKI", 1e-3, 1.0), ("Nesterov EKI", 0.03, 0.5)):
        assert found[name, "largest relative distance of the flow from its closed form"] < 1e-6
        assert found[name, "largest relative distance of the iteration from the flow"] < gap
        assert abs(found[name, "order in dt of the distance of the iteration from the flow"] - order) < 0.1
    last = "l2 error after 1000 steps, iteration"
    assert found["Nesterov EKI", last] < 0.7 * found["EKI", last]
    record = store.read(tmp_path / "linear.jsonl")
    assert record["experiment"] == "linear"
    assert len(record["curves"]["EKI"]["flow"]) == len(record["at_steps"])
    assert (tmp_path / "linear.png").stat().st_size > 10_000
