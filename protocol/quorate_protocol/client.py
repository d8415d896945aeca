"""The operator's client: asks for rounds, reveals truths, looks at the fleet.

::

    async with await Client.connect("quic://localhost:4433", token=token, tls=ClientTls(ca_file)) as client:
        outcome = await client.ask("classify", {"x": 1.5})
        print(outcome.value)
        await client.reveal(outcome.round, "a")

Values may be of any size. Large ones travel on streams of their own, and wait in files without a name in the temporary
directory; large arrays in them are read-only views of these.
"""

import asyncio
import contextlib
import secrets
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Iterable
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from quorate_protocol import __version__
from quorate_protocol.arguments import arguments_checked
from quorate_protocol.blobs import Blob, make_blob, make_private_store
from quorate_protocol.bodies import encode_body_parts
from quorate_protocol.bulk import BulkInbox, header_for, patience_s, ref_to, send_blob
from quorate_protocol.channel import Channel
from quorate_protocol.errors import ArgumentInvalid, CallFailed, Code, ConnectFailed, LinkError, Refused, StreamError
from quorate_protocol.fields import BodyRef, Role
from quorate_protocol.limits import BODY_BYTES_MAX
from quorate_protocol.messages import (
    PULSE,
    AgentResult,
    Agents,
    Ask,
    Bulk,
    CallError,
    DrainAgent,
    Draining,
    Fleet,
    Hello,
    Message,
    Opened,
    Outcome,
    Part,
    Refusal,
    Reveal,
    Revealed,
    Welcome,
)
from quorate_protocol.transport import ClientTls, Connection, Priority, connect

#: Seconds that a large body waits for whoever iterates over streamed replies to come to its part.
_UNREAD_S: Final = 600.0

#: Seconds to wait before asking a busy coordinator again, at first and at most.
_BUSY_PAUSE_S: Final = 0.02
_BUSY_PAUSE_S_MAX: Final = 1.0

AnswerT = TypeVar("AnswerT", bound=Message)


