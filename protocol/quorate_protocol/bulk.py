"""Bodies on streams of their own: sending one, receiving one, and bringing together what refers to a body and the body.

::

    sending                                     receiving
    blob = await make_blob(encode_body_parts(value))
    send(Reply(…, bulk=ref_to(blob)))           inbox.take(stream, await read_header(stream))
    await send_blob(connection, blob,           blob = await inbox.get(reply.bulk, timeout_s)
                    header_for(blob, "reply",   value = decode_body(blob.view())
                               round=…))
"""

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

from quorate_protocol.blobs import CHUNK_BYTES, Blob, BlobStore
from quorate_protocol.errors import (
    BodyNotReceived,
    Code,
    ConnectionClosed,
    FrameTooLarge,
    FrameTruncated,
    LinkError,
    ProtocolError,
    QuorateError,
    SpoolError,
    SpoolFull,
    StreamError,
    UnexpectedMessage,
)
from quorate_protocol.fields import BodyRef
from quorate_protocol.frames import FrameDecoder
from quorate_protocol.limits import BULK_HEADER_BYTES_MAX, FRAME_PREFIX_BYTES
from quorate_protocol.messages import Bulk, BulkOf, Message, parse_message
from quorate_protocol.pace import SHARE_BYTES_MIN, Pace
from quorate_protocol.taking import while_taken
from quorate_protocol.transport.api import Buffer, Connection, Priority, ReceiveStream, SendStream

T = TypeVar("T")

#: Of each connection that has sent a body.
_paces: WeakKeyDictionary[Connection, Pace] = WeakKeyDictionary()

#: Seconds that the first frame of a stream may take.
HEADER_TIMEOUT_S: Final = 10.0

#: Seconds that a body waits for the message that refers to it. The message was sent first and is small: it is late when
#: it was lost and has to be sent again.
UNCLAIMED_S: Final = 30.0

#: Seconds that a body may take that a message refers to: so many, and as long as a path of 256 KiB/s needs. Whoever is
#: slower holds a part of the budget for too long.
_PATIENCE_S: Final = 30.0
_PATIENCE_BYTES_S: Final = 256 << 10

#: Seconds without a byte after which a body that has begun to come is given up, and by the coordinator one that its
#: peer does not take: it holds a part of the budget. Longer than a connection lives without a word (30 s), so that a
#: break is not taken for it.
STALLED_S: Final = 35.0

#: Bodies of one connection that no message has referred to yet; and their bytes, where they are more than one.
UNCLAIMED_MAX: Final = 64
UNCLAIMED_BYTES_MAX: Final = 256 << 20

#: References of one connection whose bodies were turned away before their messages came; and as many that were refused
#: before their bodies came. More than one peer may owe.
_TURNED_AWAY_MAX: Final = 1024

#: Streams of one connection whose first frame has not come; the others wait to be accepted.
_HEADERS_MAX: Final = 64


def ref_to(blob: Blob) -> BodyRef:
    """What a message carries in place of a body."""
    return BodyRef(size=blob.size_bytes, digest=blob.digest)


def patience_s(ref: BodyRef) -> float:
    """How long to wait for a body that nothing else sets an end to, in seconds."""
    return _PATIENCE_S + ref.size / _PATIENCE_BYTES_S


def header_for(blob: Blob, of: BulkOf, *, round: int = 0, call: int = 0) -> Bulk:
    """What a body's stream begins with.

    Args:
        blob: The body.
        of: Type of the message that refers to it.
        round: That one's round, if it has one.
        call: Stream of the call that it belongs to, if it does.
    """
    return Bulk(of=of, round=round, call=call, size=blob.size_bytes, digest=blob.digest)


