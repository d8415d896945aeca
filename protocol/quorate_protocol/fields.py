"""What messages are made of: names, numbers and texts with their bounds, states, and the bodies in them. Pure."""

from typing import Annotated, Any, Literal, Protocol, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, StringConstraints

from quorate_protocol.limits import BODY_BYTES_MAX, NAME_BYTES_MAX, SECONDS_MAX, TEXT_CHARS_MAX

#: Agent ids, tasks, label keys: printable ASCII without space, so that they can stand in logs,
#: metrics, subjects and shell commands as they are.
Name = Annotated[
    str, StringConstraints(min_length=1, max_length=NAME_BYTES_MAX, pattern=r"^[A-Za-z0-9][A-Za-z0-9._:@/+-]*$")
]
Text = Annotated[str, StringConstraints(max_length=TEXT_CHARS_MAX)]
#: A body inside a message.
InlineBody = Annotated[bytes, Field(max_length=BODY_BYTES_MAX)]
#: SHA-256.
Digest = Annotated[bytes, Field(min_length=32, max_length=32)]
RoundId = Annotated[int, Field(ge=1, le=(1 << 63) - 1)]
#: Of replies that are needed, or of agents that are asked.
Number = Annotated[int, Field(ge=1, le=(1 << 63) - 1)]
Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0, le=SECONDS_MAX, allow_inf_nan=False)]
Attempt = Annotated[int, Field(ge=1, le=1000)]
PositiveSeconds = Annotated[float, Field(gt=0, le=SECONDS_MAX, allow_inf_nan=False)]

Role = Literal["agent", "operator", "observer"]

#: How each selected agent's part in a round ends; exactly one of these.
Status = Literal["replied", "declined", "failed", "late", "lost", "cancelled", "unavailable"]

#: How a round ends.
RoundState = Literal["complete", "quorate", "expired", "failed", "cancelled", "interrupted"]


class Content(Protocol):
    """The bytes of a body, wherever they are: a `Blob`."""

    @property
    def is_on_disk(self) -> bool:
        """Whether they take no memory."""
        ...

    def view(self) -> memoryview:
        """All of them, without a copy."""
        ...


class BodyRef(BaseModel):
    """Stands in place of a body that travels on a stream of its own.

    Equal where size and digest are. One that a process has received may carry the body's content, which stays as long
    as the reference; it never travels with it.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    #: Bytes.
    size: Annotated[int, Field(ge=0)]
    digest: Digest
    #: Whether no stream follows: its content is not kept any more.
    gone: bool = False

    _content: Content | None = PrivateAttr(None)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BodyRef) and (self.digest, self.size) == (other.digest, other.size)

    def __hash__(self) -> int:
        return hash(self.digest)

    @property
    def content(self) -> Content | None:
        """The body, where it is here."""
        return self._content

    def with_content(self, content: Content) -> "BodyRef":
        """The same reference with its body."""
        ref = BodyRef.model_construct(size=self.size, digest=self.digest)
        ref._content = content
        return ref


#: A body as those know it who pass it on: its bytes, or what stands for them.
Body: TypeAlias = bytes | BodyRef


def inline_bytes(body: Body | None) -> int:
    """Bytes that a body takes in the memory of who holds it so; a reference takes next to none."""
    return len(body) if isinstance(body, bytes) else 0


def place(body: Body | None, key: str = "body") -> dict[str, Any]:
    """A body as keys of a message: as `key`, or as `bulk`; nothing without one."""
    if body is None:
        return {}
    return {"bulk": body} if isinstance(body, BodyRef) else {key: body}
