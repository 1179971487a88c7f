"""Text as numbers: characters, windows of them, and what is held out."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.harness.command import Refused

# The last tenth tests.
_TEST_SHARE = 0.1


class Text(NamedTuple):
    """A text as numbers.

    Attributes:
        name: name of where it is from.
        characters: vocabulary, sorted.
        train: numbers of the characters to learn from, int32.
        test: numbers of those held out.
    """

    name: str
    characters: str
    train: np.ndarray
    test: np.ndarray

    def decoded(self, numbers: np.ndarray) -> str:
        """Characters of numbers.

        >>> Text("", "ab", np.zeros(0, np.int32), np.zeros(0, np.int32)).decoded(np.array([1, 0]))
        'ba'
        """
        return "".join(self.characters[number] for number in numbers)

    def without(self, share: float) -> Text:
        """What there is to learn from alone, of which the last share is held out, to choose settings by.

        >>> Text("", "ab", np.arange(10), np.zeros(0)).without(0.2).test
        array([8, 9])
        """
        held_out = int(len(self.train) * share)
        return self._replace(train=self.train[:-held_out], test=self.train[-held_out:])


def load(path: Path | None, context: int) -> Text:
    """The text in a file of UTF-8, or the help topics that come with Python.

    Raises:
        Refused: it is no text, or too short for windows of ``context`` characters.
    """
    if path is None:
        from pydoc_data.topics import topics

        name, text = "the topics of Python's help()", "\n".join(topics[name] for name in sorted(topics))
    else:
        name = path.name
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise Refused(f"--text {path}: no UTF-8 ({error.reason} at byte {error.start}); wanted a text") from None
    characters, numbers = np.unique(np.array(list(text), dtype="<U1"), return_inverse=True)
    held_out = int(len(numbers) * _TEST_SHARE)
    if held_out <= context:
        raise Refused(f"--text {name}: {len(numbers)} characters; wanted more than {int((context + 1) / _TEST_SHARE)}")
    numbers = numbers.astype(np.int32)
    return Text(name, "".join(characters), numbers[:-held_out], numbers[-held_out:])


def windows(numbers: np.ndarray, context: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows one after the other, evenly spread over the text, and what follows each character.

    >>> x, y = windows(np.arange(10), 3, 2)
    >>> x.tolist(), y.tolist()
    ([[0, 1, 2], [6, 7, 8]], [[1, 2, 3], [7, 8, 9]])
    """
    starts = np.arange(0, len(numbers) - context, context)
    starts = starts[np.linspace(0, len(starts) - 1, min(most, len(starts))).round().astype(int)]
    rows = starts[:, None] + np.arange(context)
    return numbers[rows], numbers[rows + 1]
