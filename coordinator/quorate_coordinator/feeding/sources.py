"""Instances from files: CSV and JSON lines."""

import csv
import io
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TextIO

from quorate_protocol.errors import LocalError

FileFormat = Literal["csv", "jsonl"]

#: Name that stands for standard input.
STDIN: Final = "-"

#: Longest line that is read, in characters: a body has to fit a frame anyway.
_LINE_CHARS_MAX: Final = 4 << 20


class SourceInvalid(LocalError):
    """A file, or a line in it, is not what it should be. The text names file and line."""


@dataclass(frozen=True, slots=True)
class Instance:
    """One row."""

    #: Line in the file, from 1.
    line: int
    #: What the agents are asked.
    features: dict[str, Any]
    #: The truth; `has_truth` tells a missing one from null.
    truth: Any = None
    has_truth: bool = False


def guess_format(name: str) -> FileFormat:
    """CSV, unless the name ends like JSON lines."""
    return "jsonl" if name.lower().endswith((".jsonl", ".ndjson", ".json")) else "csv"


def read_instances(name: str, *, target: str | None, file_format: FileFormat | None = None) -> Iterator[Instance]:
    """Reads a file, or standard input for `-`, line by line; nothing is held but the current one.

    CSV values that look like numbers are numbers, `true` and `false` are booleans, an empty value is
    left out of the features. In JSON lines each line is an object.

    Args:
        name: path or `-`.
        target: column or key that holds the truth; None feeds without truths.
        file_format: None goes by the name.

    Raises:
        SourceInvalid: no such file, no such column, a line that cannot be read or has no target.
    """
    file_format = file_format or guess_format(name)
    shown = "standard input" if name == STDIN else name
    with _open(name) as file:
        rows = _csv_rows(file, shown, target) if file_format == "csv" else _json_rows(file, shown)
        for line, row in rows:
            if target is None:
                yield Instance(line, row)
                continue
            if target not in row:
                raise SourceInvalid(f"{shown}, line {line}: no value for the target {target!r}")
            truth = row.pop(target)
            yield Instance(line, row, truth, True)


@contextmanager
def _open(name: str) -> Iterator[TextIO]:
    if name == STDIN:
        # Its own wrapper: closing it must not close the process's standard input.
        stream = io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8-sig", newline="")
        try:
            yield stream
        finally:
            stream.detach()
        return
    try:
        file = Path(name).open(encoding="utf-8-sig", newline="")  # noqa: SIM115  closed below
    except OSError as error:
        raise SourceInvalid(f"{name}: {error.strerror}") from error
    with file:
        yield file


def _csv_rows(file: TextIO, shown: str, target: str | None) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(_LINE_CHARS_MAX)
    reader = csv.reader(file)
    try:
        header = next(reader, None)
        if not header:
            raise SourceInvalid(f"{shown} is empty: the first line has to name the columns")
        doubled = {column for column in header if header.count(column) > 1}
        if doubled:
            raise SourceInvalid(f"{shown}: the column {min(doubled)!r} is named twice")
        if target is not None and target not in header:
            raise SourceInvalid(f"{shown}: no column {target!r}; there are {', '.join(header)}")
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise SourceInvalid(f"{shown}, line {reader.line_num}: {len(row)} values for {len(header)} columns")
            yield (
                reader.line_num,
                {
                    column: value
                    for column, text in zip(header, row, strict=True)
                    if (value := _value(text)) is not None
                },
            )
    except csv.Error as error:
        raise SourceInvalid(f"{shown}, line {reader.line_num}: not CSV ({error})") from error
    except UnicodeDecodeError as error:
        raise SourceInvalid(f"{shown}: not UTF-8 text, near line {reader.line_num + 1}") from error


def _json_rows(file: TextIO, shown: str) -> Iterator[tuple[int, dict[str, Any]]]:
    line = 0
    try:
        while text := file.readline(_LINE_CHARS_MAX):
            line += 1
            if len(text) == _LINE_CHARS_MAX:
                raise SourceInvalid(f"{shown}, line {line}: longer than {_LINE_CHARS_MAX} characters")
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise SourceInvalid(f"{shown}, line {line}: not JSON ({error})") from error
            if not isinstance(row, dict):
                raise SourceInvalid(f"{shown}, line {line}: a JSON {type(row).__name__}, not an object")
            yield line, row
    except UnicodeDecodeError as error:
        raise SourceInvalid(f"{shown}: not UTF-8 text, near line {line + 1}") from error


def _value(text: str) -> Any:
    text = text.strip()
    if not text:
        return None
    if text in ("true", "True", "TRUE"):
        return True
    if text in ("false", "False", "FALSE"):
        return False
    # `1_000` is a number to Python alone; a leading zero is an identifier's (a zip code, say).
    if "_" in text or (len(text) > 1 and text[0] == "0" and text[1].isdigit()):
        return text
    try:
        number = int(text)
        if -(1 << 63) <= number < 1 << 63:
            return number
    except ValueError:
        pass
    try:
        value = float(text)
    except ValueError:
        return text
    return value if math.isfinite(value) else text
