"""``python -m benchmarks COMMAND``: finds the command's module and hands it the rest of the line."""

from __future__ import annotations

import importlib
import importlib.util
import os
import signal
import sys

if __name__ == "__main__":  # before and after the command's own way to be interrupted, too
    signal.signal(signal.SIGINT, lambda *of: os._exit(130))

from benchmarks.harness.command import INTERRUPTED, guarded

# name -> (module, one line of help). A module is imported only when its command runs; it offers
# ``main(argv: list[str]) -> int``.
COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("benchmarks.train", "train a network on real images, without derivatives or with them"),
    "paper": ("benchmarks.paper.cli", "re-run a table or a figure of the paper"),
    "performance": ("benchmarks.performance.cli", "speed and memory of the step, beside other libraries"),
    "scaling": ("benchmarks.scaling.cli", "strong and weak scaling over devices, measured and predicted"),
    "accelerator": ("benchmarks.accelerator.cli", "on a GPU or TPU: correctness, the anchor, the tables, in a budget"),
    "edf": ("benchmarks.edf.cli", "exponentially decaying flows against first-order methods"),
    "calibration": ("benchmarks.calibration.cli", "calibrate simulators with every method, and beside other libraries"),
    "deviations": ("benchmarks.deviations", "how near to the gradient each kind of deviations comes, on one model"),
    "models": ("benchmarks.models.cli", "models that people bring: which are trained, and how well low rank does"),
    "policy": ("benchmarks.policy.cli", "policies without derivatives, beside evolution strategies and PPO"),
    "language": ("benchmarks.language.cli", "a transformer learns a text, without derivatives or with them"),
    "language-budget": ("benchmarks.language.comparison", "nats of a text for a given number of passes, all methods"),
    "forward-budget": ("benchmarks.forward_budget", "test accuracy for a given number of forward passes"),
    "report": ("benchmarks.report", "all tables and pictures of the results, from their files"),
}


def main(argv: list[str] | None = None) -> int:
    """Run the command named by the first argument."""
    arguments = sys.argv[1:] if argv is None else argv
    available = {name: entry for name, entry in COMMANDS.items() if _exists(entry[0])}
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, available))
        print("usage: python -m benchmarks COMMAND [--help]\n\ncommands:")
        for name, (_, summary) in available.items():
            print(f"  {name:{width}}  {summary}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in available:
        print(f"benchmarks: no command {name!r}; there are: {', '.join(available)}", file=sys.stderr)
        return 2
    return guarded(name, lambda: importlib.import_module(available[name][0]).main(rest))


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


if __name__ == "__main__":
    code = guarded("benchmarks", main)
    if code == INTERRUPTED:
        os._exit(code)  # at once: nothing is left to write, and a further Ctrl-C would only show where we are
    sys.exit(code)
