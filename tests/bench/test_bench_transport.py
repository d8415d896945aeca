"""`quorate bench transport`: that it runs, what it says and writes, what it leaves behind. Never how fast."""

import json
import os
import signal
import socket
import struct
from pathlib import Path

import pytest

from links import until
from processes import processes_with, quorate, running
from quorate_coordinator.bench.result import Result, Row
from quorate_coordinator.bench.transport.children import SIDES, BenchFailed, Children
from quorate_coordinator.bench.transport.flood import flood
from quorate_coordinator.bench.transport.memory import MemoryWatch
from quorate_coordinator.bench.transport.scenarios import SCENARIOS, selected
from quorate_coordinator.bench.transport.services import CALL, ECHO, HEADER, RECEIPT, SINK, serve
from quorate_coordinator.certificates import ensure_development_credentials

ROW_KEYS = ["name", "unit", "value", "peer", "peer_value", "target", "met"]


def size_of_png(file: Path) -> tuple[int, int]:
    """Width and height in pixels, from the header (PNG, 11.2.2)."""
    head = file.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack("!II", head[16:])
    return width, height


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- the command ---


async def test_rows_are_measured_on_both_sides_and_written(tmp_path: Path) -> None:
    numbers, picture = tmp_path / "numbers.json", tmp_path / "picture.png"
    ended = await quorate(
        *("bench", "transport", "--quick", "--json", str(numbers), "--picture", str(picture)),
        *("--only", "1452", "--only", "OPEN A STREAM", "--only", "datagram round trip, p50", "--only", "5000 idle"),
        *("--only", "critical", "--only", "memory", "--only", "flood"),
        COLUMNS="160",
    )
    assert (ended.code, ended.err) == (0, "")
    result = json.loads(numbers.read_text())
    assert list(result) == ["benchmark", "machine", "rows"]
    assert result["benchmark"] == "transport"
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == [
        "one stream, 1452-byte datagrams",
        "open a stream and send, p50",
        "open a stream and send, p99",
        "datagram round trip, p50",
        "send cost, 5000 idle streams",
        "send cost, 5000 idle streams against none",
        "critical 100 KB behind 20 bulk streams, share of their time",
        "receiver's memory, 1 GiB offered to a reader that never reads",
        "sender's memory, 1 GiB offered to a reader that never reads",
        "stream round trip p50, under a flood of garbage against without",
    ]
    for name, row in rows.items():
        assert list(row) == ROW_KEYS
        assert row["value"] > 0
        assert row["peer_value"] > 0
        assert row["peer"] == "aioquic"
        assert (row["met"] is None) == (row["target"] is None)
        assert name in ended.out
    assert "ratio" in ended.out
    width, height = size_of_png(picture)
    assert 1000 < width < 4000
    assert 500 < height < 3000


async def test_no_file_is_written_unasked(tmp_path: Path) -> None:
    variable = "BENCH_TEST_UNASKED"
    ended = await quorate(
        "bench", "transport", "--quick", "--only", "stream round trip, p50", TMPDIR=str(tmp_path), **{variable: "1"}
    )
    assert (ended.code, ended.line) == (0, "--picture FILE.png draws it, --json FILE keeps the numbers")
    assert names_in(tmp_path) == []
    assert processes_with(variable, "1") == {}


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--only", "warp"), "--only: no row has 'warp' in its name; there are: one stream, discovered MTU; "),
        (("--json", "absent/x.json"), "--json: cannot write absent/x.json: there is no directory absent"),
        (("--picture", "."), "--picture: . is a directory"),
        (("--picture", "x.words"), "--picture: x.words: pictures are drawn as "),
    ],
)
async def test_what_is_wrong_is_said_before_anything_is_measured(arguments: tuple[str, ...], problem: str) -> None:
    ended = await quorate("bench", "transport", *arguments)
    assert (ended.code, ended.out) == (2, "")
    assert ended.line.startswith(f"quorate: {problem}")


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGINT, 130, "quorate: interrupted"),
        (signal.SIGTERM, 1, "quorate: ended by SIGTERM"),
        (signal.SIGKILL, -signal.SIGKILL, ""),
    ],
    ids=["Ctrl-C", "SIGTERM", "kill -9"],
)
async def test_no_process_is_left_when_it_is_ended(
    tmp_path: Path, number: signal.Signals, code: int, said: str
) -> None:
    variable, value = "BENCH_TEST_ENDED", f"{os.getpid()}-{number}"
    environ = {variable: value, "TMPDIR": str(tmp_path)}
    async with running("bench", "transport", "--only", "memory", **environ) as process:
        await until(lambda: len(processes_with(variable, value)) == 5)
        process.send_signal(number)
        ended = await process.end()
    assert (ended.code, ended.out, ended.err.strip()) == (code, "", said)
    await until(lambda: not processes_with(variable, value))
    if number is not signal.SIGKILL:
        assert names_in(tmp_path) == []


