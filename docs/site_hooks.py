"""What the site needs beyond the pages: links that leave docs/ are shown as paths of the repository."""

from __future__ import annotations

import posixpath
import re
from typing import Any

_LINK = re.compile(r"\[([^\]]*)\]\(([^)\s:]+)\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by mkdocs for each page before it is rendered."""
    folder = posixpath.dirname(page.file.src_uri)

    def shown(match: re.Match[str]) -> str:
        text, target = match.groups()
        path = posixpath.normpath(posixpath.join("docs", folder, target.partition("#")[0]))
        if target.startswith("#") or path.startswith("docs/"):
            return match[0]
        return text if path.endswith(text.strip("`")) else f"{text} (`{path}`)"

    return _LINK.sub(shown, markdown)
