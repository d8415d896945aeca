"""The messages of ALPN `quorate/1`: what may stand in a frame.

Every message is a frozen pydantic model whose `type` names it on the wire. Keys that a version does
not know are ignored; a key with its default value may be left out. SPEC.md has the same in prose,
and `vectors/` has each message as bytes.
"""

from functools import cache
from typing import Annotated, Any, ClassVar, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator, model_validator

from quorate_protocol.bodies import decode_body
from quorate_protocol.errors import BodyMissing, MessageInvalid, UnknownType
from quorate_protocol.fields import (
    Attempt,
    Body,
    BodyRef,
    Count,
    Digest,
    InlineBody,
    Name,
    Number,
    PositiveSeconds,
    Role,
    RoundId,
    RoundState,
    Seconds,
    Status,
    Text,
)
from quorate_protocol.frames import encode_frame
from quorate_protocol.limits import LABELS_MAX, TASKS_MAX, TEXT_CHARS_MAX

#: Messages that have bodies.
BulkOf = Literal["assignment", "feedback", "reply", "ask", "reveal", "part", "outcome"]

#: The payload of a heartbeat datagram: the map `{"type": "pulse"}`, without a frame's length.
PULSE: Final = b"\x81\xa4type\xa5pulse"

_TYPES: dict[str, type["Message"]] = {}


class Message(BaseModel):
    """Base of all messages. Subclasses state their wire name: `class Hello(Message, type="hello")`."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    wire_type: ClassVar[str]

    def __init_subclass__(cls, type: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.wire_type = type
        _TYPES[type] = cls

    def to_frame(self) -> bytes:
        """The whole frame, prefix included; keys at their default are left out.

        Raises:
            FrameTooLarge: over the frame ceiling.
        """
        return encode_frame({"type": self.wire_type, **self.model_dump(exclude_defaults=True)})

    @classmethod
    def from_map(cls, raw: dict[str, Any]) -> Self:
        """Validates a decoded map as this message.

        Raises:
            MessageInvalid: a key is missing or wrong; the text names the key, never the value.
        """
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            raise MessageInvalid(cls.wire_type, _describe(error)) from None


def parse_message(raw: dict[str, Any]) -> Message:
    """The message that a decoded map is.

    Raises:
        UnknownType: no `type`, or one that this version does not know.
        MessageInvalid: known type, wrong content.
    """
    type_ = raw.get("type")
    model = _TYPES.get(type_) if isinstance(type_, str) else None
    if model is None:
        raise UnknownType(type_)
    return model.from_map(raw)


def clip_text(text: str) -> str:
    """`text`, shortened to what may travel as a reason or an error."""
    return text if len(text) <= TEXT_CHARS_MAX else text[: TEXT_CHARS_MAX - 1] + "…"


def _check_one(model: "Message | AgentResult", key: str, bulk: "BodyRef | None", *, required: bool = False) -> None:
    """Raises ValueError unless there is one of a body and a reference to one, or none where that is allowed."""
    body = getattr(model, key)
    if body is not None and bulk is not None:
        raise ValueError(f"both {key} and bulk are given, only one of them may be")
    if required and body is None and bulk is None:
        raise ValueError(f"neither {key} nor bulk is given, one of them must be")


def body_of(message: "Assignment | Feedback | Reply | Ask | Reveal") -> Body | None:
    """The body of a message: its bytes, or the reference in their place."""
    if message.bulk is not None:
        return message.bulk
    return message.truth if isinstance(message, Feedback | Reveal) else message.body


def _unpack(body: bytes | None, bulk: BodyRef | None) -> Any:
    """The value of a body; None without one. Large arrays are views of a body that came on a stream of its own.

    Raises:
        BodyMissing: the body is not here.
        FrameMalformed: it cannot be unpacked.
    """
    if bulk is None:
        return None if body is None else decode_body(body)
    if bulk.content is None:
        raise BodyMissing(bulk.size, is_gone=bulk.gone)
    return decode_body(bulk.content.view())


@cache
def message_types() -> dict[str, type[Message]]:
    """All wire types and their models, in the order of definition."""
    return dict(_TYPES)


def _describe(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    # A key of the peer's own making may stand in the path: it is shown short, and without what a terminal obeys.
    parts = [ascii(part)[1:-1][:64] if isinstance(part, str) else str(part) for part in first["loc"]]
    path = ".".join(parts) or "message"
    more = error.error_count() - 1
    return f"{path}: {first['msg']}" + (f" (and {more} more)" if more else "")


# --- control stream ------------------------------------------------------------------------------


class Resume(BaseModel):
    """The session that an agent wants to go on with, inside `hello`."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    session: Name
    #: The session's `welcome` said it. Never logged.
    secret: Annotated[str, StringConstraints(max_length=64)] = Field(repr=False)
    #: Frames that came on the session's coordination streams, all links together.
    received: Count = 0


