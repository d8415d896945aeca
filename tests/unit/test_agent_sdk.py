"""Writing an agent: registration, its checks, what is public."""

import functools
import math
import time

import pytest

from quorate_agent import Agent, AgentInvalid, Context, Declined
from quorate_agent.agent import check_labels, make_name
from quorate_agent.handlers import inspect_handler


def test_decorators_return_the_function_and_publish_it() -> None:
    agent = Agent("tree-1", labels={"zone": "a"}, concurrency=2)

    @agent.task("classify")
    def classify(body: int) -> int:
        return body + 1

    @agent.feedback("classify")
    async def learn(body: int, truth: int, context: Context) -> None:
        del body, truth, context

    assert classify(1) == 2
    assert agent.handlers["classify"] is classify
    assert agent.feedback_handlers["classify"] is learn
    assert agent.tasks == ("classify",)
    assert (agent.name, dict(agent.labels), agent.concurrency) == ("tree-1", {"zone": "a"}, 2)
    agent.check()


def test_what_is_published_cannot_be_changed() -> None:
    agent = Agent(labels={"zone": "a"})
    for mapping in (agent.handlers, agent.feedback_handlers, agent.labels):
        with pytest.raises(TypeError):
            mapping["x"] = "y"  # type: ignore[index]


class Model:
    def predict(self, body: object) -> object:
        return body

    async def predict_later(self, body: object, context: Context) -> object:
        return body, context

    def __call__(self, body: object) -> object:
        return body


class AsyncModel:
    async def __call__(self, body: object, context: Context) -> object:
        return body, context


def with_default(body: object, model: object = None) -> object:
    return body, model


def with_optional_context(body: object, context: Context | None = None) -> object:
    return body, context


def with_named_second(body: object, c: Context) -> object:
    return body, c


def with_keywords(body: object, *, scale: int = 2, **rest: object) -> object:
    return body, scale, rest


async def later(scale: int, body: object) -> object:
    return scale, body


@pytest.mark.parametrize(
    ("function", "is_async", "wants_context"),
    [
        (Model().predict, False, False),
        (Model().predict_later, True, True),
        (Model(), False, False),
        (AsyncModel(), True, True),
        (with_default, False, False),
        (with_optional_context, False, True),
        (with_named_second, False, True),
        (with_keywords, False, False),
        (lambda body: body, False, False),
        (functools.partial(later, 3), True, False),
        (functools.partial(Model().predict_later), True, True),
    ],
)
def test_what_may_handle_a_task(function: object, is_async: bool, wants_context: bool) -> None:
    handler = inspect_handler(function, task="t", kind="task")
    assert (handler.is_async, handler.wants_context) == (is_async, wants_context)


def no_arguments() -> None: ...


def too_many(body: object, context: Context, more: object) -> None: ...


def any_number(*bodies: object) -> None: ...


def needs_keyword(body: object, *, model: object) -> None: ...


def generator(body: object) -> object:
    yield body


async def async_generator(body: object) -> object:
    yield body


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (no_arguments, r"no_arguments .*takes \(\); it must take \(body\) or \(body, context\)"),
        (too_many, r"too_many .*takes \(body, context, more\)"),
        (any_number, r"any_number .*takes \*bodies"),
        (needs_keyword, r"needs_keyword .*keyword argument 'model'"),
        (generator, r"generator .*is a generator"),
        (async_generator, r"async_generator .*is a generator"),
        (42, r"is 42, which cannot be called"),
    ],
)
def test_a_wrong_task_handler_is_named_when_it_is_registered(function: object, problem: str) -> None:
    agent = Agent()
    with pytest.raises(AgentInvalid, match=problem) as caught:
        agent.task("classify")(function)  # type: ignore[type-var]
    assert "'classify'" in str(caught.value)
    assert agent.tasks == ()


def test_the_place_of_a_wrong_handler_is_told() -> None:
    with pytest.raises(AgentInvalid, match=r"test_agent_sdk\.py:\d+\)"):
        Agent().task("classify")(no_arguments)


