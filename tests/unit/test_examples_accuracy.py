"""The example agents in one process: how well they and their vote do, and that nothing but the seed decides it."""

import inspect
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from quorate_agent import Context, Declined
from quorate_coordinator.demo.examples import CLASSIFIERS, TASK, examples_directory, load_example
from quorate_coordinator.demo.in_process import Prediction, run_in_process
from quorate_coordinator.learner.datasets import DATASETS, instances
from quorate_protocol.bodies import decode_body, encode_body


def accuracies(predictions: list[Prediction]) -> tuple[float, dict[str, float]]:
    """Of the vote, and of each agent; no answer is a wrong one."""
    right = Counter(agent for one in predictions for agent, is_right in one.right.items() if is_right)
    vote = sum(one.correct is True for one in predictions) / len(predictions)
    return vote, {agent: right[agent] / len(predictions) for agent in CLASSIFIERS}


class TestAccuracy:
    @pytest.mark.parametrize(
        ("dataset", "limit", "floor", "behind_best_max"),
        [
            ("image-segments", 500, 0.75, 0.02),
            ("phishing", None, 0.900, 0.01),
            ("bananas", 500, 0.78, 0.03),
            ("shuttle", 500, 0.97, 0.01),
        ],
    )
    def test_vote(self, dataset: str, limit: int | None, floor: float, behind_best_max: float) -> None:
        predictions = list(run_in_process(dataset, limit=limit))
        assert len(predictions) == (limit or DATASETS[dataset].instances)
        vote, agents = accuracies(predictions)
        assert vote >= floor
        assert vote >= max(agents.values()) - behind_best_max
        # Every model has learned something: better than always saying the commonest label, or near it.
        commonest = Counter(one.truth for one in predictions).most_common(1)[0][1] / len(predictions)
        assert all(accuracy > commonest - 0.1 for accuracy in agents.values()), agents

    def test_everyone_declines_until_the_first_label(self) -> None:
        first, second = run_in_process("image-segments", limit=2)
        assert (dict(first.replies), first.answer, first.correct) == ({}, None, None)
        assert set(second.replies) == set(second.weights) == set(CLASSIFIERS)

    def test_the_best_weighs_most_in_the_end(self) -> None:
        predictions = list(run_in_process("bananas", limit=500))
        _, agents = accuracies(predictions)
        weights = predictions[-1].weights
        best = {"knn", "adaptive-random-forest"}
        assert set(sorted(agents, key=agents.__getitem__)[-2:]) == best
        assert sum(weights[agent] for agent in best) > 0.5


class TestDeterminism:
    def test_the_same_seed_gives_the_same_bytes(self) -> None:
        assert list(run_in_process("image-segments", limit=120)) == list(run_in_process("image-segments", limit=120))

    def test_the_seed_reaches_the_forest_alone(self) -> None:
        one = list(run_in_process("image-segments", limit=200, seed=1))
        other = list(run_in_process("image-segments", limit=200, seed=2))
        differ = {
            agent
            for a, b in zip(one, other, strict=True)
            for agent in a.replies
            if a.replies[agent] != b.replies[agent]
        }
        assert differ == {"adaptive-random-forest"}

    def test_the_hash_seed_of_the_process_does_not_matter(self) -> None:
        # Each agent of the demo is its own process, and Python shuffles sets of text in each.
        program = inspect.cleandoc("""
            import hashlib
            from quorate_coordinator.demo.in_process import run_in_process
            print(hashlib.sha256(repr(list(run_in_process("image-segments", limit=150))).encode()).hexdigest())
        """)
        digests = {
            subprocess.run(
                [sys.executable, "-c", program],
                env=os.environ | {"PYTHONHASHSEED": hash_seed},
                check=True,
                capture_output=True,
                timeout=60,
                text=True,
            ).stdout
            for hash_seed in ("1", "2")
        }
        assert len(digests) == 1


