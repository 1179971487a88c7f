"""One command line: the same words for the same thing, one check of each value, the same exit codes.

0 is success; 2 is what the user can mend, said in a line; 130 follows Ctrl-C or SIGTERM. A reader that closes the pipe
ends nothing: the command runs on, and says the rest to nobody.

Only the standard library is imported here, so that Ctrl-C is caught while the heavier packages are still being read.
"""

from __future__ import annotations

import _thread
import argparse
import contextlib
import functools
import importlib
import math
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

INTERRUPTED, MENDABLE = 130, 2
_INTERRUPTED = "{}: interrupted; what was finished is kept"
MOST_SEED = 2**32 - 1  # JAX folds larger ones to these


class Refused(ValueError):
    """What the user can mend; the message names it, and what is wanted."""


def command(name: str) -> Callable[[Callable[[list[str]], int]], Callable[[list[str]], int]]:
    """Make a command's ``main(argv)`` end as all of them do.

    Args:
        name: name of the command, before what it says.
    """

    def of(main: Callable[[list[str]], int]) -> Callable[[list[str]], int]:
        @functools.wraps(main)
        def run(argv: list[str]) -> int:
            return guarded(name, lambda: main(argv))

        return run

    return of


def guarded(name: str, body: Callable[[], int]) -> int:
    """The exit code of ``body``: errors that a user can mend and interrupts end in a line.

    Args:
        name: name of the command, before what is said.
        body: function that does the work.
    """
    with _patient_streams(), _short_warnings(name), _interrupts(name) as is_asked:
        try:
            return body()
        except KeyboardInterrupt:
            return _interrupted(name)
        except Exception as error:
            # One that was raised inside of a function that XLA called, or that became another error elsewhere.
            if is_asked() or "KeyboardInterrupt" in str(error):
                return _interrupted(name)
            _say_error(name, error)
        return MENDABLE


def _say_error(name: str, error: Exception) -> None:
    """Say what the user can mend, in a line; raise anything else again."""
    if isinstance(error, ImportError):
        is_ours = (error.name or "").split(".")[0] in ("benchmarks", "eki_jax")
        if is_ours or not (isinstance(error, ModuleNotFoundError) or "pip install" in str(error)):
            raise error  # a fault of this code, or packages that do not fit together
        say(f"{name}: {_needs(error)}")
    elif isinstance(error, ValueError | OSError) or type(error).__name__ == "StepRefused":  # not imported here
        say(f"{name}: {_one_line(error)}")
    else:
        raise error


def require(*packages: str) -> None:
    """Import what is needed at the end of long work before it begins; an error names what to install."""
    for package in packages:
        importlib.import_module(package)


def say(line: str) -> None:
    """A line for the person at the terminal; standard output is for results."""
    print(line, file=sys.stderr, flush=True)


def _interrupted(name: str) -> int:
    say(_INTERRUPTED.format(name))
    return INTERRUPTED


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


# What the extra ``benchmarks`` does not bring.
_EXTRAS = {"diffrax": "ode", "equinox": "equinox", "gymnax": "rl"}


def _needs(error: ImportError) -> str:
    """An import's error with what to install.

    >>> _needs(ModuleNotFoundError("No module named 'optax'", name="optax"))
    "optax is not installed: pip install 'eki_jax[benchmarks]'"
    >>> _needs(ImportError("flax is not installed: pip install 'eki_jax[flax]'"))
    "flax is not installed: pip install 'eki_jax[benchmarks]'"
    """
    text = _one_line(error)
    package = error.name or text.split(" is not installed")[0]
    if package == text:  # it says all in words of its own
        return text
    return f"{package} is not installed: pip install 'eki_jax[{_EXTRAS.get(package.split('.')[0], 'benchmarks')}]'"