class Hello(Message, type="hello"):
    """First frame of the first stream: who connects and what it can do."""

    role: Role = "agent"
    #: The agent's identity, or a name for the operator in logs.
    id: Name
    #: Bearer token. Never logged.
    token: Annotated[str, StringConstraints(max_length=TEXT_CHARS_MAX)] = Field(repr=False)
    #: Random for each process: tells a restarted agent from a second one that took its name.
    instance: Annotated[str, StringConstraints(max_length=64)] = ""
    labels: dict[Name, Text] = Field(default_factory=dict, max_length=LABELS_MAX)
    tasks: list[Name] = Field(default_factory=list, max_length=TASKS_MAX)
    #: Version of the software, for operators to see.
    software: Annotated[str, StringConstraints(max_length=64)] = ""
    #: From an agent that had a session and lost its link.
    resume: Resume | None = None

    @field_validator("tasks")
    @classmethod
    def _no_task_twice(cls, tasks: list[str]) -> list[str]:
        if len(set(tasks)) != len(tasks):
            raise ValueError("a task is named twice")
        return tasks


class Welcome(Message, type="welcome"):
    """The coordinator's answer to an accepted hello."""

    #: Names the membership in logs and in `coordination`.
    session: Name
    software: Annotated[str, StringConstraints(max_length=64)] = ""
    #: How often a pulse datagram is expected.
    pulse_s: PositiveSeconds
    #: How long silence may last before the agent counts as lost.
    lease_s: PositiveSeconds
    #: With what an agent resumes this session over another link; empty for operators. Never logged.
    secret: Annotated[str, StringConstraints(max_length=64)] = Field("", repr=False)
    #: Whether this is the session that the hello wanted to resume.
    resumed: bool = False
    #: Replies that came in the session before this link.
    received: Count = 0


class Refusal(Message, type="refusal"):
    """The coordinator's answer to a hello that it does not accept; it closes the connection."""

    #: `unauthenticated`, `bad-hello`, `draining`, `full`, `forbidden`.
    reason: Name
    message: Text
    #: Whether the same hello may be accepted later.
    retry: bool = False


class Drain(Message, type="drain"):
    """From the coordinator: no more assignments come; finish what you have. From an agent: send me none."""

    reason: Text = ""
    #: From the coordinator: leave for good, and do not come back by yourself.
    stop: bool = False


class Goodbye(Message, type="goodbye"):
    """The last frame: the sender leaves on purpose."""

    reason: Text = ""


# --- coordination stream -------------------------------------------------------------------------


class CoordinationOpened(Message, type="coordination"):
    """First frame of the agent's dedicated stream."""

    session: Name


class Assignment(Message, type="assignment"):
    """The broadcast of a round. Holds nothing that differs between agents: encoded once per round."""

    round: RoundId
    task: Name
    #: This, or `bulk` where it is too large to be inline.
    body: InlineBody | None = None
    bulk: BodyRef | None = None
    attempt: Attempt = 1
    #: Time left until the round's hard end when this was encoded.
    deadline_s: PositiveSeconds

    @model_validator(mode="after")
    def _one_body(self) -> Self:
        _check_one(self, "body", self.bulk, required=True)
        return self


class Cancellation(Message, type="cancellation"):
    """The round is over for this agent; a reply would be late."""

    round: RoundId
    reason: Text = ""


class Feedback(Message, type="feedback"):
    """The truth of a round that the agent was asked in. Always before the agent's next assignment."""

    round: RoundId
    task: Name
    #: This, or `bulk` where it is too large to be inline.
    truth: InlineBody | None = None
    bulk: BodyRef | None = None

    @model_validator(mode="after")
    def _one_truth(self) -> Self:
        _check_one(self, "truth", self.bulk, required=True)
        return self


