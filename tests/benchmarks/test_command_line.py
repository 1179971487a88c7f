"""What all commands share: refusals in a line, exit codes, locks, damaged files, and packages that are missing."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sklearn")

from benchmarks.__main__ import COMMANDS, main
from benchmarks.calibration import linear as on_linear
from benchmarks.calibration.methods import LINEAR
from benchmarks.edf import convergence
from benchmarks.forward_budget import cli as forward_budget
from benchmarks.harness import store
from benchmarks.paper import classification, common
from benchmarks.performance import parts

pytestmark = pytest.mark.benchmarks

ROOT = Path(__file__).parents[2]


def code_of(*argv: str) -> int:
    """The exit code, by whichever way it comes."""
    try:
        return main(list(argv))
    except SystemExit as error:
        return int(error.code or 0)


def said(capsys: Any) -> str:
    """The one line that was said, and nothing on standard output."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


SEEDED = ("train", "paper voting", "edf harness")
REFUSED = [
    ("train --epochs 0", "--epochs: 0; wanted a whole number, at least 1"),
    ("train --epochs 2.5", "--epochs: '2.5'; wanted a whole number"),
    ("train --particles 0", "--particles: 0"),
    ("train --batch -3", "--batch: -3"),
    ("train --learning-rate nan --method sgd", "--learning-rate: 'nan'; wanted a finite number > 0"),
    ("train --learning-rate -1 --method sgd", "--learning-rate: '-1'"),
    ("train --momentum 1 --method msgd", "--momentum: '1'; wanted a number in [0, 1)"),
    ("train --momentum inf --method msgd", "--momentum: 'inf'"),
    ("train --checkpoint-every -1", "--checkpoint-every: -1"),
    ("train --sigma nan --method natural-eki", "sigma: nan; wanted a finite number > 0"),
    ("train --sigma 0.2 --method eki", "--sigma: 0.2; eki has no such setting; wanted some of --particles"),
    ("train --learning-rate 0.2 --method eki-r", "--learning-rate: 0.2; eki-r has no such setting"),
    ("train --momentum 0.5 --method sgd", "--momentum: 0.5; sgd has no such setting"),
    ("train --rank 2 --method natural-eki", "--rank: 2; natural-eki has no such setting"),
    ("train --particles 20 --method sgd", "--particles: 20; sgd has no such setting"),
    ("train --resume nowhere --out there", "--out there: beside --resume"),
    *[(f"{command} --seed {seed}", f"--seed: {seed}; wanted") for command in SEEDED for seed in (2**32, 2**70, -1)],
    *[(f"{command} --out {{empty}}", "--out: ''; wanted the name of a f") for command in SEEDED],
    ("forward-budget --out {empty}", "--out: ''"),
    ("calibration linear --out {empty}", "--out: ''"),
    ("performance --out {empty}", "--out: ''"),
    ("scaling --output {empty}", "--out/--output: ''"),
    ("models --json {empty}", "--out/--json: ''"),
    ("language --passes 1", "--passes: 1"),
    ("policy --env Cart", "--env: invalid choice: 'Cart'"),
    (
        "policy --preset smoke --env Pendulum-v1 --out new",
        "--env: Pendulum-v1; preset smoke has CartPole-v1",
    ),
    ("policy --out {file}", "file.txt is a file; wanted a folder"),
    ("language-budget --preset smoke --passes 5 --out new", "--passes: [5]; preset smoke has 4"),
    ("deviations --kind spam", "--kind: invalid choice: 'spam'"),
    ("language --batch 500", "--batch: 500 with --context 64; wanted a multiple"),
    ("language --heads 3", "--width: 128 with --heads 3; wanted a multiple"),
    ("language --out {empty}", "--out: ''"),
    ("language --text {file}", "file.txt: 4 characters; wanted more than"),
    ("language --out {file}", "file.txt is a file; wanted a folder"),
    ("train --out {file}", "file.txt is a file; wanted a folder"),
    ("paper voting --out {file}", "file.txt is a file; wanted a folder"),
    ("forward-budget --problem mnist-sign --method msgd --out new", "--method: msgd; mnist-sign has natural-eki-per"),
    ("policy --env Acrobot-v1 --method natural-sign --out new", "--method: natural-sign; Acrobot-v1 has natural,"),
    ("forward-budget --out {file}", "file.txt is a file; wanted a folder"),
    ("calibration linear --out {file}", "file.txt is a file; wanted a folder"),
    ("performance --out {file}", "file.txt is a file; wanted a folder"),
    ("scaling --output {file}", "file.txt is a file; wanted a folder"),
    ("edf harness --out {folder}", "is a folder; wanted a file"),
    ("models --json {folder}", "is a folder; wanted a file"),
    ("paper voting --preset smoke --out {file}/below", "file.txt"),
    ("forward-budget --peers nowhere", "--peers/--env-dir: nowhere: no such folder; make it first"),
    ("calibration peers --env-dir nowhere", "--peers/--env-dir: nowhere: no such folder"),
    ("performance --env-dir nowhere", "--peers/--env-dir: nowhere: no such folder"),
    ("paper voting --precision bf16", "--precision: voting has none; wanted one of dense, "),
    ("performance --repeats 0", "--repeats: 0"),
    ("performance --limit nan", "--limit: 'nan'"),
    ("performance --parts nothing", "--parts/--only: nothing; wanted some of steps"),
    ("scaling --strong 0", "--strong: 0"),
    ("scaling --tflops -1", "--tflops: '-1'"),
    ("scaling --anchor --predict-only", "--anchor: wants the rate of a measurement"),
    ("models --model nothing-like-it --out new/x.jsonl", "no model of the zoo"),
    ("edf table nowhere.jsonl", "nowhere.jsonl: not there"),
    (
        "calibration linear --draw --out {folder}",
        "linear.jsonl: not there; run python -m benchmarks calibration",
    ),
]


