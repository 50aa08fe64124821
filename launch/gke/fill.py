"""Fill in a manifest: `{{name}}` becomes a JSON value, which YAML reads as what it is; a line whose value is
empty is left out.

fill.py TEMPLATE NAME=TEXT … NAME:=NUMBER … -- ARGUMENT …
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")


def filled(template: str, values: Mapping[str, str | int], arguments: Sequence[str]) -> str:
    """The manifest; `{{arguments}}` are a list. Raises ValueError for a line break, KeyError for a value that
    is missing."""
    for value in (*values.values(), *arguments):
        if isinstance(value, str) and ("\n" in value or "\r" in value):
            raise ValueError("a line break within a value")
    # Kubernetes replaces $(NAME) in arguments, and takes $$ for a dollar.
    texts = {**values, "arguments": [argument.replace("$", "$$") for argument in arguments]}
    lines = [
        line
        for line in template.splitlines(keepends=True)
        if all(values.get(name) != "" for name in PLACEHOLDER.findall(line))
    ]
    return PLACEHOLDER.sub(lambda found: json.dumps(texts[found[1]]), "".join(lines))


def main() -> None:
    """Write the manifest to standard output."""
    template, *words = sys.argv[1:]
    split = words.index("--")
    pairs = (word.split("=", 1) for word in words[:split])
    values = {name.removesuffix(":"): int(value) if name.endswith(":") else value for name, value in pairs}
    sys.stdout.write(filled(Path(template).read_text(), values, words[split + 1 :]))


if __name__ == "__main__":
    main()
