"""The examples of calibrations run, and show what they say."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from eki_jax import calibrate

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


def test_a_batch_is_one_call() -> None:
    """All members in each step's one call, where the callback alone would have one call a member (row 8)."""
    mean, sizes, steps = module("calibration_batches").main()
    assert sizes == [40] * steps
    np.testing.assert_allclose(mean, [0.7, -0.4], atol=0.05)


@pytest.mark.slow
def test_without_settings_a_call_is_one_member() -> None:
    """And chunks are as large as they are asked to be."""
    main = module("calibration_batches").main
    assert set(main(chunk_size=10)[1]) == {10}
    assert set(main(chunk_size=1)[1]) == {1}


def test_the_program_is_one_of_its_own(tmp_path: Path) -> None:
    """Its deflections are those of the beam: ``F p^2 (3 - p) / (6 S)`` at the end, for a load F at p."""
    simulate = module("calibration_command_line").simulate
    found = simulate({"stiffness": 12.0, "place": 1.0})["deflection"]
    places = np.array([0.25, 0.5, 0.75, 1.0])
    np.testing.assert_allclose(found, 3.0 * places**2 * (3 - places) / (6 * 12.0), rtol=1e-3)
    (failed,) = calibrate.map_particles(simulate, [{"stiffness": 1.0, "place": 0.5}])
    assert failed.reason == "RuntimeError: ValueError: the beam breaks at a stiffness of 1 N m^2"
    done = subprocess.run([sys.executable, module("calibration_command_line").PROGRAM], capture_output=True, text=True)
    assert "TypeError: main() missing 2 required positional arguments" in done.stderr


@pytest.mark.slow
def test_the_command_line_example_calibrates(tmp_path: Path) -> None:
    """And goes on from its files: another run starts no program."""
    example = module("calibration_command_line")
    calibration = example.main(tmp_path, particles=16)
    posterior = calibration.posterior()
    for name, truth in example.TRUTH.items():
        assert abs(posterior.mean[name] - truth) < 3 * posterior.sd[name]
    assert (tmp_path / "calibration.png").stat().st_size > 10_000
    assert calibrate.Calibration.load(tmp_path / "calibration.npz").done
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "members").iterdir()}
    example.main(tmp_path, particles=16)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "members").iterdir()} == kept


@pytest.mark.slow
def test_an_emulator_samples_the_posterior(tmp_path: Path) -> None:
    """Mean and standard deviation of the long chain on the simulator, with the runs of the calibration alone."""
    found = module("calibrate_emulate_sample").main(tmp_path / "picture.png", draws=20_000)
    for name, exact in found["simulator"].items():
        emulated = found["emulator"][name]
        assert abs(emulated.mean() - exact.mean()) < 0.15 * exact.std()
        assert emulated.std() == pytest.approx(exact.std(), rel=0.15)
    assert (tmp_path / "picture.png").stat().st_size > 10_000
