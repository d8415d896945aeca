"""What an operator is sent of its calls: bounded in bytes, and given up where it takes nothing."""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import structlog

from quorate_coordinator.blob_shelf import contents_of
from quorate_protocol.blobs import Blob
from quorate_protocol.bulk import BulkInbox, header_for, send_blob
from quorate_protocol.channel import Channel
from quorate_protocol.errors import CallFailed, FrameTooLarge, QuorateError, StoppedByPeer
from quorate_protocol.fields import BodyRef, inline_bytes
from quorate_protocol.messages import BulkOf, Hello, Message, Opened, Outcome, Part
from quorate_protocol.taking import while_taken
from quorate_protocol.transport import Connection

log = structlog.get_logger()

T = TypeVar("T")

#: Seconds in which an operator may take no byte of an answer or of a large body; then its call is given up. Twice as
#: long as a connection lives without a word.
UNTAKEN_S: Final = 60.0

#: Bytes in memory that one connection holds for its operator to take: the answers of sixty agents at the inline limit.
#: Over it calls are refused, and parts left out.
UNTAKEN_BYTES_MAX: Final = 64 << 20

#: The same of all connections together: beyond it those are refused that hold something.
UNTAKEN_ALL_BYTES_MAX: Final = 256 << 20

#: What a result takes beside its body, in bytes, about.
_RESULT_BYTES: Final = 256


@dataclass(frozen=True, slots=True)
class _Size:
    memory_bytes: int
    disk_bytes: int


@dataclass(slots=True)
class _Held:
    size: _Size
    times: int = 0


def _size_of(what: Message | bytes) -> _Size:
    """What a frame holds; or a message beside its frame: inline bodies, and large ones that come with it."""
    match what:
        case bytes():
            return _Size(len(what), 0)
        case Outcome(results=results, answer=answer, bulk=bulk):
            bodies = [answer, bulk, *(result.body for result in results), *(result.bulk for result in results)]
            memory_bytes = _RESULT_BYTES * len(results)
        case Part(result=result):
            bodies, memory_bytes = [result.body, result.bulk], _RESULT_BYTES
        case _:
            return _Size(0, 0)
    disk_bytes = 0
    for body in bodies:
        memory_bytes += inline_bytes(body)
    for ref in {body for body in bodies if isinstance(body, BodyRef) and body.content is not None}:
        if ref.content is not None and ref.content.is_on_disk:
            disk_bytes += ref.size
        else:
            memory_bytes += ref.size
    return _Size(memory_bytes, disk_bytes)


@dataclass(slots=True)
class AllUntaken:
    """How much all connections hold that their operators have not taken: the answers' agents pay for it as well."""

    #: Of the large bodies that are on disk. One connection may have half.
    disk_bytes_max: int
    memory_bytes: int = 0
    disk_bytes: int = 0
    #: Connections that hold something.
    holders: int = 0

    @property
    def is_full(self) -> bool:
        """Whether only those who hold less than their share should begin anything."""
        return self.memory_bytes > UNTAKEN_ALL_BYTES_MAX or self.disk_bytes > self.disk_bytes_max

    def is_over_share(self, memory_bytes: int, disk_bytes: int) -> bool:
        """Whether one connection holds more than all could."""
        holders = max(1, self.holders)
        return memory_bytes > UNTAKEN_ALL_BYTES_MAX // holders or disk_bytes > self.disk_bytes_max // holders


class Untaken:
    """How much one connection holds that its operator has not taken.

    Args:
        everybody: what it is a part of.
    """

    def __init__(self, everybody: AllUntaken) -> None:
        self._everybody = everybody
        self._disk_bytes_max = everybody.disk_bytes_max // 2
        self.memory_bytes = 0
        self.disk_bytes = 0
        #: What it holds, how many things.
        self._holds = 0
        #: The answers among it, by identity: a round that several calls have joined has one.
        self._answers: dict[int, _Held] = {}

    @property
    def is_full(self) -> bool:
        """Whether it is so much that nothing more should be begun.

        The largest answer does not count: who has taken all of one may ask for the next before that is acknowledged.
        """
        memory_bytes, disk_bytes = self.memory_bytes, self.disk_bytes
        is_crowded = self._everybody.is_full
        if not is_crowded and memory_bytes <= UNTAKEN_BYTES_MAX and disk_bytes <= self._disk_bytes_max:
            return False
        memory_bytes -= max((held.size.memory_bytes for held in self._answers.values()), default=0)
        disk_bytes -= max((held.size.disk_bytes for held in self._answers.values()), default=0)
        if is_crowded and self._everybody.is_over_share(memory_bytes, disk_bytes):
            return True
        return memory_bytes > UNTAKEN_BYTES_MAX or disk_bytes > self._disk_bytes_max

    def check_room(self) -> None:
        """Whether one more call is taken.

        Raises:
            CallFailed: it is not.
        """
        if self.is_full:
            held_bytes = self.memory_bytes + self.disk_bytes
            message = f"answers of {held_bytes} bytes wait for this connection's operator to take them"
            if self._everybody.is_full:
                everybody_bytes = self._everybody.memory_bytes + self._everybody.disk_bytes
                message += f", and of {everybody_bytes} bytes for all operators together"
            raise CallFailed("busy", message, retry=True)

    def hold(self, size: _Size) -> None:
        if not self._holds:
            self._everybody.holders += 1
        self._holds += 1
        for held in (self, self._everybody):
            held.memory_bytes += size.memory_bytes
            held.disk_bytes += size.disk_bytes

    def release(self, size: _Size) -> None:
        for held in (self, self._everybody):
            held.memory_bytes -= size.memory_bytes
            held.disk_bytes -= size.disk_bytes
        self._holds -= 1
        if not self._holds:
            self._everybody.holders -= 1

    @contextlib.contextmanager
    def holding(self, what: Message | bytes) -> Iterator[None]:
        """Holds a message, or a frame, for as long as the block takes. What several calls are told counts once."""
        held = self._answers.setdefault(id(what), _Held(_size_of(what)))
        if not held.times:
            self.hold(held.size)
        held.times += 1
        try:
            yield
        finally:
            held.times -= 1
            if not held.times:
                del self._answers[id(what)]
                self.release(held.size)


