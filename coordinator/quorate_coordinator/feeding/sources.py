"""Instances from files: CSV and JSON lines."""

import csv
import io
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TextIO

from quorate_coordinator.feeding.ahead import InterruptibleFile, Interruption
from quorate_protocol.errors import LocalError

FileFormat = Literal["csv", "jsonl"]

#: Name that stands for standard input.
STDIN: Final = "-"

#: Longest line that is read, in characters: a body has to fit a frame anyway.
_LINE_CHARS_MAX: Final = 4 << 20

_JSON_KINDS: Final[dict[type, str]] = {
    list: "array",
    str: "text",
    bool: "truth value",
    int: "number",
    float: "number",
    type(None): "null",
}


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


def read_instances(
    name: str,
    *,
    target: str | None,
    file_format: FileFormat | None = None,
    interruption: Interruption | None = None,
) -> Iterator[Instance]:
    """Reads a file, or standard input for `-`, line by line; nothing is held but the current one.

    CSV values that look like numbers are numbers, `true` and `false` are booleans, an empty value is
    left out of the features. In JSON lines each line is an object.

    Args:
        name: path or `-`.
        target: column or key that holds the truth; None feeds without truths.
        file_format: None goes by the name.
        interruption: ends the reading, as if the file had ended, also while it waits for more of a pipe.

    Raises:
        SourceInvalid: no such file, no such column, a line that cannot be read or has no target.
    """
    file_format = file_format or guess_format(name)
    shown = "standard input" if name == STDIN else name
    with _open(name, interruption) as file:
        lines = _Lines(file, shown)
        rows = _csv_rows(lines, target) if file_format == "csv" else _json_rows(lines)
        for line, row in rows:
            if target is None:
                yield Instance(line, row)
                continue
            if target not in row:
                raise SourceInvalid(f"{shown}, line {line}: no value for the target {target!r}")
            truth = row.pop(target)
            yield Instance(line, row, truth, True)


@contextmanager
def _open(name: str, interruption: Interruption | None) -> Iterator[TextIO]:
    try:
        # A descriptor of its own: closing it must not close the process's standard input.
        raw = io.FileIO(os.dup(0) if name == STDIN else Path(name))
    except OSError as error:
        raise SourceInvalid(f"{name}: {error.strerror}") from error
    with raw:
        source = raw if interruption is None else InterruptibleFile(raw, interruption)
        # What is not UTF-8 gets through here and is found line by line, where its place is known.
        with io.TextIOWrapper(
            io.BufferedReader(source), encoding="utf-8-sig", errors="surrogateescape", newline=""
        ) as file:
            yield file


class _Lines:
    """The lines of a file, counted and checked."""

    def __init__(self, file: TextIO, shown: str) -> None:
        self._file = file
        self.shown = shown
        #: Number of the line that was given last, from 1.
        self.number = 0

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        try:
            text = self._file.readline(_LINE_CHARS_MAX)
        except OSError as error:
            raise SourceInvalid(f"{self.shown}: cannot be read: {error.strerror}") from error
        if not text:
            raise StopIteration
        self.number += 1
        if len(text) == _LINE_CHARS_MAX:
            raise self.invalid(f"longer than {_LINE_CHARS_MAX} characters")
        if not text.isascii() and any("\udc80" <= character <= "\udcff" for character in text):
            raise self.invalid("not UTF-8 text")
        return text

    def invalid(self, problem: str, line: int | None = None) -> SourceInvalid:
        """What is wrong with a line, or with the last."""
        return SourceInvalid(f"{self.shown}, line {self.number if line is None else line}: {problem}")


def _csv_rows(lines: _Lines, target: str | None) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(_LINE_CHARS_MAX)
    reader = csv.reader(lines, strict=True)
    try:
        header = [column.strip() for column in next(reader, [])]
        if not header:
            raise SourceInvalid(f"{lines.shown} is empty: the first line has to name the columns")
        doubled = {column for column in header if header.count(column) > 1}
        if doubled:
            raise SourceInvalid(f"{lines.shown}: the column {min(doubled)!r} is named twice")
        if target is not None and target not in header:
            raise SourceInvalid(f"{lines.shown}: no column {target!r}; there are {', '.join(header)}")
        begins_at = lines.number + 1
        for row in reader:
            line, begins_at = begins_at, lines.number + 1
            if not row:
                continue
            if len(row) != len(header):
                raise lines.invalid(f"{len(row)} values for {len(header)} columns", line)
            yield (
                line,
                {
                    column: value
                    for column, text in zip(header, row, strict=True)
                    if (value := _value(text)) is not None
                },
            )
    except csv.Error as error:
        raise lines.invalid(f"not CSV ({error})") from error


def _json_rows(lines: _Lines) -> Iterator[tuple[int, dict[str, Any]]]:
    for text in lines:
        if not text.strip():
            continue
        try:
            row = json.loads(text.strip())
        except json.JSONDecodeError as error:
            raise lines.invalid(f"not JSON ({error.msg}, at character {error.pos + 1})") from error
        except (ValueError, RecursionError) as error:
            raise lines.invalid(f"not JSON ({error})") from error
        if not isinstance(row, dict):
            raise lines.invalid(f"a JSON {_JSON_KINDS[type(row)]}, not an object")
        yield lines.number, row


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
