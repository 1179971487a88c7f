"""``python -m benchmarks accelerator``: all that is to be measured on a GPU or a TPU, within a budget of seconds.

Correctness comes first, and nothing else is run where it fails. Then come the rate that anchors the prediction of
scaling, the performance table, and the paper's cells in the order of their value for the time they take. What is
finished is kept: the same command goes on with what is left.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness import store
from benchmarks.harness.command import Parser, Refused, command, folder, number, require, say
from benchmarks.reporting import plain, print_result
from eki_jax.training.files import claimed

_ROOT = Path(__file__).parents[2]
_GRACE = 60  # seconds in which a stage that is stopped saves what it has


class Stage(NamedTuple):
    """A part of the work.

    Attributes:
        name: As the record has it.
        arguments: Of the interpreter.
        seconds: What it takes, about, where that is known.
    """

    name: str
    arguments: list[str]
    seconds: float | None = None


# The parts of the performance table that a device has: what others' libraries do on processors is known already.
_PARTS = ("steps", "natural", "frameworks", "growth", "precision")
# preset -> preset of `performance`, and its parts
_PERFORMANCE = {"smoke": ("quick", ("steps",)), "full": ("default", _PARTS)}
# Of every stage whose file names no other.
_PRECISION = "float32, multiplied as JAX does by itself"
_MOST_CELLS = {"smoke": 1, "full": None}


@command("accelerator")
def main(argv: list[str]) -> int:
    """Run what is left, stage by stage, until all is done or the budget is spent."""
    arguments = _parser().parse_args(argv)
    require("matplotlib", "flax", "optax", "orbax.checkpoint")
    arguments.out = arguments.out.resolve()
    with claimed(arguments.out, ".accelerator.lock"):
        record = Record(arguments.out / "accelerator.jsonl", arguments.preset, arguments.seed)
        end = time.monotonic() + arguments.budget
        left = _run(arguments, record, end)
    print_result({"command": "accelerator", "device": record.device, "done": len(record.done), "left": left})
    if left:
        say(f"{len(left)} stages are left; the same command goes on with them")
    return 0


def _run(arguments: argparse.Namespace, record: Record, end: float) -> list[str]:
    """Run the stages in their order; returns the names of those that are left."""
    before = _before_the_cells(arguments)
    left = []
    for stage in before:
        if not _done(stage, record, end) and stage.name == "correctness":
            raise Refused("the budget was spent before the first stage was over; wanted a larger --budget")
        if stage.name == "correctness":
            _say_device(record)
    left = [stage.name for stage in before if stage.name not in record.done]
    if "scaling" in left or time.monotonic() >= end:
        return [*left, "the paper's cells"]
    planning = Stage("plan", _worker(stage="plan", preset=arguments.preset, out=arguments.out, seed=arguments.seed))
    if not _done(planning, record, end, again=True):
        return [*left, "the paper's cells"]
    for stage in _cells(arguments):  # none of which is finished: the plan has looked
        if not _done(stage, record, end, again=True):
            left.append(stage.name)
    return left


def _before_the_cells(arguments: argparse.Namespace) -> list[Stage]:
    out, preset = str(arguments.out), arguments.preset
    size, parts = _PERFORMANCE[preset]
    performance = ["-m", "benchmarks", "performance", "--preset", size, "--out", out]
    return [
        Stage("correctness", _worker(stage="correctness", preset=preset, out=out)),
        Stage("scaling", ["-m", "benchmarks", "scaling", "--anchor", "--preset", preset, "--out", out]),
        *[Stage(f"performance, {part}", [*performance, "--parts", part]) for part in parts],
    ]


def _cells(arguments: argparse.Namespace) -> list[Stage]:
    jobs = store.result(arguments.out / "plan.jsonl", "run the same command again")["jobs"]
    data = None if arguments.data is None else arguments.data.resolve()
    common = {"stage": "cell", "preset": arguments.preset, "out": arguments.out, "data": data}
    return [
        Stage(
            f"paper, {job['table']}: {job['name']}, seed {job['seed']}",
            _worker(**common, table=job["table"], name=job["name"], seed=job["seed"]),
            job["seconds"],
        )
        for job in jobs[: _MOST_CELLS[arguments.preset]]
    ]


def _worker(**task: Any) -> list[str]:
    return ["-m", "benchmarks.accelerator.worker", json.dumps(plain(task))]


def _done(stage: Stage, record: Record, end: float, *, again: bool = False) -> bool:
    """Whether a stage is finished: before, or now. A failed one is said, and left for the next call."""
    if stage.name in record.done and not again:
        return True
    if (limit := end - time.monotonic()) <= 0:
        return False
    about = "" if stage.seconds is None else f", about {stage.seconds:.0f} s"
    say(f"{stage.name}{about}; {limit:.0f} s are left")
    started = time.monotonic()
    code = run(stage.arguments, limit)
    record.keep(stage.name, {0: "done", None: "stopped"}.get(code, "failed"), time.monotonic() - started)
    if code and stage.name in ("correctness", "plan"):
        raise Refused(f"{stage.name}: failed, as it says above; nothing else was run")
    if code:
        say(f"{stage.name}: failed, as it says above; left for the next call")
    return code == 0


def run(arguments: list[str], limit: float) -> int | None:
    """The exit code of a process that runs a stage; None where it was stopped at the limit.

    What it prints goes to standard error. It gets a Ctrl-C, so that it saves, before it is ended.
    """
    # Each process takes what it needs of a GPU's memory, not most of it: stages start processes of their own. Ctrl-C of
    # the terminal comes to this one alone, since a second signal would end a stage before it has saved.
    variables = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ}
    process = subprocess.Popen([sys.executable, *arguments], cwd=_ROOT, env=variables, stdout=2, start_new_session=True)
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class Record:
    """What was done, with its day: ``accelerator.jsonl``.

    Args:
        path: Its file.
        preset: Preset of the run.
        seed: Seed of the run.

    Raises:
        Refused: It is of another preset or seed.
    """

    def __init__(self, path: Path, preset: str, seed: int) -> None:
        self._path = path
        self._head = {"command": "accelerator", "preset": preset, "seed": seed}
        found = store.earlier(path, command="accelerator") or {}
        if found and (other := store.differences(found, self._head)):
            raise Refused(f"{path}: holds something else ({other}); name another by --out")
        self.stages: dict[str, dict[str, Any]] = found.get("stages", {})

    @property
    def done(self) -> list[str]:
        """The names of what is finished, the paper's cells included."""
        return [name for name, stage in self.stages.items() if stage["status"] == "done" and name != "plan"]

    @property
    def device(self) -> str | None:
        """The device, as the first stage saw it."""
        path = self._path.with_name("correctness.jsonl")
        return store.read(path)["environment"]["device"] if path.is_file() else None

    def keep(self, name: str, status: str, seconds: float) -> None:
        """Write down how a stage ended; the seconds of earlier calls count too."""
        seconds += self.stages.get(name, {}).get("seconds", 0.0)
        when = datetime.now(UTC).isoformat(timespec="seconds")
        self.stages[name] = {"status": status, "seconds": round(seconds, 1), "date": when}
        about = {"device": self.device, "precision": _PRECISION, "stages": self.stages}
        store.write(self._path, {**self._head, **about})


def _say_device(record: Record) -> None:
    if (record.device or "").startswith("cpu"):
        say("no accelerator was found: everything runs on the processor, and says nothing about one")
    else:
        say(f"device: {record.device}; its steps are those of the processor")


def _parser() -> Parser:
    parser = Parser(prog="python -m benchmarks accelerator", description=__doc__)
    parser.add_preset(
        choices=("smoke", "full"), default="full", help="smoke: a minute or two, on a processor too (default: full)"
    )
    words = "seconds (default: 3600); what does not fit is left for the next call, and a running stage is stopped"
    parser.add_argument("--budget", metavar="SECONDS", type=number(), default=3600, help=words)
    words = "folder for the results, and of those that a call goes on with (default: runs/accelerator)"
    parser.add_argument("--out", metavar="DIR", type=folder, default=Path("runs/accelerator"), help=words)
    parser.add_data()
    parser.add_seed(default=0)
    return parser
