"""Drives rounds: the shell round the book of rounds, the ledger and the journal.

The book decides; this carries out: it sends frames, keeps the loop's timer, has what happened recorded, and
answers who asked once the record is durable. One writer: everything happens on the event loop, in the
order of the book's instructions.
"""

import asyncio
import itertools
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from typing import Final, assert_never

import structlog

from quorate_coordinator.asking import Asking, Listener, deserted_rounds
from quorate_coordinator.blob_shelf import BlobShelf
from quorate_coordinator.gather_ports import Fleet, Recorder
from quorate_coordinator.idempotency import Keys, check_same, earlier_digest_of, is_final, question_of
from quorate_coordinator.journal.records import Record, RoundClosed
from quorate_coordinator.learner.api import Experience, Learner
from quorate_coordinator.ledger import (
    Announcement,
    Ledger,
    Question,
    as_told,
    book_outcome_of,
    outcome_of,
    without_answers,
)
from quorate_coordinator.planning import Candidates, Planner
from quorate_coordinator.round_numbers import RoundNumbers
from quorate_coordinator.rounds.book import BookLimits, RoundBook
from quorate_coordinator.rounds.events import (
    AgentLost,
    AgentReachable,
    CoordinatorStopped,
    DrainRequested,
    Event,
    ReplyReceived,
    RoundCancelled,
    RoundRequested,
    TimerFired,
    TruthRevealed,
)
from quorate_coordinator.rounds.instructions import (
    AnnounceDrained,
    CloseRound,
    Instruction,
    LearnTruth,
    NoteForgotten,
    NoteStray,
    OfferLateReply,
    OpenRound,
    RejectRequest,
    SendAssignment,
    SendCancellation,
    SendFeedback,
    TellPart,
)
from quorate_coordinator.rounds.instructions import Outcome as BookOutcome
from quorate_coordinator.rounds.policy import RoundPolicy
from quorate_protocol.bodies import decode_body
from quorate_protocol.bulk import header_for
from quorate_protocol.errors import CallFailed, ConfigurationError, FrameMalformed
from quorate_protocol.fields import Body, BodyRef, place
from quorate_protocol.limits import CONNECTIONS_MAX
from quorate_protocol.messages import (
    Ask,
    Assignment,
    BulkOf,
    Cancellation,
    Feedback,
    Opened,
    Outcome,
    Part,
    Reply,
    Reveal,
    Revealed,
    body_of,
    clip_text,
)

log = structlog.get_logger()

#: How long nobody may have waited for a round that has a key before its place may be another's, in seconds: long
#: enough for an operator that comes back by itself.
DESERTED_S: Final = 60.0

#: Agents whose replies are counted one by one, the least recently counted go first: ids may be new with every
#: process of an agent. More than may be connected.
AGENTS_COUNTED_MAX: Final = 2 * CONNECTIONS_MAX


