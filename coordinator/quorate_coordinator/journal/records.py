"""What the journal holds: five kinds of records, each a msgpack map of its fields. Pure.

A field that has its default is left out, and a key that is not known is passed over, so that a later version can add
fields. Times are seconds; floats are kept exactly. Bodies are opaque, as on the wire; of a large one, which was no
part of its message, size and digest are kept.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Self, TypeVar, get_args

import msgpack

from quorate_coordinator.journal.errors import RecordInvalid
from quorate_protocol.fields import Body, BodyRef, RoundState, Status

T = TypeVar("T")

_STATUSES: Final = get_args(Status)
_STATES: Final = get_args(RoundState)


@dataclass(frozen=True, slots=True)
class RoundOpened:
    """A round was opened: its agents are asked from now on."""

    kind: ClassVar[str] = "opened"

    round: int
    task: str
    #: What the agents are asked, packed, or a reference to it.
    body: Body
    #: All who were selected, sorted.
    selected: tuple[str, ...]
    #: Replies needed.
    quorum: int
    #: Seconds left to stragglers once quorum is met; None without grace.
    grace_s: float | None
    #: Seconds until the hard end.
    deadline_s: float
    #: Who asked.
    operator: str
    #: The operator's idempotency key.
    key: str | None = None
    #: Of what was asked: tells whether the same key asks the same.
    digest: bytes | None = None

    def encode(self) -> bytes:
        """Packs it.

        Raises:
            RecordInvalid: a field cannot be packed.
        """
        fields: dict[str, Any] = {
            "round": self.round,
            "task": self.task,
            "body": _plain(self.body),
            "selected": self.selected,
            "quorum": self.quorum,
            "deadline_s": self.deadline_s,
            "operator": self.operator,
        }
        _add_present(fields, grace_s=self.grace_s, key=self.key, digest=self.digest)
        return _pack(self.kind, fields)

    @classmethod
    def decode(cls, payload: bytes) -> Self:
        """Unpacks it.

        Raises:
            RecordInvalid: it is not what `encode` makes.
        """
        fields = _Fields(cls.kind, payload)
        return cls(
            round=fields.get("round", _count),
            task=fields.get("task", _text),
            body=fields.get("body", _body),
            selected=tuple(fields.get("selected", _texts)),
            quorum=fields.get("quorum", _count),
            grace_s=fields.find("grace_s", _seconds),
            deadline_s=fields.get("deadline_s", _seconds),
            operator=fields.get("operator", _text),
            key=fields.find("key", _text),
            digest=fields.find("digest", _bytes),
        )


@dataclass(frozen=True, slots=True)
class RecordedResult:
    """One selected agent's part in a closed round."""

    agent: str
    status: Status
    #: The answer, packed; with `replied` alone.
    body: Body | None = None
    #: With any other status: why, as far as known.
    error: str = ""
    #: Seconds from opening the round to receiving the reply; None without a reply in time.
    latency_s: float | None = None
    #: Seconds, as the agent says.
    compute_s: float = 0.0
    #: Seconds, as the agent says.
    waited_s: float = 0.0


@dataclass(frozen=True, slots=True)
class RoundClosed:
    """A round has ended, and this is what its operator is told."""

    kind: ClassVar[str] = "closed"

    round: int
    task: str
    state: RoundState
    #: Replies that were needed.
    quorum: int
    #: One for each selected agent, sorted.
    results: tuple[RecordedResult, ...]
    #: Seconds from opening to closing.
    duration_s: float
    #: With a state other than complete and quorate: what went wrong.
    reason: str = ""
    #: The combined answer, packed; None where there was none.
    answer: Body | None = None
    #: Share of weight behind the answer, 0 to 1; None without one.
    support: float | None = None
    #: Weight of each agent that replied, at closing.
    weights: Mapping[str, float] = field(default_factory=dict)
    #: As in `RoundOpened`.
    key: str | None = None
    #: As in `RoundOpened`.
    digest: bytes | None = None

    def encode(self) -> bytes:
        """Packs it; a result is a short array.

        Raises:
            RecordInvalid: a field cannot be packed.
        """
        fields: dict[str, Any] = {
            "round": self.round,
            "task": self.task,
            "state": self.state,
            "quorum": self.quorum,
            "results": [_short(result) for result in self.results],
            "duration_s": self.duration_s,
        }
        if self.reason:
            fields["reason"] = self.reason
        if self.weights:
            fields["weights"] = dict(self.weights)
        _add_present(fields, answer=_plain(self.answer), support=self.support, key=self.key, digest=self.digest)
        return _pack(self.kind, fields)

    @classmethod
    def decode(cls, payload: bytes) -> Self:
        """Unpacks it.

        Raises:
            RecordInvalid: it is not what `encode` makes.
        """
        fields = _Fields(cls.kind, payload)
        return cls(
            round=fields.get("round", _count),
            task=fields.get("task", _text),
            state=fields.get("state", _state),
            quorum=fields.get("quorum", _count),
            results=fields.get("results", _results),
            duration_s=fields.get("duration_s", _seconds),
            reason=fields.find("reason", _text) or "",
            answer=fields.find("answer", _body),
            support=fields.find("support", _seconds),
            weights=fields.find("weights", _weights) or {},
            key=fields.find("key", _text),
            digest=fields.find("digest", _bytes),
        )


