"""The shell round the agent's core: the connection, its streams, the clock and the handlers.

One turn: something arrives or ends, it becomes an event, the core answers with instructions, and they
are carried out at once, in order. What takes time (connecting, leaving, handlers) runs beside and ends
in an event again.
"""

import asyncio
import random
import secrets
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import structlog

from quorate_agent import events as ev
from quorate_agent.agent import Agent, check_concurrency, check_labels, check_name
from quorate_agent.backoff import Backoff
from quorate_agent.core import AgentCore
from quorate_agent.counts import Counts
from quorate_agent.handlers import AgentInvalid
from quorate_agent.running import HandlerRunner
from quorate_agent.session import Session
from quorate_agent.states import State
from quorate_agent.streams import Background, OwnStreams
from quorate_protocol import __version__
from quorate_protocol.blobs import BlobStore, make_private_store
from quorate_protocol.errors import (
    Code,
    ConnectFailed,
    ConnectionClosed,
    LocalError,
    MessageInvalid,
    QuorateError,
    Refused,
)
from quorate_protocol.limits import HELLO_BYTES_MAX
from quorate_protocol.messages import Hello, Resume, Welcome
from quorate_protocol.transport import ClientTls, Connection, connect

log = structlog.get_logger()

T = TypeVar("T")

#: Seconds for a handshake, all addresses of the name together.
CONNECT_TIMEOUT_S: Final = 10.0
#: Seconds that background functions may take to end when their link has.
BACKGROUND_TIMEOUT_S: Final = 5.0
#: Seconds that an attempt needs at the least.
ATTEMPT_MIN_S: Final = 0.1
#: Seconds for a handshake while a session waits for its link: where packets are lost, a handshake tries again ever
#: later (0.3 s, 0.9, 2.1 …), and a new one at once.
RESUME_TIMEOUT_S: Final = 2.0
#: The longest pause between two attempts meanwhile, as a share of the lease: some of them fall into it for sure. After
#: the lease nobody waits any more, and pauses are as long as a fleet without a coordinator needs them to be.
RESUME_PAUSE_SHARE: Final = 1 / 8
#: Bytes that `resume` may add to a hello.
_RESUME_BYTES_MAX: Final = 1024


@dataclass(frozen=True, slots=True)
class Ending:
    """Why a worker stopped."""

    kind: ev.EndingKind
    #: For people.
    message: str
    #: With REFUSED: the short reason, such as `unauthenticated`.
    refusal: str = ""

    def raise_if_error(self) -> None:
        """Raises what fits the ending; returns when the worker was asked to stop.

        Raises:
            Refused: the coordinator does not let this agent in.
            ConnectionClosed: with code `REPLACED`: another agent took the id.
            ConnectFailed: no coordinator was reached in time.
        """
        if self.kind is ev.EndingKind.REFUSED:
            raise Refused(self.refusal, self.message)
        if self.kind is ev.EndingKind.REPLACED:
            raise ConnectionClosed(Code.REPLACED, self.message, by_peer=True)
        if self.kind is ev.EndingKind.UNREACHABLE:
            raise ConnectFailed("coordinator", self.message)


