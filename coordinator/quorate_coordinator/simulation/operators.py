"""Operators: they ask, wait, leave, ask again after a crash, and tell truths: late, twice, or of the wrong round."""

from collections import Counter
from typing import Final

from quorate_coordinator.simulation.coordinator import CoordinatorHost
from quorate_coordinator.simulation.plan import CallPlan, RevealPlan, operator_of
from quorate_coordinator.simulation.rounds import Told
from quorate_coordinator.simulation.tasks import ANSWERS
from quorate_coordinator.simulation.world import START_S, World

#: Seconds one way between an operator and the coordinator.
_WAY_S: Final = (0.0005, 0.02)

#: Tries of a call, and the seconds between them: beyond, an operator gives up.
_TRIES_MAX: Final = 12
_RETRY_S: Final = (0.2, 5.0)

#: Seconds after which a try without an answer counts as failed: over any deadline.
_PATIENCE_S: Final = 90.0


class Operators:
    """All of them."""

    def __init__(self, world: World, host: CoordinatorHost) -> None:
        self.world = world
        self.host = host
        self.calls: dict[str, Call] = {}
        #: How calls ended.
        self.ended: Counter[str] = Counter()
        host.on_died.append(self._coordinator_died)

    def plan(self, call: CallPlan) -> None:
        """A call that will be made."""
        self.world.at(START_S + call.at_s, self._begin, call)

    @property
    def waiting(self) -> list[str]:
        """Calls that are not over, by key."""
        return [key for key, call in self.calls.items() if not call.is_over]

    def _begin(self, plan: CallPlan) -> None:
        call = self.calls[plan.key] = Call(self, plan)
        call.ask()

    def _coordinator_died(self) -> None:
        for call in list(self.calls.values()):
            call.link_broke()

    def link_broke(self, operator: int, heard_after_s: float) -> None:
        """An operator's connection breaks with all that waits on it; the coordinator hears of that after a while."""
        for call in list(self.calls.values()):
            if operator_of(call.plan.key) == operator:
                call.link_broke(heard_after_s)

    def over(self, call: "Call", how: str) -> None:
        """A call has ended; what is still to be told of it goes on by itself."""
        self.ended[how] += 1
        del self.calls[call.plan.key]


class Call:
    """One round that an operator asks for, and what follows."""

    def __init__(self, operators: Operators, plan: CallPlan) -> None:
        self.operators = operators
        self.world = operators.world
        self.plan: Final = plan
        self.random: Final = self.world.stream(f"operator {plan.key}")
        self.is_over = False
        self.truth: Final = ANSWERS[self.random.randrange(len(ANSWERS))]
        self._tries = 0
        #: The try whose answer counts.
        self._waits_for = 0

    def ask(self) -> None:
        """Sends the ask."""
        self._tries += 1
        self._waits_for = number = self._tries
        self._send(self._arrives, number)
        self.world.after(_PATIENCE_S, self._timed_out, number)
        if self._tries == 1 and self.plan.cancel_after_s is not None:
            self.world.after(self.plan.cancel_after_s, self._leave)

    def link_broke(self, heard_after_s: float | None = None) -> None:
        """Whether the round was taken is not known, so it is asked for again.

        Args:
            heard_after_s: Seconds until the coordinator hears of it; None when it is the coordinator that is gone.
        """
        number = self._waits_for
        if self.is_over or not number:
            return
        self.world.note(f"{self.plan.key} loses its link")
        if heard_after_s is not None:
            self.world.after(heard_after_s, self._send, self._left, number, False)
        self._again("the link broke")

    def _arrives(self, number: int) -> None:
        current = self.operators.host.current
        if current is None:
            self._back(number, Told(0, "", error="unreachable", retry=True))
        else:
            current.rounds.ask(self.plan, self.truth, number, lambda told: self._back(number, told))

    def _back(self, number: int, told: Told) -> None:
        self.world.after(self.random.uniform(*_WAY_S), self._answered, number, told)

    def _answered(self, number: int, told: Told) -> None:
        if self.is_over or number != self._waits_for:
            return
        if told.error and told.retry:
            self._again(told.error)
        elif told.error:
            self._finish(told.error)
        else:
            self._finish(told.state)
            if self.plan.reveal is not None:
                for _ in range(self.plan.reveal.times):
                    self.world.after(self.plan.reveal.after_s, self._reveal, told.round, self.plan.reveal)

    def _again(self, why: str) -> None:
        self._waits_for = 0
        if self._tries >= _TRIES_MAX:
            self._finish(f"gave up: {why}")
        else:
            self.world.after(self.random.uniform(*_RETRY_S) * min(self._tries, 4), self._ask_again)

    def _ask_again(self) -> None:
        if not self.is_over:
            self.ask()

    def _timed_out(self, number: int) -> None:
        if not self.is_over and number == self._waits_for:
            self._again("no answer")

    def _leave(self) -> None:
        if not self.is_over:
            number = self._waits_for
            self._finish("left")
            if number:
                self._send(self._left, number, True)

    def _left(self, number: int, withdraws: bool) -> None:
        """The coordinator hears that a try is over."""
        current = self.operators.host.current
        if current is not None:
            current.rounds.leave(self.plan, number, withdraws=withdraws)

    def _finish(self, how: str) -> None:
        self.is_over = True
        self.world.note(f"{self.plan.key} ends: {how}")
        self.operators.over(self, how)

    def _reveal(self, round_id: int, plan: RevealPlan) -> None:
        self._send(self._reveals, round_id + plan.off_by)

    def _reveals(self, round_id: int) -> None:
        current = self.operators.host.current
        if current is not None:
            current.rounds.reveal(round_id, self.truth, self._revealed)

    def _revealed(self, told: Told) -> None:
        self.operators.ended[f"reveal: {told.error or told.state}"] += 1

    def _send(self, what: object, *arguments: object) -> None:
        """Lets something reach the coordinator's process, if there is one then."""
        self.world.after(self.random.uniform(*_WAY_S), self._deliver, what, arguments)

    def _deliver(self, what: object, arguments: tuple[object, ...]) -> None:
        assert callable(what)
        current = self.operators.host.current
        if current is None:
            what(*arguments)
        else:
            current.process.call(what, *arguments)