class Gatherer:
    """Opens rounds, gathers replies, answers calls."""

    def __init__(
        self,
        fleet: Fleet,
        ledger: Ledger,
        recorder: Recorder | None,
        *,
        shelf: BlobShelf,
        policy: RoundPolicy,
        limits: BookLimits,
        numbers: RoundNumbers,
        first_round: int,
        first_seq: int,
        observe_duration: Callable[[str, float], None],
    ) -> None:
        self.book: Final = RoundBook(limits, first_round=first_round)
        self.ledger: Final = ledger
        self._fleet = fleet
        self._recorder = recorder
        self._planner = Planner(self.book, ledger.learner, policy, fleet.is_behind)
        self._keys = Keys()
        #: What large bodies hold, for rounds in flight, outcomes that are not told, and keys.
        self.shelf: Final = shelf
        self._numbers = numbers
        #: Numbers of the last record, and of the last that a checkpoint covers.
        self._last_seq = self._checkpoint_seq = 0
        #: Number of the last record that is durable; how many became so since the start, and in how many commits.
        self._committed_seq = first_seq - 1
        self.records_total = self.commits_total = 0
        self._observe_duration = observe_duration
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._request_ids = itertools.count(1)
        #: Calls whose outcome has not been told.
        self._asks: dict[int, Asking] = {}
        self._reveals: dict[int, asyncio.Future[Revealed]] = {}
        self._drained: asyncio.Future[None] = self._loop.create_future()
        #: Why nothing can be recorded now; empty while it can.
        self.recording_problem = ""
        #: (task, state), (task, status), (agent, status), task, kind: totals since the start.
        self.rounds_total: Counter[tuple[str, str]] = Counter()
        self.replies_total: Counter[tuple[str, str]] = Counter()
        self.agent_replies_total: Counter[tuple[str, str]] = Counter()
        self.feedback_total: Counter[str] = Counter()
        #: Calls that were answered by a round asked for before under the same key.
        self.repeated_total = 0
        #: What agents told while nothing could be recorded, or the disk was behind.
        self.experiences_dropped_total = 0
        #: The agents in `agent_replies_total` and their statuses there, least recently counted first.
        self._counted: OrderedDict[str, set[str]] = OrderedDict()

    @property
    def learner(self) -> Learner:
        """What combines and learns."""
        return self.ledger.learner

    def recall(self, awaiting: Iterable[RoundClosed]) -> None:
        """Takes up the rounds of earlier runs whose truth may come, oldest first. Before any other call."""
        for closed in awaiting:
            for instruction in self.book.recall(book_outcome_of(closed)):
                self._carry_out(instruction)

    # --- calls ---

    async def find_asked(self, ask: Ask, listener: Listener | None = None) -> Asking | None:
        """The round that was asked for before under the same key. The caller has joined it; its body is not looked at.

        Raises:
            CallFailed: another question was asked under the key; or there was none, and nothing can be recorded now.
        """
        asking = await self._find_asked(ask, question_of(ask))
        if asking is None:
            self._check_recording()
            return None
        self.repeated_total += 1
        asking.join(listener)
        return asking

    async def ask(self, ask: Ask, operator: str = "", listener: Listener | None = None) -> Asking:
        """Opens a round, or finds the one that was asked for before under the same key. The caller has joined it.

        A large body is there: its reference carries it.

        Raises:
            CallFailed: there was no round.
        """
        if (asking := await self.find_asked(ask, listener)) is not None:
            return asking
        try:
            self._numbers.check(self.book.next_id)
        except ConfigurationError as error:
            raise CallFailed(
                "not-recorded", f"no round is taken, because none can be numbered: {error}", retry=True
            ) from None
        question = question_of(ask)
        candidates = Candidates(self._fleet.select(ask.task, ask.labels), self._fleet.select_away(ask.task, ask.labels))
        request_id = next(self._request_ids)
        if ask.bulk is not None:
            ask = ask.model_copy(update={"bulk": self.shelf.put(("question", request_id), ask.bulk)})
        try:
            request = self._planner.plan(ask, candidates, request_id=request_id, operator=operator)
        except BaseException:
            self.shelf.drop(("question", request_id))
            raise
        self._make_place(request)
        asking = self._asks[request_id] = Asking(request_id, question, self._withdraw)
        asking.join(listener)
        if question.key is not None and question.digest is not None:
            self._keys.open(question.key, question.digest, request_id)
        try:
            self.handle(request)
        except Exception:
            # A fault of ours must not leave a key that waits for ever.
            self._answer_error(request_id, _failure())
            raise
        return asking

    async def reveal(self, reveal: Reveal) -> Revealed:
        """Scores a round's agents by its truth, and tells them; returns when that is durable.

        Raises:
            CallFailed: no such round, still open, told before, or it cannot be recorded.
        """
        truth = body_of(reveal)
        assert truth is not None, "a reveal without a truth is none"
        try:
            # A large one may be anything: it is compared as it is.
            if isinstance(truth, bytes):
                decode_body(truth)
        except FrameMalformed as error:
            raise CallFailed("bad-request", f"truth: {error}") from None
        self._check_recording("truth")
        request_id = next(self._request_ids)
        if isinstance(truth, BodyRef):
            truth = self.shelf.put(("truth", request_id), truth)
        future: asyncio.Future[Revealed] = self._loop.create_future()
        self._reveals[request_id] = future
        try:
            self.handle(TruthRevealed(request_id, reveal.round, truth))
            return await future
        except CallFailed as error:
            if self._recorder is None or error.reason != "unknown-round" or not self._recorder.has_truth(reveal.round):
                raise
            # Told to an earlier run, say, that died before it could answer.
            raise CallFailed("already-revealed", f"the truth of round {reveal.round} has been told before") from None
        finally:
            del self._reveals[request_id]
            self.shelf.drop(("truth", request_id))

    def experience(self, experience: Experience) -> None:
        """An agent told something of its own accord; where it could not be recorded, it is dropped."""
        if self._recorder is not None and (self.recording_problem or self._recorder.is_half_full):
            self.experiences_dropped_total += 1
            return
        record, report = self.ledger.experience(experience)
        if report is not None:
            self._record(record)

    async def _find_asked(self, ask: Ask, question: Question) -> Asking | None:
        """The round that was asked for under this key: in flight, or over."""
        if question.key is None or question.digest is None:
            return None
        outcome: Outcome | None = None
        read: int | None = None
        while outcome is None:
            keyed = self._keys.find(question.key, question.digest)
            if keyed is not None and keyed.request_id is not None:
                return self._asks.get(keyed.request_id)
            if keyed is not None:
                outcome = keyed.outcome
            elif self._recorder is None or (newest := self._recorder.find_key(question.key)) in (None, read):
                return None
            else:
                # While it is read others ask: what is known of the key is looked at again, where it came to nothing.
                read, closed = newest, await self._recorder.read_key(question.key)
                if closed is not None and is_final(found := outcome_of(closed)):
                    check_same(question.key, closed.digest, question.digest, earlier_digest_of(ask))
                    outcome = found
        asking = Asking(0, question, self._withdraw)
        asking.answer(self.shelf.fill_outcome(outcome))
        return asking

    def _check_recording(self, what: str = "round") -> None:
        if self.recording_problem:
            message = f"no {what} is taken, because none can be recorded: {self.recording_problem}"
            raise CallFailed("not-recorded", message, retry=True)
        if self._recorder is not None and self._recorder.is_full:
            raise CallFailed("busy", "so many records wait for the disk that no more are taken", retry=True)

    def _make_place(self, request: RoundRequested) -> None:
        """Gives up rounds that nobody has waited for in a while, the longest first, where there is no place else."""
        now = self._loop.time()
        deserted = deserted_rounds(self._asks.values(), now - DESERTED_S)
        for round_id in self.book.in_the_way(request, filter(self.book.is_in_flight, deserted), now):
            self.handle(RoundCancelled(round_id, "nobody waited for it, and there was no place for another"))

    def _withdraw(self, asking: Asking) -> None:
        if asking.opened is not None:
            self.handle(RoundCancelled(asking.opened.round, "its operator left"))

    # --- events ---

    def reply_received(self, agent: str, reply: Reply) -> None:
        """An agent's reply came in; with its body, where that is a large one."""
        body = body_of(reply)
        if isinstance(body, BodyRef):
            if self.awaits_s(agent, reply.round, reply.attempt):
                self.shelf.put(("answers", reply.round), body)
            body = BodyRef(size=body.size, digest=body.digest)
        self.handle(
            ReplyReceived(
                round=reply.round,
                agent=agent,
                attempt=reply.attempt,
                status=reply.status,
                body=body if reply.status == "replied" else None,
                error=reply.error,
                compute_s=reply.compute_s,
                waited_s=reply.waited_s,
            )
        )

    def awaits_s(self, agent: str, round_id: int, attempt: int | None) -> float:
        """Seconds for which a round would take a reply of an agent to this attempt, or to any; 0 when it would not."""
        if not self.book.awaits(round_id, agent, attempt):
            return 0.0
        return self.book.remaining_s(round_id, self._loop.time())

    def agent_reachable(self, agent: str) -> None:
        """An agent has a link it had not: it gets what it owes."""
        self.handle(AgentReachable(agent))

    def agent_lost(self, agent: str, reason: str) -> None:
        """What an agent worked on will not come."""
        self.handle(AgentLost(agent, reason))

    async def drain(self) -> None:
        """Opens no new rounds; returns when none is in flight."""
        self.handle(DrainRequested())
        await asyncio.shield(self._drained)

    def stop(self, reason: str) -> None:
        """Closes what is in flight as interrupted."""
        self.handle(CoordinatorStopped(reason))
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def close(self) -> None:
        """Lets go of what nobody will ask for any more."""
        self.shelf.close()

    def handle(self, event: Event) -> None:
        """Hands an event to the book and carries out what it says."""
        unopened: list[int] = []
        for instruction in self.book.handle(event, self._loop.time()):
            try:
                self._carry_out(instruction)
            except Exception:
                # One that fails must take neither the others with it nor who waits for it.
                log.exception("instruction_failed", instruction=type(instruction).__name__)
                self._fail_request(instruction)
                if isinstance(instruction, OpenRound):
                    unopened.append(instruction.round)
        self._arm()
        for round_id in unopened:
            # Nobody waits for it any more.
            self.handle(RoundCancelled(round_id, "it could not be opened"))

    def _fail_request(self, instruction: Instruction) -> None:
        """Answers who waits for an instruction that could not be carried out."""
        if isinstance(instruction, CloseRound):
            self._close_without_answers(instruction.outcome)
        elif (request_id := getattr(instruction, "request_id", None)) is not None:
            self._answer_error(request_id, _failure())

    def _close_without_answers(self, closed: BookOutcome) -> None:
        """The end of a round could not be recorded as it was: it gets one that can, and takes no truth."""
        self.book.give_up(closed.round)
        self.ledger.forget(closed.round)
        self.shelf.drop(("answers", closed.round))
        asking = self._asks.get(closed.request_id)
        record = without_answers(closed, Question() if asking is None else asking.question)
        try:
            self._record(record, Announcement(closed.request_id, outcome_of(record)))
        except Exception:
            log.exception("round_not_recorded", round=closed.round)
            self._answer_error(closed.request_id, _failure())
        # The learner may have combined what no record has.
        self.checkpoint()

    def _answer_error(self, request_id: int, error: CallFailed) -> None:
        self.shelf.drop(("question", request_id))
        asking = self._asks.pop(request_id, None)
        if asking is not None:
            if asking.question.key is not None:
                self._keys.drop(asking.question.key, request_id)
            asking.fail(error)
        revealing = self._reveals.get(request_id)
        if revealing is not None and not revealing.done():
            revealing.set_exception(error)

    def _arm(self) -> None:
        at = self.book.next_timer()
        if self._timer is not None:
            if at is not None and self._timer.when() <= at:
                # Fires too early at worst, and is then set anew: cheaper than moving it each time.
                return
            self._timer.cancel()
        self._timer = None if at is None else self._loop.call_at(at, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self.handle(TimerFired())

    def _carry_out(self, instruction: Instruction) -> None:
        match instruction:
            case OpenRound():
                self._opened(instruction)
            case SendAssignment():
                frame = Assignment(
                    round=instruction.round,
                    task=instruction.task,
                    **place(instruction.body),
                    attempt=instruction.attempt,
                    deadline_s=instruction.deadline_s,
                ).to_frame()
                self._fleet.send(instruction.agents, frame, is_assignment=True)
                self._send_body(instruction.agents, instruction.body, "assignment", instruction.round)
            case TellPart(request_id, round_id, result):
                if (asking := self._asks.get(request_id)) is not None and asking.is_heard:
                    asking.tell(Part(round=round_id, result=self.shelf.fill_result(as_told(result))))
            case SendCancellation():
                frame = Cancellation(round=instruction.round, reason=clip_text(instruction.reason)).to_frame()
                self._fleet.send(instruction.agents, frame)
                self._fleet.stop_bodies(instruction.agents, instruction.round)
            case CloseRound(outcome):
                self._closed(outcome)
            case SendFeedback():
                self.feedback_total[instruction.task] += 1
                truth = place(instruction.truth, "truth")
                frame = Feedback(round=instruction.round, task=instruction.task, **truth).to_frame()
                # The next assignment usually follows at once: both in one packet wake an agent once.
                self._fleet.send(instruction.agents, frame, hurried=False)
                self._send_body(instruction.agents, instruction.truth, "feedback", instruction.round)
            case LearnTruth():
                self._learn(instruction)
            case RejectRequest():
                error = CallFailed(instruction.reason, instruction.message, retry=instruction.retry)
                self._answer_error(instruction.request_id, error)
            case NoteStray(kind, round_id, agent):
                log.debug("stray_reply", kind=kind, round=round_id, agent=agent)
            case OfferLateReply():
                self._record(self.ledger.take_late(instruction))
            case NoteForgotten(round_id):
                self.ledger.forget(round_id)
            case AnnounceDrained():
                if not self._drained.done():
                    self._drained.set_result(None)
            case _:
                assert_never(instruction)

    def _send_body(self, agents: tuple[str, ...], body: Body, of: BulkOf, round_id: int) -> None:
        if isinstance(body, BodyRef):
            blob = self.shelf.find(body)
            assert blob is not None, "questions are held while their rounds are in flight, truths while they are told"
            self._fleet.send_body(agents, blob, header_for(blob, of, round=round_id))

    def _opened(self, opened: OpenRound) -> None:
        asking = self._asks[opened.request_id]
        try:
            self._numbers.use(opened.round)
        except ConfigurationError as error:
            # The round goes on and its operator waits; a later run may use its number again.
            log.error("round_numbers_not_reserved", problem=str(error))
        self._record(self.ledger.open(opened, asking.question))
        asking.tell(
            Opened(
                round=opened.round,
                selected=list(opened.selected),
                quorum=opened.policy.quorum,
                deadline_s=opened.policy.deadline_s,
            )
        )

    def _closed(self, closed: BookOutcome) -> None:
        for result in closed.results:
            self.replies_total[closed.task, result.status] += 1
            self._count_reply(result.agent, result.status)
        self.rounds_total[closed.task, closed.state] += 1
        self._observe_duration(closed.task, closed.duration_s)
        log.debug(
            "round_closed", round=closed.round, task=closed.task, state=closed.state, duration_s=closed.duration_s
        )
        self.shelf.drop(("question", closed.request_id))
        asking = self._asks.get(closed.request_id)  # none where its opening could not be carried out
        question = Question() if asking is None else asking.question
        record, outcome = self.ledger.close(closed, question)
        if question.key is not None and not is_final(outcome):
            # Whoever asks again from now on wants a new round, and not to hear how this one came to nothing.
            self._keys.drop(question.key, closed.request_id)
        self._record(record, Announcement(closed.request_id, outcome))

    def _count_reply(self, agent: str, status: str) -> None:
        self.agent_replies_total[agent, status] += 1
        self._counted.setdefault(agent, set()).add(status)
        self._counted.move_to_end(agent)
        if len(self._counted) > AGENTS_COUNTED_MAX:
            forgotten, statuses = self._counted.popitem(last=False)
            for old in statuses:
                del self.agent_replies_total[forgotten, old]

    def _learn(self, instruction: LearnTruth) -> None:
        record, revealed = self.ledger.learn(instruction)
        answer: Revealed | CallFailed
        if revealed is not None:
            answer = revealed
        else:
            message = f"the learner failed to learn from round {record.round}; the coordinator's log says more"
            answer = CallFailed("internal", message)
        # The truth is told either way: once that was said, it is not taken again.
        self._record(record, Announcement(instruction.request_id, answer))

    # --- recording ---

    def _record(self, record: Record, announcement: Announcement | None = None) -> None:
        """Has something written down; what is to be announced because of it waits for that."""
        if self._recorder is None:
            if announcement is not None:
                self._announce(announcement)
            return
        seq = self._last_seq = self._recorder.append(record, time.time(), hurried=announcement is not None)
        if announcement is not None:
            self.ledger.hold(seq, announcement)
            if self.recording_problem:
                self._answer_unrecorded(announcement)
        if self._recorder.is_checkpoint_due:
            self.checkpoint()

    def checkpoint(self) -> None:
        """Has the learner's state written down: a restart replays what comes after it only."""
        if self._recorder is not None and self._last_seq != self._checkpoint_seq:
            self._checkpoint_seq = self._last_seq
            try:
                self._recorder.append_checkpoint(self._last_seq, self.learner.snapshot)
            except Exception:
                # The records are there: a restart takes longer, and that is all.
                log.exception("checkpoint_failed", seq=self._last_seq)

    def committed(self, seq: int) -> None:
        """The journal has made all records up to `seq` durable."""
        self.records_total += seq - self._committed_seq
        self._committed_seq = seq
        self.commits_total += 1
        for announcement in self.ledger.committed(seq):
            self._announce(announcement)

    def recording_failed(self, problem: str) -> None:
        """Records cannot be made durable: nothing is taken until they can, and who waits is told."""
        log.error("recording_failed", problem=problem)
        self.recording_problem = problem
        for announcement in self.ledger.unannounced():
            self._answer_unrecorded(announcement)

    def recording_recovered(self) -> None:
        """Records are durable again, those from before among them."""
        log.info("recording_recovered")
        self.recording_problem = ""

    def _announce(self, announcement: Announcement) -> None:
        answer = announcement.answer
        if isinstance(answer, CallFailed):
            self._answer_error(announcement.request_id, answer)
            return
        if isinstance(answer, Revealed):
            revealing = self._reveals.get(announcement.request_id)
            if revealing is not None and not revealing.done():
                revealing.set_result(answer)
            return
        asking = self._asks.pop(announcement.request_id, None)
        if asking is not None:
            if asking.question.key is not None:
                self._keys.keep(asking.question.key, announcement.request_id, answer)
                if is_final(answer):
                    self.shelf.keep(asking.question.key, answer)
            asking.answer(self.shelf.fill_outcome(answer))
        self.shelf.drop(("answers", answer.round))

    def _answer_unrecorded(self, announcement: Announcement) -> None:
        """Answers who waits. The announcement stays held: a key is that round's until it is known whether it lasts."""
        answer, why = announcement.answer, self.recording_problem
        if isinstance(answer, Revealed | CallFailed):
            message = f"the truth is told, but that cannot be recorded now: {why}"
            self._answer_error(announcement.request_id, CallFailed("not-recorded", message, retry=True))
        elif (asking := self._asks.get(announcement.request_id)) is not None:
            again = "ask again later" + ("" if asking.question.key is None else " under the same key")
            message = f"round {answer.round} is over, but that cannot be recorded now: {why}; {again}"
            asking.fail(CallFailed("not-recorded", message, retry=True))


def _failure() -> CallFailed:
    return CallFailed("internal", "the coordinator failed; its log says more")
