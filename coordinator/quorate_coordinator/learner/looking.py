"""What a learner tells of its agents, for listings and metrics: its faults cost those figures, and nothing else."""

from collections.abc import Iterable

import structlog

from quorate_coordinator.learner.api import AgentScore, Latency, Learner, TaskScore

log = structlog.get_logger()


def scores_of(learner: Learner) -> tuple[TaskScore, ...]:
    """How each task and its agents do, in plain numbers; nothing where the learner fails to tell."""
    try:
        return tuple(
            TaskScore(
                task=score.task,
                accuracy=None if score.accuracy is None else float(score.accuracy),
                answers=int(score.answers),
                agents={
                    agent: AgentScore(weight=float(one.weight), accuracy=float(one.accuracy), answers=int(one.answers))
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
                latencies[agent] = Latency(p50_s=float(latency.p50_s), p99_s=float(latency.p99_s))
    except Exception:
        log.exception("learner_failed_to_tell_latencies")
        return {}
    return latencies
