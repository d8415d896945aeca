"""What driving rounds needs of the rest of the coordinator: a fleet to ask, and somewhere to write down."""

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from quorate_coordinator.journal.records import Record, RoundClosed
from quorate_protocol.blobs import Blob
from quorate_protocol.messages import Bulk


class Fleet(Protocol):
    """What rounds need of the fleet."""

    def select(self, task: str, labels: Mapping[str, str]) -> tuple[str, ...]:
        """Agents that can be asked now, sorted."""

    def select_away(self, task: str, labels: Mapping[str, str]) -> tuple[str, ...]:
        """Agents that could be asked if they had a link, sorted."""

    def is_behind(self, agent: str, more_bytes: int) -> bool:
        """Whether an agent has so much to take in that it should not be sent so many bytes more."""

    def send(self, agents: Iterable[str], frame: bytes, *, hurried: bool = True, is_assignment: bool = False) -> None:
        """Sends one frame to each of these agents; those who are away get all but assignments when they return."""

    def send_body(self, agents: Iterable[str], blob: Blob, header: Bulk) -> None:
        """Sends each of these agents the body that the frame before refers to, beside everything else."""

    def stop_bodies(self, agents: Iterable[str], round_id: int) -> None:
        """Gives up the bodies of a round on their way to and from these agents."""


class Recorder(Protocol):
    """What rounds need of the journal."""

    @property
    def is_full(self) -> bool:
        """Whether so much waits to be written that nothing more should."""

    @property
    def is_half_full(self) -> bool:
        """Whether what waits leaves room for rounds alone."""

    @property
    def is_checkpoint_due(self) -> bool:
        """Whether a restart would replay so much that the learner's state should be written down."""

    def append(self, record: Record, at: float, *, hurried: bool) -> int:
        """Queues a record, made at `at` (Unix seconds); returns its number. `Gatherer.committed` is called later.

        One that is not hurried may wait for another to share a commit with.
        """

    def append_checkpoint(self, seq: int, take_snapshot: Callable[[], bytes]) -> None:
        """Queues the learner's state after all records up to `seq`; it is not due any more, even if that raises."""

    def find_key(self, key: str) -> int | None:
        """Number of the last round that was opened under a key."""

    async def read_key(self, key: str) -> RoundClosed | None:
        """How that round was closed, which may be large."""

    def has_truth(self, round_id: int) -> bool:
        """Whether the truth of a round is recorded."""