class Client:
    """One connection of an operator. Calls may run concurrently: each has a stream of its own."""

    def __init__(self, connection: Connection, control: Channel, welcome: Welcome) -> None:
        self._connection = connection
        #: Stays open as long as the client is a member.
        self._control = control
        #: Software version of the coordinator.
        self.coordinator_software = welcome.software
        store = make_private_store()
        # What comes was asked for: the budget is ceiling enough.
        self._inbox = BulkInbox(store, unclaimed_s=_UNREAD_S, unclaimed_bytes_max=store.budget.disk_bytes_max)
        self._tasks = [
            asyncio.create_task(self._watch(welcome.pulse_s, welcome.lease_s), name="client watch"),
            asyncio.create_task(self._receive_bodies(), name="client bodies"),
        ]

    @classmethod
    async def connect(
        cls,
        url: str,
        *,
        token: str,
        tls: ClientTls | None = None,
        name: str | None = None,
        role: Role = "operator",
        timeout_s: float = 10.0,
    ) -> Self:
        """Connects and says hello.

        Args:
            url: `quic://HOST[:PORT]`, or `memory:NAME` for a coordinator in this process.
            token: the coordinator's bearer token.
            tls: whom to trust; None trusts the system's authorities.
            name: how the coordinator's log names this client; None makes one up.
            role: an `observer` may look and not ask.
            timeout_s: seconds for all of it.

        Raises:
            ArgumentInvalid: `name` or `token` cannot be one.
            ConfigurationError: the address or the authorities' file is wrong.
            ConnectFailed: nobody there, not trusted, or the hello is not answered.
            Refused: the coordinator does not let us in; a wrong token, say.
        """
        with arguments_checked(id="name"):
            hello = Hello(
                role=role,
                id=name or f"{role}-{secrets.token_hex(4)}",
                token=token,
                software=f"quorate/{__version__}",
            )
        ends_at = asyncio.get_running_loop().time() + timeout_s
        connection = await connect(url, tls=tls, timeout_s=timeout_s)
        try:
            try:
                async with asyncio.timeout_at(ends_at):
                    control = Channel(await connection.open_bi_stream(Priority.CRITICAL))
                    await control.send(hello)
                    answer = await control.expect(Welcome, Refusal)
            except TimeoutError:
                raise ConnectFailed(url, f"connected, but the hello was not answered within {timeout_s:g} s") from None
            if isinstance(answer, Refusal):
                raise Refused(answer.reason, answer.message, retry=answer.retry)
            assert isinstance(answer, Welcome)
        except BaseException:
            await connection.close(Code.NO_ERROR)
            raise
        return cls(connection, control, answer)

    async def ask(
        self,
        task: str,
        value: Any,
        *,
        quorum: int | float | None = None,
        grace_s: float | None = None,
        deadline_s: float | None = None,
        labels: dict[str, str] | None = None,
        count: int | None = None,
        attempts: int | None = None,
        key: str | None = None,
    ) -> Outcome:
        """Opens a round and waits for its end.

        Args:
            task: what the agents are asked to do.
            value: what they are asked; anything that `encode_body` takes, of any size. Large arrays must not change
                meanwhile.
            quorum: replies needed: a count (int), or a share of the selected agents (float in (0, 1]).
            grace_s: seconds left to stragglers once the quorum is met.
            deadline_s: seconds after which the round closes, whoever is missing.
            labels: asks only agents that carry all of these.
            count: asks at most so many agents, those that the learner thinks best of.
            attempts: how often one agent may be given the question: again when it failed, or was lost and
                came back; 1 to 100.
            key: idempotency key. The same question asked again under the same key, after an error or a broken
                connection say, is the same round with the same outcome; while it has a key, a round goes on
                when the connection breaks.

        Returns:
            The outcome, also of a round that failed or expired: look at `state`. Of some 9,000 agents and more it has
            not all results: `left_out` says how many are missing. It is durable where the
            coordinator keeps a journal; answers over about 1 MiB are not, and asked again under its key much
            later, the outcome is told without them (`value` raises `BodyMissing`).

        Raises:
            CallFailed: there was no round (nobody does the task, busy, too large, a conflict in the policy), or with
                the reason `not-recorded` one that could not be written down; `retry` says whether to ask again.
            LocalError: `value` is of a kind that cannot travel.
            ArgumentInvalid: one is out of range; a LocalError that names which.
            SpoolError: there is no room here for the answer: earlier ones are still held.
            BodyNotReceived: a large answer did not come.
            ResetByPeer: the coordinator gave the call up: a large answer cannot be read there, or nothing of it was
                taken here for a minute.
            ConnectionClosed: the connection ended; whether there was a round is not known. Ask again under the
                same key.
        """
        request, parts = _ask_of(task, value, quorum, grace_s, deadline_s, labels, count, attempts, key)
        request, blob = await _pack(request, "body", parts)
        return await self._call(request, Outcome, blob)

    def ask_stream(
        self,
        task: str,
        value: Any,
        *,
        quorum: int | float | None = None,
        grace_s: float | None = None,
        deadline_s: float | None = None,
        labels: dict[str, str] | None = None,
        count: int | None = None,
        attempts: int | None = None,
        key: str | None = None,
    ) -> "Replies":
        """As `ask`, and tells each agent's part as it ends::

            async with client.ask_stream("classify", {"x": 1.5}, quorum=3) as replies:
                async for result in replies:
                    print(result.agent, result.status, result.value)
            print(replies.outcome.value)

        The call is made when the iteration begins. Leaving the block before the end withdraws the round.

        Raises: as `ask`; what comes of the coordinator, from the iteration.
        """
        request, parts = _ask_of(task, value, quorum, grace_s, deadline_s, labels, count, attempts, key)
        return Replies(self._connection, self._inbox, request.model_copy(update={"stream": True}), parts)

    async def ask_many(
        self,
        task: str,
        values: Iterable[Any] | AsyncIterable[Any],
        *,
        in_flight: int = 16,
        quorum: int | float | None = None,
        grace_s: float | None = None,
        deadline_s: float | None = None,
        labels: dict[str, str] | None = None,
        count: int | None = None,
        attempts: int | None = None,
    ) -> AsyncGenerator[Outcome, None]:
        """Asks for each of many values, some at a time; yields the outcomes in the order of the values.

        Values are taken as there is room for them, so that they may come from a file or a queue without end; an outcome
        does not wait for the next value. Where the coordinator is busy for a moment, the question is asked again.

        Args:
            values: what the agents are asked, one after the other.
            in_flight: rounds under way at once, at least 1.
            others: as in `ask`.

        Raises: as `ask`, for the first value that fails; the rounds after it are withdrawn.
        """
        if in_flight < 1:
            raise ArgumentInvalid("in_flight", f"at least one round must be under way, got {in_flight}")

        async def ask_one(value: Any) -> Outcome:
            asked, parts = _ask_of(task, value, quorum, grace_s, deadline_s, labels, count, attempts, None)
            request, blob = await _pack(asked, "body", parts)
            pause_s = _BUSY_PAUSE_S
            while True:
                try:
                    return await self._call(request, Outcome, blob)
                except CallFailed as error:
                    if error.reason != "busy" or not error.retry:
                        raise
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _BUSY_PAUSE_S_MAX)

        calls: deque[asyncio.Task[Outcome]] = deque()
        source = _each(values)
        taking: asyncio.Task[Any] | None = None  # the next value, where there is room for it
        is_over = False
        try:
            while calls or not is_over:
                if taking is None and not is_over and len(calls) < in_flight:
                    taking = asyncio.create_task(_next(source), name=f"next value for {task}")
                waiting: set[asyncio.Task[Any]] = {one for one in (taking, *list(calls)[:1]) if one is not None}
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                if taking is not None and taking.done():
                    value, taking = taking.result(), None
                    is_over = value is _END
                    if not is_over:
                        calls.append(asyncio.create_task(ask_one(value), name=f"ask {task}"))
                elif calls[0].done():
                    yield calls.popleft().result()
        finally:
            left = [*calls] if taking is None else [taking, *calls]
            for one in left:
                one.cancel()
            await asyncio.gather(*left, return_exceptions=True)
            await source.aclose()

    async def reveal(self, round: int, truth: Any) -> Revealed:
        """Tells the truth of a round: the learner scores its agents, and they get it as feedback.

        Raises:
            CallFailed: no such round, still open, or its truth was told before.
            ArgumentInvalid: `round` is no number of one.
            LocalError: `truth` is of a kind that cannot travel.
            ConnectionClosed: the connection ended.
        """
        with arguments_checked():
            reveal = Reveal(round=round, truth=b"")
        request, blob = await _pack(reveal, "truth", encode_body_parts(truth))
        return await self._call(request, Revealed, blob)

    async def agents(self) -> Fleet:
        """The fleet as it is now.

        Raises:
            ConnectionClosed: the connection ended.
        """
        return await self._call(Agents(), Fleet)

    async def drain(self, agent: str, reason: str = "") -> None:
        """Has an agent finish what it does and leave for good. Returns when it is told, not when it has left.

        Raises:
            CallFailed: there is no such agent.
            ArgumentInvalid: `agent` is no id of one, or the reason is too long.
            ConnectionClosed: the connection ended.
        """
        with arguments_checked():
            request = DrainAgent(agent=agent, reason=reason)
        await self._call(request, Draining)

    async def _watch(self, pulse_s: float, lease_s: float) -> None:
        """Gives up a coordinator that is silent: one that died says nothing, and calls would wait for long."""
        connection = self._connection
        loop = asyncio.get_running_loop()
        while not connection.is_closed:
            await asyncio.sleep(pulse_s)
            silent_s = loop.time() - connection.stats.received_at
            if silent_s > lease_s:
                connection.abort(Code.LEASE_EXPIRED, f"the coordinator has not been heard for {silent_s:.0f} s")
            elif not connection.is_closed and connection.datagrams.max_bytes >= len(PULSE):
                # Its acknowledgement is what is listened for.
                connection.datagrams.send(PULSE)

    async def _receive_bodies(self) -> None:
        with contextlib.suppress(LinkError):
            await self._inbox.serve(self._connection)

    async def close(self) -> None:
        """Leaves. Values that were received stay."""
        for task in self._tasks:
            task.cancel()
        self._inbox.close()
        await self._connection.close(Code.NO_ERROR)

    async def _call(self, request: Message, answer_type: type[AnswerT], blob: Blob | None = None) -> AnswerT:
        channel = Channel(await self._connection.open_bi_stream(Priority.HIGH))
        try:
            async with _uploading(self._connection, channel, request, blob):
                answer = await channel.expect(answer_type, CallError)
                if isinstance(answer, Outcome):
                    answer = await _Bodies(self._inbox, channel).fill_outcome(answer)
            # Tells the coordinator that the answer has arrived.
            await channel.finish()
        except BaseException:
            # Whatever failed, or the caller gave up: the coordinator hears of it, and the stream is not left open.
            channel.abort(Code.CANCELLED)
            raise
        if isinstance(answer, CallError):
            raise CallFailed(answer.reason, answer.message, retry=answer.retry)
        assert isinstance(answer, answer_type)
        return answer

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class Replies:
    """The replies of one streamed round, as they come. Made by `Client.ask_stream`; iterate once."""

    def __init__(self, connection: Connection, inbox: BulkInbox, request: Ask, parts: list[bytes | memoryview]) -> None:
        self._connection = connection
        self._inbox = inbox
        self._request = request
        self._parts = parts
        self._iterator: AsyncGenerator[AgentResult, None] | None = None
        self._outcome: Outcome | None = None
        #: The round's number and whom it asks, once it is open; None where it was over when it was asked for again.
        self.opened: Opened | None = None

    @property
    def outcome(self) -> Outcome:
        """How the round ended.

        Raises:
            RuntimeError: before the iteration has come to its end (a caller's bug).
        """
        if self._outcome is None:
            raise RuntimeError("the outcome is there when all replies have been iterated over")
        return self._outcome

    @property
    def round(self) -> int | None:
        """The round's number, as soon as it is known: with the first reply at the latest."""
        known = self.opened or self._outcome
        return None if known is None else known.round

    def __aiter__(self) -> AsyncGenerator[AgentResult, None]:
        if self._iterator is not None:
            raise RuntimeError("replies can be iterated over once")
        self._iterator = self._iterate()
        return self._iterator

    async def aclose(self) -> None:
        """Withdraws the round, where it is not over."""
        if self._iterator is not None:
            await self._iterator.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _iterate(self) -> AsyncGenerator[AgentResult, None]:
        request, blob = await _pack(self._request, "body", self._parts)
        channel = Channel(await self._connection.open_bi_stream(Priority.HIGH))
        told: set[str] = set()
        bodies = _Bodies(self._inbox, channel)
        try:
            async with _uploading(self._connection, channel, request, blob):
                while self._outcome is None:
                    message = await channel.expect(Opened, Part, Outcome, CallError)
                    match message:
                        case Opened():
                            self.opened = message
                        case Part(result=result):
                            told.add(result.agent)
                            yield await bodies.fill(result)
                        case Outcome():
                            outcome = await bodies.fill_outcome(message)
                            await channel.finish()
                            self._outcome = outcome
                        case CallError(reason=reason, message=text, retry=retry):
                            await channel.finish()
                            raise CallFailed(reason, text, retry=retry)
        except CallFailed:
            raise
        except BaseException:
            channel.abort(Code.CANCELLED)
            raise
        # Those whose part the end of the round has ended: each agent is told once.
        for result in self._outcome.results:
            if result.agent not in told:
                yield result


