"""The coordinator: what listens, who is let in, and how it ends."""

import asyncio
import datetime
import hmac
import time
from collections import Counter
from collections.abc import Coroutine
from typing import Any, Final, Self, TypedDict

import structlog

from quorate_coordinator.blob_shelf import BlobShelf
from quorate_coordinator.certificates import (
    DevelopmentCredentials,
    ensure_certificate,
    ensure_reset_key,
)
from quorate_coordinator.fleet import Fleet
from quorate_coordinator.from_settings import find_credentials, round_policy
from quorate_coordinator.gather import Gatherer
from quorate_coordinator.http import HttpServer
from quorate_coordinator.journal.database import Lock
from quorate_coordinator.learner.api import Learner
from quorate_coordinator.learner.fixed_share import LEARNING_RATE, SHARE
from quorate_coordinator.learner.looking import latencies_of, scores_of
from quorate_coordinator.learner.vote import VoteLearner
from quorate_coordinator.ledger import Ledger
from quorate_coordinator.metrics import Metrics, Sources
from quorate_coordinator.modalities import Modalities, load_consumers
from quorate_coordinator.operators import Operators
from quorate_coordinator.recording import Recording, lock_state_dir
from quorate_coordinator.recovery import Recovered
from quorate_coordinator.round_numbers import RoundNumbers
from quorate_coordinator.rounds.book import BookLimits
from quorate_coordinator.serving import refuse_streams
from quorate_coordinator.settings import Settings
from quorate_protocol import __version__
from quorate_protocol.blobs import BlobBudget, BlobStore
from quorate_protocol.channel import Channel
from quorate_protocol.client import Client
from quorate_protocol.errors import (
    CallFailed,
    Code,
    ConfigurationError,
    ConnectionClosed,
    LinkError,
    ProtocolError,
    QuorateError,
    Refused,
    ServerClosed,
    UnexpectedMessage,
)
from quorate_protocol.limits import FRAME_BYTES_MAX, HELLO_BYTES_MAX
from quorate_protocol.logs import configure_embedded
from quorate_protocol.messages import AgentInfo, Hello, Message, Modality, Refusal, Telemetry
from quorate_protocol.messages import Fleet as FleetListing
from quorate_protocol.transport import ClientTls, Connection, ReceiveStream, Server, listen
from quorate_protocol.transport.address import MEMORY_PREFIX, join_host_port

log = structlog.get_logger()

#: The directory for large bodies, in the state directory.
_SPOOL_NAME: Final = "spool"

#: One part of so many of the spool, and of the memory for bodies, may hold answers for who asks again under a key.
_KEPT_SHARE: Final = 4

#: How often the development certificate is looked at, in seconds.
_CERTIFICATE_CHECK_S: Final = 3600.0

#: How long a refused client may take to read why, in seconds.
_REFUSAL_TIMEOUT_S: Final = 2.0

#: Streams that a stranger may open beside its first before the connection is closed.
_STRANGER_STREAMS_MAX: Final = 16


class Credentials(TypedDict):
    """What agents and operators join with."""

    token: str
    tls: ClientTls | None