class _Patient:
    """A stream that goes on after its reader has gone, and that shows what its encoding cannot as question marks."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._gone = False

    def write(self, text: str) -> int:
        if not self._gone:
            try:
                return self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self._stream.encoding or "ascii"
                return self._stream.write(text.encode(encoding, "replace").decode(encoding))
            except BrokenPipeError:
                self._leave()
        return len(text)

    def flush(self) -> None:
        if not self._gone:
            try:
                self._stream.flush()
            except BrokenPipeError:
                self._leave()

    def _leave(self) -> None:
        self._gone = True
        with contextlib.suppress(OSError, ValueError):  # what is left in the buffer goes there too
            empty = os.open(os.devnull, os.O_WRONLY)
            os.dup2(empty, self._stream.fileno())
            os.close(empty)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _patient_streams() -> Iterator[None]:
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (s if isinstance(s, _Patient) or s is None else _Patient(s) for s in before)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        sys.stdout, sys.stderr = before


@contextlib.contextmanager
def _short_warnings(name: str) -> Iterator[None]:
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *rest, **more: f"{name}: {_one_line(message)}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


@contextlib.contextmanager
def _interrupts(name: str) -> Iterator[Callable[[], bool]]:
    """SIGTERM is a Ctrl-C; one that comes while another is dealt with ends the process at once.

    So does one that comes while packages are being imported, whose extension modules do not survive an exception.

    Yields:
        A function that says whether one has come, whatever became of its ``KeyboardInterrupt``.
    """
    asked = False

    def handler(number: int, frame: Any) -> NoReturn:
        nonlocal asked
        if asked or _is_importing(frame):
            if not asked:
                os.write(2, f"{_INTERRUPTED.format(name)}\n".encode())
            os._exit(INTERRUPTED)
        asked = True
        raise KeyboardInterrupt

    def unraisable(what: Any) -> None:
        nonlocal asked
        if not issubclass(what.exc_type, KeyboardInterrupt):
            return hook(what)
        asked = False  # it fell into a function whose errors Python drops, such as a callback of its garbage collector
        again = threading.Timer(0.01, _thread.interrupt_main)  # once this function is over, too
        again.daemon = True
        again.start()

    before: dict[signal.Signals, Any] = {}
    hook, sys.unraisablehook = sys.unraisablehook, unraisable
    with contextlib.suppress(ValueError):  # not in the main thread: the signals are somebody else's
        for one in (signal.SIGINT, signal.SIGTERM):
            before[one] = signal.signal(one, handler)
    try:
        yield lambda: asked
    finally:
        sys.unraisablehook = hook
        for one, previous in before.items():
            signal.signal(one, previous)


def _is_importing(frame: Any) -> bool:
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Say it in a line, and exit with 2."""
        name = self.prog.removeprefix("python -m benchmarks").strip() or "benchmarks"
        self.exit(MENDABLE, f"{name}: {_one_line(ValueError(message.removeprefix('argument ')))}\n")

    def add_preset(
        self, *, default: str = "cpu", choices: tuple[str, ...] = ("smoke", "cpu", "full"), **o: Any
    ) -> None:
        """Add ``--preset``."""
        self.add_argument("--preset", choices=choices, default=default, **o)

    def add_seed(self, **options: Any) -> None:
        """Add ``--seed``, of everything random."""
        words = {"metavar": "S", "help": "of everything random (default: 0)", **options}
        self.add_argument("--seed", type=whole(0, MOST_SEED), **words)

    def add_data(self) -> None:
        """Add ``--data``."""
        self.add_argument(
            "--data", metavar="DIR", type=folder, help="folder of the data files; else EKI_JAX_DATA, else download"
        )

    def add_draw(self, *more: str) -> None:
        """Add ``--draw``, under other names too."""
        words = "run nothing: make picture and table of the numbers that are there"
        self.add_argument("--draw", *more, action="store_true", help=words)

    def add_keep(self) -> None:
        """Add ``--keep``."""
        words = "keep the cells of a finished run with the same settings"
        self.add_argument("--keep", action="store_true", help=words)

    def add_peers(self) -> None:
        """Add ``--peers``, None where it is not given."""
        words = "folder, which has to be there, where other libraries are installed (default: in the user's cache)"
        self.add_argument("--peers", "--env-dir", metavar="DIR", type=there, help=words)


def whole(least: int = 1, most: int | None = None) -> Callable[[str], int]:
    """A check of a whole number's text.

    Args:
        least: least number.
        most: largest number, if any.

    >>> whole(0, 9)("7")
    7
    >>> whole()("0")
    Traceback (most recent call last):
        ...
    argparse.ArgumentTypeError: 0; wanted a whole number, at least 1
    """
    words = f"wanted a whole number, at least {least}" if most is None else f"wanted a whole number, {least} to {most}"

    def check(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}; {words}") from None
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"{text}; {words}")
        return value

    return check


def number(
    words: str = "a finite number > 0", holds: Callable[[float], bool] = lambda value: value > 0
) -> Callable[[str], float]:
    """A check of a number's text.

    Args:
        words: words for the numbers that are wanted.
        holds: function that says whether a finite number is one of them.

    >>> number()("0.5")
    0.5
    >>> number()("nan")
    Traceback (most recent call last):
        ...
    argparse.ArgumentTypeError: 'nan'; wanted a finite number > 0
    """

    def check(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and holds(value)):
            raise argparse.ArgumentTypeError(f"{text!r}; wanted {words}")
        return value

    return check


def folder(text: str) -> Path:
    """A folder's name, or that of a new one.

    >>> folder("")
    Traceback (most recent call last):
        ...
    argparse.ArgumentTypeError: ''; wanted the name of a folder
    """
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r}; wanted the name of a folder")
    if Path(text).exists() and not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a file; wanted a folder, or a name for a new one")
    return Path(text)


def there(text: str) -> Path:
    """The name of a folder that is there."""
    path = folder(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: no such folder; make it first, if it is the one you mean")
    return path


def file(text: str) -> Path:
    """A file's name, or that of a new one."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r}; wanted the name of a file")
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; wanted a file, or a name for a new one")
    return Path(text)