@pytest.mark.parametrize(("line", "words"), REFUSED)
def test_what_is_refused(line: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """By name, in one line, before anything is written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").write_text("mine")
    (tmp_path / "folder").mkdir()
    names = {"{empty}": "", "{file}": "file.txt", "{folder}": "folder"}
    argv = [re.sub(r"\{\w+\}", lambda found: names[found[0]], word) for word in line.split()]
    assert code_of(*argv) == 2
    assert words in said(capsys)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.name[0] != "."} == {
        "file.txt",
        "folder",
    }
    assert (tmp_path / "file.txt").read_text() == "mine"


LOCKED = [
    ("paper linear --preset smoke --out .", ".paper.lock"),
    ("forward-budget --preset smoke --summary --out .", ".forward_budget_smoke.lock"),
    ("edf harness --preset smoke --out x.jsonl", ".x.lock"),
    ("calibration linear --preset smoke --out .", ".linear.lock"),
    ("models --preset smoke --out x.jsonl", ".x.lock"),
    ("performance --preset quick --out .", ".performance.lock"),
    ("scaling --predict-only --out .", ".scaling.lock"),
    ("accelerator --preset smoke --out .", ".accelerator.lock"),
    ("language --out . --quiet --steps 1", ".lock"),
    ("policy --preset smoke --out .", ".policy_smoke.lock"),
    ("language-budget --preset smoke --out .", ".language_smoke.lock"),
    ("deviations --preset smoke --out .", ".deviations_smoke.lock"),
    ("train --out . --quiet --particles 4 --batch 700 --epochs 1", ".lock"),
]


@pytest.mark.parametrize(("line", "lock"), LOCKED)
def test_one_run_at_a_time(line: str, lock: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Of two runs with one --out, the second is refused, and writes nothing."""
    from eki_jax.training.files import claimed

    monkeypatch.chdir(tmp_path)
    with claimed(tmp_path, lock):
        assert code_of(*line.split()) == 2
    assert f"in use by process {os.getpid()}" in said(capsys)
    assert [path.name for path in tmp_path.iterdir()] == [lock]


def test_the_new_goal_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """A run that is to go further, and is stopped on the way, goes there; fewer epochs than it has are refused."""
    run = str(tmp_path / "run")
    small = ["--particles", "4", "--batch", "700", "--quiet"]
    assert main(["train", *small, "--epochs", "1", "--out", run]) == 0
    save = classification.fit.__globals__["Recorder"].save
    stop = lambda *args, **options: (save(*args, **options), os.kill(os.getpid(), signal.SIGTERM))[0]
    with monkeypatch.context() as patched:
        patched.setattr("eki_jax.training.recording.Recorder.save", stop)
        assert main(["train", "--resume", run, "--epochs", "5", "--quiet"]) == 130
    assert main(["train", "--resume", run, "--quiet"]) == 0
    result = json.loads(Path(run, "result.json").read_text())
    assert (len(result["history"]), result["epochs"]) == (5, 5)
    assert result["command"].endswith("--epochs 5")
    capsys.readouterr()
    assert main(["train", "--resume", run, "--epochs", "2"]) == 2
    assert "--epochs: 2; the run has done 5" in said(capsys)


def test_recorded_commands_are_accepted() -> None:
    """Those of committed results name settings of other methods too, at their defaults."""
    from benchmarks import train

    for name, run in store.read(ROOT / "benchmarks/results/train.jsonl")["runs"].items():
        command = run["command"]
        if "examples/" in command:
            continue
        arguments = train.parser().parse_args(command.split()[4:])
        again, epochs = train._settings(arguments)
        flags = train._flags({**again, "epochs": epochs}).split()
        assert set(flags) <= {*command.split()[4:], "--precision", "auto"}, name  # which older records do not name


def test_damaged_cells_are_made_again(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cell that is cut, of other settings, or of fewer epochs is named, set aside and made again."""
    from benchmarks.problems import registry

    cell = classification.Cell("p", "sgd", "A", epochs=2, images=10)
    line = {"test_accuracy_mean": 0.5, "seconds": 1.0}
    result = type("Result", (), {"history": [line] * 2, "interrupted": False})
    nothing = dict.fromkeys(registry.Problem._fields)
    problem = registry.Problem(**nothing | {"train": ([0],) * 2, "test": ([0],) * 2})
    monkeypatch.setattr(classification, "fit", lambda *args, **options: result)
    monkeypatch.setattr(classification.registry, "get", lambda name, data: problem)
    monkeypatch.setattr(classification.methods, "get", lambda *args, **settings: None)
    path = tmp_path / "t.jsonl"
    run = lambda: classification.run_cell(cell, store.Runs(path), None, 0)
    whole = run()
    text = path.read_text()
    for damaged, words in (
        (text[:100], "damaged"),
        (text.splitlines()[0], "damaged (0 lines after the first"),
        ("[]", "damaged"),
        (text.replace('"seed": 0', '"seed": 1'), "of another run (settings"),
        (text.replace('"seconds": 1.0}]', '"seconds": 1.0}, {}]'), "history: 3 epochs, wanted 2"),
        (text.replace('"history"', '"story"'), "damaged (KeyError: 'history')"),
    ):
        assert damaged != text
        path.write_text(damaged)
        assert run()["history"] == whole["history"]
        assert words in (error := capsys.readouterr().err)
        assert f"{path}: " in error
    assert len(list(tmp_path.glob("*.damaged*"))) == 3
    assert len((tmp_path / "t.jsonl.other").read_text().splitlines()) == 3


def test_whole_runs_of_a_damaged_file(tmp_path: Path, capsys: Any) -> None:
    """A file that is cut loses the run that it is cut in, and no other."""
    path = tmp_path / "t.jsonl"
    for name in "abc":
        store.Runs(path).keep(name, {"found": name})
    path.write_text(path.read_text()[:-20])
    runs = store.Runs(path)
    assert [(name, run["found"]) for name, run in runs.all.items()] == [("a", "a"), ("b", "b")]
    assert "t.jsonl: damaged" in capsys.readouterr().err
    assert runs.keep("c", {"found": "c"}) == store.read(path)["runs"]["c"]


def test_files_of_a_folder_are_checked_first(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged or a foreign file is named before the work; the one to be made again is set aside."""
    ran: list[int] = []
    module = "benchmarks.paper.voting"
    monkeypatch.setattr(f"{module}.measure", lambda *args: ran.append(1) or common.Found({"rows": []}))
    command = ["paper", "voting", "--preset", "smoke", "--out", str(tmp_path)]
    for text, words in (
        ("{", "rnn.jsonl: damaged"),
        ('{"lines": 0, "a": 1}', "rnn.jsonl: no result of this command"),
    ):
        (tmp_path / "rnn.jsonl").write_text(text)
        assert main(command) == 2
        assert words in said(capsys)
        assert not ran
    (tmp_path / "rnn.jsonl").unlink()
    (tmp_path / "voting.jsonl").write_text('{"experiment": "voting", "ro')
    assert main(command) == 0
    assert "voting.jsonl: damaged" in capsys.readouterr().err
    assert (tmp_path / "voting.jsonl.damaged").exists()
    monkeypatch.setitem(parts.PARTS, "steps", lambda options: ran.append(2))
    (tmp_path / "performance-linear.jsonl").write_text("{")
    assert main(["performance", "--parts", "steps", "--out", str(tmp_path)]) == 2
    assert "performance-linear.jsonl: damaged" in said(capsys)
    assert ran == [1]


def test_damaged_runs_of_a_budget(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is cut is named, and made again; a summary, which makes none, refuses it."""

    def perform(task: dict[str, Any], data: Any, peers: Any) -> dict[str, Any]:
        return {"passes": [0, 100_000, 200_000], "seconds": [0, 1.0, 2.0], "test_accuracy": [0.1, 0.5, 0.6]}

    monkeypatch.setattr(forward_budget, "perform", perform)
    command = ["forward-budget", "--preset", "smoke", "--out", str(tmp_path), "--method", "msgd"]
    assert main(command) == 0
    path, name = tmp_path / "forward_budget_smoke.jsonl", "digits-dnn-msgd-0"
    result = store.read(path)
    whole = result["cells"][name]
    table = (tmp_path / "forward_budget_smoke.md").read_text()
    first = lambda count: {**whole, "found": {key: numbers[:count] for key, numbers in whole["found"].items()}}
    for cell in (None, first(1), first(2), {"settings": whole["settings"]}):
        store.write(path, {**result, "cells": {**result["cells"], name: cell or whole}})
        if cell is None:
            path.write_text(path.read_text()[:-20])
        capsys.readouterr()
        assert main([*command, "--draw"]) == 2
        assert f"{path}: " in said(capsys)
        if cell is not None:  # one that nobody asks for is refused before the work begins
            assert main([*command[:-1], "natural-eki"]) == 2
            assert f"{path}: {name}: " in said(capsys)
        assert main(command) == 0
        assert store.read(path)["cells"][name]["found"] == whole["found"]
        assert (tmp_path / "forward_budget_smoke.md").read_text() == table


def test_damaged_cells_of_a_calibration(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an interrupted run left, if it is damaged, is named, and measured again; so is a damaged result."""
    monkeypatch.setattr(on_linear, "SIZES", {"smoke": ((10, 40), 1)})
    monkeypatch.setattr(on_linear, "LINEAR", {"etki": LINEAR["etki"]})
    monkeypatch.setattr(on_linear, "draw", lambda result, path: None)
    monkeypatch.setattr(on_linear, "calibrate", lambda *args: [{"seed": 0, "mean": 1.0, "variance": 1.0, "steps": 1}])
    path = tmp_path / "linear.jsonl"
    store.Runs(path, store.UNFINISHED).keep("etki 10", {"head": {}})
    path.write_text(path.read_text() + '{"unfin')
    assert main(["calibration", "linear", "--preset", "smoke", "--out", str(tmp_path)]) == 0
    error = capsys.readouterr().err
    assert "linear.jsonl: damaged" in error
    assert "linear.jsonl: etki 10: of another run" in error
    cut = store.read(path)
    assert "unfinished" not in cut
    cut["cells"]["etki 10"]["found"] = []
    store.write(path, cut)
    assert main(["calibration", "linear", "--preset", "smoke", "--out", str(tmp_path), "--keep"]) == 0
    assert len(store.read(path)["cells"]["etki 10"]["found"]) == 1


def test_foreign_results_are_named(tmp_path: Path, capsys: Any) -> None:
    """A table of a file of another kind is refused, as is one of half a result."""
    path = tmp_path / "linear.jsonl"
    for text in ('{"lines": 0, "a": 1}', '{"lines": 0, "cells": {}, "environment": {}}', "[]", "{", '{"a": 1}'):
        path.write_text(text)
        for line in (
            f"edf table {path}",
            f"calibration linear --draw --out {tmp_path}",
            f"models --draw --json {path}",
            f"edf harness --draw --out {path}",
        ):
            if line.startswith("models") and "cells" in text:
                continue  # no model, and so an empty table
            assert main(line.split()) == 2
            assert f"{path}: " in said(capsys)
        assert path.read_text() == text


def test_damaged_settings_are_named(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "settings.json").write_text('{"problem": "digi')
    assert main(["train", "--resume", str(tmp_path)]) == 2
    assert re.search(r"settings.json: damaged .*; write it anew", said(capsys))


def test_everything_is_written_whole() -> None:
    """No command and no run writes a file but by the one way that leaves it whole."""
    places = [*(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "eki_jax/training").rglob("*.py")]
    exempt = {"files.py": "the way itself", "figures.py": "", "timing.py": "/proc", "others.py": "a temporary folder"}
    writing = re.compile(r"\.write_(text|bytes)\(|savefig\((?!new\b)|open\([^)]*[\"'][wax]|json\.dump\(")
    found = [path.name for path in places if path.name not in exempt and writing.search(path.read_text())]
    assert not found


def test_interrupts_end_in_a_line(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C, SIGTERM, and either where it becomes another error: a line and 130, at any time."""
    import jax
    import jax.numpy as jnp

    def interrupt(number: int) -> Any:
        return lambda *args: os.kill(os.getpid(), number)

    def within(*args: Any) -> None:
        def raising(x: Any) -> Any:
            raise KeyboardInterrupt

        shape = jax.ShapeDtypeStruct((), "float32")
        jax.block_until_ready(jax.jit(lambda x: jax.pure_callback(raising, shape, x))(jnp.float32(0)))

    class Dropped:
        def __del__(self) -> None:  # whose errors are dropped too
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    def dropping(*args: Any) -> None:
        Dropped()
        for _ in range(100):
            time.sleep(0.001)

    def reading(*args: Any) -> None:  # as an extension module's beginning makes of it
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        raise ImportError("Encountered an error while initializing the extension.")

    for how in (interrupt(signal.SIGINT), interrupt(signal.SIGTERM), within, dropping, reading):
        monkeypatch.setattr(convergence, "plan", how)
        out = str(tmp_path / "x.jsonl")
        assert main(["edf", "convergence", "--preset", "smoke", "--out", out]) == 130
        assert "edf: interrupted; what was finished is kept" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    twice = lambda *args: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]
    monkeypatch.setattr("eki_jax.training.recording.plot_accuracy", twice)
    small = ["--particles", "4", "--batch", "700", "--epochs", "9", "--quiet"]
    assert main(["train", *small, "--out", str(tmp_path / "run")]) == 130
    assert "train: interrupted" in capsys.readouterr().err


def test_interrupts_while_importing(tmp_path: Path) -> None:
    """The process ends at once, since extension modules make of a ``KeyboardInterrupt`` what they like."""
    (tmp_path / "package.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nprint('goes on')")
    code = "import sys; from benchmarks.harness.command import guarded; guarded('x', lambda: __import__('package'))"
    variables = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "x: interrupted; what was finished is kept\n"


@pytest.mark.slow
def test_interrupts_at_random_times(tmp_path: Path) -> None:
    """From the first import on, once or twice, by Ctrl-C or SIGTERM: 130, and no traceback."""
    times = random.Random(0)
    command = [sys.executable, "-m", "benchmarks", "train", "--particles", "50", "--epochs", "200", "--quiet"]
    for index in range(20):
        with subprocess.Popen(
            [*command, "--out", str(tmp_path / str(index))], cwd=ROOT, stderr=subprocess.PIPE, text=True
        ) as process:
            time.sleep(times.uniform(0.3, 8))
            which = times.choice((signal.SIGINT, signal.SIGTERM))
            for _ in range(times.choice((1, 2))):
                process.send_signal(which)
                time.sleep(times.choice((0.01, 0.3)))
            error = process.communicate()[1]
        assert process.returncode == 130, error
        assert "Traceback" not in error


def test_a_closed_pipe_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command runs to its end, and says the rest to nobody."""
    ends: list[str] = []

    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    def run(*args: Any) -> Any:
        print("x", flush=True)
        print("y", file=sys.stderr)
        ends.append("end")
        raise ValueError("a trouble that is said to nobody")

    monkeypatch.setattr(convergence, "plan", run)
    monkeypatch.setattr(sys, "stdout", Closed())
    monkeypatch.setattr(sys, "stderr", Closed())
    assert main(["edf", "convergence", "--preset", "smoke", "--out", str(tmp_path / "x.jsonl")]) == 2
    assert ends == ["end"]


def test_a_reader_that_goes_and_a_plain_locale(tmp_path: Path) -> None:
    """As a shell runs it: `| head -1`, and a terminal that knows no Unicode."""
    name = "edf_convergence_cpu.jsonl"
    line = f"{sys.executable} -m benchmarks edf table benchmarks/results/{name}"
    variables = {**os.environ, "PYTHONIOENCODING": "ascii", "JAX_PLATFORMS": "cpu"}
    shell = ["bash", "-o", "pipefail", "-c", f"{line} | head -1; echo ${{PIPESTATUS[0]}}; {line} | grep -c '?'"]
    done = subprocess.run(shell, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert len(done.stdout.splitlines()) == 3, (done.stdout, done.stderr)
    header, code, marks = done.stdout.splitlines()
    assert header.startswith("| method")
    assert code in ("0", "141")
    assert int(marks) > 0
    assert done.stderr == ""


MISSING = """
import sys
for name in ("optax", "flax", "equinox", "rich", "matplotlib", "sklearn", "scipy", "gymnax", "orbax.checkpoint"):
    sys.modules[name] = None
from benchmarks.__main__ import COMMANDS, main
for name in ("optax", "flax", "edf", "equinox", "semi_supervised"):
    try:
        __import__(f"eki_jax.{name}")
    except ImportError as error:
        print(error)
for name in COMMANDS:
    more = {"paper": ["dense"], "calibration": ["linear"], "edf": ["harness"]}.get(name, [])
    print(name, main([name, *more]), flush=True)
"""
ADAPTERS = [("optax", "optax"), ("flax", "flax"), ("optax", "optax"), ("equinox", "equinox"), ("scipy", "graph")]


def test_missing_packages_are_named() -> None:
    """With the core alone, adapters and commands name the extra to install."""
    done = subprocess.run([sys.executable, "-c", MISSING], cwd=ROOT, capture_output=True, text=True, check=False)
    wanted = [f"{package} is not installed: pip install 'eki_jax[{extra}]'" for package, extra in ADAPTERS]
    assert done.stdout.splitlines() == [*wanted, *(f"{name} 2" for name in COMMANDS)], done.stderr
    errors = done.stderr.splitlines()
    assert len(errors) == len(COMMANDS)
    assert all("pip install 'eki_jax[" in line for line in errors)