class Reply(Message, type="reply"):
    """An agent's answer to an assignment, or why there is none."""

    round: RoundId
    attempt: Attempt = 1
    status: Literal["replied", "declined", "failed"] = "replied"
    #: With `replied`: this, or `bulk` where it is too large to be inline.
    body: InlineBody | None = None
    bulk: BodyRef | None = None
    #: With `declined` and `failed`: what to tell the operator.
    error: Text = ""
    #: Time the task's handler ran.
    compute_s: Seconds = 0.0
    #: Time the assignment waited at the agent because other handlers ran (earlier feedback, say).
    waited_s: Seconds = 0.0

    @model_validator(mode="after")
    def _one_body(self) -> Self:
        _check_one(self, "body", self.bulk)
        return self


# --- bulk streams --------------------------------------------------------------------------------


class Bulk(Message, type="bulk"):
    """First frame of a bulk stream; so many raw bytes, one body, follow it. A message refers to them."""

    #: Type of the message that does.
    of: BulkOf
    #: The round it belongs to; 0 with `ask`, whose round has no number yet.
    round: Annotated[int, Field(ge=0)] = 0
    #: Stream of the call it belongs to; 0 with what an agent sends or gets.
    call: Annotated[int, Field(ge=0)] = 0
    #: Bytes.
    size: Annotated[int, Field(ge=0)]
    digest: Digest

    @property
    def ref(self) -> BodyRef:
        """What the message holds in place of the body."""
        return BodyRef(size=self.size, digest=self.digest)


# --- streams of an agent's own ---------------------------------------------------------------------


class Modality(Message, type="modality"):
    """First frame of a unidirectional stream with data of an agent's own: audio, video, sensors. Raw bytes follow."""

    #: Names who takes it at the coordinator.
    topic: Name
    #: The round that it is about; 0 is none.
    round: Annotated[int, Field(ge=0)] = 0


class Telemetry(Message, type="telemetry"):
    """First frame of a unidirectional stream of experiences for the learner. `experience` frames follow."""

    topic: Name


class ExperienceTold(Message, type="experience"):
    """One experience, on a telemetry stream."""

    body: InlineBody


# --- call streams --------------------------------------------------------------------------------


class Ask(Message, type="ask"):
    """Open a round. Answered by `outcome` or `error`; where it is streamed, `opened` and `part`s go before."""

    task: Name
    #: This, or `bulk` where it is too large to be inline.
    body: InlineBody | None = None
    bulk: BodyRef | None = None
    #: Replies needed, as a count or as a share of the selected agents (rounded up); not both.
    quorum: Number | None = None
    quorum_fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    grace_s: Seconds | None = None
    deadline_s: PositiveSeconds | None = None
    #: Only agents that carry all of these labels with these values.
    labels: dict[Name, Text] = Field(default_factory=dict, max_length=LABELS_MAX)
    #: At most so many agents, those that the learner thinks best of.
    count: Number | None = None
    #: How often one agent may be given the assignment: again when it failed, or was lost and came back.
    attempts: Annotated[int, Field(ge=1, le=100)] | None = None
    #: Idempotency key: the same question under the same key is one round, however often it is asked.
    key: Name | None = None
    #: Whether the end of each agent's part is to be told as it comes.
    stream: bool = False

    @model_validator(mode="after")
    def _one_body(self) -> Self:
        _check_one(self, "body", self.bulk, required=True)
        return self


class Opened(Message, type="opened"):
    """The round of a streamed `ask` is open."""

    round: RoundId
    #: Sorted.
    selected: list[Name]
    quorum: Number
    #: Seconds until the hard end.
    deadline_s: PositiveSeconds


class AgentResult(BaseModel):
    """One selected agent's part in an outcome."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    agent: Name
    status: Status
    #: This, or `bulk`, where there is one.
    body: InlineBody | None = None
    bulk: BodyRef | None = None
    error: Text = ""
    #: From sending the assignment to receiving the reply, at the coordinator.
    latency_s: Seconds | None = None
    compute_s: Seconds = 0.0
    waited_s: Seconds = 0.0
    #: The learner's weight when the answer was combined.
    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None

    @model_validator(mode="after")
    def _one_body(self) -> Self:
        _check_one(self, "body", self.bulk)
        return self

    @property
    def value(self) -> Any:
        """The unpacked body; None without one."""
        return _unpack(self.body, self.bulk)


class Part(Message, type="part"):
    """One agent's part in the round of a streamed `ask` has ended. The outcome has it again, and is what counts."""

    round: RoundId
    result: AgentResult


