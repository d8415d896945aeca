"""Distribution changes nothing: seven processes over QUIC say what the same models say in one."""

import asyncio

import pytest

from quorate_coordinator.demo.examples import CLASSIFIERS, TASK
from quorate_coordinator.demo.in_process import Prediction, run_in_process
from quorate_coordinator.demo.run import _DEADLINE_S, _fleet
from quorate_coordinator.learner.datasets import instances
from quorate_protocol.bodies import encode_body
from quorate_protocol.messages import Outcome, Revealed

INSTANCES = 300
SEED = 7


async def run_distributed(dataset: str) -> list[tuple[Outcome, Revealed]]:
    """What was answered and what was learned, for each instance."""
    said = []
    async with _fleet(dataset, seed=SEED, listen="127.0.0.1:0", http="127.0.0.1:0", quiet=True) as (client, _, _):
        for features, label in instances(dataset, INSTANCES):
            outcome = await client.ask(TASK, features, grace_s=_DEADLINE_S, deadline_s=_DEADLINE_S)
            said.append((outcome, await client.reveal(outcome.round, label)))
    return said


def compare(number: int, outcome: Outcome, revealed: Revealed, expected: Prediction) -> None:
    where = f"instance {number}"
    replies = {result.agent: result.body for result in outcome.results if result.status == "replied"}
    assert replies == expected.replies, where
    assert {result.agent for result in outcome.results} == set(CLASSIFIERS), where
    statuses = {result.status for result in outcome.results if result.agent not in replies}
    # Once too many have declined, the others need not go on.
    assert statuses <= ({"declined", "cancelled"} if outcome.state == "failed" else {"declined"}), where
    assert outcome.answer == expected.answer, where
    assert (revealed.correct, revealed.right) == (expected.correct, expected.right), where
    # To the last bit.
    assert revealed.weights == expected.weights, where


@pytest.mark.timeout(180)
@pytest.mark.parametrize("dataset", ["image-segments", "phishing"])
async def test_distribution_changes_nothing(dataset: str) -> None:
    said, expected = await asyncio.gather(
        run_distributed(dataset), asyncio.to_thread(list, run_in_process(dataset, limit=INSTANCES, seed=SEED))
    )
    assert len(said) == len(expected) == INSTANCES
    truths = [encode_body(label) for _, label in instances(dataset, INSTANCES)]
    for number, ((outcome, revealed), prediction) in enumerate(zip(said, expected, strict=True)):
        assert prediction.truth == truths[number]
        compare(number, outcome, revealed, prediction)
    # It is no comparison of nothing with nothing.
    answered = [prediction for prediction in expected if prediction.answer is not None]
    assert len(answered) >= INSTANCES - 1
    assert sum(prediction.correct is True for prediction in answered) > 0.6 * INSTANCES
    assert {name for prediction in answered for name in prediction.replies} == set(CLASSIFIERS)
    assert any(not right for prediction in answered for right in prediction.right.values())
