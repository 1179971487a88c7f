"""What a run leaves when it is stopped or killed, or when its checkpoints are damaged."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eki_jax
from eki_jax.checkpoints import Checkpoints
from eki_jax.training import Method, ensemble_method, fit

X = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
DATA = (X, (X[:, 0] > 0).astype(np.int32))


def forward(params: Any, x: Any) -> Any:
    return jax.nn.softmax(x @ params)


SOLVER = eki_jax.euler(forward, eki_jax.cross_entropy())
METHOD = ensemble_method(SOLVER, forward, eki_jax.xavier(jnp.zeros((4, 2))), 6, resample=True)


def train(method: Method = METHOD, **options: Any) -> Any:
    settings = {"batch_size": 20, "epochs": 3, "key": jax.random.key(1), "progress": False, **options}
    return fit(method, DATA, DATA, **settings)


def interrupting(how: Callable[[], None]) -> Method:
    """The method, with an accuracy that does something while it is compiled, in the first epoch."""

    def accuracy(state: Any, x: Any, labels: Any) -> Any:
        how()
        return METHOD.accuracy(state, x, labels)

    return METHOD._replace(accuracy=accuracy)


def test_a_request_to_end_is_a_ctrl_c(tmp_path: Path) -> None:
    """SIGTERM ends the epoch, saves, and returns; what was asked for is remembered, and what was there too."""
    train(epochs=1, directory=tmp_path, settings={"a": 1})
    stop = interrupting(lambda: os.kill(os.getpid(), signal.SIGTERM))
    result = train(stop, epochs=30, directory=tmp_path, settings={"a": 1}, resume=True)
    assert result.interrupted
    assert len(result.history) == 2
    assert json.loads((tmp_path / "settings.json").read_text()) == {"a": 1, "epochs": 30}
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_run_without_a_checkpoint_begins_anew(tmp_path: Path) -> None:
    """Stopped before its first checkpoint, a run is no dead end: neither for resume, nor for the same command."""

    def stop() -> None:
        raise KeyboardInterrupt

    wanted = train().state.ensemble
    for again in ({"resume": True}, {}):
        folder = tmp_path / str(len(again))
        with pytest.raises(KeyboardInterrupt):
            train(interrupting(stop), directory=folder)
        assert json.loads((folder / "settings.json").read_text()) == {"epochs": 3}
        if again:
            with pytest.warns(UserWarning, match="no checkpoint yet; the run begins anew"):
                found = train(directory=folder, **again)
        else:
            found = train(directory=folder)
        np.testing.assert_array_equal(found.state.ensemble, wanted)


def test_refused_settings_leave_no_run(tmp_path: Path) -> None:
    """Settings are written once the run is known to be possible."""
    with pytest.raises(ValueError, match="batch_size"):
        train(directory=tmp_path, batch_size=50)
    with pytest.raises(ValueError, match="checkpoint_every: -1"):
        train(directory=tmp_path, checkpoint_every=-1)
    assert not (tmp_path / "settings.json").exists()


def cut(place: Path) -> None:
    place.write_bytes(place.read_bytes()[:10])


DAMAGES: dict[str, Callable[[Path], None]] = {
    "no notes": lambda step: shutil.rmtree(step / "about"),
    "notes cut": lambda step: cut(step / "about/metadata"),
    "no arrays": lambda step: shutil.rmtree(step / "state"),
    "no shapes": lambda step: (step / "state/_METADATA").unlink(),
    "shapes cut": lambda step: cut(step / "state/_METADATA"),
    "arrays cut": lambda step: cut(step / "state/manifest.ocdbt"),
    "empty": lambda step: [shutil.rmtree(child) for child in step.iterdir() if child.is_dir()] and None,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_older_checkpoint_is_taken(damage: str, tmp_path: Path) -> None:
    """The newest one damaged, the one before it is used, and said; the damaged one is set aside."""
    like = lambda notes: {"w": jnp.zeros(3)}
    checkpoints = Checkpoints(tmp_path, {"a": 1})
    for number in (1, 2):
        checkpoints.save(number, {"w": jnp.full(3, float(number))}, notes=number)
    checkpoints.close()
    DAMAGES[damage](tmp_path / "2")
    checkpoints = Checkpoints(tmp_path, {"a": 1})
    with pytest.warns(UserWarning, match="2: damaged, .*; set aside as 2.damaged, going on from checkpoint 1"):
        state, notes = checkpoints.restore(like)
    assert (state["w"].tolist(), notes) == ([1.0] * 3, 1)
    checkpoints.save(2, {"w": jnp.full(3, 5.0)}, notes=2)
    assert checkpoints.restore(like)[0]["w"].tolist() == [5.0] * 3
    checkpoints.close()


@pytest.mark.slow
def test_a_damaged_run_ends_as_a_whole_one(tmp_path: Path) -> None:
    """The epoch that is lost is trained again, to the same bits."""
    train(directory=tmp_path)
    DAMAGES["arrays cut"](tmp_path / "checkpoints/3")
    with pytest.warns(UserWarning, match="going on from checkpoint 2"):
        found = train(directory=tmp_path, resume=True)
    np.testing.assert_array_equal(found.state.ensemble, train().state.ensemble)
    assert [row["epoch"] for row in found.history] == [1, 2, 3]


def test_all_checkpoints_damaged(tmp_path: Path) -> None:
    """Where none can be read, the error says so and names the remedy; one of other settings is no damage."""
    checkpoints = Checkpoints(tmp_path, {"a": 1})
    checkpoints.save(1, {"w": jnp.zeros(3)})
    checkpoints.close()
    other = Checkpoints(tmp_path, {"a": 2})
    with pytest.raises(ValueError, match="another run"):
        other.restore(lambda notes: {"w": jnp.zeros(3)})
    other.close()
    DAMAGES["no arrays"](tmp_path / "1")
    checkpoints = Checkpoints(tmp_path, {"a": 1})
    with pytest.warns(UserWarning, match="none is left"), pytest.raises(ValueError, match="remove the folder"):
        checkpoints.restore(lambda notes: {"w": jnp.zeros(3)})
    checkpoints.close()


def test_a_checkpoint_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """An error in a line, and the ones before as they were."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"w": jnp.ones(3)}, notes=1)

    def full(*args: Any, **options: Any) -> None:
        logging.getLogger("absl").error("a long story")
        raise ValueError("OUT_OF_RANGE:\nno space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints._manager, "save", full)
        with pytest.raises(OSError, match="checkpoint 2 cannot be written: OUT_OF_RANGE: no space left on device"):
            checkpoints.save(2, {"w": jnp.ones(3)})
    assert "a long story" not in capfd.readouterr().err
    assert checkpoints.restore(lambda notes: {"w": jnp.zeros(3)})[1] == 1
    checkpoints.close()


def test_lines_do_for_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Without rich an epoch is a line."""
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    train(epochs=2, progress=True)
    captured = capsys.readouterr()
    assert [line.split(":")[0] for line in captured.err.splitlines()] == ["epoch 1/2", "epoch 2/2"]
    assert captured.out == ""
