"""The page of `report`, read back: its tables, its searches, and every tag."""

from html.parser import HTMLParser
from pathlib import Path


class Page(HTMLParser):
    """The tables of a page by their titles, the texts of its searches, and all tags with their attributes."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.sections: list[str] = []
        self.texts: dict[str, list[str]] = {"query": [], "reply": [], "document": []}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._title, self._open, self._cell = "", "", ""
        self.text = file.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        self._open = attributes.get("class") or tag
        if tag == "section":
            self.sections.append(str(attributes["id"]))
        if tag == "table":
            self.tables[self._title] = []
        if tag == "tr":
            self.tables[self._title].append([])
        if tag in ("td", "th"):
            self._cell = ""
        # The interval below a value.
        if self._open == "small":
            self._cell += "|"
        if self._open in self.texts:
            self.texts[self._open].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.tables[self._title][-1].append(self._cell)
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open == "h3":
            self._title = data
        self._cell += data
        if self._open in self.texts:
            self.texts[self._open][-1] += data

    def row(self, table: str, name: str) -> list[str]:
        return next(row[1:] for row in self.tables[table] if row[0] == name)
