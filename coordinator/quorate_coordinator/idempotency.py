"""Questions that were asked under a key: asked again, they are the same round. Pure."""

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from quorate_coordinator.ledger import Question
from quorate_protocol.errors import CallFailed
from quorate_protocol.fields import BodyRef
from quorate_protocol.messages import Ask, Outcome

#: Outcomes that are kept for who asks again, the oldest go first. The journal, where there is one, has older ones.
KEPT_MAX: Final = 10_000
#: Bytes of answers that those hold together.
KEPT_BYTES_MAX: Final = 64 << 20

#: What an outcome costs beside its bodies, and each of its results, in bytes.
_OUTCOME_BYTES: Final = 1024
_RESULT_BYTES: Final = 256

#: States that are no answer: whoever asks again wants a round.
_NOT_FINAL: Final = ("cancelled", "interrupted")


def digest_of(ask: Ask) -> bytes:
    """Tells whether two asks are the same question, 16 bytes: everything but the key and whether it is streamed.

    Of the body it takes size and SHA-256, so that it is the same whether that comes inline or on a stream of its own.
    """
    if ask.bulk is not None:
        ref = BodyRef(size=ask.bulk.size, digest=ask.bulk.digest)
    else:
        body = ask.body or b""
        ref = BodyRef(size=len(body), digest=hashlib.sha256(body).digest())
    return _digest(ask.model_copy(update={"body": None, "bulk": ref}))


def question_of(ask: Ask) -> Question:
    """What an ask says beside its round."""
    return Question() if ask.key is None else Question(ask.key, digest_of(ask))


def earlier_digest_of(ask: Ask) -> bytes:
    """The same as it was recorded before bodies were digested by themselves: over the body as it came."""
    return _digest(ask)


def _digest(ask: Ask) -> bytes:
    same = ask.model_copy(update={"key": None, "stream": False, "labels": dict(sorted(ask.labels.items()))})
    return hashlib.blake2b(same.to_frame(), digest_size=16).digest()


def is_final(outcome: Outcome) -> bool:
    """Whether a round with this outcome answers its key for good."""
    return outcome.state not in _NOT_FINAL


@dataclass(slots=True)
class Keyed:
    """One key."""

    digest: bytes
    #: The call whose round is in flight, or waits to be recorded; None once the outcome is announced.
    request_id: int | None
    outcome: Outcome | None = None
    size_bytes: int = 0


class Keys:
    """Keys that are in flight, and those whose outcome was announced lately."""

    def __init__(self, *, kept_max: int = KEPT_MAX, kept_bytes_max: int = KEPT_BYTES_MAX) -> None:
        self._kept_max: Final = kept_max
        self._kept_bytes_max: Final = kept_bytes_max
        self._in_flight: dict[str, Keyed] = {}
        self._kept: OrderedDict[str, Keyed] = OrderedDict()
        self._kept_bytes = 0

    def __len__(self) -> int:
        return len(self._in_flight) + len(self._kept)

    def find(self, key: str, digest: bytes) -> Keyed | None:
        """What is known of a key.

        Raises:
            CallFailed: another question was asked under it.
        """
        keyed = self._in_flight.get(key) or self._kept.get(key)
        if keyed is not None:
            check_same(key, keyed.digest, digest)
        return keyed

    def open(self, key: str, digest: bytes, request_id: int) -> None:
        """A round is asked for under a key that is not in flight."""
        assert key not in self._in_flight
        self._drop_kept(key)
        self._in_flight[key] = Keyed(digest, request_id)

    def drop(self, key: str, request_id: int) -> None:
        """There was no round, or it came to nothing: the key is free, where another call has not taken it since."""
        keyed = self._in_flight.get(key)
        if keyed is not None and keyed.request_id == request_id:
            del self._in_flight[key]

    def keep(self, key: str, request_id: int, outcome: Outcome) -> None:
        """The outcome of a call under a key was announced."""
        keyed = self._in_flight.get(key)
        if keyed is None or keyed.request_id != request_id or not is_final(outcome):
            self.drop(key, request_id)
            return
        del self._in_flight[key]
        bodies = sum(len(result.body or b"") + len(result.error) for result in outcome.results)
        keyed.request_id, keyed.outcome = None, outcome
        keyed.size_bytes = _OUTCOME_BYTES + _RESULT_BYTES * len(outcome.results) + bodies + len(outcome.answer or b"")
        self._drop_kept(key)
        self._kept[key] = keyed
        self._kept_bytes += keyed.size_bytes
        while len(self._kept) > self._kept_max or self._kept_bytes > self._kept_bytes_max:
            self._drop_kept(next(iter(self._kept)))

    def _drop_kept(self, key: str) -> None:
        old = self._kept.pop(key, None)
        if old is not None:
            self._kept_bytes -= old.size_bytes


def check_same(key: str, known: bytes | None, *digests: bytes) -> None:
    """Whether the question that a key is known for is this one, by any of its digests.

    Raises:
        CallFailed: it is another.
    """
    if known not in digests:
        message = f"key: {key!r} was used for another question, or with other options; take a new key for this one"
        raise CallFailed("bad-request", message)
