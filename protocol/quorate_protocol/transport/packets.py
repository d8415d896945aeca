"""What an endpoint stands on: something that carries datagrams to addresses, reliably or not.

A port knows no connections, and an endpoint no sockets. `udp` is the real thing, `memory` a network
inside one process, with faults.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol

from quorate_protocol.transport.api import ServerStats
from quorate_protocol.transport.engine import Address

#: One datagram: its payload, and where it came from or goes to.
Packet = tuple[bytes, Address]


class PacketReceiver(Protocol):
    """What a port reports to. Every call may close the port."""

    def datagrams_received(self, datagrams: Sequence[Packet]) -> None:
        """Datagrams came, in this order; a bounded batch in each turn of the loop."""

    def refused(self) -> None:
        """Somebody says that nobody listens where we sent to (ICMP port unreachable). Anyone can forge that."""

    def datagram_too_large(self, datagram_bytes: int, address: Address) -> None:
        """A datagram of this size to this address was not sent: the way out takes smaller ones only (EMSGSIZE)."""

    def writable(self) -> None:
        """What was kept has been sent, and `send` takes more."""


class PacketPort(ABC):
    """Carries datagrams. Belongs to one event loop."""

    #: What the cost of a stranger's datagram is measured with, in seconds: the processor's time, because on a busy
    #: machine others' work would be charged to it. A port under virtual time has a clock that stands still, so that its
    #: seed alone decides what happens.
    work_clock: Callable[[], float] = staticmethod(time.thread_time)

    @abstractmethod
    def attach(self, receiver: PacketReceiver, stats: ServerStats) -> None:
        """Begins to receive, and counts in `stats` from now on. Once, before anything else."""

    @property
    @abstractmethod
    def address(self) -> Address:
        """What the port is bound to."""

    @abstractmethod
    def connect(self, address: Address) -> Address:
        """Ties the port to one peer; returns the address that the peer's datagrams will really come from.

        Raises:
            OSError: the address cannot be reached from here, as far as this machine knows.
        """

    @abstractmethod
    def send(self, datagrams: Sequence[Packet]) -> None:
        """Sends datagrams in this order. What cannot leave now is kept, once: until `writable`, more is dropped.

        So a port holds no more than what one call gave it. Datagrams that the network refuses are
        dropped and counted: to QUIC they are lost packets.
        """

    @property
    @abstractmethod
    def is_writable(self) -> bool:
        """Whether `send` takes anything."""

    @abstractmethod
    def close(self) -> None:
        """Lets go of everything; reports nothing any more. More calls do nothing."""
