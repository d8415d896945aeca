"""The operator's client: asks for rounds, reveals truths, looks at the fleet.

::

    async with await Client.connect("quic://localhost:4433", token=token, tls=ClientTls(ca_file)) as client:
        outcome = await client.ask("classify", {"x": 1.5})
        print(outcome.value)
        await client.reveal(outcome.round, "a")
"""

import asyncio
import secrets
from types import TracebackType
from typing import Any, Self, TypeVar

from quorate_protocol import __version__
from quorate_protocol.bodies import encode_body
from quorate_protocol.channel import Channel
from quorate_protocol.errors import CallFailed, Code, ConnectFailed, Refused
from quorate_protocol.messages import (
    PULSE,
    Agents,
    Ask,
    CallError,
    Fleet,
    Hello,
    Message,
    Outcome,
    Refusal,
    Reveal,
    Revealed,
    Role,
    Welcome,
)
from quorate_protocol.transport import ClientTls, Connection, Priority, connect

AnswerT = TypeVar("AnswerT", bound=Message)


class Client:
    """One connection of an operator. Calls may run concurrently: each has a stream of its own."""

    def __init__(self, connection: Connection, control: Channel, welcome: Welcome) -> None:
        self._connection = connection
        #: Stays open as long as the client is a member.
        self._control = control
        #: Software version of the coordinator.
        self.coordinator_software = welcome.software
        self._watching = asyncio.create_task(self._watch(welcome.pulse_s, welcome.lease_s), name="client watch")

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
            url: `quic://HOST[:PORT]`.
            token: the coordinator's bearer token.
            tls: whom to trust; None trusts the system's authorities.
            name: how the coordinator's log names this client; None makes one up.
            role: an `observer` may look and not ask.
            timeout_s: seconds for all of it.

        Raises:
            ValidationError: `name` or `token` cannot be one.
            ConfigurationError: the address or the authorities' file is wrong.
            ConnectFailed: nobody there, not trusted, or the hello is not answered.
            Refused: the coordinator does not let us in; a wrong token, say.
        """
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
    ) -> Outcome:
        """Opens a round and waits for its end.

        Args:
            task: what the agents are asked to do.
            value: what they are asked; anything that `encode_body` takes.
            quorum: replies needed: a count (int), or a share of the selected agents (float in (0, 1]).
            grace_s: seconds left to stragglers once the quorum is met.
            deadline_s: seconds after which the round closes, whoever is missing.
            labels: asks only agents that carry all of these.

        Returns:
            The outcome, also of a round that failed or expired: look at `state`.

        Raises:
            CallFailed: there was no round (nobody does the task, busy, a conflict in the policy).
            LocalError: `value` is of a kind that cannot travel.
            ValidationError: an argument is out of range or too large; it names which.
            ConnectionClosed: the connection ended; whether there was a round is not known.
        """
        is_count = quorum is None or (isinstance(quorum, int) and not isinstance(quorum, bool))
        request = Ask(
            task=task,
            body=encode_body(value),
            quorum=quorum if is_count else None,  # type: ignore[arg-type]
            quorum_fraction=None if is_count else quorum,
            grace_s=grace_s,
            deadline_s=deadline_s,
            labels=labels or {},
        )
        return await self._call(request, Outcome)

    async def reveal(self, round: int, truth: Any) -> Revealed:
        """Tells the truth of a round: the learner scores its agents, and they get it as feedback.

        Raises:
            CallFailed: no such round, still open, or its truth was told before.
            LocalError: `truth` is of a kind that cannot travel.
            ValidationError: `truth` is too large.
            ConnectionClosed: the connection ended.
        """
        return await self._call(Reveal(round=round, truth=encode_body(truth)), Revealed)

    async def agents(self) -> Fleet:
        """The fleet as it is now.

        Raises:
            ConnectionClosed: the connection ended.
        """
        return await self._call(Agents(), Fleet)

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

    async def close(self) -> None:
        """Leaves."""
        self._watching.cancel()
        await self._connection.close(Code.NO_ERROR)

    async def _call(self, request: Message, answer_type: type[AnswerT]) -> AnswerT:
        channel = Channel(await self._connection.open_bi_stream(Priority.HIGH))
        try:
            await channel.send(request)
            answer = await channel.expect(answer_type, CallError)
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
