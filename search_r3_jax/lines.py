"""Lines and fields of untrusted files, gzipped or not: bounded reading, and errors raised or counted."""

import gzip
import json
import zlib
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from search_r3_jax.errors import UserError

# A file without line ends must not be read into memory whole.
MAX_LINE_BYTES = 64 * 2**20
MAX_LISTED = 20
MAX_SHOWN = 80


class LineError(Exception):
    """A line that cannot be used; `reason` is the key to count it by, the text names field and remedy."""

    def __init__(self, reason: str, text: str):
        super().__init__(text)
        self.reason = reason


@dataclass(kw_only=True)
class Problems:
    """Problems of the input: raise UserError at the first one, or with `skip_bad` count them by reason.

    Attributes:
        skip_bad: leave out lines that cannot be used.
        as_published: take what published collections hold: empty texts, and judgements of texts that are not
            there. `counts` says how many.
        counts: reason → number of lines.
        listed: descriptions of the first few.
    """

    skip_bad: bool = False
    as_published: bool = False
    counts: Counter[str] = field(default_factory=Counter)
    listed: list[str] = field(default_factory=list)

    @property
    def strict(self) -> bool:
        """Whether the first problem ends the reading."""
        return not (self.skip_bad or self.as_published)

    @contextmanager
    def at(self, where: str) -> Iterator[None]:
        """Turn a LineError of the block into a UserError that begins with `where`.

        With `skip_bad`, count it and continue.
        """
        try:
            yield
        except LineError as problem:
            if not self.skip_bad:
                raise UserError(f"{where}: {problem}") from None
            self.count(where, problem)

    def count(self, where: str, problem: LineError) -> None:
        """Count a problem without leaving its line out."""
        self.counts[problem.reason] += 1
        if len(self.listed) < MAX_LISTED:
            self.listed.append(f"{where}: {problem}")


def read_lines(
    path: Path, problems: Problems, *, blank: bool = False, undecoded: bool = False
) -> Iterator[tuple[str, str]]:
    """`(where, line)` of each line that is not blank, or with `blank` of each, without its line end.

    `where` names file and line. With `undecoded`, a byte that is not UTF-8 is no mistake but a surrogate, as
    of the error handler `surrogateescape`, and NUL bytes stay. Raises UserError when the file cannot be read.
    """
    try:
        with _open(path) as file:
            yield from read_stream(file, str(path), problems, blank=blank, undecoded=undecoded)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror or error}); mend it or choose another --input"
        ) from None


def read_stream(
    file: gzip.GzipFile | BinaryIO,
    name: str,
    problems: Problems,
    *,
    blank: bool = False,
    undecoded: bool = False,
) -> Iterator[tuple[str, str]]:
    """`read_lines` of an open file, which messages call `name`."""
    number = 0
    try:
        # Bytes are split at "\n" only: text may hold other separators such as U+2028.
        while raw := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if raw == BOM_UTF8:
                # All that the file holds: no line.
                continue
            where, line = f"{name}, line {number}", None
            with problems.at(where):
                line = _decoded(raw, first=number == 1, undecoded=undecoded)
            while len(raw) > MAX_LINE_BYTES and not raw.endswith(b"\n"):
                raw = file.readline(MAX_LINE_BYTES + 1)
            if line is not None and (blank or line.strip()):
                yield where, line
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        with problems.at(f"{name}, after line {number}"):
            raise LineError("damaged gzip file", f"damaged gzip file ({error}); fetch it again") from None


def parse_object(line: str) -> dict[str, Any]:
    """The JSON object of a line; raises LineError."""
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        text = f"not valid JSON ({error.msg} at column {error.colno}); expected one object a line"
        raise LineError("malformed JSON", text) from None
    except ValueError:
        raise LineError(
            "malformed JSON", "not valid JSON for us (a number with too many digits); shorten it"
        ) from None
    except RecursionError:
        raise LineError(
            "malformed JSON", "not valid JSON for us (nested too deeply); expected a flat object"
        ) from None
    if not isinstance(fields, dict):
        raise LineError("no JSON object", f"expected a JSON object, got {type(fields).__name__}")
    return fields


def string_field(fields: dict[str, Any], name: str, *, default: str | None = None) -> str:
    """A string field; `default` if it is missing or null and a default is given; raises LineError."""
    if fields.get(name) is None and default is not None:
        return default
    if name not in fields:
        raise LineError("missing field", f"field {name!r} is missing; add it")
    return checked_string(fields[name], name)


def filled_field(fields: dict[str, Any], name: str) -> str:
    """A string field that is not blank; raises LineError."""
    text = string_field(fields, name)
    if not text.strip():
        raise LineError("empty text", f"field {name!r} is empty; fill it or remove the line")
    return text


def id_field(fields: dict[str, Any], names: Sequence[str]) -> str | None:
    """The id under the first of `names` that is there and not null: a string or a whole number; else None.

    Raises LineError.
    """
    name = next((name for name in names if fields.get(name) is not None), None)
    if name is None:
        return None
    value = fields[name]
    # bool is a kind of int in Python.
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    checked = checked_string(value, name)
    if not checked.strip():
        raise LineError("empty id", f"field {name!r} is empty; fill it or leave it out")
    return checked


def checked_string(value: object, name: str) -> str:
    """`value`, if it is a string without NUL that UTF-8 can encode; raises LineError naming the field."""
    if not isinstance(value, str):
        raise LineError("wrong type", f"field {name!r} must be a string, got {type(value).__name__}")
    if "\0" in value:
        raise LineError("NUL byte", f"field {name!r} holds a NUL byte; remove it")
    try:
        value.encode()
    except UnicodeEncodeError:
        # JSON escapes can spell half a surrogate pair, which no UTF-8 file can store.
        raise LineError(
            "unpaired surrogate", f"field {name!r} holds an unpaired surrogate escape; remove it"
        ) from None
    return value


def shown(value: str) -> str:
    """`value` quoted for a message: one line, truncated when long."""
    return repr(value if len(value) <= MAX_SHOWN else value[:MAX_SHOWN] + "…")


def _decoded(raw: bytes, *, first: bool, undecoded: bool) -> str:
    if len(raw) > MAX_LINE_BYTES:
        raise LineError("line too long", f"longer than {MAX_LINE_BYTES} bytes; shorten or remove it")
    encoding = "utf-8-sig" if first else "utf-8"
    if undecoded:
        return raw.decode(encoding, "surrogateescape").rstrip("\r\n")
    if b"\0" in raw:
        raise LineError("NUL byte", "holds a NUL byte; remove it, or convert the file to UTF-8")
    try:
        return raw.decode(encoding).rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise LineError("not UTF-8", f"not UTF-8 ({error.reason}); convert the file to UTF-8") from None


def _open(path: Path) -> gzip.GzipFile | BinaryIO:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")