@dataclass(frozen=True, slots=True)
class ReplyLate:
    """An answer that came after its agent's part had ended: the outcome stays, the learner takes it."""

    kind: ClassVar[str] = "late"

    round: int
    task: str
    agent: str
    #: Packed, or a reference to it.
    body: Body
    #: Seconds from opening the round to receiving this.
    latency_s: float
    #: Seconds, as the agent says.
    compute_s: float
    #: Seconds, as the agent says.
    waited_s: float

    def encode(self) -> bytes:
        """Packs it.

        Raises:
            RecordInvalid: a field cannot be packed.
        """
        return _pack(
            self.kind,
            {
                "round": self.round,
                "task": self.task,
                "agent": self.agent,
                "body": _plain(self.body),
                "latency_s": self.latency_s,
                "compute_s": self.compute_s,
                "waited_s": self.waited_s,
            },
        )

    @classmethod
    def decode(cls, payload: bytes) -> Self:
        """Unpacks it.

        Raises:
            RecordInvalid: it is not what `encode` makes.
        """
        fields = _Fields(cls.kind, payload)
        return cls(
            round=fields.get("round", _count),
            task=fields.get("task", _text),
            agent=fields.get("agent", _text),
            body=fields.get("body", _body),
            latency_s=fields.get("latency_s", _seconds),
            compute_s=fields.get("compute_s", _seconds),
            waited_s=fields.get("waited_s", _seconds),
        )


@dataclass(frozen=True, slots=True)
class TruthTold:
    """The truth of a closed round became known: its agents are scored."""

    kind: ClassVar[str] = "truth"

    round: int
    #: Packed, or a reference to it.
    truth: Body

    def encode(self) -> bytes:
        """Packs it.

        Raises:
            RecordInvalid: a field cannot be packed.
        """
        return _pack(self.kind, {"round": self.round, "truth": _plain(self.truth)})

    @classmethod
    def decode(cls, payload: bytes) -> Self:
        """Unpacks it.

        Raises:
            RecordInvalid: it is not what `encode` makes.
        """
        fields = _Fields(cls.kind, payload)
        return cls(round=fields.get("round", _count), truth=fields.get("truth", _body))


@dataclass(frozen=True, slots=True)
class ExperienceTaken:
    """The learner took what an agent told of its own accord, outside any round."""

    kind: ClassVar[str] = "experience"
    #: It belongs to none.
    round: ClassVar[None] = None

    agent: str
    topic: str
    #: Packed.
    body: bytes

    def encode(self) -> bytes:
        """Packs it.

        Raises:
            RecordInvalid: a field cannot be packed.
        """
        return _pack(self.kind, {"agent": self.agent, "topic": self.topic, "body": self.body})

    @classmethod
    def decode(cls, payload: bytes) -> Self:
        """Unpacks it.

        Raises:
            RecordInvalid: it is not what `encode` makes.
        """
        fields = _Fields(cls.kind, payload)
        return cls(agent=fields.get("agent", _text), topic=fields.get("topic", _text), body=fields.get("body", _bytes))


Record = RoundOpened | RoundClosed | ReplyLate | TruthTold | ExperienceTaken

#: By the name under which it is kept.
KINDS: Final[Mapping[str, type[Record]]] = {
    kind.kind: kind for kind in (RoundOpened, RoundClosed, ReplyLate, TruthTold, ExperienceTaken)
}


