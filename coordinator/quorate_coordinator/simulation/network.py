"""Links between agents and the coordinator: ordered streams of messages, and pulses that cost nothing.

Loss shows as delay, because streams are reliable; what a cut path holds back arrives when it is mended, or dies with
its link. Pulses are not sent: when somebody asks when the other side was last heard, that is computed from since when
the path has been open and what was lost on it. So an idle agent has no events of its own.
"""

import random
from typing import Final, Literal, Protocol

from quorate_coordinator.simulation.draws import Draws, mix
from quorate_coordinator.simulation.process import Process
from quorate_coordinator.simulation.world import World
from quorate_protocol.messages import Assignment, Cancellation, Feedback, Message, Reply

StreamName = Literal["control", "coordination"]

#: Seconds until a lost packet is sent again, at first; doubled each time, up to the second.
_RETRANSMIT_S: Final = 0.2
_RETRANSMIT_MAX_S: Final = 3.2

#: Seconds within which everything that was held back by a cut arrives after it.
_MENDED_S: Final = 2.0

#: Seconds in which a doubled message comes again: soon, mostly; or when its round has been forgotten.
_DOUBLED_S: Final = 5.0
_DOUBLED_LATE_S: Final = 900.0
_DOUBLED_LATE_SHARE: Final = 0.2

#: Pulses that are looked at for one that was not lost: with half of them lost, one run in a million has more.
_PULSES_MAX: Final = 20

#: Messages about a round, told apart for their fates.
_KINDS: Final = {Assignment: 1, Reply: 2, Cancellation: 3, Feedback: 4}


class Doubled:
    """A reply that comes once more. Streams do not do that: it is no frame of its session's, and is not counted."""

    def __init__(self, reply: Reply) -> None:
        self.reply: Final = reply


class StreamEnded:
    """What follows the last message of a stream."""


Sent = Message | StreamEnded | Doubled


class AgentEnd(Protocol):
    """What a link needs of an agent's process."""

    @property
    def name(self) -> str:
        """The agent's id."""

    @property
    def process(self) -> Process:
        """What runs it."""

    def receive(self, link: "Link", stream: StreamName, message: Sent) -> None:
        """A message came."""

    def link_closed(self, link: "Link", reason: str, replaced: bool) -> None:
        """The coordinator closed the link."""


class CoordinatorEnd(Protocol):
    """What a link needs of a coordinator's process."""

    @property
    def process(self) -> Process:
        """What runs it."""

    def receive(self, link: "Link", stream: StreamName, message: Sent) -> None:
        """A message came."""

    def link_closed(self, link: "Link", reason: str, is_final: bool) -> None:
        """The agent closed the link; for good, or to come back."""


class Path:
    """The way between one agent's host and the coordinator's, both directions. Outlives links."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.random: Final[random.Random] = world.stream(f"path {name}")
        #: Seconds one way, at least.
        self.latency_s: Final = self.random.uniform(0.0002, 0.06)
        #: Mean of what comes on top.
        self.jitter_s: Final = self.latency_s * self.random.uniform(0.01, 0.5)
        #: Faults that cut the way from the agent to the coordinator, and back.
        self.cuts_up = 0
        self.cuts_down = 0
        #: Probability of a packet's loss.
        self.loss = 0.0
        #: Seconds by which one stream may fall behind another.
        self.reordering_s = 0.0
        #: Probability of a reply's coming again.
        self.duplication = 0.0
        #: What becomes of what travels here, together with what it is.
        self.fate: Final = self.random.getrandbits(64)
        self._sent = 0
        #: Those that are open on either side.
        self.links: list[Link] = []

    def draws_for(self, message: Sent) -> Draws:
        """The fate of a message: that of its round's call, where it has a round."""
        fates = self.world.fates
        match message:
            case Reply(round=number) | Assignment(round=number) | Cancellation(round=number) | Feedback(round=number):
                return Draws(mix(fates.get(number, number), self.fate + _KINDS[type(message)]))
        self._sent += 1
        return Draws(mix(self.fate, self._sent))

    def draw_delay_s(self, draw: Draws) -> float:
        """How long a message takes, with all that is lost of it on the way."""
        delay_s = self.latency_s + draw.exponential(self.jitter_s)
        if self.loss > 0.0:
            wait_s = _RETRANSMIT_S
            while draw.random() < self.loss:
                delay_s += wait_s
                wait_s = min(2.0 * wait_s, _RETRANSMIT_MAX_S)
        if self.reordering_s > 0.0:
            delay_s += draw.uniform(0.0, self.reordering_s)
        return delay_s

    def freeze(self) -> None:
        """To be called before something changes for pulses: what was heard by now is settled."""
        for link in self.links:
            link.freeze()

    def update(self) -> None:
        """To be called after it."""
        for link in self.links:
            link.update()


