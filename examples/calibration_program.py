"""A simulator as a program of its own: it reads parameters from a JSON file and writes its results to another.

A beam of one metre, clamped at one end, that bears a load of 3 N somewhere: its deflections at four places, by small
steps along it. It stands for any program that is there already, in whatever language.

    python examples/calibration_program.py parameters.json results.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

POINTS, LOAD = 200, 3.0


def deflections(stiffness: float, place: float, places: list[float]) -> list[float]:
    """Deflections w of ``stiffness w'' = LOAD max(place - x, 0)`` with ``w(0) = w'(0) = 0``, in metres."""
    if stiffness < 5.0:
        raise ValueError(f"the beam breaks at a stiffness of {stiffness:.3g} N m^2")
    width, deflection, slope, found = 1 / POINTS, 0.0, 0.0, [0.0]
    for i in range(POINTS):
        bending = LOAD * max(place - (i + 0.5) * width, 0.0) / stiffness
        deflection += width * (slope + 0.5 * width * bending)
        slope += width * bending
        found.append(deflection)
    return [found[round(x * POINTS)] for x in places]


def main(source: str, target: str) -> None:
    parameters = json.loads(Path(source).read_text())
    values = deflections(parameters["stiffness"], parameters["place"], [0.25, 0.5, 0.75, 1.0])
    Path(target).write_text(json.dumps({"deflection": values}))


if __name__ == "__main__":
    main(*sys.argv[1:])
