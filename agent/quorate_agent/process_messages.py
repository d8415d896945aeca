"""What an agent and the processes of its handlers say to each other: dataclasses, as msgpack frames on a socket pair.

Bodies are bytes here as they are on the wire: the child unpacks them and packs the answer. Nothing is pickled. Large
ones go the same way, with their digest: they are copied, and one frame, which is 4 GiB at most, holds them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

from quorate_agent.events import (
    CancelHandler,
    HandlerDeclined,
    HandlerFailed,
    HandlerReturned,
    StartAssignment,
    StartFeedback,
)
from quorate_protocol.blobs import Blob
from quorate_protocol.bulk import ref_to
from quorate_protocol.fields import BodyRef
from quorate_protocol.frames import FrameDecoder, encode_frame

#: As much as a length prefix can say. Both ends are one program, and what a peer sent was bounded where it came in.
_FRAME_BYTES_MAX: Final = 2**32 - 1


@dataclass(frozen=True, slots=True)
class Load:
    """The first that a child hears: what to load, and to look like its parent meanwhile."""

    #: As `load_agent` takes it.
    target: str
    settings: Mapping[str, str]
    #: Tasks whose handlers it must have, and tasks whose feedback handlers.
    tasks: list[str]
    feedback_tasks: list[str]
    agent_id: str
    #: `sys.argv`, which the user's module may read.
    argv: list[str]
    #: Level and format of the log; empty when the parent did not set it up.
    log: list[str]


@dataclass(frozen=True, slots=True)
class Loaded:
    """The child has the agent and works."""


@dataclass(frozen=True, slots=True)
class LoadingFailed:
    """The child does not have the agent, and ends."""

    problem: str


ToChild = Load | StartAssignment | StartFeedback | CancelHandler
FromChild = Loaded | LoadingFailed | HandlerReturned | HandlerDeclined | HandlerFailed

#: Keys that hold bodies.
_BODIES: Final = ("body", "truth")

_KINDS: Final[dict[str, type[Any]]] = {
    kind.__name__: kind
    for kind in (
        Load,
        Loaded,
        LoadingFailed,
        StartAssignment,
        StartFeedback,
        CancelHandler,
        HandlerReturned,
        HandlerDeclined,
        HandlerFailed,
    )
}


def pack(message: ToChild | FromChild) -> bytes:
    """One frame.

    Raises:
        LocalError: a value has no msgpack form.
    """
    values = {field.name: _plain(getattr(message, field.name)) for field in fields(message)}
    return encode_frame({"type": type(message).__name__, **values}, frame_bytes_max=_FRAME_BYTES_MAX)


def _plain(value: Any) -> Any:
    if not isinstance(value, BodyRef):
        return value
    assert value.content is not None, "bodies are handed on when they are there"
    return [value.digest, bytes(value.content.view())]


class Unpacker:
    """Cuts what comes over the socket into messages."""

    def __init__(self) -> None:
        self._decoder = FrameDecoder(frame_bytes_max=_FRAME_BYTES_MAX)

    def feed(self, data: bytes) -> list[Any]:
        """The messages that these bytes complete, in order.

        Raises:
            FrameMalformed: something else wrote to the socket.
            KeyError, TypeError: likewise.
        """
        messages = []
        for values in self._decoder.feed(data):
            kind = _KINDS[values.pop("type")]
            for name in _BODIES:
                if isinstance(values.get(name), list):
                    digest, content = values[name]
                    blob = Blob(len(content), digest, parts=(content,))
                    values[name] = ref_to(blob).with_content(blob)
            messages.append(kind(**values))
        return messages