# --- its parts ---


def test_rows_have_names_of_their_own_and_are_found_by_a_part_of_them() -> None:
    names = [name for scenario in SCENARIOS for name in scenario.names]
    assert len(set(names)) == len(names)
    assert selected([]) == list(SCENARIOS)
    assert [scenario.title for scenario in selected(["MTU", "idle"])] == [
        "one stream, discovered MTU",
        "send cost with idle streams",
    ]
    assert selected(["warp"]) == []


@pytest.mark.parametrize("side", SIDES)
async def test_a_command_that_fails_comes_with_the_end_of_the_log(tmp_path: Path, side: str) -> None:
    children = Children(tmp_path, ensure_development_credentials(tmp_path / "state"))
    try:
        child = await children.start(side, "client")
        with pytest.raises(BenchFailed, match=rf"^the process {side} client: transfer: AttributeError: ") as failed:
            await child.do("transfer", count=1)
        assert "Traceback" in failed.value.log_tail
        assert await child.do("close") == {}  # it lives on
    finally:
        await children.stop()
    with pytest.raises(BenchFailed, match=rf"^the process {side} client: ended during close$"):
        await child.do("close")


class ScriptedPipe:
    """A pipe whose incoming bytes are known before; no more than `piece_bytes` of them come at a time."""

    def __init__(self, incoming: bytes, piece_bytes: int) -> None:
        self._incoming = incoming
        self._piece_bytes = piece_bytes
        self.sent = b""
        self.is_finished = False

    async def receive(self, max_bytes: int = 65_536) -> bytes:
        count = min(max_bytes, self._piece_bytes)
        piece, self._incoming = self._incoming[:count], self._incoming[count:]
        return piece

    async def send(self, data: bytes) -> None:
        self.sent += data

    async def finish(self) -> None:
        self.is_finished = True


@pytest.mark.parametrize("piece_bytes", [1, 7, 1 << 20])
async def test_services_whole_and_byte_by_byte(piece_bytes: int) -> None:
    echo = ScriptedPipe(HEADER.pack(ECHO, 0) + b"again and again", piece_bytes)
    await serve(echo)
    assert (echo.sent, echo.is_finished) == (b"again and again", True)

    call = ScriptedPipe(HEADER.pack(CALL, 0) + b"whatever", piece_bytes)
    await serve(call)
    assert (len(call.sent), call.is_finished) == (RECEIPT.size, True)

    sink = ScriptedPipe(HEADER.pack(SINK, 1000) + bytes(1000) + HEADER.pack(SINK, 5) + bytes(5), piece_bytes)
    await serve(sink)
    assert (len(sink.sent), sink.is_finished) == (2 * RECEIPT.size, False)

    short = ScriptedPipe(HEADER.pack(SINK, 1000) + bytes(999), piece_bytes)
    await serve(short)
    assert short.sent == b""


async def test_a_flood_keeps_to_its_rate_and_its_port() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.setblocking(False)
        sent = await flood(sock.getsockname()[1], per_s=500, seconds=0.2)
        assert 0 < sent <= 100
        datagram = sock.recv(65_536)
    assert len(datagram) == 1200
    assert datagram[0] == 0xC0


async def test_memory_growth_is_that_of_the_largest_moment() -> None:
    watch = MemoryWatch()
    watch.start()
    held = b"x" * (32 << 20)
    await until(lambda: watch.growth_bytes >= 24 << 20)
    del held
    assert watch.stop() >= 24 << 20
    watch.start()
    assert watch.stop() >= 4096


def test_a_result_as_json_has_the_rows_keys_alone() -> None:
    row = Row("cost", "µs", 2.0, "stock", 5.0, target=3.0, note="read twice")
    (entry,) = Result("some", [row], machine={}).as_json()["rows"]
    assert list(entry) == ROW_KEYS
    assert entry["met"] is True