def test_a_feedback_handler_takes_body_and_truth() -> None:
    agent = Agent()
    with pytest.raises(AgentInvalid, match=r"takes \(body\); it must take \(body, truth\) or \(body, truth, context\)"):
        agent.feedback("classify")(lambda body: None)
    agent.feedback("classify")(lambda body, truth: None)


def test_nothing_is_registered_twice() -> None:
    agent = Agent()
    agent.task("a")(with_default)
    agent.feedback("a")(with_default)
    with pytest.raises(AgentInvalid, match="task 'a' already has the handler with_default"):
        agent.task("a")(with_keywords)
    with pytest.raises(AgentInvalid, match="task 'a' already has the feedback handler with_default"):
        agent.feedback("a")(with_named_second)


def test_feedback_without_its_task_is_an_error_at_start_only() -> None:
    agent = Agent()
    agent.feedback("b")(with_default)  # the task may be registered later
    agent.task("a")(with_default)
    with pytest.raises(AgentInvalid, match=r"with_default is for 'b', which is no task of this agent \('a'\)"):
        agent.check()
    agent.task("b")(with_default)
    agent.check()


def test_an_agent_without_tasks_cannot_start() -> None:
    with pytest.raises(AgentInvalid, match="no tasks"):
        Agent().check()


def test_a_decorator_without_its_name_is_explained() -> None:
    with pytest.raises(AgentInvalid, match=r'write @agent\.task\("name"\)'):
        Agent().task(with_default)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["", "two words", "-dash", "ümlaut", "x" * 256, 3])
def test_names_that_cannot_travel_are_refused(name: object) -> None:
    for make in (Agent, Agent().task, Agent().feedback):
        with pytest.raises(AgentInvalid):
            make(name)  # type: ignore[operator]


@pytest.mark.parametrize(
    "labels",
    [{"two words": "x"}, {"a": 3}, {"a": "x" * 5000}, {f"k{n}": "" for n in range(65)}],
    ids=["key", "not text", "long", "many"],
)
def test_labels_that_cannot_travel_are_refused(labels: dict[str, str]) -> None:
    with pytest.raises(AgentInvalid):
        Agent(labels=labels)


@pytest.mark.parametrize("concurrency", [0, -1, 257, 1.5, True, "2"])
def test_concurrency_is_a_sensible_number(concurrency: int) -> None:
    with pytest.raises(AgentInvalid, match="concurrency"):
        Agent(concurrency=concurrency)


def test_labels_are_copied() -> None:
    labels = {"zone": "a"}
    agent = Agent(labels=labels)
    labels["zone"] = "b"
    assert agent.labels["zone"] == "a"
    assert check_labels(agent.labels) is not agent.labels


def test_declined_carries_its_reason() -> None:
    assert Declined("not mine").reason == str(Declined("not mine")) == "not mine"
    assert Declined().reason == ""


def test_a_context_tells_what_time_is_left() -> None:
    context = Context(1, "classify", "tree-1", deadline=time.monotonic() + 100)
    assert 99 < context.remaining_s <= 100
    assert Context(1, "classify", "tree-1", deadline=time.monotonic() - 1).remaining_s == 0.0
    assert Context(1, "classify", "tree-1").remaining_s == math.inf
    assert not context.cancelled.is_set()
    with pytest.raises(AttributeError):
        context.round = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "name"), [("my host-tree-7", "my-host-tree-7"), ("_x", "x"), ("böx", "b-x"), ("", "agent"), ("…", "agent")]
)
def test_a_name_is_made_of_any_text(text: str, name: str) -> None:
    assert make_name(text) == name
    Agent(make_name(text))


async def test_running_without_any_identity_is_an_error() -> None:
    agent = Agent()
    agent.task("a")(with_default)
    with pytest.raises(AgentInvalid, match="no name"):
        await agent.run("quic://localhost", token="x")
