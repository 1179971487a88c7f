"""``python -m benchmarks train``: one problem, one method, one folder with what came of it."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from benchmarks import methods, precision
from benchmarks.harness import store
from benchmarks.harness.command import Parser, Refused, command, folder, number, say, whole
from benchmarks.problems import registry
from benchmarks.reporting import environment, print_result, save_result
from eki_jax.training import Result, check_labels, fit

# Particles, samples a step, epochs: enough for the digits in a minute; the paper's J and batch for its networks.
_DIGITS = (1000, 100, 25)
_PAPER = (2000, 600, 20)
_KINDS: dict[str, dict[str, Any]] = {
    "natural": {"particles": 1000, "batch": 1000},
    "per_sample": {"particles": 3, "batch": 100, "learning_rate": 0.03, "sigma": 0.05},
}
# Flags of the natural-gradient methods, named only where given.
_OWN = ("sigma", "damping", "rank", "rate", "norm_constraint")
_DAMPINGS = "1e-5 where dense layers are localized, else 1e-3"


def parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="python -m benchmarks train",
        description="Train a network and report its test accuracy. "
        "The last line on standard output is one JSON object.",
        epilog="With --resume all settings are those of the run that goes on; more epochs may be named.",
    )
    known = ", ".join(registry.names())
    add = parser.add_argument
    add("--problem", metavar="P", help=f"one of {known} (default: digits-dnn, no download)")
    add("--method", metavar="M", help=f"one of {', '.join(methods.METHODS)} (default: eki-r)")
    words = (
        "ensemble size (default: 1000, 2000 for eki, meki, eki-r and meki-r on other data than digits, or 3 per sample)"
    )
    add("--particles", metavar="J", type=whole(), help=words)
    words = "samples a step (default: 1000 for natural-eki*, 100 per sample; else 100 for digits, or 600)"
    add("--batch", metavar="B", type=whole(), help=words)
    add("--epochs", metavar="N", type=whole(), help="passes over the data (default: 25 for digits, else 20)")
    parser.add_seed()
    add(
        "--learning-rate",
        metavar="R",
        type=number(),
        help="of sgd, msgd and ste, and per sample (default: 0.1, or 0.03)",
    )
    factor = number("a number in [0, 1)", lambda value: 0 <= value < 1)
    add(
        "--momentum",
        metavar="F",
        type=factor,
        help="of meki, meki-r, heavy-ball, msgd, ste, and per sample (default: 0.9)",
    )
    add(
        "--sigma",
        metavar="S",
        type=float,
        help="of natural-eki*: scale of the deviations (default: 0.1, or 0.05 per sample)",
    )
    add("--damping", metavar="L", type=float, help=f"of natural-eki*: lambda (default: {_DAMPINGS})")
    add("--rank", metavar="R", type=int, help="of natural-eki-lowrank (default: 1)")
    words = "of natural-eki*: share of a step that is taken (default: 1, or 0.5 if localized)"
    add("--eta", "--rate", dest="rate", metavar="E", type=float, help=words)
    words = "of natural-eki*: largest squared norm of a step (default: none, or 3 if localized)"
    add("--norm-constraint", metavar="N", type=float, help=words)
    words = "of an ensemble's products: float32, bf16 (the model's too) or auto, the faster as measured (default: auto)"
    add("--precision", choices=precision.CHOICES, help=words)
    add("--out", metavar="DIR", type=folder, help="folder for the results (default: a new one in runs/)")
    parser.add_data()
    add("--resume", metavar="DIR", type=folder, help="go on with the run in DIR")
    words = "epochs between checkpoints; 0: the last (default: 1)"
    add("--checkpoint-every", metavar="N", type=whole(0), default=1, help=words)
    add("--quiet", action="store_true", help="no progress bar, no table of the leaves")
    return parser


@command("train")
def main(argv: list[str]) -> int:
    """Run the command line; 2 for what the user can mend, 130 after Ctrl-C."""
    summary, result, out = run(parser().parse_args(argv))
    say(f"picture: {out / 'accuracy.png'}\nnumbers: {out / 'result.json'}")
    print_result(summary)
    return 130 if result.interrupted else 0


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], Result, Path]:
    """Train as told; returns the summary, the result and the folder."""
    settings, epochs = _settings(arguments)
    if arguments.out is not None and _holds_a_run(arguments.out):
        where = arguments.out
        raise Refused(f"--out {where}: holds a run already; go on with it by --resume {where}, or name another folder")
    problem = registry.get(settings["problem"], arguments.data)
    for name, (x, labels) in (("train", problem.train), ("test", problem.test)):
        check_labels(problem.forward, problem.template, x, labels, name=name)
    multiplied = None
    if "precision" in settings:
        multiplied = precision.choose(settings.pop("precision"), settings["method"], problem)
        if multiplied.name != "float32":  # which older records do not name
            settings["precision"] = multiplied.name
    own = methods.Natural(**{name: settings[name] for name in _OWN if name in settings})
    method = methods.get(
        settings["method"],
        problem,
        settings["particles"],
        settings["learning_rate"],
        settings["momentum"],
        own,
        settings.get("precision"),
    )
    told = "" if multiplied is None else f"precision: {multiplied.name} ({multiplied.why})"
    if told and not arguments.quiet:
        say(told)
    description = None if arguments.quiet else methods.describe(settings["method"], problem, settings["batch"], own)
    if description is not None:
        say(str(description))
    with _folder(arguments, f"{settings['problem']}-{settings['method']}") as out:
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
    if told and arguments.quiet:  # once nothing can be refused any more, whose one line would be two
        say(told)
    first, last = result.history[0], result.history[-1]
    summary = {
        **settings,
        "precision": settings.get("precision", "float32"),
        "epochs": len(result.history),
        **{name: last[name] for name in last if name.startswith("test_accuracy")},
        "test_accuracy_first_epoch": first["test_accuracy_mean"],
        "forward_passes": last["forward_passes"],
        "seconds": round(sum(row["seconds"] for row in result.history), 2),  # those before a resume included
        "device": environment()["device"],
    }
    text = f"python -m benchmarks train {_flags({**summary, 'epochs': max(epochs, len(result.history))})}"
    save_result(out / "result.json", {"command": text, **summary, "history": result.history})
    return summary, result, out


def _settings(arguments: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """What the run is, and its epochs; of a resumed run, what it was, unless the command line says otherwise."""
    before = {} if arguments.resume is None else _before(arguments)
    problem = arguments.problem or before.get("problem", "digits-dnn")
    chosen = arguments.method or before.get("method", "eki-r")
    particles, batch, epochs = _DIGITS if problem.startswith("digits") else _PAPER
    kind = methods.METHODS[chosen].kind if chosen in methods.METHODS else "ensemble"
    of_kind = _KINDS.get(kind, {})
    defaults = {
        "method": "eki-r",
        "particles": of_kind.get("particles", particles),
        "batch": of_kind.get("batch", batch),
        "seed": 0,
        "learning_rate": of_kind.get("learning_rate", 0.1),
        "momentum": 0.9,
    }
    _check_flags(arguments, chosen, defaults)
    settings = {"problem": problem}
    for name, default in defaults.items():
        given = getattr(arguments, name)
        settings[name] = before.get(name, default) if given is None else given
    if kind in _KINDS:
        for name in _OWN if kind == "natural" else ("sigma",):
            given = getattr(arguments, name)
            value = (before or of_kind).get(name) if given is None else given
            settings.update({} if value is None else {name: value})
    if kind == "gradient":
        settings["particles"] = 1
    if chosen in methods.METHODS and "precision" in methods.METHODS[chosen].settings:
        given = None if arguments.precision == "auto" else arguments.precision
        settings["precision"] = given or before.get("precision", "float32" if before else "auto")
    return settings, arguments.epochs or before.get("epochs", epochs)


def _before(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the run to resume was."""
    path = arguments.resume / "settings.json"
    if arguments.out is not None:
        raise Refused(f"--out {arguments.out}: beside --resume, whose folder gets the results; wanted one of the two")
    if not path.is_file():
        raise FileNotFoundError(f"--resume {arguments.resume}: no settings.json there; wanted the folder of a run")
    remedy = (
        "write it anew, with problem, method, particles, batch, seed, learning_rate, momentum and epochs of the run"
    )
    before = store.result(path, remedy, store.read_object)
    if (arguments.resume / "result.json").is_file() and not _has_checkpoint(arguments.resume):
        raise Refused(f"--resume {arguments.resume}: its checkpoints are gone; wanted a run with them, or a new folder")
    metrics = arguments.resume / "metrics.jsonl"
    done = len(metrics.read_bytes().splitlines()) if metrics.is_file() and _has_checkpoint(arguments.resume) else 0
    if arguments.epochs is not None and arguments.epochs < done:
        raise Refused(f"--epochs: {arguments.epochs}; the run has done {done}; wanted as many or more")
    return before


