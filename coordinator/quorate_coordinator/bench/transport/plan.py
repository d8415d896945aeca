"""How long and how often things are measured, and what is promised."""

from dataclasses import dataclass
from typing import Final

#: Promises, in the units of their rows.
DISCOVERED_MB_S: Final = 300.0
DATAGRAMS_1452_MB_S: Final = 70.0
OPEN_P50_US: Final = 60.0
OPEN_P99_US: Final = 100.0
DATAGRAM_ROUND_TRIP_P50_US: Final = 250.0
IDLE_STREAMS_RATIO: Final = 1.5
OVERTAKE_PERCENT: Final = 5.0
MEMORY_MIB: Final = 32.0


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured. What is measured is the same in every plan."""

    #: Seconds of one transfer, and before the first for discovery and slow start.
    transfer_s: float
    warm_up_s: float
    #: Transfers, and blocks of samples, of each side, in turn with the other's.
    repetitions: int
    #: Samples of a time in one block.
    samples: int
    #: Messages of which the cost is taken, for each number of idle streams.
    cost_samples: int
    #: Bytes on each of the bulk streams; and how often they are overtaken.
    bulk_bytes: int
    overtakes: int
    #: Bytes offered to a reader that does not read; the stock takes them all, and gets fewer.
    offered_bytes: int
    offered_stock_bytes: int
    #: Seconds without progress after which a held sender counts as held.
    held_s: float
    #: Seconds of garbage.
    flood_s: float


def plan(seconds: float) -> Plan:
    """The whole of it, with transfers of so many seconds."""
    return Plan(
        transfer_s=seconds,
        warm_up_s=max(0.6, seconds),
        repetitions=5,
        samples=200,
        cost_samples=200,
        bulk_bytes=2 << 20,
        overtakes=3,
        offered_bytes=1 << 30,
        offered_stock_bytes=256 << 20,
        held_s=3.0,
        flood_s=2.0,
    )


#: For tests and a first look: too few samples to believe in.
QUICK: Final = Plan(
    transfer_s=0.1,
    warm_up_s=0.4,
    repetitions=2,
    samples=50,
    cost_samples=40,
    bulk_bytes=512 << 10,
    overtakes=1,
    offered_bytes=1 << 30,
    offered_stock_bytes=32 << 20,
    held_s=0.5,
    flood_s=0.5,
)
