"""The large bodies of one agent's session: those on their way to it, and those that its replies refer to.

Each is on a stream of its own and waits for nobody else's. A body that a link did not deliver is sent again over the
next one: a question by the rounds, a truth from here, an answer by the agent.
"""

import asyncio
import traceback
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import structlog

from quorate_protocol.blobs import Blob, BlobBudget, BlobStore
from quorate_protocol.bulk import STALLED_S, BulkInbox, give_up_blob, patience_s, send_blob
from quorate_protocol.errors import (
    BodyDigestWrong,
    BodyNotReceived,
    BodyTooLarge,
    BodyTruncated,
    Code,
    ConnectionClosed,
    LinkError,
    QuorateError,
    SpoolFull,
    StoppedByPeer,
    StreamError,
)
from quorate_protocol.fields import BodyRef
from quorate_protocol.limits import BODY_BYTES_MAX
from quorate_protocol.messages import Bulk, Reply
from quorate_protocol.transport import ReceiveStream

if TYPE_CHECKING:
    from quorate_coordinator.links import AgentLink

log = structlog.get_logger()

#: Why a body may not be taken; the values of the metric's label.
REFUSALS: Final = (
    "too-large",
    "truncated",
    "wrong-digest",
    "not-received",
    "given-up",
    "unreferenced",
    "spool-full",
    "disk",
)

#: Truths of one session that are kept until they are delivered, the oldest are given up beyond it: as many as its
#: rounds in flight would be by default.
_TRUTHS_MAX: Final = 64

#: What the truths that are kept for all agents may hold of the budget, in memory and on disk: by default that is one of
#: the largest bodies, and three quarters are left to questions and answers while agents are away.
_TRUTHS_SHARE: Final = 0.25

#: Truths of one session that were given up and that its agent has not been told of: as many as frames are kept for it
#: (`links.LOG_FRAMES_MAX`).
_GIVEN_UP_MAX: Final = 1024


#: What an operator is told of our own trouble; the log says more.
_OUR_TROUBLE: Final = {
    "spool-full": "the coordinator has no room for a body of {size} bytes now",
    "disk": "the coordinator cannot keep a body of {size} bytes now",
}


def explain_refusal(error: QuorateError, ref: BodyRef) -> str:
    """Why a body was not taken, for the operator."""
    return _OUR_TROUBLE.get(refusal_of(error), str(error)).format(size=ref.size)


def refusal_of(error: QuorateError) -> str:
    """Why a body was not taken, one of `REFUSALS`."""
    match error:
        case BodyTooLarge():
            return "too-large"
        case BodyTruncated():
            return "truncated"
        case BodyDigestWrong():
            return "wrong-digest"
        case BodyNotReceived():
            return "not-received"
        case SpoolFull():
            return "spool-full"
        case StreamError():
            return "given-up"
        case _:
            return "disk"


@dataclass(frozen=True, slots=True)
class BodyDesk:
    """What all sessions share."""

    store: BlobStore
    #: Counted on, by reason, one of `REFUSALS`.
    refused_total: Counter[str]
    #: Takes a reply, with its agent.
    on_reply: Callable[[str, Reply], None]
    #: Seconds for which a round would take a reply of an agent to this attempt, or to any; 0 when it would not.
    awaits_s: Callable[[str, int, int | None], float]
    truths: "KeptTruths"


class KeptTruths:
    """What is kept of truths, for all sessions, until they are delivered: their bytes have a ceiling.

    Beyond it the oldest are given up, whoever they are for; the newest is kept whatever its size.
    """

    def __init__(self, budget: BlobBudget) -> None:
        self._budget = budget
        self._kept: OrderedDict[tuple[AgentBodies, int], Blob] = OrderedDict()
        #: How often each is kept: a truth is one body for all agents.
        self._places: Counter[Blob] = Counter()
        self._memory_bytes = 0
        self._disk_bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, owner: "AgentBodies", round_id: int, blob: Blob) -> None:
        """Keeps the truth of a round for an agent, and gives up what there is no room for."""
        self.drop(owner, round_id)
        self._kept[owner, round_id] = blob
        self._places[blob] += 1
        if self._places[blob] == 1:
            self._count(blob, len(blob))
        while self._is_over(blob.is_on_disk):
            others = (
                key for key, kept in self._kept.items() if kept is not blob and kept.is_on_disk == blob.is_on_disk
            )
            if (oldest := next(others, None)) is None:
                break
            oldest[0].give_up_truth(oldest[1])

    def drop(self, owner: "AgentBodies", round_id: int) -> None:
        """It is delivered, or nobody waits for it."""
        blob = self._kept.pop((owner, round_id), None)
        if blob is not None:
            self._places[blob] -= 1
            if not self._places[blob]:
                del self._places[blob]
                self._count(blob, -len(blob))

    def _count(self, blob: Blob, more_bytes: int) -> None:
        if blob.is_on_disk:
            self._disk_bytes += more_bytes
        else:
            self._memory_bytes += more_bytes

    def _is_over(self, on_disk: bool) -> bool:
        if on_disk:
            return self._disk_bytes > self._budget.disk_bytes_max * _TRUTHS_SHARE
        return self._memory_bytes > self._budget.memory_bytes_max * _TRUTHS_SHARE


