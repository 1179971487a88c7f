"""``python -m benchmarks train``: one problem, one method, one folder with what came of it."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import jax

from benchmarks import methods
from benchmarks.problems import registry
from benchmarks.reporting import environment, print_result, save_result
from eki_jax import StepRefused
from eki_jax.training import Result, check_labels, fit

# Particles, samples a step, epochs: enough for the digits in a minute; the paper's J and batch for its networks.
_DIGITS = (1000, 100, 25)
_PAPER = (2000, 600, 20)
_KINDS = {"natural": (1000, 1000), "per_sample": (16, 100)}  # particles and batch
# Flags of the natural-gradient methods, named only where given.
_OWN = ("sigma", "damping", "rank", "rate", "norm_constraint")
_DAMPINGS = "1e-5 where dense layers are localized, else 1e-3"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks train",
        description="Train a network and report its test accuracy.\n"
        "The last line on standard output is one JSON object.",
        epilog="With --resume the problem, method, particles, batch and seed are those of the run that goes on.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = ", ".join(registry.names())
    parser.add_argument("--problem", metavar="P", help=f"one of {known} (default: digits-dnn, no download)")
    parser.add_argument("--method", metavar="M", help=f"one of {', '.join(methods.METHODS)} (default: eki-r)")
    parser.add_argument(
        "--particles",
        metavar="J",
        type=int,
        help="ensemble size (default: 1000, or 2000 for eki, meki, eki-r and meki-r on other data than digits)",
    )
    parser.add_argument(
        "--batch",
        metavar="B",
        type=int,
        help="samples a step (default: 1000 for natural-eki*; else 100 for digits, or 600)",
    )
    parser.add_argument(
        "--epochs",
        metavar="N",
        type=int,
        help="passes over the data (default: 25 for digits, else 20)",
    )
    parser.add_argument("--seed", metavar="S", type=int, help="of everything random (default: 0)")
    parser.add_argument("--learning-rate", metavar="R", type=float, help="of sgd, msgd and ste (default: 0.1)")
    parser.add_argument("--momentum", metavar="F", type=float, help="of meki, meki-r, msgd and ste (default: 0.9)")
    parser.add_argument(
        "--sigma", metavar="S", type=float, help="of natural-eki*: scale of the deviations (default: 0.1)"
    )
    parser.add_argument("--damping", metavar="L", type=float, help=f"of natural-eki*: lambda (default: {_DAMPINGS})")
    parser.add_argument("--rank", metavar="R", type=int, help="of natural-eki-lowrank (default: 1)")
    parser.add_argument(
        "--rate", metavar="E", type=float, help="of natural-eki*: eta (default: 1, or 0.5 if localized)"
    )
    parser.add_argument(
        "--norm-constraint",
        metavar="N",
        type=float,
        help="of natural-eki*: largest squared norm of a step (default: none, or 3 if localized)",
    )
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder for the results (default: a new one in runs/)")
    parser.add_argument(
        "--data", metavar="DIR", type=Path, help="folder of the data files; else EKI_JAX_DATA, else download"
    )
    parser.add_argument("--resume", metavar="DIR", type=Path, help="go on with the run in DIR")
    parser.add_argument(
        "--checkpoint-every",
        metavar="N",
        type=int,
        default=1,
        help="epochs between checkpoints; 0: the last (default: 1)",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no table of the leaves")
    return parser


def main(argv: list[str]) -> int:
    """Run the command line; 2 for what the user can mend, 130 after Ctrl-C."""
    arguments = parser().parse_args(argv)
    try:
        summary, result, out = run(arguments)
    except (ValueError, FileNotFoundError, StepRefused) as error:
        print(f"train: {error}", file=sys.stderr)
        return 2
    print(f"picture: {out / 'accuracy.png'}\nnumbers: {out / 'result.json'}", file=sys.stderr)
    print_result(summary)
    return 130 if result.interrupted else 0


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], Result, Path]:
    """Train as told; returns the summary, the result and the folder."""
    settings, epochs = _settings(arguments)
    out = arguments.resume or arguments.out or _new_folder(f"{settings['problem']}-{settings['method']}")
    _remember(out, {**settings, "epochs": epochs}, resume=arguments.resume is not None)
    problem = registry.get(settings["problem"], arguments.data)
    for name, (x, labels) in (("train", problem.train), ("test", problem.test)):
        check_labels(problem.forward, problem.template, x, labels, name=name)
    own = methods.Natural(**{name: settings[name] for name in _OWN if name in settings})
    method = methods.get(
        settings["method"],
        problem,
        settings["particles"],
        settings["learning_rate"],
        settings["momentum"],
        own,
    )
    description = None if arguments.quiet else methods.describe(settings["method"], problem, settings["batch"], own)
    if description is not None:
        print(description, file=sys.stderr)
    result = fit(
        method,
        problem.train,
        problem.test,
        batch_size=settings["batch"],
        epochs=epochs,
        key=jax.random.key(settings["seed"]),
        directory=out,
        settings=settings,
        resume=arguments.resume is not None,
        checkpoint_every=arguments.checkpoint_every,
        progress=not arguments.quiet,
    )
    first, last = result.history[0], result.history[-1]
    summary = {
        **settings,
        "epochs": len(result.history),
        **{name: last[name] for name in last if name.startswith("test_accuracy")},
        "test_accuracy_first_epoch": first["test_accuracy_mean"],
        "forward_passes": last["forward_passes"],
        "seconds": round(sum(row["seconds"] for row in result.history), 2),  # those before a resume included
        "device": environment()["device"],
    }
    command = f"python -m benchmarks train {_flags({**settings, 'epochs': epochs})}"
    save_result(out / "result.json", {"command": command, **summary, "history": result.history})
    return summary, result, out


def _settings(arguments: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """What the run is, and its epochs; of a resumed run, what it was, unless the command line says otherwise."""
    before: dict[str, Any] = {}
    if arguments.resume is not None:
        path = arguments.resume / "settings.json"
        if not path.is_file():
            raise FileNotFoundError(f"--resume {arguments.resume}: no settings.json there; wanted the folder of a run")
        before = json.loads(path.read_text(encoding="utf-8"))
    problem = arguments.problem or before.get("problem", "digits-dnn")
    chosen = arguments.method or before.get("method", "eki-r")
    particles, batch, epochs = _DIGITS if problem.startswith("digits") else _PAPER
    kind = methods.METHODS[chosen].kind if chosen in methods.METHODS else "ensemble"
    if kind in _KINDS:
        particles, batch = _KINDS[kind]
    defaults = {
        "method": "eki-r",
        "particles": particles,
        "batch": batch,
        "seed": 0,
        "learning_rate": 0.1,
        "momentum": 0.9,
    }
    settings = {"problem": problem}
    for name, default in defaults.items():
        given = getattr(arguments, name)
        settings[name] = before.get(name, default) if given is None else given
    if kind in _KINDS:
        for name in _OWN if kind == "natural" else ("sigma",):
            given = getattr(arguments, name)
            value = before.get(name) if given is None else given
            settings.update({} if value is None else {name: value})
    if kind == "gradient":
        settings["particles"] = 1
    return settings, arguments.epochs or before.get("epochs", epochs)


def _remember(out: Path, settings: dict[str, Any], *, resume: bool) -> None:
    """Write down what the run in ``out`` is, so that ``--resume`` alone can go on with it."""
    path = out / "settings.json"
    if path.exists() and not resume:
        raise ValueError(f"--out {out}: holds a run already; go on with it by --resume {out}, or name another folder")
    out.mkdir(parents=True, exist_ok=True)
    if not resume:
        path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def _new_folder(name: str) -> Path:
    number, folder = 1, Path("runs") / name
    while folder.exists():
        number += 1
        folder = Path("runs") / f"{name}-{number}"
    return folder


def _flags(settings: dict[str, Any]) -> str:
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in settings.items())