def decode_record(kind: str, payload: bytes) -> Record:
    """Unpacks a record of any kind.

    Raises:
        RecordInvalid: the kind is not known, or the payload is not what it has to be.
    """
    try:
        return KINDS[kind].decode(payload)
    except KeyError:
        raise RecordInvalid(kind, f"there is no such kind; there are {', '.join(KINDS)}") from None


def _pack(kind: str, fields: dict[str, Any]) -> bytes:
    try:
        return msgpack.packb(fields, use_bin_type=True)  # type: ignore[no-any-return]
    except (TypeError, ValueError, OverflowError) as error:
        raise RecordInvalid(kind, f"it cannot be packed: {error}") from error


def _add_present(fields: dict[str, Any], **optional: object) -> None:
    fields.update((name, value) for name, value in optional.items() if value is not None)


def _short(result: RecordedResult) -> list[object]:
    head: list[object] = [result.agent, result.status, _plain(result.body), result.error]
    if result.latency_s is None and not result.compute_s and not result.waited_s:
        return head
    return [*head, result.latency_s, result.compute_s, result.waited_s]


class _Fields:
    """A payload's map, read field by field."""

    def __init__(self, kind: str, payload: bytes) -> None:
        self._kind = kind
        try:
            fields = msgpack.unpackb(payload, raw=False)
        except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
            raise RecordInvalid(kind, f"it is not one msgpack value: {type(error).__name__}") from error
        if not isinstance(fields, dict):
            raise RecordInvalid(kind, f"it is not a map but a {type(fields).__name__}")
        self._fields: dict[Any, Any] = fields

    def get(self, name: str, read: Callable[[Any], T]) -> T:
        if name not in self._fields:
            raise RecordInvalid(self._kind, f"{name} is missing")
        try:
            return read(self._fields[name])
        except (ValueError, TypeError) as error:
            raise RecordInvalid(self._kind, f"{name} {error}") from None

    def find(self, name: str, read: Callable[[Any], T]) -> T | None:
        return None if self._fields.get(name) is None else self.get(name, read)


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"is no count: {value!r:.40}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"is no text: {value!r:.40}")
    return value


def _texts(value: Any) -> list[str]:
    if not isinstance(value, list):
        raise TypeError(f"is no list: {value!r:.40}")
    return [_text(one) for one in value]


def _bytes(value: Any) -> bytes:
    if not isinstance(value, bytes):
        raise TypeError(f"is not binary: {value!r:.40}")
    return value


def _plain(body: Body | None) -> object:
    """A body as msgpack has it."""
    return {"size": body.size, "digest": body.digest} if isinstance(body, BodyRef) else body


def _body(value: Any) -> Body:
    if not isinstance(value, dict):
        return _bytes(value)
    digest = _bytes(value.get("digest"))
    if len(digest) != 32:
        raise ValueError(f"has a digest of {len(digest)} bytes")
    return BodyRef(size=_count(value.get("size")), digest=digest)


def _seconds(value: Any) -> float:
    if type(value) not in (float, int):
        raise TypeError(f"is no number: {value!r:.40}")
    return float(value)


def _state(value: Any) -> RoundState:
    if value not in _STATES:
        raise ValueError(f"is no state of a closed round: {value!r:.40}")
    return value  # type: ignore[no-any-return]


def _status(value: Any) -> Status:
    if value not in _STATUSES:
        raise ValueError(f"is no status of an agent: {value!r:.40}")
    return value  # type: ignore[no-any-return]


def _weights(value: Any) -> dict[str, float]:
    if not isinstance(value, dict):
        raise TypeError(f"is no map: {value!r:.40}")
    return {_text(agent): _seconds(weight) for agent, weight in value.items()}


def _results(value: Any) -> tuple[RecordedResult, ...]:
    if not isinstance(value, list):
        raise TypeError(f"is no list: {value!r:.40}")
    return tuple(_result(one) for one in value)


def _result(value: Any) -> RecordedResult:
    if not isinstance(value, list) or len(value) < 4:
        raise TypeError(f"has one that is no list of at least four: {value!r:.40}")
    agent, status, body, error, latency_s, compute_s, waited_s = (
        [*value, None, 0.0, 0.0][:7] if len(value) < 7 else value[:7]
    )
    return RecordedResult(
        agent=_text(agent),
        status=_status(status),
        body=None if body is None else _body(body),
        error=_text(error),
        latency_s=None if latency_s is None else _seconds(latency_s),
        compute_s=_seconds(compute_s),
        waited_s=_seconds(waited_s),
    )
