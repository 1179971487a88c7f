"""The file of a result: lines of JSON, from which what was written is read to the last bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness import store

pytestmark = pytest.mark.benchmarks

RESULTS: list[dict[str, Any]] = [
    {},
    {"experiment": "a", "environment": {"device": "cpu", "versions": {"jax": "1"}}, "seeds": [0, 1], "nothing": None},
    {"cells": {"b": {"x": 1 / 3}, "a": {"x": [1e-300, {}]}}, "rows": [{"ours": 0.1}, {}, {"ours": None}]},
    {"cells": {}, "rows": [], "mixed": [{}, 1], "own": {"a": {"own": 2}}},  # which become no lines
    {"text": "two\nlines,\u2028 and a third of 15°\x85", "cells": {"a\nb": {"": ""}}},
]


@pytest.mark.parametrize("result", RESULTS)
def test_a_result_is_read_as_written(result: dict[str, Any], tmp_path: Path) -> None:
    """Each line is JSON; the first one counts the others, and each of these says what it is."""
    path = store.write(tmp_path / "x.jsonl", result)
    assert store.read(path) == json.loads(json.dumps(result))
    head, *lines = map(json.loads, path.read_text().rstrip("\n").split("\n"))
    assert head["lines"] == len(lines)
    kinds = {next(iter(line)) for line in lines}
    assert kinds == {kind for kind in ("cells", "rows") if result.get(kind)}
    assert not kinds & set(head)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text[:-9], "damaged"),
        (lambda text: text.rpartition('{"cells"')[0], "1 lines after the first"),
        (lambda text: text + '{"cells": "c"}\n', "3 lines after the first"),
        (lambda text: text.replace('{"lines": 2', '{"line": 2'), "no 'lines'"),
        (lambda text: text.replace('{"cells": "b", "x": 2}', "[]"), "damaged"),
        (lambda text: "", "damaged"),
    ],
)
def test_what_is_no_result_is_named(change: Any, words: str, tmp_path: Path) -> None:
    """A file that is cut, where a line ends too, or has more than it says."""
    path = store.write(tmp_path / "x.jsonl", {"preset": "cpu", "cells": {"a": {"x": 1}, "b": {"x": 2}}})
    text = path.read_text()
    assert change(text) != text
    path.write_text(change(text))
    with pytest.raises(store.Damaged, match=f"x.jsonl: damaged .*{words if words != 'damaged' else ''}"):
        store.read(path)


def test_what_is_begun_is_no_result(tmp_path: Path) -> None:
    """Runs of a command that was interrupted are kept, and are not taken for the result of another."""
    path = tmp_path / "x.jsonl"
    store.Runs(path).keep("a", {"found": 1})
    assert store.is_begun(store.read(path))
    assert store.earlier(path, "smoke", experiment="b") is None
    store.save(path, {**store.read(path), "experiment": "a", "preset": "cpu"})
    store.Runs(path, store.UNFINISHED).keep("b", {"found": 2})
    assert store.earlier(path, "cpu", experiment="a")["runs"]["a"]["found"] == 1
    with pytest.raises(store.Refused, match="holds something else"):
        store.earlier(path, experiment="b")
