"""Streams that agents open of their own, through a real coordinator."""

import asyncio
import re
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from coordination import Fleet, RawPeer, coordinating, until
from quorate_agent import Agent
from quorate_agent.streams import OwnStreams
from quorate_coordinator.learner.api import Experience, Report
from quorate_coordinator.learner.vote import VoteLearner
from quorate_coordinator.modalities import STREAMS_PER_AGENT_MAX, ModalityStream
from quorate_protocol.bodies import decode_body, encode_body
from quorate_protocol.errors import Code, ConfigurationError, ResetByPeer, StoppedByPeer
from quorate_protocol.messages import ExperienceTold, Modality, Telemetry
from quorate_protocol.transport import Priority


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    async with coordinating(tmp_path) as fleet:
        yield fleet


def echo(name: str) -> Agent:
    agent = Agent(name)

    @agent.task("echo")
    async def reply(body: Any) -> Any:
        return body

    return agent


class Taken:
    """A consumer that keeps what it gets."""

    def __init__(self) -> None:
        self.streams: list[tuple[str, str, int, bytes]] = []
        self.reset: list[int] = []

    async def __call__(self, stream: ModalityStream) -> None:
        data = b""
        try:
            async for chunk in stream:
                data += chunk
        except ResetByPeer as error:
            self.reset.append(error.code)
            return
        self.streams.append((stream.agent, stream.topic, stream.round, data))


async def test_a_consumer_gets_what_agents_send(fleet: Fleet) -> None:
    taken = Taken()
    fleet.coordinator.modalities.register("video", taken)
    agent = echo("camera")

    @agent.background
    async def film(streams: OwnStreams) -> None:
        async with await streams.open_stream("video", priority=Priority.LOW) as stream:
            for number in range(10):
                await stream.send(bytes([number]) * 100_000)

    await fleet.join(agent)
    await until(lambda: taken.streams)
    expected = b"".join(bytes([number]) * 100_000 for number in range(10))
    assert taken.streams == [("camera", "video", 0, expected)]
    assert fleet.coordinator.modalities.bytes_total == {"video": 1_000_000}


async def test_a_handler_sends_along_with_its_round(fleet: Fleet) -> None:
    taken = Taken()
    fleet.coordinator.modalities.register("audio", taken)
    agent = Agent("speaker")

    @agent.task("say")
    async def say(body: Any, context: Any) -> str:
        async with await context.open_stream("audio") as stream:
            await stream.send(body.encode())
        return "said"

    await fleet.join(agent)
    operator = await fleet.operator()
    outcome = await operator.ask("say", "hello")
    assert outcome.value == "said"
    await until(lambda: taken.streams)
    assert taken.streams == [("speaker", "audio", outcome.round, b"hello")]


async def test_a_cancelled_round_gives_its_streams_up_and_the_agent_stays(fleet: Fleet) -> None:
    taken = Taken()
    fleet.coordinator.modalities.register("audio", taken)
    agent = Agent("speaker")
    begun = asyncio.Event()

    @agent.task("say")
    async def say(body: Any, context: Any) -> None:
        stream = await context.open_stream("audio")
        await stream.send(b"an endless speech")
        begun.set()
        await asyncio.sleep(3600)

    await fleet.join(agent)
    operator = await fleet.operator()
    asking = asyncio.create_task(operator.ask("say", "hello"))
    await begun.wait()
    asking.cancel()
    await until(lambda: taken.reset)
    assert taken.reset == [Code.CANCELLED]
    assert [info.state for info in (await operator.agents()).agents] == ["connected"]


async def test_a_topic_that_nobody_takes_is_said_so(fleet: Fleet) -> None:
    stopped: list[StoppedByPeer] = []
    agent = echo("a")

    @agent.background
    async def shout(streams: OwnStreams) -> None:
        stream = await streams.open_stream("noise")
        try:
            while True:
                await stream.send(b"!")
                await asyncio.sleep(0)
        except StoppedByPeer as error:
            stopped.append(error)

    await fleet.join(agent)
    await until(lambda: stopped)
    assert stopped[0].code == Code.NOT_WANTED
    assert str(stopped[0]).startswith("the coordinator has no consumer for the topic 'noise'")
    operator = await fleet.operator()
    assert (await operator.ask("echo", 1)).value == 1