class TestExamples:
    def test_a_label_of_text_for_one_model_of_two_labels_fails_and_does_not_guess(self) -> None:
        agent = load_example("logistic_regression.py", multiclass=False)
        with pytest.raises((TypeError, ValueError)):
            agent.feedback_handlers[TASK]({"x": 1.0}, "yes")

    @pytest.mark.parametrize("name", CLASSIFIERS)
    def test_is_named_after_its_file_and_does_the_task(self, name: str) -> None:
        agent = load_example(CLASSIFIERS[name])
        agent.check()
        assert agent.name == name
        assert agent.tasks == (TASK,)
        assert list(agent.feedback_handlers) == [TASK]

    @pytest.mark.parametrize("name", CLASSIFIERS)
    def test_each_load_is_a_new_model(self, name: str) -> None:
        taught, other = load_example(CLASSIFIERS[name]), load_example(CLASSIFIERS[name])
        taught.feedback_handlers[TASK]({"x": 1.0}, "a")
        taught.handlers[TASK]({"x": 1.0})
        with pytest.raises(Declined, match="no prediction before the first label"):
            other.handlers[TASK]({"x": 1.0})

    @pytest.mark.parametrize("name", CLASSIFIERS)
    @pytest.mark.parametrize("labels", [(0, 1), (False, True)], ids=str)
    def test_answers_are_spelled_as_the_labels_were(self, name: str, labels: tuple[Any, Any]) -> None:
        agent = load_example(CLASSIFIERS[name], multiclass=False)
        for n in range(40):
            agent.feedback_handlers[TASK]({"x": 10.0 * (n % 2) + n % 7 / 10}, labels[n % 2])
        answers = [agent.handlers[TASK]({"x": 10.0 * n + 0.3}) for n in (0, 1)]
        assert answers == list(labels)
        assert [type(answer) for answer in answers] == [type(label) for label in labels]

    def test_loading_leaves_the_path_alone(self) -> None:
        before = list(sys.path)
        load_example("knn.py")
        assert sys.path == before

    def test_the_directory_lists_every_example(self) -> None:
        files = {path.name for path in examples_directory().glob("*.py")}
        assert files == {*CLASSIFIERS.values(), "crowd.py", "echo.py", "multimodal.py", "primes.py", "prequential.py"}
        readme = Path(examples_directory(), "README.md").read_text(encoding="utf-8")
        assert [file for file in sorted(files) if f"`{file}`" not in readme] == []

    async def test_echo(self) -> None:
        agent = load_example_attribute("echo.py")
        assert await agent.handlers["echo"]({"any": ["body"]}) == {"any": ["body"]}

    def test_primes(self) -> None:
        agent = load_example_attribute("primes.py")
        count = agent.handlers["count_primes"]
        context = Context(1, "count_primes", "primes")
        below = [sum(all(n % d for d in range(2, n)) for n in range(2, limit)) for limit in range(130)]
        assert [count(limit, context) for limit in range(130)] == below
        assert count(1_000_000, context) == 78_498
        for wrong in (-1, 10**10, 1.5, "12", None, True):
            with pytest.raises(Declined):
                count(wrong, context)


def load_example_attribute(file: str) -> Any:
    """The agent of an example that makes it itself."""
    namespace: dict[str, Any] = {}
    source = Path(examples_directory(), file).read_text(encoding="utf-8")
    exec(compile(source, file, "exec"), namespace)  # noqa: S102 - our own file
    return namespace["agent"]


class TestDatasets:
    @pytest.mark.parametrize("name", DATASETS)
    def test_survives_the_wire_unchanged(self, name: str) -> None:
        for features, label in instances(name, 100):
            body = decode_body(encode_body([features, label]))
            assert body == [features, label]
            assert [type(value) for value in body[0].values()] == [type(value) for value in features.values()]
            assert type(body[1]) is type(label)

    @pytest.mark.parametrize("name", [name for name, dataset in DATASETS.items() if dataset.instances < 10_000])
    def test_number_of_instances_and_labels(self, name: str) -> None:
        labels = [label for _, label in instances(name)]
        assert len(labels) == DATASETS[name].instances
        assert (len(set(labels)) > 2) == DATASETS[name].multiclass
        assert DATASETS[name].multiclass or set(labels) == {False, True}

    def test_limit(self) -> None:
        assert len(list(instances("bananas", 3))) == 3
        assert list(instances("bananas", 0)) == []

    def test_unknown_name(self) -> None:
        with pytest.raises(KeyError):
            next(instances("iris"))