def _check_flags(arguments: argparse.Namespace, method: str, defaults: dict[str, Any]) -> None:
    """Refuse settings that mean nothing to the method, but at their defaults, which older records name."""
    if method not in methods.METHODS:
        return  # which is refused elsewhere
    own, recorded = methods.METHODS[method].settings, {**defaults, "particles": 1}
    for name in ("particles", "learning_rate", "momentum", "precision", *_OWN):
        value = getattr(arguments, name)
        if name == "precision" and value != "bf16":
            continue  # what all others have
        if value is not None and name not in own and value != recorded.get(name):
            flags = ", ".join(f"--{one.replace('_', '-')}" for one in own)
            raise Refused(f"--{name.replace('_', '-')}: {value}; {method} has no such setting; wanted some of {flags}")


def _has_checkpoint(out: Path) -> bool:
    return any(child.name.isdigit() for child in (out / "checkpoints").glob("*"))


def _holds_a_run(out: Path) -> bool:
    return _has_checkpoint(out) or (out / "result.json").exists()


@contextlib.contextmanager
def _folder(arguments: argparse.Namespace, name: str) -> Iterator[Path]:
    """The folder of the run: the one that is named, or a new one, which goes again if nothing comes to be in it."""
    named = arguments.resume or arguments.out
    if named is not None:
        yield named
        return
    number, out = 1, Path("runs") / name
    while True:
        try:
            out.mkdir(parents=True)
            break
        except FileExistsError:  # by a run that began in the same moment, too
            number, out = number + 1, Path("runs") / f"{name}-{number + 1}"
    try:
        yield out
    finally:
        with contextlib.suppress(OSError):
            out.rmdir()


def _flags(settings: dict[str, Any]) -> str:
    known = ("problem", "method", "batch", "seed", "epochs", *methods.METHODS[settings["method"]].settings)
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in settings.items() if name in known)
