"""Running handlers: threads and tasks, and how their ends are told."""

import asyncio
import math
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import numpy
import pytest
import structlog

from quorate_agent import Agent, Context, Declined, calling
from quorate_agent.calling import Ended, describe
from quorate_agent.events import HandlerDeclined, HandlerFailed, HandlerReturned, StartAssignment, StartFeedback
from quorate_agent.running import HandlerRunner
from quorate_agent.streams import OwnStreams
from quorate_agent.threads import HandlerThreads
from quorate_protocol.blobs import Blob, blob_of
from quorate_protocol.bodies import decode_body, encode_body, encode_body_parts
from quorate_protocol.bulk import ref_to
from quorate_protocol.errors import Code, ConnectionClosed
from quorate_protocol.fields import Body, BodyRef
from quorate_protocol.limits import BODY_BYTES_MAX

Run = Callable[..., Awaitable[Ended]]


def no_link() -> OwnStreams:
    raise ConnectionClosed(Code.NO_ERROR)


class Runner:
    """A runner and the ends that it has told."""

    def __init__(self) -> None:
        self.agent = Agent()
        self.ended: asyncio.Queue[Ended] = asyncio.Queue()
        self._runner: HandlerRunner | None = None

    @property
    def runner(self) -> HandlerRunner:
        if self._runner is None:
            self._runner = HandlerRunner(self.agent, "agent-1", 2, self.ended.put_nowait, no_link)
        return self._runner

    async def task(self, function: Any, body: Any = None, raw: Body | None = None) -> Ended:
        if not self.agent.handlers:
            self.agent.task("t")(function)
        self.runner.start(assignment(body, raw=raw))
        return await self.ended.get()

    async def feedback(self, function: Any, body: Any, truth: Any) -> Ended:
        self.agent.feedback("t")(function)
        self.runner.start(StartFeedback(1, 5, "t", encode_body(body), encode_body(truth)))
        return await self.ended.get()


def assignment(body: Any = None, *, work: int = 1, raw: Body | None = None) -> StartAssignment:
    return StartAssignment(work, 5, 2, "t", encode_body(body) if raw is None else raw, math.inf)


@pytest.fixture
async def runner() -> AsyncIterator[Runner]:
    runner = Runner()
    with structlog.testing.capture_logs():
        yield runner
        await runner.runner.close()


async def test_a_sync_handler_runs_off_the_event_loop(runner: Runner) -> None:
    threads = []

    def handle(body: dict[str, int]) -> int:
        threads.append(threading.current_thread())
        return body["a"] + 1

    ended = await runner.task(handle, {"a": 1})
    assert isinstance(ended, HandlerReturned)
    assert decode_body(ended.body) == 2
    assert threads[0] is not threading.main_thread()
    assert threads[0].daemon, "the interpreter must not wait for it"


async def test_an_async_handler_runs_on_the_event_loop(runner: Runner) -> None:
    async def handle(body: int) -> int:
        await asyncio.sleep(0)
        assert threading.current_thread() is threading.main_thread()
        return body * 2

    ended = await runner.task(handle, 4)
    assert isinstance(ended, HandlerReturned)
    assert decode_body(ended.body) == 8


async def test_the_context_names_the_work(runner: Runner) -> None:
    seen: list[Context] = []

    def handle(body: None, context: Context) -> None:
        seen.append(context)

    await runner.task(handle)
    context = seen[0]
    assert (context.round, context.task, context.agent, context.attempt) == (5, "t", "agent-1", 2)
    assert not context.cancelled.is_set()


async def test_feedback_gets_body_truth_and_context(runner: Runner) -> None:
    seen: list[Any] = []

    def learn(body: Any, truth: Any, context: Context) -> set[int]:
        seen.append((body, truth, context.round, context.deadline))
        return {1}  # cannot travel, and need not

    runner.agent.task("t")(lambda body: body)
    ended = await runner.feedback(learn, [1, 2], "yes")
    assert ended == HandlerReturned(1, compute_s=ended.compute_s)
    assert seen == [([1, 2], "yes", 5, math.inf)]


async def test_what_a_handler_took_is_measured(runner: Runner) -> None:
    gate = threading.Event()

    def handle(body: None) -> None:
        gate.wait(0.05)

    ended = await runner.task(handle)
    assert 0.04 < ended.compute_s < 5


class _Silent(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text for you")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("first\nsecond"), "ValueError: first"),
        (KeyError("zone"), "KeyError: 'zone'"),
        (RuntimeError(), "RuntimeError"),
        (SystemExit(3), "SystemExit: 3"),
        (_Silent(), "_Silent"),
    ],
)
@pytest.mark.parametrize("is_async", [False, True])
async def test_a_handler_that_raises_has_failed(
    runner: Runner, error: BaseException, text: str, is_async: bool
) -> None:
    def handle(body: None) -> None:
        raise error

    async def handle_async(body: None) -> None:
        raise error

    ended = await runner.task(handle_async if is_async else handle)
    assert isinstance(ended, HandlerFailed)
    assert ended.error == text == describe(error)


async def test_a_failure_is_logged_with_its_traceback(runner: Runner) -> None:
    def handle(body: None) -> None:
        raise ValueError("boom")

    with structlog.testing.capture_logs() as logged:
        await runner.task(handle)
    (entry,) = logged
    assert (entry["event"], entry["task"], entry["round"]) == ("handler_failed", "t", 5)
    assert isinstance(entry["exc_info"], ValueError)