async def send_blob(
    connection: Connection,
    blob: Blob,
    header: Bulk,
    *,
    priority: Priority = Priority.NORMAL,
    untaken_s: float | None = None,
) -> None:
    """Sends a body on a stream of its own; returns when the peer's transport has acknowledged all of it.

    However it ends otherwise, cancelled too, the stream is reset. A peer that does not read is waited for, unless
    `untaken_s` says for how many seconds it may take nothing.

    Raises:
        TimeoutError: it has taken nothing for so long.
        StoppedByPeer: the peer does not want it any more, or has no room for it (`BUSY`).
        ConnectionClosed: the connection is over.
        TimeoutError: the peer has taken nothing for too long.
        OSError: any other: the spooled file cannot be read. The peer has been told which body does not come.
    """
    assert (header.size, header.digest) == (blob.size_bytes, blob.digest), "the header is another body's"
    async with asyncio.timeout(untaken_s):
        stream = await connection.open_uni_stream(priority)
    pace = _paces.setdefault(connection, Pace())
    pace.begin(asyncio.get_running_loop().time())
    try:
        async with while_taken(stream, untaken_s):
            frame = header.to_frame()
            await stream.send(frame)
            try:
                await _send_at_pace(connection, stream, blob, pace, sent_bytes=len(frame))
            except OSError:
                # A reset may overtake the header, and without it nobody knows which body does not come.
                await stream.flush()
                stream.reset(Code.INTERNAL)
                raise
            await stream.finish()
            await stream.flush()
    except BaseException:
        stream.reset(Code.CANCELLED)
        raise
    finally:
        pace.end()


async def give_up_blob(connection: Connection, header: Bulk, *, priority: Priority = Priority.NORMAL) -> None:
    """Tells the peer that a body does not come to which a message refers that it has: its stream ends after the header.

    Raises:
        StoppedByPeer: the peer does not want it anyway.
        ConnectionClosed: the connection is over.
    """
    stream = await connection.open_uni_stream(priority)
    try:
        await stream.send(header.to_frame())
        await stream.flush()
    finally:
        stream.reset(Code.CANCELLED)


async def _send_at_pace(connection: Connection, stream: SendStream, blob: Blob, pace: Pace, *, sent_bytes: int) -> None:
    """Sends a body, no faster than the path carries it; `sent_bytes` were sent before."""
    loop = asyncio.get_running_loop()
    arrived_bytes = 0
    async with contextlib.aclosing(blob.chunks()) as chunks:
        async for chunk in chunks:
            for part in _split(chunk, SHARE_BYTES_MIN):
                await stream.flush(pace.share_bytes - len(part))
                more_bytes = sent_bytes - stream.unsent_bytes - arrived_bytes
                pace.acknowledged(more_bytes, loop.time(), connection.stats.rtt_least_s)
                arrived_bytes += more_bytes
                await stream.send(part)
                sent_bytes += len(part)


def _split(chunk: Buffer, part_bytes: int) -> Iterator[memoryview]:
    view = memoryview(chunk)
    for at in range(0, len(view), part_bytes):
        yield view[at : at + part_bytes]


async def read_header(stream: ReceiveStream) -> Message:
    """The first frame of a unidirectional stream. What follows it has not been touched.

    Raises:
        ProtocolError: it is none, or over 4096 bytes. The stream has been stopped.
        ResetByPeer, ConnectionClosed: the stream ended before.
    """
    decoder = FrameDecoder(frame_bytes_max=BULK_HEADER_BYTES_MAX)
    try:
        prefix = await _read_exactly(stream, FRAME_PREFIX_BYTES)
        payload_bytes = int.from_bytes(prefix, "big")
        if payload_bytes > BULK_HEADER_BYTES_MAX:
            raise FrameTooLarge(payload_bytes, BULK_HEADER_BYTES_MAX)
        (raw,) = decoder.feed(prefix + await _read_exactly(stream, payload_bytes))
        return parse_message(raw)
    except ProtocolError as error:
        stream.stop(error.code)
        raise


async def _read_exactly(stream: ReceiveStream, count: int) -> bytes:
    data = b""
    while len(data) < count:
        chunk = await stream.receive(count - len(data))
        if not chunk:
            raise FrameTruncated(count - len(data))
        data += chunk
    return data