RequestT = TypeVar("RequestT", bound=Message)
BodiedT = TypeVar("BodiedT", AgentResult, Outcome)


async def _pack(request: RequestT, key: str, parts: list[bytes | memoryview]) -> tuple[RequestT, Blob | None]:
    """The request with its body inside, or with a reference to it and the body."""
    if sum(map(len, parts)) <= BODY_BYTES_MAX:
        return request.model_copy(update={key: b"".join(parts)}), None
    blob = await make_blob(parts)
    return request.model_copy(update={key: None, "bulk": ref_to(blob)}), blob


@contextlib.asynccontextmanager
async def _uploading(
    connection: Connection, channel: Channel, request: Message, blob: Blob | None
) -> AsyncGenerator[None, None]:
    """Sends a request, and its body beside what is done in the block; at the end of the block nothing more of it."""
    await channel.send(request)
    if blob is None:
        yield
        return
    header = header_for(blob, "reveal" if isinstance(request, Reveal) else "ask", call=channel.stream.id)
    uploading = asyncio.create_task(_upload(connection, blob, header), name="upload")
    try:
        yield
    finally:
        uploading.cancel()
        await asyncio.wait((uploading,))
        if not uploading.cancelled():
            uploading.exception()


async def _upload(connection: Connection, blob: Blob, header: Bulk) -> None:
    # The answer, or its failing to come, says what is to be known of this.
    with contextlib.suppress(StreamError, LinkError):
        await send_blob(connection, blob, header)