async def test_one_agent_has_so_many_streams(fleet: Fleet) -> None:
    held = asyncio.Event()
    opened = 0

    async def hold(stream: ModalityStream) -> None:
        nonlocal opened
        opened += 1
        await held.wait()

    fleet.coordinator.modalities.register("many", hold)
    codes: list[int] = []
    agent = echo("a")

    @agent.background
    async def many(streams: OwnStreams) -> None:
        kept = [await streams.open_stream("many") for _ in range(STREAMS_PER_AGENT_MAX)]
        await until(lambda: opened == STREAMS_PER_AGENT_MAX)
        extra = await streams.open_stream("many")
        try:
            while True:
                await extra.send(b"x")
                await asyncio.sleep(0)
        except StoppedByPeer as error:
            codes.append(error.code)
        assert kept

    await fleet.join(agent)
    await until(lambda: codes)
    held.set()
    assert codes == [Code.BUSY]


async def test_a_consumer_that_fails_costs_its_stream_alone(fleet: Fleet) -> None:
    async def fail(stream: ModalityStream) -> None:
        await stream.receive()
        raise ValueError("no such codec")

    fleet.coordinator.modalities.register("video", fail)
    codes: list[int] = []
    agent = echo("a")

    @agent.background
    async def film(streams: OwnStreams) -> None:
        stream = await streams.open_stream("video")
        try:
            while True:
                await stream.send(b"x")
                await asyncio.sleep(0)
        except StoppedByPeer as error:
            codes.append(error.code)

    await fleet.join(agent)
    await until(lambda: codes)
    assert codes == [Code.INTERNAL]
    operator = await fleet.operator()
    assert (await operator.ask("echo", 1)).value == 1