async def receive_blob(stream: ReceiveStream, header: Bulk, store: BlobStore) -> Blob:
    """The body that follows a header. However it ends otherwise, cancelled too, the stream is stopped.

    Raises:
        BodyTooLarge, BodyTruncated, BodyDigestWrong: it is over the ceiling, or not what the header says.
        SpoolError: there is no room for it, or not for all of it.
        BodyNotReceived: nothing more of it came for `STALLED_S` seconds.
        ResetByPeer, ConnectionClosed: the stream ended before.
    """
    try:
        writer = store.writer(header.size, header.digest)
        try:
            while chunk := await _receive_some(stream, header, writer.received_bytes):
                await writer.write(chunk)
            return await writer.finish()
        finally:
            writer.close()
    except (ProtocolError, SpoolError) as error:
        stream.stop(error.code)
        raise
    except BaseException:
        stream.stop(Code.CANCELLED)
        raise


async def _receive_some(stream: ReceiveStream, header: Bulk, received_bytes: int) -> bytes:
    for _ in range(2):
        # In two halves: after the first, what came while this process was stopped itself is there to be read.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STALLED_S / 2):
                return await stream.receive(CHUNK_BYTES)
    raise BodyNotReceived(header.size, STALLED_S, received_bytes)


class _Pair(NamedTuple):
    """What a body and the message that refers to it have in common."""

    ref: BodyRef
    #: The call's stream; 0 where there is none. Two calls may have the same body, and one of them be given up.
    call: int


@dataclass(slots=True, eq=False)
class _Arrival:
    """A body that comes, or has come, and that no message has referred to."""

    pair: _Pair
    receiving: asyncio.Task[Blob]
    #: Drops it when no message refers to it.
    expiry: asyncio.TimerHandle


