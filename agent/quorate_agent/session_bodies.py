"""The large bodies of a session's time on one connection: questions and truths that come, answers that go."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from typing import Any, Final

import structlog

from quorate_agent import events as ev
from quorate_protocol.blobs import Blob, BlobStore
from quorate_protocol.bulk import BulkInbox, header_for, patience_s, send_blob
from quorate_protocol.errors import Code, ConnectionClosed, LinkError, ProtocolError, QuorateError, StoppedByPeer
from quorate_protocol.fields import Body, BodyRef
from quorate_protocol.limits import BODY_BYTES_MAX
from quorate_protocol.messages import Bulk
from quorate_protocol.transport import Connection

log = structlog.get_logger()

#: Bodies that are remembered as not wanted, the oldest go first: their streams come soon after, or never.
_REFUSED_MAX: Final = 256

#: Why a coordinator stops an answer that it does not need: its round is over, or it has it.
_NOT_WANTED: Final = (Code.CANCELLED, Code.UNEXPECTED_MESSAGE)

#: Why it stops one that it cannot have: the reply has `failed` there (SPEC.md, Bulk), at once or as soon as it comes.
_NOT_TAKEN: Final = (Code.BUSY, Code.BODY_INVALID)

#: Seconds that reading what had come before the connection's end may take.
_READ_OUT_TIMEOUT_S: Final = 1.0


class SessionBodies:
    """See the module.

    Args:
        connection: The session's.
        store: Where what comes goes.
        agent_id: For logs.
        apply: Takes `BodyReceived`, `BodyFailed` and `ReplyBodyDelivered`.
    """

    def __init__(
        self, connection: Connection, store: BlobStore, agent_id: str, apply: Callable[[ev.Event], None]
    ) -> None:
        self._connection = connection
        self._agent_id = agent_id
        self._apply = apply
        self._inbox = BulkInbox(store, is_wanted=self._is_wanted, on_fault=self._note_fault)
        self._refused: OrderedDict[tuple[str, int], None] = OrderedDict()
        #: By what they are of and round: `reply` goes, the others come.
        self._tasks: dict[tuple[str, int], asyncio.Task[None]] = {}

    async def serve(self) -> None:
        """Takes what comes.

        Raises:
            ConnectionClosed: it is over.
        """
        await self._inbox.serve(self._connection)

    def execute(self, instruction: ev.ReceiveBody | ev.RefuseBody | ev.StopBodies) -> None:
        """Does what the core asks."""
        match instruction:
            case ev.ReceiveBody(of, round_id, ref, timeout_s):
                self._refused.pop((of, round_id), None)
                self._begin(of, round_id, self._receive(of, round_id, ref, timeout_s))
            case ev.RefuseBody(of, round_id, ref):
                self._refuse(of, round_id)
                self._inbox.drop(ref)
            case ev.StopBodies(round_id):
                self._refuse("assignment", round_id)
                self._cancel("assignment", round_id)
                self._cancel("reply", round_id)

    def send(self, round_id: int, attempt: int, ref: BodyRef) -> None:
        """Sends the body of a reply, whose frame goes before."""
        self._begin("reply", round_id, self._send(round_id, attempt, ref))

    async def end(self) -> None:
        """The connection is over, or not wanted any more. What has come whole is told."""
        self._inbox.end(ConnectionClosed(Code.NO_ERROR, "the link is over"))
        for of, round_id in list(self._tasks):
            if of == "reply":
                self._cancel(of, round_id)
        if self._tasks and self._connection.is_closed:
            await asyncio.wait(list(self._tasks.values()), timeout=_READ_OUT_TIMEOUT_S)
        for of, round_id in list(self._tasks):
            self._cancel(of, round_id)
        self._inbox.close()

    def _begin(self, of: str, round_id: int, work: Coroutine[Any, Any, None]) -> None:
        self._cancel(of, round_id)
        task = self._tasks[of, round_id] = asyncio.create_task(work, name=f"{of} body of round {round_id}")
        task.add_done_callback(lambda done: self._ended(of, round_id, done))

    def _cancel(self, of: str, round_id: int) -> None:
        task = self._tasks.pop((of, round_id), None)
        if task is not None:
            task.cancel()

    def _ended(self, of: str, round_id: int, task: asyncio.Task[None]) -> None:
        if self._tasks.get((of, round_id)) is task:
            del self._tasks[of, round_id]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("body_failed", agent=self._agent_id, round=round_id, exc_info=error)

    async def _receive(self, of: ev.BodyOf, round_id: int, ref: BodyRef, timeout_s: float | None) -> None:
        try:
            blob = await self._inbox.get(ref, patience_s(ref) if timeout_s is None else timeout_s)
        except LinkError as error:
            log.debug("body_cut_off", agent=self._agent_id, round=round_id, reason=str(error))
            return
        except QuorateError as error:
            log.warning("body_not_received", agent=self._agent_id, round=round_id, problem=str(error))
            self._apply(ev.BodyFailed(of, round_id, f"the {of}'s body did not come: {error}"))
            return
        body: Body = bytes(blob.view()) if ref.size <= BODY_BYTES_MAX else ref.with_content(blob)
        self._apply(ev.BodyReceived(of, round_id, body))

    async def _send(self, round_id: int, attempt: int, ref: BodyRef) -> None:
        blob = ref.content
        assert isinstance(blob, Blob), "answers are here"
        try:
            await send_blob(self._connection, blob, header_for(blob, "reply", round=round_id))
        except StoppedByPeer as error:
            if error.code in _NOT_WANTED:
                log.debug("answer_not_wanted", agent=self._agent_id, round=round_id, reason=str(error))
            elif error.code in _NOT_TAKEN:
                log.warning("answer_not_taken", agent=self._agent_id, round=round_id, reason=str(error))
            else:
                # Nobody can tell what has become of the reply: it is sent again over the next link.
                log.error("answer_stopped", agent=self._agent_id, round=round_id, reason=str(error))
                return
        except LinkError as error:
            log.debug("answer_cut_off", agent=self._agent_id, round=round_id, reason=str(error))
            return
        except OSError as error:
            # The coordinator counts it as failed, as one that was reset.
            log.error("answer_not_read", agent=self._agent_id, round=round_id, problem=str(error))
        self._apply(ev.ReplyBodyDelivered(round_id, attempt))

    def _refuse(self, of: str, round_id: int) -> None:
        self._refused[of, round_id] = None
        if len(self._refused) > _REFUSED_MAX:
            self._refused.popitem(last=False)

    def _is_wanted(self, header: Bulk) -> bool:
        return header.of in ("assignment", "feedback") and (header.of, header.round) not in self._refused

    def _note_fault(self, error: ProtocolError) -> None:
        log.warning("body_spoiled", agent=self._agent_id, problem=str(error))
