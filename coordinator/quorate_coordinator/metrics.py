"""What Prometheus sees. Computed at the scrape from the coordinator's state wherever that state exists.

Label values come from authenticated agents and operators only, and their number is bounded: agents by
what the registry remembers, tasks by what agents announce.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, get_args

from prometheus_client import CollectorRegistry, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from quorate_coordinator.agent_bodies import REFUSALS
from quorate_coordinator.fleet import Fleet
from quorate_coordinator.gather import Gatherer
from quorate_coordinator.learner.api import Learner
from quorate_coordinator.learner.looking import latencies_of, scores_of
from quorate_coordinator.operators import Operators
from quorate_coordinator.recording import Recording
from quorate_coordinator.rounds.instructions import StrayKind
from quorate_protocol import __version__
from quorate_protocol.blobs import BlobBudget
from quorate_protocol.errors import Code
from quorate_protocol.transport import ServerStats

#: Upper bounds of the round-duration histogram in seconds: from loopback's milliseconds to minutes.
_DURATION_BUCKETS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


#: How a hello may end: let in; refused, and why; not said, or not in our words; not said in time; its sender gone.
HANDSHAKE_RESULTS: Final = ("welcome", "unauthenticated", "draining", "full", "bad-hello", "timeout", "gone")

#: The codes that blame a peer for what it sent.
_PROTOCOL_ERRORS: Final = (
    Code.FRAME_MALFORMED.name,
    Code.FRAME_TOO_LARGE.name,
    Code.FRAME_TRUNCATED.name,
    Code.UNKNOWN_TYPE.name,
    Code.MESSAGE_INVALID.name,
    Code.UNEXPECTED_MESSAGE.name,
)


@dataclass(frozen=True, slots=True)
class Sources:
    """Where the numbers are."""

    started_at_unix_s: float
    fleet: Fleet
    gatherer: Gatherer
    #: None without a journal.
    recording: Recording | None
    operators: Operators
    server: ServerStats
    bodies: BlobBudget
    #: By reason, one of `REFUSALS`.
    bodies_refused_total: Mapping[str, int]
    #: By result, one of `HANDSHAKE_RESULTS`.
    handshakes_total: Mapping[str, int]
    #: By wire code.
    protocol_errors_total: Mapping[str, int]


class _StateCollector(Collector):
    def __init__(self, sources: Sources) -> None:
        self._sources = sources

    def collect(self) -> Iterator[Metric]:
        sources = self._sources
        yield _gauge("quorate_build_info", "Version of the software.", ["version"], {(__version__,): 1})
        yield _gauge("quorate_start_time_seconds", "Start, Unix time.", [], {(): sources.started_at_unix_s})
        yield from self._fleet(sources)
        yield from self._rounds(sources.gatherer)
        yield from self._learner(sources.gatherer.learner)
        yield _counter("quorate_calls", "Operators' calls.", ["call", "result"], sources.operators.calls_total)
        yield _counter(
            "quorate_calls_repeated",
            "Calls that were answered by a round asked for before under the same key.",
            [],
            {(): sources.gatherer.repeated_total},
        )
        yield from self._bodies(sources)
        yield from self._journal(sources)
        yield from self._transport(sources)

    def _fleet(self, sources: Sources) -> Iterator[Metric]:
        registry, learner = sources.fleet.registry, sources.gatherer.learner
        yield _gauge("quorate_agents", "Agents by state.", ["state"], _keyed(registry.counts()))
        fleet = sources.fleet
        yield _counter(
            "quorate_resumptions",
            "Sessions that went on over a new link; incomplete where so much was sent that some frames were not kept.",
            ["result"],
            {
                ("complete",): fleet.resumed_total - fleet.resumed_with_gap_total,
                ("incomplete",): fleet.resumed_with_gap_total,
            },
        )
        latencies = latencies_of(learner, (member.agent for member in registry.agents()))
        yield _gauge(
            "quorate_agent_reply_latency_seconds",
            "Quantiles of the time from asking an agent to its reply.",
            ["agent", "quantile"],
            {
                (agent, quantile): value
                for agent, latency in latencies.items()
                for quantile, value in (("0.5", latency.p50_s), ("0.99", latency.p99_s))
            },
        )

    def _rounds(self, gatherer: Gatherer) -> Iterator[Metric]:
        yield _gauge("quorate_rounds_open", "Rounds in flight.", [], {(): gatherer.book.in_flight})
        yield _counter("quorate_rounds", "Rounds closed.", ["task", "state"], gatherer.rounds_total)
        yield _counter(
            "quorate_replies", "Agents' parts in rounds, by how they ended.", ["task", "status"], gatherer.replies_total
        )
        yield _counter(
            "quorate_agent_replies",
            "One agent's parts in rounds, by how they ended.",
            ["agent", "status"],
            gatherer.agent_replies_total,
        )
        yield _counter(
            "quorate_stray_replies",
            "Replies that did not count.",
            ["kind"],
            _keyed(gatherer.book.stray_counts, get_args(StrayKind)),
        )
        yield _counter(
            "quorate_feedback", "Truths sent to agents as feedback.", ["task"], _keyed(gatherer.feedback_total)
        )

    def _learner(self, learner: Learner) -> Iterator[Metric]:
        scores = scores_of(learner)
        yield _gauge(
            "quorate_agent_weight",
            "The learner's weight of an agent.",
            ["agent", "task"],
            {(agent, score.task): one.weight for score in scores for agent, one in score.agents.items()},
        )
        yield _gauge(
            "quorate_agent_accuracy",
            "Share of an agent's replies that were right.",
            ["agent", "task"],
            {(agent, score.task): one.accuracy for score in scores for agent, one in score.agents.items()},
        )
        yield _gauge(
            "quorate_ensemble_accuracy",
            "Share of combined answers that were right.",
            ["task"],
            {(score.task,): score.accuracy for score in scores if score.accuracy is not None},
        )

    def _bodies(self, sources: Sources) -> Iterator[Metric]:
        held = sources.bodies
        yield _gauge(
            "quorate_bodies_held_bytes",
            "Bytes of large bodies that are held or on their way in.",
            ["place"],
            {("memory",): held.memory_bytes, ("disk",): held.disk_bytes},
        )
        yield _counter(
            "quorate_bodies_refused",
            "Large bodies that were not taken.",
            ["reason"],
            _keyed(sources.bodies_refused_total, REFUSALS),
        )

    def _journal(self, sources: Sources) -> Iterator[Metric]:
        gatherer, recording = sources.gatherer, sources.recording
        failing = float(bool(gatherer.recording_problem))
        yield _gauge("quorate_journal_failing", "1 while nothing can be recorded.", [], {(): failing})
        durable = commits = pending_bytes = file_bytes = damaged = 0
        if recording is not None:
            durable, commits = gatherer.records_total, gatherer.commits_total
            pending_bytes = recording.journal.pending_bytes
            file_bytes, damaged = recording.file_bytes, recording.damaged_total
        yield _counter("quorate_journal_records", "Records that became durable.", [], {(): durable})
        yield _counter("quorate_journal_commits", "Commits that made records durable.", [], {(): commits})
        yield _counter("quorate_journal_damaged", "Times that something read was not as written.", [], {(): damaged})
        yield _gauge("quorate_journal_pending_bytes", "Bytes that wait for the disk.", [], {(): pending_bytes})
        yield _gauge("quorate_journal_file_bytes", "Size of the journal and its log.", [], {(): file_bytes})

    def _transport(self, sources: Sources) -> Iterator[Metric]:
        server = sources.server
        yield _gauge("quorate_connections", "QUIC connections now.", [], {(): server.connections})
        yield _counter(
            "quorate_handshakes",
            "Hellos, by how they ended.",
            ["result"],
            _keyed(sources.handshakes_total, HANDSHAKE_RESULTS),
        )
        yield _counter(
            "quorate_protocol_errors",
            "Streams and connections ended for breaking the format.",
            ["code"],
            _keyed(sources.protocol_errors_total, _PROTOCOL_ERRORS),
        )
        yield _counter(
            "quorate_udp_datagrams",
            "UDP datagrams.",
            ["direction"],
            {("in",): server.udp_datagrams_received, ("out",): server.udp_datagrams_sent},
        )
        yield _counter(
            "quorate_udp_bytes",
            "UDP payload bytes.",
            ["direction"],
            {("in",): server.bytes_received, ("out",): server.bytes_sent},
        )
        yield _counter(
            "quorate_udp_trouble",
            "What came to nothing or had to wait: datagrams of strangers (unknown), handshakes that were turned away "
            "(refused), datagrams that the kernel did not take (dropped), times that its buffer was full (blocked).",
            ["kind"],
            {
                ("unknown",): server.udp_datagrams_unknown,
                ("refused",): server.handshakes_refused,
                ("dropped",): server.udp_datagrams_dropped,
                ("blocked",): server.udp_send_blocked,
            },
        )


#: Label values to value, one for each label. (`Mapping` is invariant in its key: Any stands for tuples of any length.)
_Samples = Mapping[Any, float]


class Metrics:
    """The registry of one coordinator."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._durations = Histogram(
            "quorate_round_duration_seconds",
            "Time from opening to closing a round.",
            ["task"],
            buckets=_DURATION_BUCKETS_S,
            registry=self.registry,
        )

    def observe_duration(self, task: str, duration_s: float) -> None:
        """A round of this task took so long."""
        self._durations.labels(task).observe(duration_s)

    def attach(self, sources: Sources) -> None:
        """Reads the rest from here at every scrape."""
        self.registry.register(_StateCollector(sources))


def _gauge(name: str, text: str, labels: list[str], samples: _Samples) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=labels)
    for values, value in samples.items():
        family.add_metric(values, value)
    return family


def _counter(name: str, text: str, labels: list[str], samples: _Samples) -> CounterMetricFamily:
    family = CounterMetricFamily(name, text, labels=labels)
    for values, value in samples.items():
        family.add_metric(values, value)
    return family


def _keyed(samples: Mapping[Any, float], known: Iterable[str] = ()) -> dict[tuple[str, ...], float]:
    """The same with one-label keys. Known keys are there from the start: a rate needs a zero to begin from."""
    keyed: dict[tuple[str, ...], float] = {(key,): 0.0 for key in known}
    for key, value in samples.items():
        keyed[str(key),] = value
    return keyed