class Listening(VoteLearner):
    """A vote that keeps what it is told."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.told: list[tuple[str, str, Any]] = []

    def process_message(self, experience: Experience) -> Report:
        self.told.append((experience.agent, experience.topic, decode_body(experience.body)))
        return Report()


async def test_the_learner_is_told_and_it_is_recorded(tmp_path: Any) -> None:
    learner = Listening()
    async with coordinating(tmp_path, learner=learner) as fleet:
        agent = echo("a")

        @agent.background
        async def tell(streams: OwnStreams) -> None:
            for number in range(3):
                await streams.tell("reward", {"step": number})

        await fleet.join(agent)
        await until(lambda: len(learner.told) == 3)
        assert learner.told == [("a", "reward", {"step": number}) for number in range(3)]
        recording = fleet.coordinator._recording
        assert recording is not None
        assert recording.journal.last_seq == 3


async def test_who_tells_too_much_is_read_more_slowly(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quorate_coordinator.modalities.EXPERIENCES_PER_S", 50)
    monkeypatch.setattr("quorate_coordinator.modalities.AT_ONCE_S", 0.1)
    learner = Listening()
    async with coordinating(tmp_path, learner=learner) as fleet:
        agent = echo("a")
        loop = asyncio.get_running_loop()
        times: list[float] = []

        @agent.background
        async def tell(streams: OwnStreams) -> None:
            times.append(loop.time())
            for number in range(25):
                await streams.tell("noise", number)

        await fleet.join(agent)
        await until(lambda: len(learner.told) == 25)
        assert loop.time() - times[0] >= (25 - 5) / 50 - 0.05
        # Others are served meanwhile and after.
        operator = await fleet.operator()
        assert (await operator.ask("echo", 1)).value == 1


async def tell_all(peer: RawPeer, topic: str, *experiences: bytes) -> None:
    """One telemetry stream, from its beginning to its end."""
    stream = await peer.connection.open_uni_stream(Priority.LOW)
    await stream.send(Telemetry(topic=topic).to_frame())
    for body in experiences:
        await stream.send(ExperienceTold(body=body).to_frame())
    await stream.finish()


async def test_what_an_agent_may_tell_outlives_its_streams_and_sessions(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quorate_coordinator.modalities.EXPERIENCES_PER_S", 100)
    monkeypatch.setattr("quorate_coordinator.modalities.AT_ONCE_S", 0.05)
    learner = Listening()
    async with coordinating(tmp_path, learner=learner) as fleet:
        began_at = asyncio.get_running_loop().time()
        for session in range(4):
            peer = await fleet.peer()
            await peer.join("teller")
            for number in range(10):
                await tell_all(peer, "noise", encode_body(number))
                await until(lambda told=session * 10 + number + 1: len(learner.told) == told)
            await peer.leave()
            await until(lambda: not fleet.connected)
        assert asyncio.get_running_loop().time() - began_at >= 40 / 100 - 0.05 - 0.05


async def test_an_agent_that_tells_large_things_is_read_more_slowly(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quorate_coordinator.modalities.EXPERIENCE_BYTES_PER_S", 1_000_000)
    monkeypatch.setattr("quorate_coordinator.modalities.AT_ONCE_S", 0.05)
    learner = Listening()
    async with coordinating(tmp_path, learner=learner) as fleet:
        began_at = asyncio.get_running_loop().time()
        peer, other = await fleet.peer(), await fleet.peer()
        await peer.join("large")
        await other.join("small")
        await tell_all(peer, "noise", *[encode_body(bytes(100_000))] * 5)
        await tell_all(other, "noise", encode_body(1))
        await until(lambda: len(learner.told) == 6)
        assert asyncio.get_running_loop().time() - began_at >= 0.5 - 0.05 - 0.05
        # What one may tell is no other's.
        assert learner.told[-1][0] == "large"
        await peer.leave()
        await other.leave()


async def test_who_told_little_is_forgotten(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quorate_coordinator.modalities.EXPERIENCES_PER_S", 100_000)
    learner = Listening()
    async with coordinating(tmp_path, learner=learner) as fleet:
        for number in range(5):
            peer = await fleet.peer()
            await peer.join(f"agent-{number}")
            await tell_all(peer, "noise", encode_body(number))
            await until(lambda told=number + 1: len(learner.told) == told)
            await peer.leave()
        assert list(fleet.coordinator.modalities._told_until) == ["agent-4"]


async def test_unwanted_streams_are_logged_once(fleet: Fleet) -> None:
    peer = await fleet.peer()
    await peer.join("camera")
    modalities = fleet.coordinator.modalities
    with structlog.testing.capture_logs() as logged:
        for number in range(20):
            stream = await peer.connection.open_uni_stream(Priority.LOW)
            await stream.send(Modality(topic="video" if number % 2 else "audio").to_frame())
            await until(lambda served=number + 1: modalities.streams_total.total() == served)
        await until(lambda: not modalities._open)
    warned = [(entry["agent"], entry["topic"]) for entry in logged if entry["event"] == "modality_not_wanted"]
    assert sorted(warned) == [("camera", "audio"), ("camera", "video")]
    await peer.leave()


@pytest.mark.parametrize(
    ("reference", "problem"),
    [
        ("nonsense", "is not MODULE:FUNCTION"),
        ("no_such_module_here:take", "cannot load no_such_module_here"),
        ("json:no_such_function", "has no function 'no_such_function'"),
        ("json:loads", "'loads' of json is not an async function"),
        ("/no/such/file.py:take", "there is no file"),
    ],
)
async def test_a_consumer_that_cannot_be_loaded_is_named(tmp_path: Any, reference: str, problem: str) -> None:
    with pytest.raises(ConfigurationError, match=problem) as caught:
        async with coordinating(tmp_path, consumers={"video": reference}):
            pass
    assert caught.value.path == "consumers.video"


async def test_the_example_shows_all_three_alone_and_together() -> None:
    example = Path(__file__).parents[2] / "agent/examples/multimodal.py"
    process = await asyncio.create_subprocess_exec(sys.executable, example, "0.3", stdout=asyncio.subprocess.PIPE)
    async with asyncio.timeout(60):
        out, _ = await process.communicate()
    assert process.returncode == 0
    heading, *lines = out.decode().splitlines()
    assert "alone" in heading
    assert [line.split()[0] for line in lines] == ["sensor", "audio", "video"]
    assert all(re.fullmatch(r"\w+( +\d+\.\d\d / \d+\.\d\d){2}", line) for line in lines)