class BulkInbox:
    """The bodies that come over one connection, and the messages that refer to them, in whichever order.

    A body and a reference of one call that say the same size and digest are a pair; each body is given out once. What
    nobody refers to yet is received all the same, up to the limits of `UNCLAIMED_MAX` and `UNCLAIMED_BYTES_MAX` (one
    may be larger), and dropped after `unclaimed_s` seconds. What is over them is turned away, and its message is told.

    Args:
        store: Where bodies go.
        is_wanted: Whether a message may yet refer to the body of this header; otherwise its stream is stopped.
        on_fault: Told of each body that the peer spoiled, for counting.
        on_unclaimed: Told of each body that no message referred to in time.
        unclaimed_s: Seconds that a body waits for its message.
        unclaimed_bytes_max: Instead of `UNCLAIMED_BYTES_MAX`.
    """

    def __init__(
        self,
        store: BlobStore,
        *,
        is_wanted: Callable[[Bulk], bool] = lambda header: True,
        on_fault: Callable[[ProtocolError], None] = lambda error: None,
        on_unclaimed: Callable[[BodyRef], None] = lambda ref: None,
        unclaimed_s: float = UNCLAIMED_S,
        unclaimed_bytes_max: int | None = None,
    ) -> None:
        self._store = store
        self._is_wanted = is_wanted
        self._on_fault = on_fault
        self._on_unclaimed = on_unclaimed
        self._unclaimed_s = unclaimed_s
        self._unclaimed_bytes_max = UNCLAIMED_BYTES_MAX if unclaimed_bytes_max is None else unclaimed_bytes_max
        self._loop = asyncio.get_running_loop()
        self._unclaimed: dict[_Pair, deque[_Arrival]] = {}
        self._claims: dict[_Pair, deque[asyncio.Future[asyncio.Task[Blob]]]] = {}
        #: How many bodies of a kind no message will claim.
        self._refused: Counter[_Pair] = Counter()
        #: How many bodies of a kind were turned away that a message has not claimed.
        self._turned_away: Counter[_Pair] = Counter()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._beginning: set[asyncio.Task[None]] = set()
        self._end_error: QuorateError | None = None
        self._is_closed = False
        #: Bodies that no message has referred to yet, and their bytes.
        self.unclaimed = 0
        self.unclaimed_bytes = 0

    async def serve(self, connection: Connection) -> None:
        """Takes every unidirectional stream that the peer opens until the connection is over.

        For a connection whose unidirectional streams are all bulk; otherwise use `read_header`, `take` and `end`.

        Raises:
            ConnectionClosed: it is over.
        """
        try:
            while True:
                while len(self._beginning) >= _HEADERS_MAX:
                    # To stop more would be to turn away bodies without knowing whose.
                    await asyncio.wait(self._beginning, return_when=asyncio.FIRST_COMPLETED)
                stream = await connection.accept_uni_stream()
                beginning = self._spawn(self._begin(stream), stream)
                self._beginning.add(beginning)
                beginning.add_done_callback(self._beginning.discard)
        except QuorateError as error:
            # What has come before the end can be read after it.
            while self._beginning:
                await asyncio.wait(self._beginning)
            self.end(error)
            raise

    async def _begin(self, stream: ReceiveStream) -> None:
        try:
            async with asyncio.timeout(HEADER_TIMEOUT_S):
                header = await read_header(stream)
            if not isinstance(header, Bulk):
                stream.stop(Code.UNEXPECTED_MESSAGE)
                raise UnexpectedMessage(header.wire_type, "on a unidirectional stream")
            self.take(stream, header)
        except ProtocolError as error:
            self._on_fault(error)
        except TimeoutError:
            stream.stop(Code.CANCELLED)
        except (StreamError, LinkError):
            pass  # it ended before it began

    def take(self, stream: ReceiveStream, header: Bulk) -> None:
        """Begins to receive the body that follows a header, or stops the stream."""
        if self._is_closed:
            stream.stop(Code.CANCELLED)
            return
        pair = _Pair(header.ref, header.call)
        claim = self._next_claim(pair)
        if claim is None and self._refused[pair]:
            self._count_off(self._refused, pair)
            stream.stop(Code.CANCELLED)
        elif claim is None and not self._is_wanted(header):
            stream.stop(Code.UNEXPECTED_MESSAGE)
        elif claim is None and not self._has_room(header.size):
            stream.stop(Code.BUSY)
            if self._turned_away.total() < _TURNED_AWAY_MAX:
                self._count_on(self._turned_away, pair)
        else:
            receiving = self._spawn(receive_blob(stream, header, self._store), stream)
            receiving.add_done_callback(self._received)
            if claim is not None:
                claim.set_result(receiving)
                return
            # Those of one kind expire in the order in which they came.
            expiry = self._loop.call_later(self._unclaimed_s, self._expire, pair)
            self._unclaimed.setdefault(pair, deque()).append(_Arrival(pair, receiving, expiry))
            self.unclaimed += 1
            self.unclaimed_bytes += header.size

    async def get(self, ref: BodyRef, timeout_s: float, *, call: int = 0) -> Blob:
        """The body that a message refers to, when all of it is there. Giving this up stops its stream.

        Args:
            ref: What the message holds in its place.
            timeout_s: How long to wait.
            call: Stream of the call that the message belongs to, if it does.

        Raises:
            BodyNotReceived: not within so many seconds, or nothing more of it for `STALLED_S`.
            BodyTooLarge, BodyTruncated, BodyDigestWrong: it is not what was announced, or over the ceiling.
            SpoolError: there is no room for it.
            ResetByPeer, ConnectionClosed: the peer gave it up, or the connection ended.
        """
        pair = _Pair(ref, call)
        try:
            async with asyncio.timeout(timeout_s):
                receiving = self._take_unclaimed(pair)
                if receiving is None:
                    self._check_not_turned_away(pair)
                    receiving = await self._claim(pair)
                try:
                    await asyncio.wait((receiving,))
                except BaseException:
                    receiving.cancel()
                    raise
        except TimeoutError:
            raise BodyNotReceived(ref.size, timeout_s) from None
        if receiving.cancelled():
            self._check_not_ended()
        return receiving.result()

    def drop(self, ref: BodyRef, *, call: int = 0) -> None:
        """Gives up the oldest body of this kind that has come, or comes, and that no message has referred to."""
        receiving = self._take_unclaimed(_Pair(ref, call))
        if receiving is not None:
            receiving.cancel()

    def refuse(self, ref: BodyRef, *, call: int) -> None:
        """A message has referred to a body that is not wanted: its stream is stopped, be it here or still to come."""
        pair = _Pair(ref, call)
        if pair in self._unclaimed:
            self.drop(ref, call=call)
        elif not self._is_closed and self._refused.total() < _TURNED_AWAY_MAX:
            self._count_on(self._refused, pair)

    def _count_on(self, counter: Counter[_Pair], pair: _Pair) -> None:
        """One more, for as long as a body and its message may wait for each other."""
        counter[pair] += 1
        self._loop.call_later(self._unclaimed_s, self._count_off, counter, pair)

    @staticmethod
    def _count_off(counter: Counter[_Pair], pair: _Pair) -> None:
        counter[pair] -= 1
        if counter[pair] <= 0:
            del counter[pair]

    def end(self, error: QuorateError) -> None:
        """No more streams come: whoever waits for one is told the error. Bodies that have begun to come go on."""
        if self._end_error is not None:
            return
        self._end_error = error
        for claims in self._claims.values():
            for claim in claims:
                if not claim.done():
                    claim.set_exception(error.again())
        self._claims.clear()

    def close(self) -> None:
        """Gives up everything that was not given out."""
        self.end(ConnectionClosed(Code.NO_ERROR, "no bodies are received any more"))
        self._is_closed = True
        for pair in list(self._unclaimed):
            while pair in self._unclaimed:
                self.drop(pair.ref, call=pair.call)
        for task in self._tasks:
            task.cancel()

    def _check_not_ended(self) -> None:
        if self._end_error is not None:
            raise self._end_error.again()

    def _spawn(self, work: Coroutine[Any, Any, T], stream: ReceiveStream) -> asyncio.Task[T]:
        def done(task: asyncio.Task[T]) -> None:
            self._tasks.discard(task)
            if task.cancelled():
                # Perhaps before it has begun: nobody else has stopped the stream then.
                stream.stop(Code.CANCELLED)

        task = asyncio.create_task(work, name="bulk")
        self._tasks.add(task)
        task.add_done_callback(done)
        return task

    def _received(self, receiving: asyncio.Task[Blob]) -> None:
        error = None if receiving.cancelled() else receiving.exception()
        if isinstance(error, ProtocolError):
            self._on_fault(error)

    def _check_not_turned_away(self, pair: _Pair) -> None:
        if self._turned_away[pair]:
            self._count_off(self._turned_away, pair)
            where = "among those that no message had referred to"
            raise SpoolFull(where, pair.ref.size, self.unclaimed_bytes, self._unclaimed_bytes_max)

    # --- messages that came before their bodies ---

    async def _claim(self, pair: _Pair) -> asyncio.Task[Blob]:
        """The task that receives the body, once its stream has come."""
        self._check_not_ended()
        claim: asyncio.Future[asyncio.Task[Blob]] = self._loop.create_future()
        claims = self._claims.setdefault(pair, deque())
        claims.append(claim)
        try:
            return await claim
        except BaseException:
            if claim.done() and not claim.cancelled() and claim.exception() is None:
                # It came in the moment in which it was given up.
                claim.result().cancel()
            raise
        finally:
            if claim in claims:
                claims.remove(claim)
            if not claims and self._claims.get(pair) is claims:
                del self._claims[pair]

    def _next_claim(self, pair: _Pair) -> asyncio.Future[asyncio.Task[Blob]] | None:
        claims = self._claims.get(pair)
        while claims:
            claim = claims.popleft()
            if not claim.done():
                return claim
        return None

    # --- bodies that came before their messages ---

    def _has_room(self, size_bytes: int) -> bool:
        return self.unclaimed == 0 or (
            self.unclaimed < UNCLAIMED_MAX and self.unclaimed_bytes + size_bytes <= self._unclaimed_bytes_max
        )

    def _take_unclaimed(self, pair: _Pair) -> asyncio.Task[Blob] | None:
        arrivals = self._unclaimed.get(pair)
        if not arrivals:
            return None
        arrival = arrivals[0]
        self._forget(arrival)
        return arrival.receiving

    def _forget(self, arrival: _Arrival) -> None:
        """It waits for no message any more."""
        arrivals = self._unclaimed[arrival.pair]
        arrivals.remove(arrival)
        if not arrivals:
            del self._unclaimed[arrival.pair]
        self.unclaimed -= 1
        self.unclaimed_bytes -= arrival.pair.ref.size
        arrival.expiry.cancel()

    def _expire(self, pair: _Pair) -> None:
        self.drop(pair.ref, call=pair.call)
        self._on_unclaimed(pair.ref)