@dataclass(slots=True)
class Call:
    """One call and whoever makes it."""

    connection: Connection
    channel: Channel
    caller: Hello
    #: The large bodies that its operator sends.
    inbox: BulkInbox
    #: What its connection holds.
    untaken: Untaken
    #: Digests of the large bodies that it has been sent.
    sent: set[bytes] = field(default_factory=set)

    @property
    def id(self) -> int:
        """Its stream's."""
        return self.channel.stream.id


class Told:
    """What a streamed call is told before its outcome, as fast as its operator takes it.

    Parts that have no room with what else its connection holds are left out: the outcome has all of them again.
    """

    def __init__(self, untaken: Untaken) -> None:
        self._untaken = untaken
        self._waiting: deque[tuple[Opened | Part, _Size]] = deque()
        self._changed = asyncio.Event()
        self._is_over = False

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, message: Opened | Part) -> None:
        """One more to be told."""
        if isinstance(message, Part) and self._untaken.is_full:
            return
        size = _size_of(message)
        self._untaken.hold(size)
        self._waiting.append((message, size))
        self._changed.set()

    def end(self) -> None:
        """The outcome is there, and no round's bound holds parts any more: what was not got to is left out."""
        kept = [(message, size) for message, size in self._waiting if isinstance(message, Opened)]
        self.close()
        for _, size in kept:
            self._untaken.hold(size)
        self._waiting.extend(kept)

    def close(self) -> None:
        """Nothing more is told."""
        for _, size in self._waiting:
            self._untaken.release(size)
        self._waiting.clear()
        self._is_over = True
        self._changed.set()

    async def send(self, call: Call) -> None:
        """Sends it all, up to the end.

        Raises:
            StreamError, LinkError: nobody reads.
            TimeoutError: the operator has taken nothing for too long.
        """
        while self._waiting or not self._is_over:
            if not self._waiting:
                self._changed.clear()
                await self._changed.wait()
                continue
            message, size = self._waiting.popleft()
            try:
                # While the round is open nothing is owed yet: a slow reader hears less of it.
                await _send_told(call, message, counts=lambda: self._is_over)
            finally:
                self._untaken.release(size)


async def _send_told(call: Call, message: Opened | Part, counts: Callable[[], bool]) -> None:
    try:
        frame = message.to_frame()
    except FrameTooLarge:
        if not isinstance(message, Opened):
            raise
        frame = message.model_copy(update={"selected": []}).to_frame()  # very many agents: the outcome names them
    async with while_taken(call.channel.stream, UNTAKEN_S, counts=counts):
        await call.channel.stream.send(frame)
    if isinstance(message, Part) and (ref := message.result.bulk) is not None and isinstance(ref.content, Blob):
        await _send_content(call, ref, ref.content, "part", message.round)


async def send_answer(call: Call, answer: Message, frame: bytes) -> None:
    """Sends an answer, with its large bodies; less of those, when its operator has had enough.

    Raises:
        StreamError, LinkError: nobody reads.
        TimeoutError: the operator has taken nothing for too long.
    """
    async with while_taken(call.channel.stream, UNTAKEN_S):
        await call.channel.stream.send(frame)
    if isinstance(answer, Outcome) and (contents := contents_of(answer, call.sent)):
        await _unless_enough(call, contents, answer.round)


async def _unless_enough(call: Call, contents: dict[BodyRef, Blob], round_id: int) -> None:
    async def send_all() -> None:
        for ref, blob in contents.items():
            await _send_content(call, ref, blob, "outcome", round_id)

    watching = asyncio.ensure_future(call.channel.receive())
    sending = asyncio.ensure_future(send_all())
    try:
        await asyncio.wait((watching, sending), return_when=asyncio.FIRST_COMPLETED)
        result_of(sending if sending.done() else watching)
    finally:
        await end(watching, sending)


def result_of(task: "asyncio.Future[T]") -> T:
    """The result of what is done.

    What it raised is raised afresh: it keeps its own, which would keep all frames from here up, and bodies with them.
    """
    error = task.exception()
    if isinstance(error, QuorateError):
        raise error.again()
    if isinstance(error, TimeoutError):
        raise TimeoutError
    return task.result()


async def end(*tasks: "asyncio.Future[Any]") -> None:
    """Cancels tasks; returns when they have ended, however."""
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.exception()


async def _send_content(call: Call, ref: BodyRef, blob: Blob, of: BulkOf, round_id: int) -> None:
    try:
        header = header_for(blob, of, round=round_id, call=call.id)
        await send_blob(call.connection, blob, header, untaken_s=UNTAKEN_S)
    except TimeoutError:
        raise
    except StoppedByPeer as error:
        log.debug("body_not_wanted", operator=call.caller.id, round=round_id, reason=str(error))
    except OSError as error:
        # Its operator has been told by a reset; of a part, it is tried once more with the outcome.
        log.error("body_not_read", round=round_id, problem=str(error))
        return
    call.sent.add(ref.digest)