@dataclass(slots=True, eq=False)
class _Answer:
    """A reply whose body is waited for."""

    reply: Reply
    #: Over which the reply came, and the body does.
    link: "AgentLink"
    task: asyncio.Task[None]
    #: Whether the task has begun, and so claimed the body.
    has_claimed: bool = False


class AgentBodies:
    """See the module."""

    __slots__ = ("_agent", "_desk", "_feedback", "_replies", "_sending", "_store")

    def __init__(self, agent: str, desk: BodyDesk) -> None:
        self._agent = agent
        self._desk = desk
        #: Where its answers go, over whatever link; made when one comes.
        self._store: BlobStore | None = None
        #: By round, tasks that send its question, and over which link; under 0 those that send truths.
        self._sending: dict[int, dict[asyncio.Task[None], AgentLink]] = {}
        #: By round; those of a link before the present one too, as long as what came over it is being read.
        self._replies: dict[int, _Answer] = {}
        #: By round, truths that have not been delivered; None for one that was given up, of which the agent is told.
        self._feedback: OrderedDict[int, tuple[Blob | None, Bulk]] = OrderedDict()

    # --- to the agent ---

    def send(self, link: "AgentLink | None", blob: Blob, header: Bulk) -> None:
        """Sends the body of an assignment or a feedback, whose frame goes before, over a link that takes frames.

        Where there is none yet, the rounds send an assignment once more, and the truth waits for `resume`.
        """
        if header.of == "feedback":
            self._keep_truth(blob, header)
        if link is not None and link.is_taking and not link.connection.is_closed:
            self._begin(link, blob, header)

    def resume(self, link: "AgentLink") -> None:
        """The session goes on over another link: sends the truths that the one before has not delivered.

        Of those that are not kept any more the agent is told that they do not come.
        """
        for blob, header in list(self._feedback.values()):
            self._begin(link, blob, header)

    def give_up_truth(self, round_id: int) -> None:
        """There is no room to keep a truth until it is delivered. Where it is being sent, that goes on."""
        _, header = self._feedback[round_id]
        self._feedback[round_id] = (None, header)
        self._desk.truths.drop(self, round_id)
        log.warning("truth_not_kept", agent=self._agent, round=round_id, bytes=header.size)

    def _keep_truth(self, blob: Blob, header: Bulk) -> None:
        self._feedback[header.round] = (blob, header)
        self._desk.truths.keep(self, header.round, blob)
        kept = [round_id for round_id, (body, _) in self._feedback.items() if body is not None]
        if len(kept) > _TRUTHS_MAX:
            self.give_up_truth(kept[0])
        if len(self._feedback) > _TRUTHS_MAX + _GIVEN_UP_MAX:
            self._forget_truth(next(iter(self._feedback)))

    def _forget_truth(self, round_id: int) -> None:
        if self._feedback.pop(round_id, None) is not None:
            self._desk.truths.drop(self, round_id)

    def _begin(self, link: "AgentLink", blob: Blob | None, header: Bulk) -> None:
        place = 0 if header.of == "feedback" else header.round
        task = asyncio.create_task(self._send(link, blob, header), name=f"body of round {header.round}")
        self._sending.setdefault(place, {})[task] = link
        task.add_done_callback(lambda done: self._sent(place, done))

    async def _send(self, link: "AgentLink", blob: Blob | None, header: Bulk) -> None:
        try:
            await link.has_opened.wait()
            async with asyncio.timeout(patience_s(header.ref)):
                if blob is None:
                    await give_up_blob(link.connection, header)
                else:
                    await send_blob(link.connection, blob, header, untaken_s=STALLED_S)
        except StoppedByPeer as error:
            # It has it, does not want it, or has no room; its reply says what is to be known of that.
            log.debug("body_not_wanted", agent=self._agent, round=header.round, reason=str(error))
        except QuorateError as error:
            log.debug("body_not_delivered", agent=self._agent, round=header.round, reason=str(error))
            return
        except TimeoutError as error:
            log.warning("body_not_taken", agent=self._agent, round=header.round)
            # They hold the body, and what is raised by a timeout is part of a cycle.
            traceback.clear_frames(error.__traceback__)
        except OSError as error:
            log.error("body_not_read", agent=self._agent, round=header.round, problem=str(error))
        if header.of == "feedback":
            self._forget_truth(header.round)

    def _sent(self, place: int, task: asyncio.Task[None]) -> None:
        tasks = self._sending.get(place)
        if tasks is not None:
            tasks.pop(task, None)
            if not tasks:
                del self._sending[place]

    # --- of the agent ---

    def take_stream(self, link: "AgentLink", stream: ReceiveStream, header: Bulk) -> None:
        """A body comes over a link."""
        self._inbox_of(link).take(stream, header)

    def take_reply(self, link: "AgentLink", reply: Reply) -> None:
        """Hands a reply on when its body is there; at once, by reference alone, when nobody waits for it any more."""
        ref = reply.bulk
        assert ref is not None
        inbox = self._inbox_of(link)
        known = self._replies.get(reply.round)
        if known is not None and known.link is link:
            # The same once more.
            inbox.drop(ref)
            return
        left_s = self._desk.awaits_s(self._agent, reply.round, reply.attempt)
        if not left_s:
            inbox.drop(ref)
            self._desk.on_reply(self._agent, reply)
            return
        if known is not None:
            # It is sent again because it did not come whole over the link before, as far as the agent knows. What is
            # still being read of that may be cut off: this one is not.
            known.task.cancel()
        task = asyncio.create_task(self._receive(inbox, reply, left_s), name=f"answer of {self._agent}")
        self._replies[reply.round] = _Answer(reply, link, task)
        task.add_done_callback(lambda done: self._received(reply.round, done))

    async def _receive(self, inbox: BulkInbox, reply: Reply, left_s: float) -> None:
        ref = reply.bulk
        assert ref is not None
        self._replies[reply.round].has_claimed = True
        if ref.size > self._desk.store.size_bytes_max:
            error: QuorateError = BodyTooLarge(ref.size, self._desk.store.size_bytes_max)
        else:
            try:
                blob = await inbox.get(ref, left_s)
            except LinkError as broken:
                # It is sent again, when the session goes on.
                log.debug("answer_cut_off", agent=self._agent, round=reply.round, reason=str(broken))
                return
            except QuorateError as failed:
                error = failed
            else:
                update = (
                    {"body": bytes(blob.view()), "bulk": None}
                    if ref.size <= BODY_BYTES_MAX
                    else {"bulk": ref.with_content(blob)}
                )
                self._desk.on_reply(self._agent, reply.model_copy(update=update))
                return
        self._desk.refused_total[refusal_of(error)] += 1
        log.warning("answer_refused", agent=self._agent, round=reply.round, reason=str(error))
        self._fail(reply, f"its answer was not taken: {explain_refusal(error, ref)}")

    def _fail(self, reply: Reply, text: str) -> None:
        failed = reply.model_copy(update={"status": "failed", "bulk": None, "error": text})
        self._desk.on_reply(self._agent, failed)

    def _received(self, round_id: int, task: asyncio.Task[None]) -> None:
        answer = self._replies.get(round_id)
        if answer is not None and answer.task is task:
            del self._replies[round_id]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("answer_not_handed_on", agent=self._agent, round=round_id, exc_info=error)

    def _inbox_of(self, link: "AgentLink") -> BulkInbox:
        if self._store is None:
            self._store = self._desk.store.for_peer()
        if link.inbox is None:
            link.inbox = BulkInbox(
                self._store,
                is_wanted=lambda header: self._is_wanted(link, header),
                on_unclaimed=lambda ref: self._desk.refused_total.update(("unreferenced",)),
            )
        return link.inbox

    def _is_wanted(self, link: "AgentLink", header: Bulk) -> bool:
        answer = self._replies.get(header.round)
        return (
            header.of == "reply"
            and header.size <= self._desk.store.size_bytes_max
            and not (answer is not None and answer.link is link and answer.has_claimed)
            and self._desk.awaits_s(self._agent, header.round, None) > 0
        )

    # --- the end ---

    def stop(self, round_id: int) -> None:
        """The round is over for the agent: what is on its way in either direction is given up.

        A reply whose body was on its way counts as late, by reference alone.
        """
        for task in self._sending.pop(round_id, ()):
            task.cancel()
        answer = self._replies.pop(round_id, None)
        if answer is not None:
            answer.task.cancel()
            # Not at once: the rounds are in the middle of what they have to say of this one.
            asyncio.get_running_loop().call_soon(self._hand_on_late, answer.reply)

    def _hand_on_late(self, reply: Reply) -> None:
        # Awaited it still is where it was the session that ended, and another attempt may be made.
        if not self._desk.awaits_s(self._agent, reply.round, reply.attempt):
            self._desk.on_reply(self._agent, reply)

    async def settle(self, link: "AgentLink", timeout_s: float) -> bool:
        """Waits until the answers that have come over a link are handed on; returns whether they are."""
        tasks = [answer.task for answer in self._replies.values() if answer.link is link]
        if not tasks:
            return True
        _, pending = await asyncio.wait(tasks, timeout=timeout_s)
        return not pending

    async def end_link(self, link: "AgentLink", timeout_s: float) -> None:
        """A link is over. What had come over it is read to its end, and for longer where the disk is slow.

        An answer that came whole is counted when it is read, however late; one that did not is sent again over the next
        link and takes the place of what is left of it (`take_reply`).
        """
        for tasks in self._sending.values():
            for task, over in tasks.items():
                if over is link:
                    task.cancel()
        if link.inbox is not None:
            link.inbox.end(ConnectionClosed(Code.NO_ERROR, "the link is over"))
            if await self.settle(link, timeout_s):
                link.inbox.close()

    def close(self) -> None:
        """The session is over."""
        for round_id in list(self._feedback):
            self._forget_truth(round_id)
        for round_id in [*self._sending, *self._replies]:
            self.stop(round_id)