class Coordinator:
    """A coordinator in this process and loop.

    Without a network, for agents and operators of the same process::

        async with Coordinator(Settings(listen="memory:mine", http="")) as coordinator:
            joined = asyncio.create_task(agent.run(coordinator.url, **coordinator.credentials))
            async with await coordinator.client() as client:
                outcome = await client.ask("classify", {"x": 1.5})

    Args:
        settings: checked settings.
        learner: None makes the one that the settings name.
    """

    def __init__(self, settings: Settings, *, learner: Learner | None = None) -> None:
        self.settings: Final = settings
        self.metrics: Final = Metrics()
        self.started_at_unix_s = time.time()
        self._started_at_s = time.monotonic()
        #: Who takes what agents send on streams of their own; `register` more before `start`, or any time.
        self.modalities: Final = Modalities(lambda experience: self._gatherer.experience(experience))
        self._given_learner = learner
        self._recording: Recording | None = None
        self._lock: Lock | None = None
        self._server: Server | None = None
        self._http = HttpServer(self.metrics.registry, lambda: self.is_ready)
        self._token = ""
        #: None trusts the system's authorities.
        self._client_tls: ClientTls | None = None
        self._is_draining = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._fleet: Fleet
        self._gatherer: Gatherer
        self._operators: Operators
        self._bodies_refused_total: Counter[str] = Counter()
        self._handshakes_total: Counter[str] = Counter()
        self._protocol_errors_total: Counter[str] = Counter()

    # --- life ---

    async def start(self) -> None:
        """Listens; returns when agents and operators may come.

        Raises:
            ConfigurationError: an address is taken, a file cannot be read.
        """
        settings = self.settings
        configure_embedded(settings.log.level, settings.log.format)
        for topic, consumer in load_consumers(settings.consumers).items():
            self.modalities.register(topic, consumer)
        tls, self._token, development = find_credentials(settings)
        if development is not None:
            self._client_tls = ClientTls(development.ca_file)
        # Reading a long journal takes a while: the loop has nothing else to do yet. It is first, because its lock
        # keeps a second coordinator out of the state directory.
        self._lock = lock_state_dir(settings)
        opened = Recording.open(settings, self._make_learner, self._restore_learner)
        recording, recovered = (None, None) if opened is None else opened
        self._recording = recording
        try:
            store = _open_store(settings)
            self._fleet = self._make_fleet(store)
            self._gatherer = self._make_gatherer(recording, recovered)
            self._operators = self._make_operators(store)
            if recording is not None:
                recording.journal.start(
                    asyncio.get_running_loop(),
                    self._gatherer.committed,
                    self._gatherer.recording_failed,
                    self._gatherer.recording_recovered,
                )
            self._server = await listen(settings.listen, tls=tls, reset_key=ensure_reset_key(settings.state_dir))
            if settings.http_address is not None:
                await self._http.start(*settings.http_address)
        except BaseException:
            if self._server is not None:
                server, self._server = self._server, None
                await server.close()
            await self._close_recording()
            raise
        self.metrics.attach(
            Sources(
                started_at_unix_s=self.started_at_unix_s,
                fleet=self._fleet,
                gatherer=self._gatherer,
                recording=recording,
                operators=self._operators,
                server=self._server.stats,
                bodies=store.budget,
                bodies_refused_total=self._bodies_refused_total,
                handshakes_total=self._handshakes_total,
                protocol_errors_total=self._protocol_errors_total,
            )
        )
        self._spawn(self._accept(self._server), "accept")
        if recording is not None:
            self._spawn(recording.prune_for_ever(settings, self._gatherer.book.awaiting), "prune")
        if development is not None:
            self._spawn(self._renew_certificate(self._server, development), "certificate")
        log.info(
            "coordinator_started",
            listen=join_host_port(*self.address),
            http=None if self._http.address is None else join_host_port(*self._http.address),
            state_dir=str(settings.state_dir),
            version=__version__,
        )

    def _make_fleet(self, store: BlobStore) -> Fleet:
        sessions = self.settings.sessions
        return Fleet(
            lease_s=sessions.lease_s,
            pulse_s=sessions.pulse_s,
            open_timeout_s=sessions.hello_timeout_s,
            on_reply=lambda agent, reply: self._gatherer.reply_received(agent, reply),
            on_reachable=lambda agent: self._gatherer.agent_reachable(agent),
            on_lost=lambda agent, reason: self._gatherer.agent_lost(agent, reason),
            serve_stream=self._serve_stream,
            awaits_s=lambda agent, round_id, attempt: self._gatherer.awaits_s(agent, round_id, attempt),
            store=store,
            bodies_refused_total=self._bodies_refused_total,
            handshakes_total=self._handshakes_total,
            protocol_errors_total=self._protocol_errors_total,
        )

    def _make_gatherer(self, recording: Recording | None, recovered: Recovered | None) -> Gatherer:
        settings = self.settings
        numbers = RoundNumbers(settings.state_dir / "next-round")
        gatherer = Gatherer(
            self._fleet,
            Ledger(self._make_learner()) if recovered is None else recovered.ledger,
            recording,
            shelf=BlobShelf(
                kept_bytes_max=settings.bodies.spool_bytes_max // _KEPT_SHARE,
                kept_memory_bytes_max=settings.bodies.memory_bytes_max // _KEPT_SHARE,
            ),
            policy=round_policy(settings),
            limits=BookLimits(
                in_flight_max=settings.rounds.in_flight_max,
                in_flight_per_agent_max=settings.rounds.in_flight_per_agent_max,
                in_flight_per_operator_max=settings.rounds.in_flight_per_operator_max,
                remembered_max=settings.rounds.remembered_max,
            ),
            numbers=numbers,
            first_round=numbers.first if recovered is None else max(numbers.first, recovered.next_round),
            first_seq=1 if recording is None else recording.first_seq,
            observe_duration=self.metrics.observe_duration,
        )
        if recovered is not None:
            gatherer.recall(recovered.awaiting)
        return gatherer

    def _make_operators(self, store: BlobStore) -> Operators:
        sessions = self.settings.sessions
        return Operators(
            self._gatherer,
            self.list_fleet,
            self._drain_agent,
            store=store,
            bodies_refused_total=self._bodies_refused_total,
            pulse_s=sessions.pulse_s,
            lease_s=sessions.lease_s,
            handshakes_total=self._handshakes_total,
            protocol_errors_total=self._protocol_errors_total,
        )

    async def drain(self, timeout_s: float | None = None) -> bool:
        """Takes no new agents or rounds; returns when the rounds in flight are over and told.

        Args:
            timeout_s: None is the setting `sessions.drain_s`.

        Returns:
            False when the time was not enough: what was left closed as interrupted.
        """
        timeout_s = self.settings.sessions.drain_s if timeout_s is None else timeout_s
        self._is_draining = True
        log.info("draining", rounds_open=self._gatherer.book.in_flight)
        in_time = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._gatherer.drain()
        except TimeoutError:
            in_time = False
            log.warning("drain_timed_out", rounds_open=self._gatherer.book.in_flight)
            self._gatherer.stop("the coordinator was stopped")
        await self._flush_recording()
        await self._operators.finish(1.0)
        return in_time

    async def close(self) -> None:
        """Ends at once: rounds in flight close as interrupted, agents are told goodbye."""
        if self._server is None:
            return
        self._is_draining = True
        try:
            self._gatherer.stop("the coordinator was stopped")
            # Outcomes are told once they are durable.
            await self._flush_recording()
            await self._operators.finish(1.0)
            await self._fleet.close("the coordinator stops")
            await self._close_server()
            for task in list(self._tasks):
                task.cancel()
            if self._tasks:
                await asyncio.wait(self._tasks)
            await self._http.close()
            self._gatherer.close()
            self._gatherer.checkpoint()
        finally:
            # Also where this is cancelled: whoever starts another needs the port and the journal.
            await self._close_server()
            await self._close_recording()
        log.info("coordinator_stopped")

    async def _close_server(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            await server.close(Code.SHUTDOWN, "the coordinator stops")

    async def _flush_recording(self) -> None:
        if self._recording is not None and not self._gatherer.recording_problem:
            await self._recording.flush()

    async def _close_recording(self) -> None:
        recording, self._recording = self._recording, None
        if recording is not None:
            await recording.close()
        if self._lock is not None:
            self._lock.release()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    # --- what it is ---

    @property
    def address(self) -> tuple[str, int]:
        """UDP host and port that are really bound."""
        assert self._server is not None, "not started"
        return self._server.address

    @property
    def url(self) -> str:
        """Where agents and operators on this machine reach it."""
        host, port = self.address
        return f"memory:{host}" if self.settings.listen.startswith(MEMORY_PREFIX) else f"quic://localhost:{port}"

    @property
    def credentials(self) -> Credentials:
        """The keyword arguments `token` and `tls` of those who join from this process. A secret."""
        return {"token": self._token, "tls": self._client_tls}

    async def client(self, *, name: str | None = None) -> Client:
        """An operator's client in this process; close it before the coordinator.

        Raises: as `Client.connect`.
        """
        return await Client.connect(self.url, name=name, **self.credentials)

    @property
    def http_address(self) -> tuple[str, int] | None:
        """TCP host and port of the HTTP endpoints; None when they are off."""
        return self._http.address

    @property
    def is_ready(self) -> bool:
        """Whether rounds are taken."""
        return self._server is not None and not self._is_draining and not self._gatherer.recording_problem

    @property
    def is_recording(self) -> bool:
        """Whether records wait for the disk."""
        return self._recording is not None and self._recording.journal.pending_records > 0

    async def _serve_stream(self, agent: str, header: Message, stream: ReceiveStream) -> None:
        if not isinstance(header, Modality | Telemetry):
            raise UnexpectedMessage(header.wire_type, "on a unidirectional stream")
        await self.modalities.serve(agent, header, stream)

    def _drain_agent(self, agent: str, reason: str) -> None:
        if not self._fleet.drain(agent, reason):
            gone = next((member for member in self._fleet.registry.agents() if member.agent == agent), None)
            if gone is not None:
                raise CallFailed("unknown-agent", f"agent {agent!r} is gone: {gone.state}")
            raise CallFailed("unknown-agent", f"there is no agent {agent!r} in the fleet")

    def list_fleet(self) -> FleetListing:
        """Everybody who is known, for `agents` calls."""
        now = asyncio.get_running_loop().time()
        weights: dict[str, dict[str, float]] = {}
        for score in scores_of(self._gatherer.learner):
            for agent, agent_score in score.agents.items():
                weights.setdefault(agent, {})[score.task] = agent_score.weight
        assignments: Counter[str] = Counter()
        replies: Counter[str] = Counter()
        for (agent, status), count in self._gatherer.agent_replies_total.items():
            assignments[agent] += count
            if status == "replied":
                replies[agent] += count
        infos = []
        members = self._fleet.registry.agents()
        latencies = latencies_of(self._gatherer.learner, (member.agent for member in members))
        for member in members:
            latency = latencies.get(member.agent)
            is_live = member.state in ("connected", "suspect", "draining")
            infos.append(
                AgentInfo(
                    agent=member.agent,
                    state=member.state,
                    # Of those who are gone a thousand are remembered, and their labels are nobody's business.
                    labels=dict(member.labels) if is_live else {},
                    tasks=list(member.tasks) if is_live else [],
                    address=member.address,
                    software=member.software,
                    connected_s=now - member.joined_at if is_live else 0.0,
                    last_seen_s=max(0.0, now - self._fleet.last_seen_at(member)),
                    assignments=assignments[member.agent],
                    replies=replies[member.agent],
                    latency_p50_s=None if latency is None else latency.p50_s,
                    latency_p99_s=None if latency is None else latency.p99_s,
                    weights=weights.get(member.agent, {}),
                )
            )
        closed: Counter[str] = Counter()
        for (_, state), count in self._gatherer.rounds_total.items():
            closed[state] += count
        return FleetListing(
            software=f"quorate/{__version__}",
            uptime_s=time.monotonic() - self._started_at_s,
            draining=self._is_draining,
            rounds_open=self._gatherer.book.in_flight,
            rounds_closed=dict(closed),
            agents=infos,
        )

    # --- the learner ---

    def _make_learner(self) -> Learner:
        wanted = self.settings.learner
        return self._given_learner or VoteLearner(
            learning_rate=LEARNING_RATE if wanted.learning_rate is None else wanted.learning_rate,
            share=SHARE if wanted.share is None else wanted.share,
        )

    def _restore_learner(self, snapshot: bytes) -> Learner:
        if self._given_learner is not None:
            return type(self._given_learner).restore(snapshot)
        wanted = self.settings.learner
        return VoteLearner.restore(snapshot, learning_rate=wanted.learning_rate, share=wanted.share)

    # --- connections ---

    async def _accept(self, server: Server) -> None:
        while True:
            try:
                connection = await server.accept()
            except ServerClosed:
                return
            self._spawn(self._serve(connection), f"connection {connection.peer}")

    async def _serve(self, connection: Connection) -> None:
        """One connection, from its hello to its end. Whatever a peer does, it ends here."""
        code, reason = Code.NO_ERROR, ""
        try:
            channel, hello = await self._greet(connection)
            try:
                self._admit(connection, hello)
                channel.allow(FRAME_BYTES_MAX)
                if hello.role == "agent":
                    await self._fleet.serve(connection, channel, hello)
                else:
                    await self._operators.serve(connection, channel, hello)
            except Refused as refusal:
                self._handshakes_total[refusal.reason] += 1
                code, reason = Code.REFUSED, refusal.reason
                await _refuse(connection, channel, refusal)
        except ProtocolError as error:
            self._protocol_errors_total[error.code.name] += 1
            log.warning("protocol_error", address=connection.peer, problem=str(error))
            code, reason = error.code, error.code.name
        except QuorateError as error:
            log.debug("connection_ended", address=connection.peer, reason=str(error))
        except Exception:
            log.exception("connection_failed", address=connection.peer)
            code = Code.INTERNAL
        finally:
            connection.abort(code, reason)

    async def _greet(self, connection: Connection) -> tuple[Channel, Hello]:
        """Who is there.

        Raises:
            LinkError: it went, does not say, or opened too many streams instead.
            ProtocolError: it does not speak our protocol.
        """
        timeout_s = self.settings.sessions.hello_timeout_s
        guards = [asyncio.create_task(_turn_away(connection, uni=True))]
        try:
            async with asyncio.timeout(timeout_s):
                channel = Channel(await connection.accept_bi_stream(), frame_bytes_max=HELLO_BYTES_MAX)
                guards.append(asyncio.create_task(_turn_away(connection, uni=False)))
                hello = await channel.expect(Hello)
                # What came in the same datagrams as the hello was opened before its welcome, too.
                await asyncio.sleep(0)
        except TimeoutError:
            self._handshakes_total["timeout"] += 1
            connection.abort(Code.REFUSED, f"no hello within {timeout_s:g} s")
            raise ConnectionClosed(Code.REFUSED, "no hello in time") from None
        except LinkError:
            closed = connection.close_error
            is_ours = isinstance(closed, ConnectionClosed) and not closed.by_peer and closed.code == Code.REFUSED
            self._handshakes_total["bad-hello" if is_ours else "gone"] += 1
            raise
        except QuorateError:
            self._handshakes_total["bad-hello"] += 1
            raise
        finally:
            for guard in guards:
                guard.cancel()
        assert isinstance(hello, Hello)
        return channel, hello

    def _admit(self, connection: Connection, hello: Hello) -> None:
        """Whether a stranger becomes one of us.

        Raises:
            Refused: it does not.
        """
        if not hmac.compare_digest(hello.token.encode(), self._token.encode()):
            log.warning("unauthenticated", role=hello.role, id=hello.id, address=connection.peer)
            raise Refused("unauthenticated", "the token is not this coordinator's")
        # Rounds in flight wait for the replies of who comes back, and operators for what becomes of them.
        if self._is_draining and hello.role == "agent" and not self._fleet.can_resume(hello):
            raise Refused("draining", "the coordinator is draining", retry=True)

    async def _renew_certificate(self, server: Server, files: DevelopmentCredentials) -> None:
        shown = files.certificate_file.read_bytes()
        while True:
            await asyncio.sleep(_CERTIFICATE_CHECK_S)
            try:
                ensure_certificate(files, names=self.settings.tls.names, now=datetime.datetime.now(datetime.UTC))
                # Another coordinator of this directory may have been the one to renew it.
                certificate = files.certificate_file.read_bytes()
                if certificate != shown:
                    server.reload_tls(files.tls)
                    shown = certificate
                    log.info("certificate_renewed", file=str(files.certificate_file))
            except (OSError, ConfigurationError) as error:
                log.error("certificate_not_renewed", problem=str(error))

    def _spawn(self, coroutine: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("task_failed", task=task.get_name(), exc_info=error)


async def _turn_away(connection: Connection, *, uni: bool) -> None:
    """Refuses what a stranger opens beside its first stream."""
    accept = connection.accept_uni_stream if uni else connection.accept_bi_stream
    try:
        await refuse_streams(accept, Code.REFUSED, count_max=_STRANGER_STREAMS_MAX)
    except LinkError:
        return
    connection.abort(Code.REFUSED, "too many streams before hello")


async def _refuse(connection: Connection, channel: Channel, refusal: Refused) -> None:
    try:
        async with asyncio.timeout(_REFUSAL_TIMEOUT_S):
            await channel.send(Refusal(reason=refusal.reason, message=refusal.message, retry=refusal.retry))
            await channel.finish()
            # Closing at once could overtake the refusal; the client closes when it has read it.
            await connection.wait_closed()
    except (TimeoutError, QuorateError):
        return


def _open_store(settings: Settings) -> BlobStore:
    """Where large bodies go: a directory of this user's alone, empty.

    Raises:
        ConfigurationError: it cannot be made so.
    """
    spool_dir = settings.state_dir / _SPOOL_NAME
    try:
        spool_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        spool_dir.chmod(0o700)
        for path in spool_dir.iterdir():
            # Of a process that died where files cannot be made without a name.
            path.unlink()
    except OSError as error:
        raise ConfigurationError("state_dir", f"{spool_dir} cannot be made empty: {error.strerror}") from error
    bodies = settings.bodies
    budget = BlobBudget(memory_bytes_max=bodies.memory_bytes_max, disk_bytes_max=bodies.spool_bytes_max)
    return BlobStore(spool_dir, budget, size_bytes_max=min(bodies.bytes_max, bodies.spool_bytes_max))