class _Bodies:
    """The large bodies of one call's parts and outcome, which come on streams of their own, each once."""

    def __init__(self, inbox: BulkInbox, channel: Channel) -> None:
        self._inbox = inbox
        self._call = channel.stream.id
        self._received: dict[BodyRef, BodyRef] = {}

    async def fill_outcome(self, outcome: Outcome) -> Outcome:
        """The outcome with all its bodies, those that were received before among them. Raises: as `fill`."""
        if outcome.bulk is None and all(result.bulk is None for result in outcome.results):
            return outcome
        answer = await self.fill(outcome)
        results = [await self.fill(result) for result in outcome.results]
        return answer.model_copy(update={"results": results})

    async def fill(self, bodied: BodiedT) -> BodiedT:
        """The same with its body, where that travels on a stream of its own.

        Raises:
            BodyNotReceived: it did not come in time, or not as it was announced.
            SpoolError: there is no room for it.
            ConnectionClosed: the connection ended.
        """
        ref = bodied.bulk
        if ref is None or (ref.gone and ref not in self._received):
            return bodied
        if ref not in self._received:
            self._received[ref] = ref.with_content(await self._inbox.get(ref, patience_s(ref), call=self._call))
        return bodied.model_copy(update={"bulk": self._received[ref]})


def _ask_of(
    task: str,
    value: Any,
    quorum: int | float | None,
    grace_s: float | None,
    deadline_s: float | None,
    labels: dict[str, str] | None,
    count: int | None,
    attempts: int | None,
    key: str | None,
) -> tuple[Ask, list[bytes | memoryview]]:
    """A request without its body, checked, and the body's parts."""
    is_count = quorum is None or (isinstance(quorum, int) and not isinstance(quorum, bool))
    with arguments_checked(quorum_fraction="quorum"):
        request = Ask(
            task=task,
            body=b"",
            quorum=quorum if is_count else None,  # type: ignore[arg-type]
            quorum_fraction=None if is_count else quorum,
            grace_s=grace_s,
            deadline_s=deadline_s,
            labels=labels or {},
            count=count,
            attempts=attempts,
            key=key,
        )
    return request, encode_body_parts(value)


#: Instead of a value, when there are no more.
_END: Final = object()


async def _next(source: AsyncGenerator[Any, None]) -> Any:
    return await anext(source, _END)


async def _each(values: Iterable[Any] | AsyncIterable[Any]) -> AsyncGenerator[Any, None]:
    if isinstance(values, AsyncIterable):
        async for value in values:
            yield value
    else:
        for value in values:
            yield value
