"""Streams that agents open of their own accord: data for registered consumers, experiences for the learner."""

import asyncio
import importlib
import importlib.util
import inspect
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Final

import structlog

from quorate_coordinator.learner.api import Experience
from quorate_protocol.errors import Code, ConfigurationError, ProtocolError, QuorateError, UnexpectedMessage
from quorate_protocol.frames import FrameDecoder
from quorate_protocol.messages import ExperienceTold, Modality, Telemetry, parse_message
from quorate_protocol.transport import ReceiveStream

log = structlog.get_logger()

#: Streams of their own that one agent may have open: a dozen sensors, each with a few streams.
STREAMS_PER_AGENT_MAX: Final = 64

#: Experiences of one agent, and bytes of them, that are taken in a second in the long run: each is learned from and
#: recorded. Who tells more is read more slowly, and its sending waits.
EXPERIENCES_PER_S: Final = 200
EXPERIENCE_BYTES_PER_S: Final = 1 << 20

#: What it may tell at once, in seconds of that.
AT_ONCE_S: Final = 2.0

#: Topics that are counted one by one; agents name them, and the rest is counted as `other`.
TOPICS_COUNTED_MAX: Final = 256

#: Agents with topics that nobody takes, of which it is remembered that a log line has said so.
_UNWANTED_MAX: Final = 4096


class ModalityStream:
    """What an agent sends on one stream of its own. Iterating yields chunks until its end.

    A consumer that returns before the end stops the stream. The agent's sending waits for the consumer's reading: one
    that is slow costs no memory.
    """

    def __init__(
        self, agent: str, topic: str, round_id: int, stream: ReceiveStream, count: Callable[[int], None]
    ) -> None:
        self.agent: Final = agent
        self.topic: Final = topic
        #: The round that it is about; 0 is none.
        self.round: Final = round_id
        self._stream = stream
        self._count = count

    async def receive(self, max_bytes: int = 65_536) -> bytes:
        """The next bytes, at most so many; b"" at the end.

        Raises:
            ResetByPeer: the agent gave the stream up: its round was cancelled, say.
            ConnectionClosed: its link broke.
        """
        data = await self._stream.receive(max_bytes)
        self._count(len(data))
        return data

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._chunks()

    async def _chunks(self) -> AsyncIterator[bytes]:
        while data := await self.receive():
            yield data


#: Takes one stream of a topic, from its beginning to its end; runs in the coordinator's event loop.
Consumer = Callable[[ModalityStream], Awaitable[None]]


