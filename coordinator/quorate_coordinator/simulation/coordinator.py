"""The coordinator: its process, from start to crash or drain, and the supervisor that starts it again."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from quorate_agent.core import AgentCore
from quorate_coordinator.idempotency import Keys
from quorate_coordinator.journal.records import RoundClosed, TruthTold
from quorate_coordinator.learner.vote import VoteLearner
from quorate_coordinator.ledger import Ledger
from quorate_coordinator.registry import Registry
from quorate_coordinator.rounds.book import RoundBook
from quorate_coordinator.simulation.agents import CLOCK_S, AgentProcess, MakeAgentCore
from quorate_coordinator.simulation.auditor import Auditor
from quorate_coordinator.simulation.disk import MakeLearner, SimDisk
from quorate_coordinator.simulation.draws import Draws
from quorate_coordinator.simulation.members import LEASE_S, MakeRegistry, Members
from quorate_coordinator.simulation.network import Link, Sent, StreamName
from quorate_coordinator.simulation.process import Process
from quorate_coordinator.simulation.rounds import MakeBook, MakeKeys, MakeLedger, Rounds
from quorate_coordinator.simulation.world import World
from quorate_protocol.messages import Hello

#: Seconds that rounds in flight have when the coordinator drains, and that its goodbye has.
_DRAIN_S: Final = 15.0
_GOODBYE_S: Final = 1.0

#: Seconds for which a crash that is meant for a commit waits for one.
_COMMIT_PATIENCE_S: Final = 10.0

#: Seconds between two looks for what is too old.
_PRUNE_EVERY_S: Final = 20.0


#: Ceilings of the learner, low enough that it forgets all the time: what it forgets depends on the order of last use,
#: which has to survive a restart as well.
LEARNER_CEILINGS: Final = {"agents_max": 16, "pairs_max": 40}


def make_learner(snapshot: bytes | None) -> VoteLearner:
    """The learner that ships."""
    if snapshot is None:
        return VoteLearner(**LEARNER_CEILINGS)
    return VoteLearner.restore(snapshot, **LEARNER_CEILINGS)


@dataclass(frozen=True, slots=True)
class Cores:
    """What is simulated; a test puts a broken one in."""

    book: MakeBook = RoundBook
    registry: MakeRegistry = Registry
    agent: MakeAgentCore = AgentCore
    learner: MakeLearner = make_learner
    ledger: MakeLedger = Ledger
    keys: MakeKeys = Keys


class CoordinatorProcess:
    """From its start to its end."""

    def __init__(self, host: "CoordinatorHost", number: int) -> None:
        cores = host.cores
        self.host = host
        self.process: Final = Process(host.world, clock_s=host.draw_clock())
        self.rounds: Final = Rounds(
            self.process,
            host.disk,
            host.auditor,
            make_book=cores.book,
            make_learner=cores.learner,
            make_ledger=cores.ledger,
            make_keys=cores.keys,
        )
        self.members: Final = Members(
            self.process,
            cores.registry(lease_s=LEASE_S),
            host.auditor,
            name=f"s{number}",
            on_reply=self.rounds.reply_received,
            on_reachable=self.rounds.agent_reachable,
            on_lost=self.rounds.agent_lost,
        )
        self.rounds.fleet = self.members
        self.rounds.recover()
        self.is_draining = False
        self.process.after(_PRUNE_EVERY_S, self._prune)

    def _prune(self) -> None:
        self.rounds.prune()
        self.process.after(_PRUNE_EVERY_S, self._prune)

    def receive(self, link: Link, stream: StreamName, message: Sent) -> None:
        """What an agent says."""
        if isinstance(message, Hello) and self.is_draining and not self.members.can_resume(message):
            self.members.refuse(link, "draining")
        else:
            self.members.receive(link, stream, message)

    def link_closed(self, link: Link, reason: str, is_final: bool) -> None:
        """The agent closed the link."""
        self.members.link_closed(link, reason, is_final)

    def drain(self) -> None:
        """SIGTERM."""
        if not self.is_draining:
            self.is_draining = True
            self.host.world.note("coordinator drains")
            self.process.after(_DRAIN_S, self._drained, "the time is over")
            self.rounds.drain(lambda: self._drained("nothing is in flight"))

    def _drained(self, why: str) -> None:
        if self.is_draining and self.host.current is self:
            self.host.world.note(f"coordinator has drained: {why}")
            self.rounds.stop("the coordinator was stopped")
            self.members.goodbye("the coordinator stops")
            self.process.after(_GOODBYE_S, self.host.ended, self)


class CoordinatorHost:
    """Its machine, with the disk."""

    def __init__(self, world: World, disk: SimDisk, auditor: Auditor, cores: Cores) -> None:
        self.world: Final = world
        self.disk: Final = disk
        self.auditor: Final = auditor
        self.cores: Final = cores
        self.current: CoordinatorProcess | None = None
        self._random = world.stream("coordinator")
        self._clocks = world.stream("clock coordinator")
        self._starts = 0
        self._strays: Counter[str] = Counter()
        self._downs = 0
        #: A learner that has lived through the durable records, and nothing else: what each process's must equal.
        self._shadow = Ledger(make_learner(None))
        self._shadow_count = 0
        self._shadow_closed: dict[int, RoundClosed] = {}
        disk.on_checkpoint = self._check_checkpoint
        disk.on_loss = lambda problem: auditor.fail("the journal is what was recorded", problem)
        #: Operators that wait for it to be there, or mind that it is gone.
        self.on_died: list[Callable[[], None]] = []

    def start(self) -> None:
        """Starts a process, which replays the disk."""
        if self.current is not None or self._downs:
            return
        self._starts += 1
        self.current = CoordinatorProcess(self, self._starts)
        self.auditor.coordinator_started(self.current.process)
        self.world.note(f"coordinator starts, {self.disk.durable} records durable")
        rounds = self.current.rounds
        self.auditor.restarted(rounds.ledger.learner.snapshot(), self.replay(), rounds.find_round)

    def replay(self) -> bytes:
        """The snapshot of a learner that has lived through the durable records."""
        return self._replay_to(self.disk.durable)

    def _check_checkpoint(self, covered: int, snapshot: bytes) -> None:
        """A checkpoint has become durable."""
        if self._shadow_count <= covered:
            self.auditor.check_learner(snapshot, self._replay_to(covered))

    def _replay_to(self, last: int) -> bytes:
        for record in self.disk.records[self._shadow_count : last]:
            if isinstance(record, RoundClosed):
                self._shadow_closed[record.round] = record
            if isinstance(record, TruthTold):
                self._shadow.replay_truth(self._shadow_closed[record.round], record)
            else:
                self._shadow.replay(record)
        self._shadow_count = max(self._shadow_count, last)
        return self._shadow.learner.snapshot()

    def check_learner(self) -> None:
        """Where nothing waits for the disk, the learner is a replay."""
        if self.current is not None and self.disk.durable == len(self.disk.records):
            self.auditor.check_learner(self.current.rounds.ledger.learner.snapshot(), self.replay())

    def crash(self, down_s: float, *, in_commit: bool) -> None:
        """kill -9, or the power; with `in_commit` the next time that something is being written, or soon without."""
        if not in_commit:
            self._crash(down_s)
        elif self.disk.in_commit is None:
            self.disk.in_commit = lambda: self._crash(down_s)
            self.world.after(_COMMIT_PATIENCE_S, self._crash_without, self.disk.in_commit)

    def _crash_without(self, crash: Callable[[], None]) -> None:
        if self.disk.in_commit is crash:
            self.disk.in_commit = None
            crash()

    def _crash(self, down_s: float) -> None:
        if self.current is not None:
            self.check_learner()
            self._gone(self.current)
        self._restart(down_s)

    def ended(self, process: CoordinatorProcess) -> None:
        """A process has ended in order."""
        if self.current is process:
            for link in list(process.members.links.values()):
                link.close_down("the coordinator stops")
            self._gone(process)
            self._restart(self._random.uniform(0.5, 5.0))

    @property
    def strays(self) -> Counter[str]:
        """Replies that did not count, in all processes so far, by kind."""
        return self._strays + (Counter() if self.current is None else self.current.rounds.strays)

    def _gone(self, process: CoordinatorProcess) -> None:
        self._strays += process.rounds.strays
        self.current = None
        process.process.die()
        process.members.abandon()
        self.disk.crash()
        self.world.note(f"coordinator is gone, {self.disk.durable} records durable")
        self.auditor.coordinator_died()
        for tell in list(self.on_died):
            tell()

    def _restart(self, down_s: float) -> None:
        self._downs += 1
        self.world.after(down_s, self._up)

    def _up(self) -> None:
        self._downs -= 1
        self.start()

    def draw_clock(self) -> float:
        """What the monotonic clock of a process that starts shows. The machine was switched on anew, as like as not."""
        return self._clocks.uniform(*CLOCK_S)

    def suspend(self, duration_s: float, *, with_clock: bool) -> None:
        """SIGSTOP, and SIGCONT after a while; or the whole machine sleeps, `with_clock`."""
        current = self.current
        if current is not None and current.process.is_running:
            for link in current.members.all_links():
                link.freeze()
            current.process.suspend()
            self.auditor.suspended()
            for link in current.members.all_links():
                link.update()
            self.world.note(f"coordinator is suspended for {duration_s:.1f} s")
            self.world.after(duration_s, self._resume, current, duration_s if with_clock else 0.0)

    def _resume(self, process: CoordinatorProcess, pause_s: float) -> None:
        if process is not self.current:
            return
        self.world.note("coordinator goes on")
        if pause_s:
            process.process.set_back(pause_s)
        self.auditor.resumed()
        process.process.resume(timers_first=self._random.random() < 0.5)
        for link in process.members.all_links():
            link.freeze()
            link.update()

    # --- being connected to ---

    def connect(self, agent: AgentProcess, timeout_s: float, answer: Callable[[Link | None, str], None]) -> None:
        """A handshake. Calls `answer` in the agent's process."""
        path, target = agent.host.path, self.current
        if target is None:
            self.world.after(path.latency_s, agent.process.call, answer, None, "nobody listens")
            return
        draw = Draws(path.random.getrandbits(64))
        delay_s = path.draw_delay_s(draw) + path.draw_delay_s(draw)
        if path.cuts_up or path.cuts_down or target.process.is_suspended or delay_s > timeout_s:
            self.world.after(timeout_s, agent.process.call, answer, None, "handshake timed out")
            return
        self.world.after(delay_s, self._shake_hands, agent, target, timeout_s, answer)

    def _shake_hands(
        self,
        agent: AgentProcess,
        target: CoordinatorProcess,
        timeout_s: float,
        answer: Callable[[Link | None, str], None],
    ) -> None:
        if target is not self.current or target.process.is_suspended:
            self.world.after(timeout_s, agent.process.call, answer, None, "handshake timed out")
        elif agent.process.is_alive:
            link = Link(agent.host.path, agent, target)
            link.update()
            target.members.accepted(link)
            agent.process.call(answer, link, "")
