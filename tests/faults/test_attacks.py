"""What a member with bad intent, or an operator with a long command line, cannot do."""

import asyncio
import io
import json
import time
from pathlib import Path

import pytest
import structlog

from coordination import PATIENCE_S, coordinating
from quorate_agent import Agent
from quorate_coordinator.certificates import ensure_development_credentials
from quorate_coordinator.cli.common import as_json, json_text
from quorate_coordinator.learner.answers import VALUE_BYTES_MAX, answer_key
from quorate_coordinator.service import Coordinator
from quorate_coordinator.settings import Settings
from quorate_protocol import logs
from quorate_protocol.bodies import decode_body
from quorate_protocol.client import Client
from quorate_protocol.errors import CallFailed, ConfigurationError, FrameMalformed, LocalError, MessageInvalid
from quorate_protocol.frames import encode_frame
from quorate_protocol.limits import TEXT_CHARS_MAX
from quorate_protocol.messages import parse_message
from quorate_protocol.transport import ClientTls


def echo(name: str) -> Agent:
    agent = Agent(name)

    @agent.task("echo")
    async def answer(body: object) -> object:
        return body

    return agent


async def test_a_vast_reason_for_the_end_of_one_agent_holds_up_no_round(tmp_path: Path) -> None:
    """The text that says what was wrong with a message must fit the outcome that it ends up in."""
    async with coordinating(tmp_path) as fleet:
        good = Agent("good")
        asked = asyncio.Event()
        may_answer = asyncio.Event()

        @good.task("echo")
        async def answer(body: object) -> object:
            asked.set()
            await may_answer.wait()
            return body

        await fleet.join(good)
        evil = await fleet.peer()
        await evil.join("evil")
        client = await fleet.operator()
        asking = asyncio.ensure_future(client.ask("echo", 1, quorum=2, grace_s=5.0, deadline_s=10.0))
        await asyncio.wait_for(asked.wait(), PATIENCE_S)
        bad = {"type": "hello", "id": "x", "token": "x", "labels": {"!" * 100_000: "v"}}
        await evil.coordination.stream.send(encode_frame(bad))
        await evil.connection.wait_closed()
        may_answer.set()
        outcome = await asyncio.wait_for(asking, PATIENCE_S)
        assert outcome.state == "failed"
        assert fleet.infos()["good"].state == "connected"
        assert (await client.ask("echo", 2, deadline_s=10.0)).value == 2


def test_what_is_wrong_with_a_message_is_told_shortly() -> None:
    with pytest.raises(MessageInvalid) as caught:
        parse_message({"type": "hello", "id": "x", "token": "x", "labels": {"\x1b[2J" * 20_000: "v"}})
    assert len(str(caught.value)) < 500
    assert str(caught.value).isprintable()


async def test_a_call_whose_refusal_would_be_too_long_is_answered(tmp_path: Path) -> None:
    async with coordinating(tmp_path) as fleet:
        client = await fleet.operator()
        with pytest.raises(CallFailed, match="no connected agent") as caught:
            await asyncio.wait_for(client.ask("echo", 1, labels={"k": "x" * TEXT_CHARS_MAX}), PATIENCE_S)
        assert caught.value.reason == "no-agents"


async def test_a_burst_of_large_questions_costs_nobody_the_membership(tmp_path: Path) -> None:
    async with coordinating(tmp_path) as fleet:
        sink = Agent("a")

        @sink.task("echo")
        async def measure(body: bytes | int) -> int:
            return len(body) if isinstance(body, bytes) else body

        await fleet.join(sink)
        client = await fleet.operator()
        # More than may wait for one agent, all at once.
        calls = [client.ask("echo", b"x" * 900_000, quorum=1.0, deadline_s=30.0) for _ in range(20)]
        results = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 60.0)
        assert {info.state for info in fleet.infos().values()} == {"connected"}
        refused = [result for result in results if isinstance(result, BaseException)]
        assert all(isinstance(error, CallFailed) and error.reason == "busy" for error in refused)
        answered = [result for result in results if not isinstance(result, BaseException)]
        assert answered
        assert {outcome.state for outcome in answered} <= {"complete", "quorate"}
        assert (await client.ask("echo", 1, quorum=1.0)).state == "complete"


def test_large_answers_are_told_apart_without_unpacking_them() -> None:
    tiny_arrays = b"\xdc\xff\xff" + (b"\xc7\x08\x01" + b"\x93\xa3|b1\x90\xc4\x00") * 0xFFFF
    assert len(tiny_arrays) > VALUE_BYTES_MAX
    began = time.process_time()
    assert answer_key(tiny_arrays) != answer_key(tiny_arrays[:-1] + b"\x01")
    # Not a measurement: unpacking took half a second, this takes half a millisecond.
    assert time.process_time() - began < 0.1


@pytest.mark.parametrize("shape", [[30_000_000, 0], [0, 10**9], [10**9, 10**9, 0]])
def test_an_array_without_bytes_is_not_vast(shape: list[int]) -> None:
    import msgpack

    body = msgpack.packb(msgpack.ExtType(1, msgpack.packb(["|b1", shape, b""])))
    with pytest.raises(FrameMalformed, match="vast"):
        decode_body(body)


def test_an_answer_too_deep_to_show_is_an_error_and_no_crash() -> None:
    value: object = 1
    for _ in range(100_000):
        value = [value]
    with pytest.raises(LocalError, match="too deep"):
        as_json(value)


def test_answers_cannot_command_the_terminal() -> None:
    text = json_text({"a": "\x1b]0;x\x07", "b": "\x9b2J\x7f\u202e", "c": "grün ✓"})
    assert text.isprintable()
    assert "grün ✓" in text
    assert json.loads(text) == {"a": "\x1b]0;x\x07", "b": "\x9b2J\x7f\u202e", "c": "grün ✓"}


class Broken(io.StringIO):
    """Standard error whose reader has gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


@pytest.mark.usefixtures("logging_put_back")
def test_a_log_that_nobody_reads_stops_nothing() -> None:
    logs.configure("info", "json", stream=Broken())
    structlog.get_logger().info("something", value=1)


@pytest.mark.usefixtures("logging_put_back")
@pytest.mark.parametrize("format", ["json", "console"])
def test_text_from_elsewhere_neither_floods_nor_commands_the_log(format: str) -> None:
    stream = io.StringIO()
    logs.configure("info", format, stream=stream)
    structlog.get_logger().info("agent left", reason="\x1b]0;x\x07\x1b[2J", problem="k" * 60_000)
    written = stream.getvalue()
    assert len(written) < 3000
    assert written.strip().isprintable()


def test_a_missing_key_of_the_authority_is_told_and_nothing_replaced(tmp_path: Path) -> None:
    files = ensure_development_credentials(tmp_path)
    authority = files.ca_file.read_bytes()
    (tmp_path / "ca-key.pem").unlink()
    with pytest.raises(ConfigurationError, match=r"ca-key\.pem is missing"):
        ensure_development_credentials(tmp_path)
    assert files.ca_file.read_bytes() == authority


async def test_the_token_may_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUORATE_TOKEN", "from-the-environment")
    settings = Settings(listen="127.0.0.1:0", http="", state_dir=tmp_path)
    async with Coordinator(settings) as coordinator:
        client = await Client.connect(
            f"quic://127.0.0.1:{coordinator.address[1]}",
            token="from-the-environment",
            tls=ClientTls(tmp_path / "ca.pem"),
        )
        await client.close()