class Modalities:
    """Who takes what agents send of their own.

    Args:
        on_experience: Takes what is for the learner.
    """

    def __init__(self, on_experience: Callable[[Experience], None]) -> None:
        self._on_experience = on_experience
        self._consumers: dict[str, Consumer] = {}
        self._open: Counter[str] = Counter()
        #: By agent: until when its experiences have used up what it may tell, on the loop's clock. Its streams and
        #: sessions may end meanwhile.
        self._told_until: dict[str, float] = {}
        #: Agents with topics that nobody takes, as they have been logged.
        self._unwanted: set[tuple[str, str]] = set()
        #: By topic, totals since the start.
        self.streams_total: Counter[str] = Counter()
        self.bytes_total: Counter[str] = Counter()
        self.experiences_total: Counter[str] = Counter()

    def register(self, topic: str, consumer: Consumer) -> None:
        """Has a consumer take the streams of a topic; in place of the one before."""
        self._consumers[topic] = consumer

    async def serve(self, agent: str, header: Modality | Telemetry, stream: ReceiveStream) -> None:
        """One stream whose first frame has come, to its end. Whatever happens in it ends here.

        Raises:
            ProtocolError: the agent broke the format of its telemetry; the stream has been stopped.
        """
        if self._open[agent] >= STREAMS_PER_AGENT_MAX:
            stream.stop(Code.BUSY)
            return
        self._open[agent] += 1
        topic = self._counted(header.topic)
        self.streams_total[topic] += 1
        try:
            if isinstance(header, Telemetry):
                await self._learn(agent, header.topic, topic, stream)
            else:
                await self._consume(agent, header, topic, stream)
        except ProtocolError as error:
            stream.stop(error.code)
            raise
        except QuorateError as error:
            log.debug("modality_ended_early", agent=agent, topic=header.topic, reason=str(error))
        except Exception:
            log.exception("consumer_failed", agent=agent, topic=header.topic)
            stream.stop(Code.INTERNAL)
        finally:
            stream.stop(Code.NO_ERROR)  # of no effect after its end
            self._open[agent] -= 1
            if not self._open[agent]:
                del self._open[agent]

    async def _pace(self, agent: str, size_bytes: int) -> None:
        """Waits until the agent may tell one more, of that size (a leaky bucket)."""
        now = asyncio.get_running_loop().time()
        if agent not in self._told_until:
            # Whoever comes anew makes room: only those stay who have told much just now.
            self._told_until = {other: until for other, until in self._told_until.items() if until > now}
        cost_s = max(1 / EXPERIENCES_PER_S, size_bytes / EXPERIENCE_BYTES_PER_S)
        until = self._told_until[agent] = max(now, self._told_until.get(agent, now)) + cost_s
        if until - now > AT_ONCE_S:
            await asyncio.sleep(until - now - AT_ONCE_S)

    async def _consume(self, agent: str, header: Modality, topic: str, stream: ReceiveStream) -> None:
        consumer = self._consumers.get(header.topic)
        if consumer is None:
            self._note_unwanted(agent, topic)
            stream.stop(Code.NOT_WANTED)
            return

        def count(size_bytes: int) -> None:
            self.bytes_total[topic] += size_bytes

        await consumer(ModalityStream(agent, header.topic, header.round, stream, count))

    def _note_unwanted(self, agent: str, topic: str) -> None:
        """Logs it once: streams come at the agent's pace, and log lines must not. `streams_total` has all of them."""
        if len(self._unwanted) >= _UNWANTED_MAX:
            self._unwanted.clear()
        if (agent, topic) not in self._unwanted:
            self._unwanted.add((agent, topic))
            log.warning("modality_not_wanted", agent=agent, topic=topic)

    async def _learn(self, agent: str, name: str, topic: str, stream: ReceiveStream) -> None:
        decoder = FrameDecoder()
        async for chunk in stream:
            self.bytes_total[topic] += len(chunk)
            for raw in decoder.feed(chunk):
                message = parse_message(raw)
                if not isinstance(message, ExperienceTold):
                    raise UnexpectedMessage(message.wire_type, "on a telemetry stream")
                await self._pace(agent, len(message.body))
                self.experiences_total[topic] += 1
                self._on_experience(Experience(agent, name, message.body))
            await asyncio.sleep(0)  # a stream that is always full must leave others their turn
        decoder.finish()

    def _counted(self, topic: str) -> str:
        is_known = topic in self.streams_total or topic in self._consumers
        return topic if is_known or len(self.streams_total) < TOPICS_COUNTED_MAX else "other"


def load_consumers(references: Mapping[str, str]) -> dict[str, Consumer]:
    """The functions that settings name, by topic: `module:function`, or `path/to/file.py:function`.

    Raises:
        ConfigurationError: there is no such function, or it is none.
    """
    return {topic: _load(f"consumers.{topic}", reference) for topic, reference in references.items()}


def _load(setting: str, reference: str) -> Consumer:
    where, colon, name = reference.rpartition(":")
    if not colon or not where or not name:
        raise ConfigurationError(setting, f"{reference!r} is not MODULE:FUNCTION or FILE.py:FUNCTION")
    try:
        module: Any = _load_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except Exception as error:
        raise ConfigurationError(setting, f"cannot load {where}: {type(error).__name__}: {error}") from error
    consumer = getattr(module, name, None)
    if not callable(consumer):
        raise ConfigurationError(setting, f"{where} has no function {name!r}")
    if not (inspect.iscoroutinefunction(consumer) or inspect.iscoroutinefunction(type(consumer).__call__)):
        raise ConfigurationError(setting, f"{name!r} of {where} is not an async function")
    loaded: Consumer = consumer
    return loaded


def _load_file(file: Path) -> object:
    spec = importlib.util.spec_from_file_location(f"quorate_consumer_{file.stem}", file)
    if spec is None or spec.loader is None or not file.exists():
        raise FileNotFoundError(f"there is no file {file}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
