"""Calibrate a program that is started on the command line, once for each member, several at a time.

The program reads a JSON file and writes one (``calibration_program.py`` beside this file). Each run has a folder of
its own, an end to its time, and is not run again after a crash; a run that fails leaves its error in the report.
Threads are enough: what works is the programs that they wait for.

    python examples/calibration_command_line.py --out runs/beam --workers 4
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from eki_jax import calibrate

PROGRAM = Path(__file__).with_name("calibration_program.py")
TRUTH = {"stiffness": 12.0, "place": 0.7}
SD = 1e-3  # of a measured deflection, in metres


def simulate(member: dict[str, float], program: Path = PROGRAM) -> dict[str, np.ndarray]:
    """One run of the program; its last line on standard error becomes the member's."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "parameters.json", Path(folder) / "results.json"
        source.write_text(json.dumps({name: float(value) for name, value in member.items()}))
        command = [sys.executable, str(program), str(source), str(target)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)  # which ends the program too
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        return {name: np.array(values) for name, values in json.loads(target.read_text()).items()}


def main(out: Path, workers: int = 2, particles: int = 20) -> calibrate.Calibration:
    """Calibrates the beam, and writes ``calibration.npz`` and ``calibration.png``."""
    out.mkdir(parents=True, exist_ok=True)
    truth = simulate(TRUTH)["deflection"]
    calibration = calibrate.Calibration(
        prior={
            "stiffness": calibrate.positive(mean=15.0, sd=8.0),  # N m^2
            "place": calibrate.bounded(0.0, 1.0),  # of the load, in metres
        },
        data={"deflection": truth + SD * np.random.default_rng(0).normal(size=4)},
        noise=SD**2,
        particles=particles,
    )
    run = partial(calibrate.map_particles, simulate, retries=1, directory=out / "members")
    with ThreadPoolExecutor(workers) as pool:
        while not calibration.done:
            print(calibration.tell(run(calibration.ask(), executor=pool)))
            calibration.save(out / "calibration.npz")
        posterior = calibration.posterior()
        predictions = run(posterior.members(), executor=pool)
    print(posterior)
    calibration.plot(predictions=predictions).savefig(out / "calibration.png", dpi=100)
    return calibration


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/beam"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--particles", type=int, default=20)
    main(**vars(parser.parse_args()))
