"""Writes ``docs/external.json``, where other libraries have the names that ours mentions: ``python docs/external.py``.

It reads the list of names that each library's site publishes for such links, so it needs a network; a build of the
site does not. A name that a site has no longer stays, with a warning; new ones are found in docstrings and pages.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILE = Path(__file__).with_name("external.json")
SITES = (
    "https://docs.python.org/3/",
    "https://numpy.org/doc/stable/",
    "https://docs.jax.dev/en/latest/",
    "https://optax.readthedocs.io/en/latest/",
    "https://flax.readthedocs.io/en/latest/",
    "https://flax-linen.readthedocs.io/en/latest/",
    "https://docs.kidger.site/equinox/",
    "https://docs.kidger.site/diffrax/",
)
#: What code calls these modules.
SHORT = {"jnp": "jax.numpy", "np": "numpy", "nn": "flax.linen", "nnx": "flax.nnx", "eqx": "equinox"}
LIBRARIES = ("concurrent", "numpy", "jax", "optax", "flax", "equinox", "diffrax")


def in_full(name: str) -> str:
    """``jax.numpy.einsum`` for ``jnp.einsum``."""
    first, dot, rest = name.partition(".")
    return SHORT.get(first, first) + dot + rest


def mentioned() -> set[str]:
    """The names of other libraries in roles of docstrings and in code of pages."""
    text = "\n".join(
        path.read_text()
        for folder, kind in (("eki_jax", "*.py"), ("docs", "*.md"), (".", "*.md"))
        for path in sorted((ROOT / folder).rglob(kind) if folder != "." else ROOT.glob(kind))
    )
    names = {in_full(name) for name in re.findall(r"`([A-Za-z_]\w*(?:\.\w+)+)(?:\(.*?\))?`", text)}
    return {name for name in names if name.partition(".")[0] in LIBRARIES}


def inventory(content: bytes, site: str) -> Iterator[tuple[str, str]]:
    """The Python names of an ``objects.inv`` of Sphinx, with their addresses."""
    head, packed = b"\n".join(content.split(b"\n", 4)[:4]), content.split(b"\n", 4)[4]
    if b"Sphinx inventory version 2" not in head:
        raise ValueError(f"{site}: no inventory of Sphinx, version 2")
    for line in zlib.decompress(packed).decode().splitlines():
        found = re.fullmatch(r"(\S+)\s+(py:\w+)\s+-?\d+\s+(\S*)\s+.*", line)
        if found:
            name, _, address = found.groups()
            yield name, site + (address[:-1] + name if address.endswith("$") else address)


def main(arguments: list[str] | None = None) -> None:
    """Reads every site, keeps what is mentioned, and writes the file, sorted."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--site", action="append", help="address that ends in a slash; all known ones without it")
    parser.add_argument("--out", type=Path, default=FILE)
    chosen = parser.parse_args(arguments)
    wanted, links = mentioned(), json.loads(chosen.out.read_text()) if chosen.out.exists() else {}
    for site in chosen.site or SITES:
        try:
            with urllib.request.urlopen(f"{site}objects.inv", timeout=30) as answer:
                found = dict(inventory(answer.read(), site))
        except (OSError, ValueError) as error:
            print(f"{site}: {error}; its names stay as they are", file=sys.stderr)
            continue
        links |= {name: found[name] for name in wanted & set(found)}
        gone = [name for name, link in links.items() if link.startswith(site) and name not in found]
        for name in gone:
            print(f"{site} has {name} no longer", file=sys.stderr)
    chosen.out.write_text(json.dumps(dict(sorted(links.items())), indent=1) + "\n")


if __name__ == "__main__":
    main()
