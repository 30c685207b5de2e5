"""The pages of the documentation and the blocks of code in them, for the tests that hold them to it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["PAGES", "ROOT", "Block", "blocks_of", "commands_in", "pages_with", "prose_of"]

ROOT = Path(__file__).resolve().parent.parent
_SKIPPED_FOLDERS = {".venv", ".git", "build", "runs", "site"}
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in ROOT.rglob("*.md")
    if not _SKIPPED_FOLDERS & set(path.relative_to(ROOT).parts[:-1])
)
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: the page and line of its fence, what stands behind that, and what is in it."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: str, language: str | None = None) -> list[Block]:
    """The blocks of a page, of one language or of all."""
    source = (ROOT / page).read_text()
    found = [
        Block(page, source.count("\n", 0, match.start()) + 1, match[1], match[2])
        for match in _FENCE.finditer(source)
    ]
    return [block for block in found if language in (None, block.language)]


def pages_with(language: str) -> list[str]:
    return [page for page in PAGES if blocks_of(page, language)]


def prose_of(page: str) -> str:
    """A page without its blocks."""
    return _FENCE.sub("", (ROOT / page).read_text())


def commands_in(block: Block) -> Iterator[list[str]]:
    """The words of each command of a bash block; comments and prompts are left off."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        if words:
            yield words
