"""``python -m benchmarks language``: a text, a transformer, a method, and what it has learned to write."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import figures
from benchmarks.harness.command import Parser, Refused, command, file, folder, number, require, say, whole
from benchmarks.language.text import Text, load
from benchmarks.language.training import METHODS, Model, Progress, bits, model, train
from benchmarks.reporting import print_result, save_result
from eki_jax.training.files import claimed, write_text

# Arguments that do not change what is trained, and the text, which is known by its name.
ELSEWHERE = ("text", "write", "out", "quiet")


def parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="python -m benchmarks language",
        description="Train a transformer on a text, character by character. "
        "The same command goes on with an interrupted run. The last line on standard output is one JSON object.",
    )
    add = parser.add_argument
    add("--text", metavar="FILE", type=file, help="text of UTF-8 (default: the topics of Python's help())")
    add("--method", metavar="M", choices=METHODS, default="natural-eki-per-sample", help=f"one of {', '.join(METHODS)}")
    add("--passes", metavar="K", type=whole(2), default=16, help="particles of the methods with noise (default: 16)")
    add("--steps", metavar="N", type=whole(), default=1000, help="number of steps (default: 1000)")
    add("--batch", metavar="B", type=whole(), default=512, help="characters a step (default: 512)")
    add("--context", metavar="T", type=whole(2), default=64, help="characters that are seen (default: 64)")
    add("--layers", metavar="L", type=whole(), default=2, help="blocks of the transformer (default: 2)")
    add("--width", metavar="W", type=whole(), default=128, help="numbers of a character (default: 128)")
    add("--heads", metavar="H", type=whole(), default=4, help="heads of attention (default: 4)")
    positive = number("a number > 0", lambda value: value > 0)
    share = number("a number in [0, 1)", lambda value: 0 <= value < 1)
    words = "first rate, which falls to 0 (default: 0.3, which is tuned for no method)"
    add("--learning-rate", metavar="R", type=positive, default=0.3, help=words)
    add("--momentum", metavar="F", type=share, default=0.9, help="momentum (default: 0.9)")
    add("--sigma", metavar="S", type=positive, default=0.05, help="scale of the noise (default: 0.05)")
    add("--decay", metavar="D", type=share, default=0.998, help="of what is learned of slopes (default: 0.998)")
    at_least = number("a number >= 1", lambda value: value >= 1)
    words = "characters whose errors are taken to cancel, of natural-eki-* (default: 1, of natural-eki-outputs 10)"
    add("--averaged", metavar="N", type=at_least, help=words)
    closed = number("a number in [0, 1]", lambda value: 0 <= value <= 1)
    words = "of credit for what comes later, beyond what attention hands on (default: 0, none)"
    add("--discount", metavar="C", type=closed, default=0.0, help=words)
    parser.add_seed(default=0)
    add("--write", metavar="N", type=whole(0), default=300, help="characters to write at the end (default: 300)")
    add("--out", metavar="DIR", type=folder, help="folder for the results (default: runs/language-M-K-SEED)")
    add("--quiet", action="store_true", help="no progress")
    return parser


@command("language")
def main(argv: list[str]) -> int:
    """Run the command line; 2 for what the user can mend, 130 after Ctrl-C."""
    arguments = parser().parse_args(argv)
    require("flax", "orbax.checkpoint", "matplotlib")
    text = load(arguments.text, arguments.context)
    for divisor, whole_number in (("context", "batch"), ("heads", "width")):
        n, d = getattr(arguments, whole_number), getattr(arguments, divisor)
        if n % d:
            raise Refused(f"--{whole_number}: {n} with --{divisor} {d}; wanted a multiple of that")
    settings = {name: value for name, value in vars(arguments).items() if name not in ELSEWHERE}
    settings |= {"text": text.name, "characters": len(text.train) + len(text.test)}
    out = arguments.out or Path("runs") / f"language-{arguments.method}-{arguments.passes}-{arguments.seed}"
    with claimed(out):
        row = run(arguments, text, settings, out)
    print_result(row)
    return 0


def run(arguments: argparse.Namespace, text: Text, settings: dict[str, Any], out: Path) -> dict[str, Any]:
    """Train, and write what came of it; returns that without the history."""
    for progress in train(text, settings, out):
        row = progress.history[-1]
        if not arguments.quiet:
            say(f"step {row['step']}/{settings['steps']}: {_said(row['test_nats'])}, {row['seconds']:.0f} s")
    written = write(model(text, settings), progress.params, text, settings, arguments.write)
    result = {"command": _line(arguments, out), **settings, **row, "test_bits": bits(row["test_nats"])}
    save_result(out / "result.json", {**result, "history": progress.history, "written": written})
    write_text(out / "written.txt", written)
    draw(progress, settings, out / "nats.png")
    say(f"{written}\n\n{_said(row['test_nats'])}\npicture: {out / 'nats.png'}\nnumbers: {out / 'result.json'}")
    return result


def write(found: Model, params: Any, text: Text, settings: dict[str, Any], number: int) -> str:
    """Characters that the model goes on with after the first held-out ones, drawn one after the other."""
    context = settings["context"]

    def one(seen: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        drawn = jax.random.categorical(key, found.forward(params, seen[None])[0, -1])
        return jnp.append(seen[1:], drawn), drawn

    keys = jax.random.split(jax.random.key(settings["seed"]), number)
    drawn = jax.lax.scan(one, jnp.asarray(text.test[:context]), keys)[1]
    return text.decoded(np.asarray(drawn))


def draw(progress: Progress, settings: dict[str, Any], path: Path) -> None:
    """Nats of held-out text against steps."""
    figure, ((axes,),) = figures.panels(1, 1, (6, 4))
    rows = progress.history
    axes.plot([row["step"] for row in rows], [row["test_nats"] for row in rows], label="held-out text")
    axes.plot([row["step"] for row in rows[1:]], [row["train_nats"] for row in rows[1:]], alpha=0.5, label="batches")
    axes.set(xlabel="steps", ylabel="nats a character", title=f"{settings['method']}: {settings['text']}")
    figures.legend(axes)
    figures.save(figure, path)


def _said(nats: float) -> str:
    return f"{nats:.3f} nats ({bits(nats):.3f} bits) a character"


def _line(arguments: argparse.Namespace, out: Path) -> str:
    given = {name: value for name, value in vars(arguments).items() if name != "quiet" and value is not None}
    words = [f"--{name.replace('_', '-')} {shlex.quote(str(value))}" for name, value in (given | {"out": out}).items()]
    return f"python -m benchmarks language {' '.join(words)}"