@pytest.mark.parametrize("is_async", [False, True])
async def test_a_handler_may_decline(runner: Runner, is_async: bool) -> None:
    def handle(body: None) -> None:
        raise Declined("not mine")

    async def handle_async(body: None) -> None:
        raise Declined("not mine")

    ended = await runner.task(handle_async if is_async else handle)
    assert isinstance(ended, HandlerDeclined)
    assert ended.reason == "not mine"


async def test_an_answer_that_cannot_travel_has_failed(runner: Runner) -> None:
    ended = await runner.task(lambda body: {1, 2})
    assert isinstance(ended, HandlerFailed)
    assert ended.error == "the answer cannot be sent: body cannot be sent: a set has no msgpack form"


async def test_an_answer_over_the_ceiling_has_failed(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calling, "BULK_BYTES_MAX", 2 * BODY_BYTES_MAX)
    ended = await runner.task(lambda body: bytes(2 * BODY_BYTES_MAX))
    assert isinstance(ended, HandlerFailed)
    assert ended.error == (
        f"the answer of {2 * BODY_BYTES_MAX + 5} bytes is over the {2 * BODY_BYTES_MAX} that can travel"
    )


async def test_the_largest_inline_answer(runner: Runner) -> None:
    ended = await runner.task(lambda body: b"x" * (BODY_BYTES_MAX - 5))
    assert isinstance(ended, HandlerReturned)
    assert isinstance(ended.body, bytes)
    assert len(ended.body) == BODY_BYTES_MAX


@pytest.mark.parametrize("is_async", [False, True])
async def test_a_large_answer_is_the_memory_of_its_array(runner: Runner, is_async: bool) -> None:
    array = numpy.arange(BODY_BYTES_MAX, dtype="u1")

    async def answer(body: Any) -> Any:
        return array

    ended = await runner.task(answer if is_async else lambda body: array)
    assert isinstance(ended, HandlerReturned)
    assert isinstance(ended.body, BodyRef)
    assert isinstance(ended.body.content, Blob)
    assert ended.body == ref_to(ended.body.content)
    *_, values = ended.body.content._parts or ()
    assert numpy.shares_memory(numpy.frombuffer(values, "u1"), array)


async def test_a_large_body_comes_as_a_view(runner: Runner) -> None:
    blob = blob_of([b"".join(encode_body_parts(numpy.arange(BODY_BYTES_MAX, dtype="u1")))])
    seen: list[Any] = []
    ended = await runner.task(seen.append, raw=ref_to(blob).with_content(blob))
    assert isinstance(ended, HandlerReturned)
    assert numpy.shares_memory(seen[0], numpy.frombuffer(blob.view(), "u1"))


async def test_a_body_that_cannot_be_unpacked_fails_that_reply(runner: Runner) -> None:
    ended = await runner.task(lambda body: body, raw=b"\xc1")
    assert isinstance(ended, HandlerFailed)
    assert ended.error.startswith("the body that came cannot be unpacked")


async def test_a_forgotten_async_def_is_explained(runner: Runner) -> None:
    async def inner() -> int:
        return 1

    ended = await runner.task(lambda body: inner())
    assert isinstance(ended, HandlerFailed)
    assert "declare it with async def" in ended.error


async def test_cancelling_interrupts_an_async_handler(runner: Runner) -> None:
    seen = []

    async def handle(body: None, context: Context) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            seen.append(context.cancelled.is_set())
            raise

    runner.agent.task("t")(handle)
    runner.runner.start(assignment())
    await asyncio.sleep(0)
    runner.runner.cancel(1)
    assert isinstance(await runner.ended.get(), HandlerFailed)
    assert seen == [True]


async def test_cancelling_before_the_first_step_is_an_end_too(runner: Runner) -> None:
    async def handle(body: None) -> None:
        raise AssertionError("never begun")

    runner.agent.task("t")(handle)
    runner.runner.start(assignment())
    runner.runner.cancel(1)
    ended = await runner.ended.get()
    assert isinstance(ended, HandlerFailed)
    assert ended.error == "the handler was cancelled"


async def test_cancelling_tells_a_thread(runner: Runner) -> None:
    def handle(body: None, context: Context) -> bool:
        return context.cancelled.wait(30)

    runner.agent.task("t")(handle)
    runner.runner.start(assignment())
    runner.runner.cancel(1)
    ended = await runner.ended.get()
    assert isinstance(ended, HandlerReturned)
    assert decode_body(ended.body) is True
    runner.runner.cancel(1)  # it is over, and nothing happens


async def test_after_closing_nothing_is_told(runner: Runner) -> None:
    release = threading.Event()
    done = threading.Event()

    def handle(body: None) -> None:
        release.wait(30)
        done.set()

    runner.agent.task("t")(handle)
    runner.runner.start(assignment())
    await runner.runner.close()
    release.set()
    await asyncio.to_thread(done.wait, 30)
    await asyncio.sleep(0)
    assert runner.ended.empty()


def test_threads_are_as_many_as_needed_and_no_more() -> None:
    threads = HandlerThreads(3)
    seen: set[str] = set()
    for _ in range(20):
        done = threading.Event()

        def job(done: threading.Event = done) -> None:
            seen.add(threading.current_thread().name)
            done.set()

        threads.submit(job)
        assert done.wait(30)
    assert len(seen) <= 2, "one that is just ending its job may not be idle yet"
    gate, barrier = threading.Event(), threading.Barrier(4)

    def hold() -> None:
        barrier.wait(30)
        gate.wait(30)

    ran = threading.Event()
    for _ in range(3):
        threads.submit(hold)
    threads.submit(ran.set)
    barrier.wait(30)  # three at once
    assert not ran.is_set(), "and no fourth"
    gate.set()
    assert ran.wait(30)
    threads.close()
