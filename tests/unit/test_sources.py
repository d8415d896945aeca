"""Files as instances: what is read as what, and how a wrong file or line is named."""

import asyncio
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quorate_coordinator.feeding import sources
from quorate_coordinator.feeding.ahead import Interruption, read_ahead
from quorate_coordinator.feeding.sources import Instance, SourceInvalid, guess_format, read_instances


def read(path: Path, text: str | bytes, **options: Any) -> list[Instance]:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return list(read_instances(str(path), **{"target": None, **options}))


def write(path: Path, text: str) -> None:
    path.write_text(text)


@pytest.fixture
def csv_file(tmp_path: Path) -> Path:
    return tmp_path / "data.csv"


@pytest.fixture
def json_file(tmp_path: Path) -> Path:
    return tmp_path / "data.jsonl"


# --- CSV -----------------------------------------------------------------------------------------


def test_rows_become_features_and_truths(csv_file: Path) -> None:
    rows = read(csv_file, "x,y,label\n1,2.5,cat\n-3,,dog\n", target="label")
    assert rows == [Instance(2, {"x": 1, "y": 2.5}, "cat", True), Instance(3, {"x": -3}, "dog", True)]


def test_without_a_target_all_columns_are_features(csv_file: Path) -> None:
    assert read(csv_file, "x,label\n1,cat\n") == [Instance(2, {"x": 1, "label": "cat"})]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("-7", -7),
        ("+7", 7),
        (" 7 ", 7),
        ("0", 0),
        ("1.50", 1.5),
        (".5", 0.5),
        ("1e3", 1000.0),
        ("true", True),
        ("FALSE", False),
        ("True", True),
        ("yes", "yes"),
        ("cat", "cat"),
        # Numbers to Python, not to people; and identifiers that look like numbers.
        ("1_000", "1_000"),
        ("007", "007"),
        ("01234", "01234"),
        ("nan", "nan"),
        ("inf", "inf"),
        ("-Infinity", "-Infinity"),
        # What fits no 64 bits is no integer any more.
        (str(2**63 - 1), 2**63 - 1),
        (str(-(2**63)), -(2**63)),
        (str(2**63), float(2**63)),
        ("1e999", "1e999"),
    ],
)
def test_values_are_read_as_what_they_look_like(csv_file: Path, text: str, value: Any) -> None:
    (row,) = read(csv_file, f"x\n{text}\n")
    assert row.features == {"x": value}
    assert type(row.features["x"]) is type(value)


def test_quoting_blank_lines_crlf_and_a_byte_order_mark(csv_file: Path) -> None:
    text = '\ufeffx, y \r\n"a,b","say ""hi"""\r\n\r\n"two\r\nlines",1\r\n3,4'
    assert read(csv_file, text) == [
        Instance(2, {"x": "a,b", "y": 'say "hi"'}),
        Instance(4, {"x": "two\r\nlines", "y": 1}),
        Instance(6, {"x": 3, "y": 4}),
    ]


def test_a_header_alone_has_no_rows(csv_file: Path) -> None:
    assert read(csv_file, "x,y\n", target="y") == []


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", " is empty: the first line has to name the columns"),
        ("\n\n", " is empty: the first line has to name the columns"),
        ("x,x,y\n1,2,3\n", ": the column 'x' is named twice"),
        ("x,z\n1,2\n", ": no column 'y'; there are x, z"),
        ("x,y\n1,2\n3\n", ", line 3: 1 values for 2 columns"),
        ("x,y\n1,2,3\n", ", line 2: 3 values for 2 columns"),
        ("x,y\n1,2\n3,\n", ", line 3: no value for the target 'y'"),
        ("x,y\n1,2\n\n3,  \n", ", line 4: no value for the target 'y'"),
        ('x,y\n"1\n2",3\n4\n', ", line 4: 1 values for 2 columns"),
        (b"x,y\n1,2\n3,4\n5,caf\xe9\n6,7\n", ", line 4: not UTF-8 text"),
        (b"\xff\xfex\0,\0", ", line 1: not UTF-8 text"),
    ],
)
def test_what_is_wrong_in_csv_is_named_by_file_and_line(csv_file: Path, content: str | bytes, problem: str) -> None:
    with pytest.raises(SourceInvalid) as caught:
        read(csv_file, content, target="y")
    assert str(caught.value) == f"{csv_file}{problem}"


def test_the_rows_before_a_bad_one_are_read(csv_file: Path) -> None:
    csv_file.write_bytes(b"x,y\n1,2\n3,4\n\xe9,6\n")
    rows = read_instances(str(csv_file), target="y")
    assert [next(rows).truth, next(rows).truth] == [2, 4]
    with pytest.raises(SourceInvalid, match="line 4"):
        next(rows)