class Outcome(Message, type="outcome"):
    """How a round ended: answers `ask`."""

    round: RoundId
    task: Name
    state: RoundState
    quorum: Number
    #: The combined answer: this, or `bulk` where it is too large to be inline; neither unless quorum was met.
    answer: InlineBody | None = None
    bulk: BodyRef | None = None
    #: Share of the weight of all who replied that stands behind the answer.
    support: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    #: Sorted by agent.
    results: list[AgentResult]
    #: How many more there are, of the last agents in that order, that had no room in the frame.
    left_out: Count = 0
    #: From opening to closing, at the coordinator.
    duration_s: Seconds
    #: With a state other than complete and quorate: what went wrong.
    reason: Text = ""

    @model_validator(mode="after")
    def _one_answer(self) -> Self:
        _check_one(self, "answer", self.bulk)
        return self

    @property
    def value(self) -> Any:
        """The unpacked answer; None without one."""
        return _unpack(self.answer, self.bulk)


class Reveal(Message, type="reveal"):
    """Tell the truth of a round. Answered by `revealed` or `error`."""

    round: RoundId
    #: This, or `bulk` where it is too large to be inline.
    truth: InlineBody | None = None
    bulk: BodyRef | None = None

    @model_validator(mode="after")
    def _one_truth(self) -> Self:
        _check_one(self, "truth", self.bulk, required=True)
        return self


class Revealed(Message, type="revealed"):
    """The learner has scored the round's agents."""

    round: RoundId
    #: Whether the combined answer was right; None where there was none.
    correct: bool | None = None
    #: Whether each agent that replied was right.
    right: dict[Name, bool] = Field(default_factory=dict)
    #: Weights after learning, by agent, for the round's task.
    weights: dict[Name, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = Field(default_factory=dict)
    #: How many agents are missing from both, because they had no room in a frame.
    left_out: Count = 0


class Agents(Message, type="agents"):
    """Ask for a listing of the fleet. Answered by `fleet`."""


class AgentInfo(BaseModel):
    """One agent in a listing."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    agent: Name
    state: Literal["connected", "suspect", "draining", "lost", "left"]
    labels: dict[Name, Text] = Field(default_factory=dict)
    tasks: list[Name] = Field(default_factory=list)
    address: Text = ""
    software: Text = ""
    connected_s: Seconds = 0.0
    last_seen_s: Seconds = 0.0
    assignments: Annotated[int, Field(ge=0)] = 0
    replies: Annotated[int, Field(ge=0)] = 0
    latency_p50_s: Seconds | None = None
    latency_p99_s: Seconds | None = None
    #: The learner's weight, by task.
    weights: dict[Name, float] = Field(default_factory=dict)


class Fleet(Message, type="fleet"):
    """A listing of the fleet: answers `agents`."""

    software: Text
    uptime_s: Seconds
    draining: bool = False
    rounds_open: Annotated[int, Field(ge=0)]
    rounds_closed: dict[str, int] = Field(default_factory=dict)
    agents: list[AgentInfo]
    #: How many agents more there are that had no room in a frame: those with the most labels, tasks and weights.
    left_out: Count = 0


class DrainAgent(Message, type="drain-agent"):
    """Ask an agent to finish what it has and to leave for good. Answered by `draining` or `error`."""

    agent: Name
    reason: Text = ""


class Draining(Message, type="draining"):
    """The agent has been told, or will be when it returns; `agents` shows when it has left."""

    agent: Name


class CallError(Message, type="error"):
    """A call that could not be done. It changed nothing, unless the reason is `not-recorded`."""

    #: `bad-request`, `no-agents`, `busy`, `draining`, `unknown-round`, `already-revealed`,
    #: `still-open`, `forbidden`, `unknown-agent`, `not-recorded`, `internal`.
    reason: Name
    message: Text
    #: Whether the same call may succeed later.
    retry: bool = False
