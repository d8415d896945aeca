"""From what an operator asks to a request for a round: whom, how long, how many. Pure but for what it is handed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import structlog

from quorate_coordinator.learner.api import Learner, Request
from quorate_coordinator.rounds.book import RoundBook
from quorate_coordinator.rounds.events import RoundRequested
from quorate_coordinator.rounds.policy import RoundPolicy
from quorate_protocol.errors import CallFailed
from quorate_protocol.fields import inline_bytes
from quorate_protocol.messages import Ask, body_of

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Candidates:
    """Agents that do a task and carry the labels that were asked for; both sorted."""

    #: They can be asked now.
    reachable: tuple[str, ...]
    #: They have no link, and their sessions live: they can be asked when they return.
    away: tuple[str, ...] = ()


class Planner:
    """Plans rounds by what the learner thinks of the agents and what the settings say.

    Args:
        book: tells who owes how much.
        learner: chooses.
        policy: what holds where neither operator nor learner says otherwise.
        is_behind: whether an agent has so much to take in that it should not be sent so many bytes more.
    """

    def __init__(
        self, book: RoundBook, learner: Learner, policy: RoundPolicy, is_behind: Callable[[str, int], bool]
    ) -> None:
        self._book: Final = book
        self._learner: Final = learner
        self._policy: Final = policy
        self._is_behind: Final = is_behind

    def plan(self, ask: Ask, candidates: Candidates, *, request_id: int, operator: str) -> RoundRequested:
        """The request for a round.

        Raises:
            CallFailed: `no-agents` or `busy`; `bad-request` for a quorum that no number of agents can meet.
        """
        if ask.count is not None and ask.quorum is not None and ask.quorum > ask.count:
            raise CallFailed("bad-request", f"quorum: {ask.quorum} is over the {ask.count} that are asked at most")
        if not candidates.reachable and not candidates.away:
            such = f" with labels {', '.join(f'{k}={v}' for k, v in ask.labels.items())}" if ask.labels else ""
            raise CallFailed("no-agents", f"no connected agent{such} does the task {ask.task!r}", retry=True)
        body = body_of(ask)
        assert body is not None, "an ask without a body is none"
        # One slow agent must not turn away what the others could answer.
        free = tuple(agent for agent in candidates.reachable if self._has_room(agent, inline_bytes(body)))
        away = tuple(agent for agent in candidates.away if self._has_room(agent, 0))
        if not free and not away:
            raise CallFailed(
                "busy",
                f"every agent that does {ask.task!r} has {self._book.limits.in_flight_per_agent_max} rounds waiting, "
                "or has not taken in what it was sent before",
                retry=True,
            )
        selected: tuple[str, ...] = ()
        policy = self._policy
        if free:
            load = {agent: self._book.in_flight_of(agent) for agent in free} if ask.count is not None else {}
            selected, policy = self._consult(
                Request(task=ask.task, body=body, candidates=free, count=ask.count, load=load)
            )
        if ask.count is not None:
            # Those who are away fill the places that are left.
            away = away[: max(0, ask.count - len(selected))]
        return RoundRequested(
            request_id=request_id,
            task=ask.task,
            body=body,
            selected=selected,
            away=away,
            policy=policy.override(
                quorum=ask.quorum,
                quorum_fraction=ask.quorum_fraction,
                grace_s=ask.grace_s,
                deadline_s=ask.deadline_s,
                attempts=ask.attempts,
            ),
            operator=operator,
            # Under a key others may join, and listen, later.
            is_streamed=ask.stream or ask.key is not None,
        )

    def _consult(self, request: Request) -> tuple[tuple[str, ...], RoundPolicy]:
        """Whom the learner would ask, and what it would change in the settings' policy, in plain values (it may reckon
        with NumPy).

        Its faults, plans that cannot be kept among them, cost its advice alone: all are asked, or the first of them.
        """
        try:
            plan = self._learner.compute_coordination(request)
            if strangers := set(plan.agents).difference(request.candidates):
                raise ValueError(f"agents: {min(strangers)!r} is no candidate")
            agents = tuple(sorted(set(plan.agents)))
            if not agents:
                raise ValueError("agents: nobody is asked")
            policy = self._policy.override(
                quorum=None if plan.quorum is None else int(plan.quorum),
                grace_s=None if plan.grace_s is None else float(plan.grace_s),
                deadline_s=None if plan.deadline_s is None else float(plan.deadline_s),
            )
            if (plan.quorum, plan.grace_s, plan.deadline_s) != (None, None, None):
                policy.resolve(len(agents))
            return agents, policy
        except Exception:
            log.exception("learner_failed_to_coordinate", task=request.task)
            return request.candidates[: request.count], self._policy

    def _has_room(self, agent: str, more_bytes: int) -> bool:
        owes_too_much = self._book.in_flight_of(agent) >= self._book.limits.in_flight_per_agent_max
        return not owes_too_much and not self._is_behind(agent, more_bytes)