def test_a_line_without_end_is_not_read_whole(csv_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_LINE_CHARS_MAX", 1000)
    with pytest.raises(SourceInvalid, match="line 2: longer than 1000 characters"):
        read(csv_file, "x\n" + "1" * 5000 + "\n")
    endless = list_of_first("/dev/zero", 1)
    assert endless == "/dev/zero, line 1: longer than 1000 characters"


def list_of_first(name: str, count: int) -> str:
    with pytest.raises(SourceInvalid) as caught:
        for _, _ in zip(range(count + 1), read_instances(name, target=None), strict=False):
            pass
    return str(caught.value)


# --- JSON lines ----------------------------------------------------------------------------------


def test_json_lines(json_file: Path) -> None:
    text = '{"x": [1, 2.5], "y": null}\n\n {"x": {"deep": true}, "y": "ü"}'
    assert read(json_file, text, target="y") == [
        Instance(1, {"x": [1, 2.5]}, None, True),
        Instance(3, {"x": {"deep": True}}, "ü", True),
    ]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"y": 1}\n{"y": 1\n', ", line 2: not JSON (Expecting ',' delimiter, at character 8)"),
        ('{"y": 1}\n[1]\n', ", line 2: a JSON array, not an object"),
        ("5\n", ", line 1: a JSON number, not an object"),
        ("true\n", ", line 1: a JSON truth value, not an object"),
        ("null\n", ", line 1: a JSON null, not an object"),
        ('"y"\n', ", line 1: a JSON text, not an object"),
        ('{"y": 1}\n{"x": 1}\n', ", line 2: no value for the target 'y'"),
        (b'{"y": 1}\n{"y": "\xe9"}\n', ", line 2: not UTF-8 text"),
        ("[" * 100_000 + "\n", ", line 1: not JSON"),
    ],
    ids=["open", "array", "number", "bool", "null", "text", "target", "utf-8", "deep"],
)
def test_what_is_wrong_in_json_is_named_by_file_and_line(json_file: Path, content: str | bytes, problem: str) -> None:
    with pytest.raises(SourceInvalid) as caught:
        read(json_file, content, target="y")
    assert str(caught.value).startswith(f"{json_file}{problem}")


# --- which file, which format --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.csv", "csv"),
        ("a.jsonl", "jsonl"),
        ("A.NDJSON", "jsonl"),
        ("a.json", "jsonl"),
        ("a", "csv"),
        ("-", "csv"),
        ("json", "csv"),
    ],
)
def test_the_format_goes_by_the_name(name: str, expected: str) -> None:
    assert guess_format(name) == expected


def test_a_format_that_is_said_goes_before_the_name(csv_file: Path) -> None:
    assert read(csv_file, '{"x": 1}\n', file_format="jsonl") == [Instance(1, {"x": 1})]


def test_files_that_cannot_be_opened_are_named(tmp_path: Path) -> None:
    assert list_of_first(str(tmp_path / "absent.csv"), 1) == f"{tmp_path}/absent.csv: No such file or directory"
    assert list_of_first(str(tmp_path), 1) == f"{tmp_path}: Is a directory"


def test_standard_input_is_named_and_stays_open(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    kept = os.dup(0)
    try:
        os.dup2(reading, 0)
        os.write(writing, b"x,y\n1,2\n3\n")
        os.close(writing)
        assert list_of_first("-", 5) == "standard input, line 3: 1 values for 2 columns"
        os.fstat(0)
    finally:
        os.dup2(kept, 0)
        for descriptor in (kept, reading):
            os.close(descriptor)


# --- reading ahead -------------------------------------------------------------------------------


class Pipe:
    """A named pipe that somebody holds open."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.path = path
        self.writing = os.open(path, os.O_RDWR)

    def write(self, text: str) -> None:
        os.write(self.writing, text.encode())

    def close(self) -> None:
        os.close(self.writing)


async def test_a_slow_source_does_not_hold_up_the_loop(tmp_path: Path) -> None:
    pipe = Pipe(tmp_path / "pipe.csv")
    interruption = Interruption()
    rows = read_ahead(read_instances(str(pipe.path), target=None, interruption=interruption), interruption)
    pipe.write("x\n1\n")
    assert (await anext(rows)).features == {"x": 1}
    waiting = asyncio.ensure_future(anext(rows))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not waiting.done()
    pipe.write("2\n")
    assert (await waiting).features == {"x": 2}
    # Nothing more will come, and nobody waits for it.
    await rows.aclose()
    interruption.close()
    pipe.close()
    assert "read-ahead" not in {thread.name for thread in threading.enumerate()}


async def test_what_goes_wrong_comes_in_its_place(csv_file: Path) -> None:
    write(csv_file, "x,y\n" + "1,2\n" * 500 + "3\n")
    interruption = Interruption()
    seen = 0
    with pytest.raises(SourceInvalid, match="line 502: 1 values"):
        async for row in read_ahead(read_instances(str(csv_file), target="y", interruption=interruption), interruption):
            assert row.line == seen + 2
            seen += 1
    interruption.close()
    assert seen == 500


async def test_it_reads_only_so_far_ahead(csv_file: Path) -> None:
    taken: list[int] = []

    def count() -> Iterator[int]:
        for number in range(1, 100_000):
            taken.append(number)
            yield number

    interruption = Interruption()
    items = read_ahead(count(), interruption)
    assert [await anext(items) for _ in range(10)] == list(range(1, 11))
    await items.aclose()
    interruption.close()
    assert len(taken) < 10 + 64 + 5


async def test_cancelled_while_waiting_it_ends(tmp_path: Path) -> None:
    pipe = Pipe(tmp_path / "pipe.jsonl")
    interruption = Interruption()

    async def read_all() -> None:
        async for _ in read_ahead(read_instances(str(pipe.path), target=None, interruption=interruption), interruption):
            pass

    reading = asyncio.create_task(read_all())
    await asyncio.sleep(0)
    reading.cancel()
    async with asyncio.timeout(10):
        await asyncio.wait([reading])
    assert reading.cancelled()
    interruption.close()
    pipe.close()
