"""The pages of the project, and their blocks."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    page
    for page in [
        *ROOT.glob("*.md"),
        *(p for room in ("search_r3_jax", "launch", "tests") for p in (ROOT / room).rglob("*.md")),
    ]
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose_of(page: Path) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def fenced(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page in one of these languages; "" is a block that names none."""
    blocks = FENCE.findall(page.read_text(encoding="utf-8"))
    return [block for language, block in blocks if language in languages]
