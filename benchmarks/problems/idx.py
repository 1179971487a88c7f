"""The IDX format of MNIST: big-endian sizes, then the values."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

_UNSIGNED_BYTE = 0x08


class DamagedFile(ValueError):
    """A data file that is not what it should be; the message names it, what it was and what was wanted."""


def read_bytes(path: Path, most: int | None = None) -> bytes:
    """The content of a file, decompressed if its name ends in ``.gz``.

    Args:
        path: The file.
        most: How many bytes it may have, decompressed; no more of them are held. None for any number.

    Raises:
        DamagedFile: The compressed stream is broken or ends too early, or there are too many bytes.
    """
    wanted = -1 if most is None else most + 1
    if path.suffix != ".gz":
        with path.open("rb") as file:
            content = file.read(wanted)
    else:
        try:
            with gzip.open(path) as unpacked:
                content = unpacked.read(wanted)
        except (OSError, EOFError, zlib.error) as error:
            size = path.stat().st_size
            raise DamagedFile(f"{path}: {size} bytes that are not a whole gzip stream ({error})") from error
    if most is not None and len(content) > most:
        raise DamagedFile(f"{path}: more than {most} bytes; wanted {most} at most")
    return content


def parse_idx(content: bytes, name: str, ndim: int) -> np.ndarray:
    """The array of unsigned bytes in an IDX file.

    Args:
        content: The decompressed file.
        name: What to call the file in errors.
        ndim: The number of dimensions wanted: 1 for labels, 3 for images.

    Returns:
        A ``uint8`` array.

    Raises:
        DamagedFile: The magic number, the sizes or the length of the content are wrong.

    Example:
        >>> parse_idx(bytes([0, 0, 8, 1, 0, 0, 0, 2, 7, 9]), "labels", 1)
        array([7, 9], dtype=uint8)
    """
    header = 4 + 4 * ndim
    if len(content) < header:
        raise DamagedFile(f"{name}: {len(content)} bytes; wanted a header of {header} bytes and the values")
    wanted = bytes([0, 0, _UNSIGNED_BYTE, ndim])
    if content[:4] != wanted:
        raise DamagedFile(f"{name}: magic number 0x{content[:4].hex()}; wanted 0x{wanted.hex()}")
    shape = tuple(int(size) for size in np.frombuffer(content[4:header], ">u4"))
    size = math.prod(shape)
    if len(content) - header != size:
        raise DamagedFile(f"{name}: {len(content) - header} values; its header wants {size}, the shape {shape}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