class Worker:
    """Runs an agent against one coordinator. `run` may be called once.

    Args:
        agent: What to run; checked.
        url: `quic://HOST[:PORT]`.
        agent_id: Identity in the fleet.
        token: Bearer token; never logged.
        tls: Whom to trust; None trusts the system's authorities.
        labels: Added to the agent's, and winning over them.
        concurrency: Instead of the agent's.
        drain_timeout_s: Seconds that handlers may go on after a stop or drain was asked for.
        max_wait_s: Seconds without a coordinator after which to give up; None never does.
        rng: Jitter of the reconnections; None makes a generator of its own.

    Raises:
        AgentInvalid: the agent or an argument is wrong.
        LocalError: its tasks and labels are too long together.
    """

    def __init__(
        self,
        agent: Agent,
        url: str,
        *,
        agent_id: str,
        token: str,
        tls: ClientTls | None = None,
        labels: Mapping[str, str] | None = None,
        concurrency: int | None = None,
        drain_timeout_s: float = 30.0,
        max_wait_s: float | None = None,
        rng: random.Random | None = None,
    ) -> None:
        agent.check()
        self._agent = agent
        self._agent_id = check_name("agent id", agent_id)
        self._url = url
        self._tls = tls
        self._concurrency = agent.concurrency if concurrency is None else check_concurrency(concurrency)
        self._drain_timeout_s = drain_timeout_s
        self._max_wait_s = max_wait_s
        hello = {
            "id": self._agent_id,
            "token": token,
            "instance": secrets.token_hex(8),
            "labels": check_labels({**agent.labels, **(labels or {})}),
            "tasks": list(agent.tasks),
            "software": f"quorate-agent/{__version__}",
        }
        try:
            self._hello = Hello.from_map(hello)
        except MessageInvalid as error:
            raise AgentInvalid(error.problem) from None  # names the key; the token is not in it
        hello_bytes = len(self._hello.to_frame()) + _RESUME_BYTES_MAX
        if hello_bytes > HELLO_BYTES_MAX:
            raise LocalError(
                f"the agent's tasks and labels make a hello of up to {hello_bytes} bytes, over the {HELLO_BYTES_MAX} "
                "that a coordinator takes: shorten them"
            )
        self._core = AgentCore(tasks=agent.tasks, feedback_tasks=agent.feedback_handlers, concurrency=self._concurrency)
        self._runner: HandlerRunner | None = None
        self._backoff = Backoff(rng or random.Random())  # noqa: S311  jitter is no secret
        #: Where large bodies go; made by `run`.
        self._store: BlobStore | None = None
        self._session: Session | None = None
        #: Those of the present link.
        self._streams: OwnStreams | None = None
        self._backgrounds: set[asyncio.Task[None]] = set()
        self._peer = ""
        #: What `run` waits for that a stop may cut short: connecting, or a pause.
        self._interruptible: asyncio.Task[Any] | None = None
        self._ending: Ending | None = None
        self._ended: asyncio.Event = asyncio.Event()
        self._drain_timer: asyncio.TimerHandle | None = None
        #: Monotonic seconds: since when there has been no session; when the present or last one began.
        self._alone_since = 0.0
        self._session_began_at: float | None = None
        #: The lease of the last session, and when it ends for one that has lost its link.
        self._lease_s = 0.0
        self._lease_ends_at = 0.0
        self._reconnect_reason = ""

    @property
    def counts(self) -> Counts:
        """What happened since the start."""
        return self._core.counts

    @property
    def state(self) -> State:
        """Where the agent stands with its coordinator."""
        return self._core.state

    def request_stop(self, reason: str) -> None:
        """Finish what is there, say goodbye, end `run`. To be called in the event loop; more calls do nothing."""
        self._apply(ev.StopRequested(reason))
        if self._interruptible is not None:
            self._interruptible.cancel()

    async def run(self) -> Ending:
        """Works until it is stopped, refused for good, replaced, or gives up. Returns which.

        Cancelling it closes the connection and cancels the handlers.

        Raises:
            ConfigurationError: the URL is none, or the authorities' file cannot be read.
            AgentInvalid: the agent's processes cannot load it.
        """
        runner = self._runner = HandlerRunner(
            self._agent,
            self._agent_id,
            self._concurrency,
            self._apply,
            self._streams_of_link,
            lambda: self._core.queued,
        )
        self._store = make_private_store()
        try:
            await self._unless_stopped(runner.open())
            self._alone_since = _now()
            while self._ending is None:
                if not self._core.wants_link:
                    # Asked to stop while there is no link, and nobody waits for it: what runs may finish.
                    await self._ended.wait()
                elif (connection := await self._connect()) is not None:
                    await self._serve(connection)
                if self._core.wants_link:
                    await self._pause()
            return self._ending
        finally:
            self._set_drain_timer(False)
            await runner.close()
            self._store = None

    # --- connecting ---

    async def _connect(self) -> Connection | None:
        timeout_s = RESUME_TIMEOUT_S if self._is_awaited(_now()) else CONNECT_TIMEOUT_S
        if self._max_wait_s is not None:
            left_s = self._alone_since + self._max_wait_s - _now()
            # A last attempt without the time to learn anything would hide what the earlier ones met with.
            if left_s <= (ATTEMPT_MIN_S if self._reconnect_reason else 0.0):
                problem = f"no coordinator at {self._url} within {self._max_wait_s:g} s"
                why = f": {self._reconnect_reason}" if self._reconnect_reason else ""
                self._apply(ev.ConnectGivenUp(problem + why))
                return None
            timeout_s = min(timeout_s, left_s)
        log.debug("connecting", coordinator=self._url, agent=self._agent_id)
        try:
            return await self._unless_stopped(connect(self._url, tls=self._tls, timeout_s=timeout_s))
        except ConnectFailed as error:
            self._apply(ev.ConnectFailed(error.problem))
            return None

    async def _pause(self) -> None:
        """Waits before the next attempt, and says so."""
        now = _now()
        began_at, self._session_began_at = self._session_began_at, None
        if began_at is None:
            delay_s = self._backoff.fail()
        else:
            self._lease_ends_at = now + self._lease_s
            delay_s = self._backoff.end_session(now - began_at, at_once=self._core.is_suspended)
            self._alone_since = now
        if self._is_awaited(now):
            delay_s = min(delay_s, self._lease_s * RESUME_PAUSE_SHARE)
        if self._max_wait_s is not None:
            delay_s = min(delay_s, max(0.0, self._alone_since + self._max_wait_s - now))
        if began_at is None:
            event, message = "cannot_connect", f"cannot connect to {self._url}, retrying in {delay_s:.1f} s"
        else:
            what = "link is broken" if self._core.is_suspended else "session is over"
            event, message = "session_ended", f"{what}, connecting to {self._url} again in {delay_s:.1f} s"
        log.warning(
            event,
            message=message,
            coordinator=self._url,
            agent=self._agent_id,
            reason=self._reconnect_reason,
            attempt=self._backoff.failures,
            retry_in_s=round(delay_s, 3),
        )
        await self._unless_stopped(asyncio.sleep(delay_s))

    def _is_awaited(self, now: float) -> bool:
        """Whether there is a session that may still be resumed."""
        return self._core.is_suspended and now < self._lease_ends_at

    async def _unless_stopped(self, work: Coroutine[Any, Any, T]) -> T | None:
        """The result of `work`; None when a stop was requested before it was there."""
        task = asyncio.create_task(work)
        self._interruptible = task
        try:
            return await task
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if not task.cancelled() or (current is not None and current.cancelling()):
                raise
            return None
        finally:
            self._interruptible = None

    # --- one session ---

    async def _serve(self, connection: Connection) -> None:
        """From the handshake until the connection is over."""
        if not self._core.wants_link:
            await connection.close(Code.NO_ERROR, "the agent ends")  # it was stopped in the very moment
            return
        assert self._store is not None, "`run` made it"
        self._peer = connection.peer
        self._session = Session(
            connection,
            make_hello=self._make_hello,
            agent_id=self._agent_id,
            store=self._store,
            apply=self._apply,
            welcomed=lambda welcome: self._on_welcomed(welcome, connection),
        )
        try:
            await self._session.run()
        finally:
            self._session = None
            self._streams = None
            await self._end_backgrounds()

    def _streams_of_link(self) -> OwnStreams:
        """For handlers and background functions.

        Raises:
            ConnectionClosed: there is no link.
        """
        if self._streams is None:
            raise ConnectionClosed(Code.NO_ERROR, "there is no link to the coordinator now")
        return self._streams

    def _start_backgrounds(self, streams: OwnStreams) -> None:
        for function in self._agent.backgrounds:
            task = asyncio.create_task(self._run_background(function, streams), name=f"background {function}")
            self._backgrounds.add(task)
            task.add_done_callback(self._backgrounds.discard)

    async def _run_background(self, function: Background, streams: OwnStreams) -> None:
        try:
            await function(streams)
        except QuorateError as error:
            # The link broke, or nobody takes its topic.
            log.warning("background_ended", agent=self._agent_id, reason=str(error))
        except Exception:
            log.exception("background_failed", agent=self._agent_id)

    async def _end_backgrounds(self) -> None:
        tasks = list(self._backgrounds)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=BACKGROUND_TIMEOUT_S)

    def _make_hello(self, resume: ev.Resume | None) -> bytes:
        if resume is None:
            return self._hello.to_frame()
        wanted = Resume(session=resume.session, secret=resume.secret, received=resume.received)
        return self._hello.model_copy(update={"resume": wanted}).to_frame()

    def _on_welcomed(self, welcome: Welcome, connection: Connection) -> None:
        self._streams = OwnStreams(connection)
        self._start_backgrounds(self._streams)
        self._session_began_at = _now()
        self._lease_s = welcome.lease_s
        log.info(
            "rejoined" if welcome.resumed else "joined",
            coordinator=self._peer,
            agent=self._agent_id,
            session=welcome.session,
            tasks=list(self._agent.tasks),
            software=welcome.software,
        )

    # --- the core ---

    def _apply(self, event: ev.Event) -> None:
        """Tells the core, and does what it says."""
        for instruction in self._core.handle(event, _now()):
            self._execute(instruction)
        self._set_drain_timer(self._core.state is State.DRAINING)

    def _execute(self, instruction: ev.Instruction) -> None:
        match instruction:
            case ev.StartAssignment() | ev.StartFeedback():
                assert self._runner is not None, "work comes over links, and `run` opens them"
                self._runner.start(instruction)
            case ev.CancelHandler(work):
                assert self._runner is not None, "what runs was started"
                self._runner.cancel(work)
            case ev.Reconnect(reason):
                self._reconnect_reason = reason
            case ev.Stop(kind, reason, refusal):
                self._ending = Ending(kind, reason, refusal)
                self._ended.set()
                if self._interruptible is not None:
                    self._interruptible.cancel()
                log.info("agent_ended", agent=self._agent_id, why=kind.value, reason=reason)
                if self._session is not None:
                    self._session.execute(ev.CloseLink())  # of no effect where it leaves
            case ev.Log(level, text, fields):
                getattr(log, level)(text, agent=self._agent_id, **fields)
            case _:
                assert self._session is not None, "the core has a link only while there is a session"
                self._session.execute(instruction)

    def _set_drain_timer(self, wanted: bool) -> None:
        if wanted and self._drain_timer is None:
            loop = asyncio.get_running_loop()
            self._drain_timer = loop.call_later(self._drain_timeout_s, self._apply, ev.DrainTimedOut())
        elif not wanted and self._drain_timer is not None:
            self._drain_timer.cancel()
            self._drain_timer = None


def _now() -> float:
    """Monotonic seconds: the loop's clock, which is `time.monotonic()` wherever time is not virtual."""
    return asyncio.get_running_loop().time()
