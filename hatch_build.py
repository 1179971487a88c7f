"""What a package says of itself that depends on where its repository is: its front page and its addresses.

A package page shows README without the repository around it, so that relative links and pictures lead nowhere there.
The address is stated once, under ``tool.hatch.metadata.hooks.custom`` in pyproject.toml. Where it is not known, links
become their words and pictures are left out.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

#: A picture alone in its line, a picture, a link; each of them to a place within the repository.
_WITHIN = r"(?P<target>(?![a-z]+:|#)[^)\s]+)\)"
PICTURE = re.compile(rf"!\[(?P<text>[^\]]*)\]\({_WITHIN}\n*")
LINK = re.compile(rf"(?<!!)\[(?P<text>[^\]]*)\]\({_WITHIN}")


def front_page(text: str, repository: str) -> str:
    """README as a package page can show it."""
    if not repository:
        return LINK.sub(lambda link: link["text"], PICTURE.sub("", text))
    text = PICTURE.sub(lambda link: f"![{link['text']}]({repository}/raw/main/{link['target']})\n\n", text)
    return LINK.sub(lambda link: f"[{link['text']}]({repository}/blob/main/{link['target']})", text)


class CustomMetadataHook(MetadataHookInterface):
    """Adds ``readme`` and ``urls``."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Called by hatchling with what pyproject.toml has."""
        root, repository = Path(self.root), self.config.get("repository", "")
        text = front_page((root / "README.md").read_text(encoding="utf-8"), repository)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
        metadata["urls"] = {}
        if repository:
            metadata["urls"] = {
                "Source": repository,
                "Issues": f"{repository}/issues",
                "Changes": f"{repository}/blob/main/CHANGELOG.md",
            }
        if documentation := self.config.get("documentation", ""):
            metadata["urls"]["Documentation"] = documentation
