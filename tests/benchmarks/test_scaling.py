"""The scaling command predicts what the documentation says, and measures what a program does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import pytest

from benchmarks.harness import store
from benchmarks.scaling import cli, measured, predicted
from eki_jax import sharding

pytestmark = pytest.mark.benchmarks

ROOT = Path(__file__).parents[2]


def run(tmp_path: Path, *options: str) -> dict[str, Any]:
    assert cli.main([*options, "--output", str(tmp_path), "--images", str(tmp_path)]) == 0
    return store.read(tmp_path / "scaling.jsonl")


def test_the_page_shows_the_prediction(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The documentation shows what the command predicts."""
    result = run(tmp_path, "--predict-only")
    lines = [line.strip() for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    page = (ROOT / "docs/scaling.md").read_text()
    assert len(lines) == 18
    assert [line for line in lines if line not in page] == []
    assert (tmp_path / "scaling_predicted.png").stat().st_size < 200_000
    assert result["cells"] == {}


def test_rates_are_stated_on_the_command_line(tmp_path: Path) -> None:
    """The rates of the machine are stated on the command line."""
    slow = run(tmp_path, "--predict-only", "--local-bandwidth", "36", "--tflops", "125", "--messages", "1")
    row = next(r for r in slow["predicted"] if (r["network"], r["devices"], r["wins"]) == ("DNN 4", 8, True))
    network = predicted.networks()["DNN 4"]
    assert row["sent"] == 2 * 7 / 8 * network.outputs * network.parameters * 4
    assert row["communication_seconds"] == pytest.approx(row["sent"] / 36e9 + 2 * 3 * 5e-6)
    assert row["compute"] == pytest.approx(2000 * (4 * 600 * 573_910 + network.forward_flops) / 125e12)


def test_the_networks_are_the_papers() -> None:
    networks = predicted.networks()
    assert [(n.parameters, n.outputs) for n in networks.values()] == [(573_910, 600), (462_534, 500)]
    assert networks["DNN 4"].forward_flops == pytest.approx(2 * 600 * 573_000, rel=0.01)


def test_a_measurement_has_the_bytes_of_the_model() -> None:
    problem = measured.dense_workload(64, (16, 10), 32)
    machine = measured.machine_at_hand(2, problem, 16)
    assert machine.flops > 0
    assert machine.local.bandwidth > 0
    row = measured.measure(problem, "strong", "all_reduce", 2, 32, machine, 1)
    assert row.sent == pytest.approx(row.predicted_sent, rel=0.1)
    assert row.flops == pytest.approx(16 * (4 * 32 * problem.parameters + problem.forward_flops), rel=0.1)
    alone = row._replace(devices=1, seconds=2 * row.seconds)
    assert [one.speedup for one in measured.compared([alone, row])] == [1.0, 2.0]
    assert [one.efficiency for one in measured.compared([alone, row])] == [1.0, 1.0]


def test_the_committed_result_is_of_a_full_run() -> None:
    """The committed result is of a full run and says its kind."""
    result = cli.summarized(store.read(ROOT / "benchmarks/results/scaling.jsonl"))
    rows = [measured.Row(**row) for row in result["measured"]]
    cases = {(row.scaling, row.communication, row.devices) for row in rows}
    assert len(cases) == len(rows) == 2 * (len(sharding.COMMUNICATIONS) + 1) * 4
    assert "virtual" in result["kind"] or "NVIDIA" in result["kind"]
    for row in rows:
        if row.devices > 1:
            wide = 2 if row.communication == "bf16_sums" else 1  # a processor's compiler makes it float32
            assert row.sent == pytest.approx(wide * row.predicted_sent, rel=0.07)
    assert jax.__version__.split(".")[0] == result["environment"]["versions"]["jax"].split(".")[0]
