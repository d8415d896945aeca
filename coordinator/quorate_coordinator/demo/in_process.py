"""The reference of the demo: the same models and the same vote in one process, without a network.

Distribution must change nothing: with the same seed, what each agent and the vote say here is what
they say as seven processes over QUIC, instance by instance and byte by byte.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from quorate_coordinator.demo.examples import CLASSIFIERS, TASK, load_example
from quorate_coordinator.learner.api import AgentReply, ClosedRound, Learner
from quorate_coordinator.learner.datasets import DATASETS, instances
from quorate_coordinator.learner.vote import VoteLearner
from quorate_protocol.bodies import decode_body, encode_body
from quorate_protocol.fields import BodyRef


@dataclass(frozen=True, slots=True)
class Prediction:
    """What was said of one instance, before and after its truth."""

    #: Body of each agent that answered, sorted by agent. Those that declined are not there.
    replies: Mapping[str, bytes]
    #: Body of the combined answer; None where nobody answered.
    answer: bytes | None
    #: Body of the true label.
    truth: bytes
    #: Whether each agent that answered was right.
    right: Mapping[str, bool]
    #: Whether the answer was; None without one.
    correct: bool | None
    #: Weight after learning of each agent that answered.
    weights: Mapping[str, float]


def run_in_process(
    dataset: str, *, limit: int | None = None, seed: int = 42, learner: Learner | None = None
) -> Iterator[Prediction]:
    """Yields a prediction for each of the first `limit` instances of a data set, or for all.

    Args:
        dataset: A name of `DATASETS`.
        limit: How many instances; None for all.
        seed: For the models that draw at random.
        learner: Combines and learns; None for a new `VoteLearner`.

    Raises:
        KeyError: there is no data set of that name.
    """
    multiclass = DATASETS[dataset].multiclass
    agents = {name: load_example(file, seed=seed, multiclass=multiclass) for name, file in sorted(CLASSIFIERS.items())}
    if learner is None:
        learner = VoteLearner()
    for number, (features, label) in enumerate(instances(dataset, limit), 1):
        body, truth = encode_body(features), encode_body(label)
        replies = {name: reply for name, agent in agents.items() if (reply := _ask(agent, body)) is not None}
        # Nothing here takes time, so that there are no latencies.
        closed = tuple(AgentReply(agent=name, body=reply, latency_s=0.0) for name, reply in replies.items())
        answer = learner.combine(ClosedRound(number, TASK, closed))
        report = learner.learn(ClosedRound(number, TASK, closed, answer.body), truth)
        assert not isinstance(answer.body, BodyRef), "labels are small"
        for agent in agents.values():
            # As over the network, everyone who was asked gets bodies of its own.
            agent.feedback_handlers[TASK](decode_body(body), decode_body(truth))
        yield Prediction(replies, answer.body, truth, report.agents, report.correct, report.weights)


def _ask(agent: Any, body: bytes) -> bytes | None:
    """The body that an agent answers; None when it declines."""
    try:
        return encode_body(agent.handlers[TASK](decode_body(body)))
    except Exception as error:
        # The agent's package is not imported here, so that its exception is known by its name alone.
        if type(error).__name__ != "Declined":
            raise
        return None