class Link:
    """One connection between an agent's process and a coordinator's."""

    __slots__ = (
        "_agent_heard_at",
        "_arrivals",
        "_coordinator_heard_at",
        "_down_since",
        "_held",
        "_is_watched",
        "_pulses_from",
        "_up_since",
        "agent",
        "agent_is_open",
        "began_at",
        "coordinator",
        "coordinator_is_open",
        "early",
        "goodbye",
        "is_opened",
        "lease_s",
        "path",
        "pulse_s",
        "replies_ended",
        "resumed_after",
        "session",
        "world",
    )

    def __init__(self, path: Path, agent: AgentEnd, coordinator: CoordinatorEnd) -> None:
        self.path = path
        self.world = path.world
        self.agent = agent
        self.coordinator = coordinator
        now = self.began_at = path.world.now
        self.agent_is_open = True
        self.coordinator_is_open = True
        #: When the last message of each stream and direction arrives.
        self._arrivals: dict[tuple[bool, StreamName], float] = {}
        #: What waits for a cut to be mended: upwards or not, stream, message.
        self._held: list[tuple[bool, StreamName, Sent]] = []
        #: Pulses leave at this moment and every `pulse_s` after it.
        self._pulses_from = now
        self.pulse_s = 1.0
        self.lease_s = 10.0
        #: Since when pulses reach the coordinator, and come back; None while they do not.
        self._up_since: float | None = now
        self._down_since: float | None = now
        #: When each side heard the other last, before that.
        self._coordinator_heard_at = now
        self._agent_heard_at = now
        self._is_watched = False
        # What the coordinator's shell keeps of a link.
        self.session = ""
        self.is_opened = False
        self.early: list[Message] = []
        self.replies_ended = False
        #: With a link that resumes a session: how many frames the agent has received in it.
        self.resumed_after: int | None = None
        self.goodbye: str | None = None
        path.links.append(self)

    def joined(self, pulse_s: float, lease_s: float) -> None:
        """The agent was welcomed: it pulses from now on, and minds the coordinator's silence."""
        self.freeze()
        self.pulse_s, self.lease_s = pulse_s, lease_s
        self._pulses_from = self.world.now
        self.update()

    # --- messages ---

    def send_up(self, stream: StreamName, message: Sent) -> float | None:
        """From the agent to the coordinator. Returns when it arrives, when that is known."""
        if not self.agent_is_open:
            return None
        if self.path.cuts_up:
            self._held.append((True, stream, message))
            return None
        return self._put(True, stream, message, None)

    def send_down(self, stream: StreamName, message: Sent) -> None:
        """From the coordinator to the agent."""
        if not self.coordinator_is_open:
            return
        if self.path.cuts_down:
            self._held.append((False, stream, message))
        else:
            self._put(False, stream, message, None)

    def _put(self, is_up: bool, stream: StreamName, message: Sent, delay_s: float | None) -> float:
        path = self.path
        draw = path.draws_for(message)
        if delay_s is None:
            delay_s = path.draw_delay_s(draw)
        direction = is_up, stream
        at = max(self.world.now + delay_s, self._arrivals.get(direction, 0.0))
        self._arrivals[direction] = at
        self.world.at(at, self._arrive_up if is_up else self._arrive_down, stream, message)
        if path.duplication and isinstance(message, Reply) and draw.random() < path.duplication:
            is_late = draw.random() < _DOUBLED_LATE_SHARE
            again_at = at + draw.uniform(0.0, _DOUBLED_LATE_S if is_late else _DOUBLED_S)
            self.world.at(again_at, self._arrive_up, stream, Doubled(message))
        return at

    def _arrive_up(self, stream: StreamName, message: Sent) -> None:
        if self.coordinator_is_open:
            self.coordinator.process.call(self._take_up, stream, message)

    def _take_up(self, stream: StreamName, message: Sent) -> None:
        if self.coordinator_is_open:
            self._coordinator_heard_at = self.world.now
            self.coordinator.receive(self, stream, message)

    def _arrive_down(self, stream: StreamName, message: Sent) -> None:
        if self.agent_is_open:
            self.agent.process.call(self._take_down, stream, message)

    def _take_down(self, stream: StreamName, message: Sent) -> None:
        if self.agent_is_open:
            self._agent_heard_at = self.world.now
            self.agent.receive(self, stream, message)

    # --- the end ---

    def close_up(self, reason: str, *, is_final: bool = False) -> None:
        """The agent closes it; the coordinator hears of that unless the path is cut or lossy."""
        if not self.agent_is_open:
            return
        self.freeze()
        self.agent_is_open = False
        self.update()
        if self.coordinator_is_open and self._closing_arrives(self.path.cuts_up):
            self.world.after(self.path.latency_s, self.coordinator.process.call, self._closed_up, reason, is_final)
        self._drop()

    def close_down(self, reason: str, *, replaced: bool = False) -> None:
        """The coordinator closes it; likewise."""
        if not self.coordinator_is_open:
            return
        self.freeze()
        self.coordinator_is_open = False
        self.update()
        if self.agent_is_open and self._closing_arrives(self.path.cuts_down):
            self.world.after(self.path.latency_s, self.agent.process.call, self._closed_down, reason, replaced)
        self._drop()

    def abandon(self, *, agent: bool) -> None:
        """One side's process is gone, without a word."""
        self.freeze()
        if agent:
            self.agent_is_open = False
        else:
            self.coordinator_is_open = False
        self.update()
        self._drop()

    def _closing_arrives(self, cuts: int) -> bool:
        return not cuts and not (self.path.loss and self.path.random.random() < self.path.loss)

    def _closed_up(self, reason: str, is_final: bool) -> None:
        if self.coordinator_is_open:
            self.coordinator.link_closed(self, reason, is_final)

    def _closed_down(self, reason: str, replaced: bool) -> None:
        if self.agent_is_open:
            self.agent.link_closed(self, reason, replaced)

    def _drop(self) -> None:
        if not self.agent_is_open and not self.coordinator_is_open and self in self.path.links:
            self.path.links.remove(self)
            self._held.clear()

    # --- pulses ---

    def heard_by_coordinator(self, now: float) -> float:
        """When the coordinator last heard anything, of what it had read by `now`."""
        heard_at, since = self._coordinator_heard_at, self._up_since
        if since is None:
            return heard_at
        delay_s = self.path.latency_s
        if self.path.loss:
            arrived_at = self._last_pulse(now, since, delay_s, 0)
        else:
            # The same, fast: most that is looked at are the leases of idle agents.
            arrived_at = now - (now - delay_s - self._pulses_from) % self.pulse_s
            if arrived_at - delay_s < since:
                return heard_at
        return arrived_at if arrived_at > heard_at else heard_at  # noqa: FURB136  max() costs as much as all the rest

    def heard_by_agent(self, now: float) -> float:
        """When the agent last heard anything: at the least, that its pulses came."""
        since = self._down_since
        if since is None:
            return self._agent_heard_at
        return max(self._agent_heard_at, self._last_pulse(now, since, 2.0 * self.path.latency_s, 1))

    def _last_pulse(self, now: float, since: float, delay_s: float, side: int) -> float:
        """When the newest pulse arrived of those that left after `since`; 0 without one."""
        pulse_s = self.pulse_s
        number = (now - delay_s - self._pulses_from) // pulse_s
        sent_at = self._pulses_from + number * pulse_s
        loss = self.path.loss
        if loss > 0.0:
            tries = 0
            while sent_at >= since and tries < _PULSES_MAX and _is_lost(self.path.fate + side, int(number), loss):
                number -= 1
                sent_at -= pulse_s
                tries += 1
        return sent_at + delay_s if sent_at >= since and number >= 0 else 0.0

    def freeze(self) -> None:
        """What was heard by now is settled: something is about to change."""
        now = self.world.now
        read_until = self.coordinator.process.read_until
        self._coordinator_heard_at = self.heard_by_coordinator(now if read_until is None else read_until)
        self._agent_heard_at = self.heard_by_agent(now)

    def update(self) -> None:
        """Whether pulses go through, as things are from now on."""
        now, path = self.world.now, self.path
        agent_speaks = self.agent_is_open and self.agent.process.is_running
        goes_up = agent_speaks and not path.cuts_up
        self._up_since = now if goes_up else None
        coordinator_hears = self.coordinator_is_open and self.coordinator.process.is_running
        self._down_since = now if goes_up and not path.cuts_down and coordinator_hears else None
        if (self._down_since is None or path.loss) and self.agent_is_open and not self._is_watched:
            self._watch()
        if self._held:
            self._release()

    def _release(self) -> None:
        held, self._held = self._held, []
        delays_s = {True: self.path.random.uniform(0.0, _MENDED_S), False: self.path.random.uniform(0.0, _MENDED_S)}
        for is_up, stream, message in held:
            if not (self.agent_is_open if is_up else self.coordinator_is_open):
                continue
            if self.path.cuts_up if is_up else self.path.cuts_down:
                self._held.append((is_up, stream, message))
            else:
                self._put(is_up, stream, message, delays_s[is_up])

    def _watch(self) -> None:
        """The agent minds the silence: it looks at every pulse, this where there may be something to see."""
        self._is_watched = True
        process = self.agent.process
        due_at = max(process.now, process.clock_at(self._agent_heard_at) + self.lease_s)
        due_at += self.path.random.uniform(0.0, self.pulse_s)
        process.at(due_at, self._look, due_at)

    def _look(self, due_at: float) -> None:
        self._is_watched = False
        if not self.agent_is_open:
            return
        process, now = self.agent.process, self.world.now
        silent_s = process.now - process.clock_at(self.heard_by_agent(now))
        if silent_s > self.lease_s and process.now - due_at < self.pulse_s:
            self.agent.link_closed(self, f"nothing heard from the coordinator for {silent_s:.1f} s", False)
        elif self._down_since is None or self.path.loss or silent_s > self.lease_s:
            self._watch()


def _is_lost(fate: int, number: int, loss: float) -> bool:
    """What becomes of one pulse."""
    return mix(fate, number) < loss * 2.0**64
