"""A call for a round that is under way, and who waits for it."""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from quorate_coordinator.fitting import fit
from quorate_coordinator.ledger import Question
from quorate_protocol.errors import CallFailed
from quorate_protocol.messages import Message, Opened, Outcome, Part

#: Takes what a streamed call is told before its outcome.
Listener = Callable[[Opened | Part], None]


class Asking:
    """One round that somebody asked for. Several may wait for it, under the same key.

    Args:
        request_id: The call's number.
        question: Its key.
        cancel: Called when nobody wants the round any more.
    """

    def __init__(self, request_id: int, question: Question, cancel: Callable[["Asking"], None]) -> None:
        self.request_id: Final = request_id
        self.question: Final = question
        #: Done once the outcome is durable, or with `CallFailed`.
        self.outcome: Final[asyncio.Future[Outcome]] = asyncio.get_running_loop().create_future()
        #: The round, once it is open.
        self.opened: Opened | None = None
        #: Since when nobody waits, on the loop's clock; None while somebody does.
        self.deserted_at: float | None = None
        self._fitted: asyncio.Future[tuple[Message, bytes]] | None = None
        self._cancel = cancel
        self._waiting = 0
        #: Of those who waited, how many are gone and may come back.
        self._away = 0
        self._listeners: list[Listener] = []

    def join(self, listener: Listener | None) -> None:
        """One more waits. A listener that joins late hears of the opening, and of the parts that end from now on."""
        self._waiting += 1
        self.deserted_at = None
        self._away = max(0, self._away - 1)  # the same question under the same key: it is one of them
        if listener is not None:
            self._listeners.append(listener)
            if self.opened is not None and not self.outcome.done():
                listener(self.opened)

    @property
    def is_heard(self) -> bool:
        """Whether anybody listens."""
        return bool(self._listeners)

    def tell(self, message: Opened | Part) -> None:
        """Tells all listeners."""
        if isinstance(message, Opened):
            self.opened = message
        for listener in self._listeners:
            listener(message)

    def withdraw(self, listener: Listener | None) -> None:
        """Somebody who waited does not want it any more. When nobody does, the round is cancelled.

        It goes on for who is gone and may come back.
        """
        self._leave(listener, cancels=self._away == 0)

    def leave(self, listener: Listener | None) -> None:
        """Somebody who waited is gone, and may come back for a round that has a key. Any other is cancelled."""
        has_key = self.question.key is not None
        self._away += has_key
        self._leave(listener, cancels=not has_key)

    def _leave(self, listener: Listener | None, *, cancels: bool) -> None:
        self._waiting -= 1
        if listener is not None:
            self._listeners.remove(listener)
        if self._waiting > 0 or self.outcome.done():
            return
        self.deserted_at = asyncio.get_running_loop().time()
        if cancels:
            self._cancel(self)

    async def fitted(self) -> tuple[Message, bytes]:
        """The outcome as it is told, and its frame: one for all who wait.

        Raises:
            CallFailed: there is none.
        """
        if self._fitted is None:
            self._fitted = asyncio.ensure_future(fit(await asyncio.shield(self.outcome)))
        return await asyncio.shield(self._fitted)

    def answer(self, outcome: Outcome) -> None:
        """It is over and durable."""
        if not self.outcome.done():
            self.outcome.set_result(outcome)

    def fail(self, error: CallFailed) -> None:
        """There is no outcome, or none that may be told."""
        if not self.outcome.done():
            self.outcome.set_exception(error)
            self.outcome.exception()  # whoever waits sees it; nobody may


def deserted_rounds(asks: Iterable[Asking], moment: float) -> Iterator[int]:
    """Rounds whose outcome is still to come, and that nobody has waited for since then; the longest left first."""
    deserted = [
        (ask.deserted_at, ask.opened.round)
        for ask in asks
        if ask.opened is not None and ask.deserted_at is not None and not ask.outcome.done()
    ]
    for deserted_at, round_id in sorted(deserted):
        if deserted_at <= moment:
            yield round_id
