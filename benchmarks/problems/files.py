"""Where the data files are: a folder the caller names, the folder of ``EKI_JAX_DATA``, or a checked download."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

from benchmarks.problems.idx import DamagedFile, read_bytes

ENVIRONMENT_VARIABLE = "EKI_JAX_DATA"


class MissingFile(FileNotFoundError):
    """A data file that is not there and could not be downloaded; the message names it and its address.

    Attributes:
        reason: The message without this machine's folders, for results that others read.
    """

    def __init__(self, reason: str, hint: str) -> None:
        super().__init__(f"{reason} ({hint})")
        self.reason = reason


class Source(NamedTuple):
    """One file of a data set.

    Attributes:
        folder: Its folder under the data folder.
        name: Its canonical file name.
        url: Its canonical address.
        md5: Of the file as downloaded.
        content_md5: Of the decompressed content where that is known too, so that a file packed anew passes.
        member: The file is this member of the downloaded archive.
        size: How many bytes the content has at most, decompressed.
    """

    folder: str
    name: str
    url: str
    md5: str | None = None
    content_md5: str | None = None
    member: str | None = None
    size: int | None = None


def data_folder(data: Path | str | None) -> Path | None:
    """The folder to read from: the argument, else ``EKI_JAX_DATA``, else ``None`` (download)."""
    chosen = data if data is not None else os.environ.get(ENVIRONMENT_VARIABLE) or None
    return None if chosen is None else Path(chosen)


def locate(source: Source, data: Path | str | None = None) -> Path:
    """The path of a file, downloading it where no folder is named.

    Raises:
        MissingFile: The named folder lacks the file, or the download failed.
    """
    folder = data_folder(data)
    if folder is None:
        return _download(source)
    candidates = [folder / source.folder / source.name, folder / source.folder / source.name.removesuffix(".gz")]
    for path in candidates:
        if path.is_file():
            return path
    raise MissingFile(
        f"{source.folder}/{source.name} is missing; it is published at {source.url}", f"looked into {folder}"
    )


def read(source: Source, data: Path | str | None = None, *, verify: bool = True) -> bytes:
    """The decompressed content of a file, checked by its hash unless ``verify`` is false.

    Raises:
        MissingFile: There is no such file.
        DamagedFile: It has another hash than the published file, or more bytes.
    """
    path = locate(source, data)
    content = read_bytes(path, source.size)
    if verify:
        check(source, path, content)
    return content


def check(source: Source, path: Path, content: bytes) -> None:
    """Raise ``DamagedFile`` unless the file has the published hash."""
    if source.content_md5 is not None:
        found, wanted = hashlib.md5(content).hexdigest(), source.content_md5
    elif source.md5 is not None and source.member is None and path.name == source.name:
        found, wanted = hashlib.md5(path.read_bytes()).hexdigest(), source.md5
    else:
        return
    if found != wanted:
        raise DamagedFile(f"{path}: MD5 {found}; wanted {wanted}, that of {source.url}")


def _download(source: Source) -> Path:
    import pooch

    known_hash = None if source.md5 is None else f"md5:{source.md5}"
    archive = source.url.rsplit("/", 1)[-1]
    processor = None if source.member is None else pooch.Untar(members=[source.member])
    target = pooch.os_cache("eki_jax") / source.folder
    try:
        paths = pooch.retrieve(source.url, known_hash, fname=archive, path=target, processor=processor)
    except ValueError as error:  # what pooch raises for a wrong hash
        raise DamagedFile(f"{source.url}: {error}") from error
    except OSError as error:
        raise MissingFile(
            f"{source.folder}/{source.name} could not be downloaded from {source.url}: {type(error).__name__}",
            f"put it into a data folder and name that by --data or {ENVIRONMENT_VARIABLE}",
        ) from error
    return Path(paths if source.member is None else paths[0])
