"""What a learner tells of its agents, for listings and metrics: its faults cost those figures, and nothing else."""

import sys
from collections.abc import Iterable

import structlog
from pydantic import TypeAdapter

from quorate_coordinator.learner.api import AgentScore, Latency, Learner, TaskScore
from quorate_protocol.fields import Name
from quorate_protocol.limits import SECONDS_MAX

log = structlog.get_logger()


def scores_of(learner: Learner) -> tuple[TaskScore, ...]:
    """How each task and its agents do, in plain numbers; nothing where the learner fails to tell."""
    try:
        return tuple(
            TaskScore(
                task=_name(score.task),
                accuracy=None if score.accuracy is None else _number(score.accuracy),
                answers=int(score.answers),
                agents={
                    _name(agent): AgentScore(_number(one.weight), _number(one.accuracy), int(one.answers))
                    for agent, one in score.agents.items()
                },
            )
            for score in learner.scores()
        )
    except Exception:
        log.exception("learner_failed_to_tell_scores")
        return ()


def latencies_of(learner: Learner, agents: Iterable[str]) -> dict[str, Latency]:
    """Reply latencies of those that it has heard, in plain numbers; of none where the learner fails to tell."""
    latencies = {}
    try:
        for agent in agents:
            if (latency := learner.latency(agent)) is not None:
                latencies[agent] = Latency(_number(latency.p50_s, SECONDS_MAX), _number(latency.p99_s, SECONDS_MAX))
    except Exception:
        log.exception("learner_failed_to_tell_latencies")
        return {}
    return latencies


_name = TypeAdapter(Name).validate_python


def _number(value: float, at_most: float = sys.float_info.max) -> float:
    """What may stand in a listing: weights and shares, or seconds.

    Raises:
        TypeError, ValueError: it may not.
    """
    number = float(value)
    if not 0 <= number <= at_most:
        raise ValueError(f"{value!r} is no weight, share or time")
    return number
