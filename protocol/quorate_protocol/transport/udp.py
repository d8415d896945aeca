"""The packet port over a UDP socket.

Receiving. A readable socket is read until it is empty or a batch is full. With UDP_GRO (udp(7)) the
kernel hands over datagrams of one flow that it has not split, or has merged, in one piece, to be cut
by the size that it names. Measured on loopback, microseconds a datagram, sending and receiving:
1200 bytes sent by segmentation 0.34 with GRO and 0.99 without; 300 single small ones from 200 peers
1.7 and 1.5; against some 15 for QUIC's own work on each. So GRO is always on where the kernel has it.

Sending. Datagrams of equal size to one address (the last may be shorter) leave in one system call,
gathered where they are (UDP_SEGMENT); a single one by plain `send`. A kernel or device that does not
do it says so once, and is not asked again.

What the kernel does not take is kept: the rest of one `send`, that is one pass of one connection
(`endpoint.PASS_DATAGRAMS_MAX`, `PASS_BYTES_MAX`). Nobody passes on anything more
until it has left: what waits is in the streams' buffers, where it can still be overtaken.
"""

import asyncio
import errno
import socket
import struct
import sys
from collections.abc import Sequence
from typing import Final

import structlog

from quorate_protocol.transport.api import ServerStats
from quorate_protocol.transport.engine import Address
from quorate_protocol.transport.packets import Packet, PacketPort, PacketReceiver

log = structlog.get_logger()

#: Datagrams read in one turn: enough to empty the socket after a fan-in of hundreds of agents, small
#: enough that timers and other sockets get their turn (about 5 ms of engine work).
BATCH_DATAGRAMS_MAX: Final = 256

#: The same in bytes, for the reasons of `endpoint.PASS_BYTES_MAX`.
_BATCH_BYTES_MAX: Final = 256 << 10

#: Larger than any UDP payload, merged ones too.
_UDP_BYTES_MAX: Final = 65_536

#: What we ask the kernel to hold for us in each direction while the loop is busy: 100 ms at 80 MB/s, or
#: two small datagrams (the kernel charges 2 KiB for one) from each of two thousand agents.
SOCKET_BUFFER_BYTES: Final = 8 << 20

#: Segments in one system call: UDP_MAX_SEGMENTS of Linux before 6.9.
_SEGMENTS_MAX: Final = 64
#: Bytes in one system call: they make one IP packet until they are cut, and that is below 65,536 with its headers.
_SEGMENTED_BYTES_MAX: Final = 65_000

#: What tells that this kernel, device or route does not do segmentation, in the words of different kernels.
_NO_SEGMENTATION: Final = frozenset({errno.EIO, errno.EINVAL, errno.ENOPROTOOPT, errno.EOPNOTSUPP})

#: ENOBUFS says that a device's queue is full, not the socket's buffer, and nothing tells when it is not: seconds
#: until we try again.
_DEVICE_RETRY_S: Final = 0.001

# Of <linux/udp.h>, <linux/in.h>, <linux/in6.h> and <asm-generic/socket.h>; Python 3.11 has no names for them.
_SOL_UDP: Final = 17
_UDP_SEGMENT: Final = 103
_UDP_GRO: Final = 104
_IP_MTU_DISCOVER: Final = 10
_IPV6_MTU_DISCOVER: Final = 23
_PMTUDISC_PROBE: Final = 3
_SO_SNDBUFFORCE: Final = 32
_SO_RCVBUFFORCE: Final = 33

#: Room for UDP_GRO's one integer.
_ANCILLARY_BYTES: Final = socket.CMSG_SPACE(4)

#: Whether this process has said that its buffers are small. Once is enough: all sockets get the same.
_small_buffers_told = False


class UdpPort(PacketPort):
    """Owns a socket from `bind_udp`. Implements `PacketPort`."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._receiver: PacketReceiver | None = None
        self._stats = ServerStats()
        self._is_connected = False
        self._is_closed = False
        self._merges = _set(sock, _SOL_UDP, _UDP_GRO, 1)
        #: Until the kernel has refused it.
        self._segments = hasattr(sock, "sendmsg")
        #: The rest of a `send`, until the kernel takes it.
        self._unsent: Sequence[Packet] = ()
        self._retry: asyncio.TimerHandle | None = None

    def attach(self, receiver: PacketReceiver, stats: ServerStats) -> None:
        self._receiver = receiver
        self._stats = stats
        self._loop.add_reader(self._sock.fileno(), self._on_readable)

    @property
    def address(self) -> Address:
        return self._sock.getsockname()

    def connect(self, address: Address) -> Address:
        self._sock.connect(address)
        self._is_connected = True
        # 0.0.0.0 answers as 127.0.0.1.
        return self._sock.getpeername()

    @property
    def is_writable(self) -> bool:
        return not self._unsent

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._loop.remove_reader(self._sock.fileno())
        self._stop_waiting()
        self._unsent = ()
        self._sock.close()

    # --- receiving ---

    def _on_readable(self) -> None:
        receiver = self._receiver
        assert receiver is not None
        batch, was_refused = self._read_batch()
        if batch:
            receiver.datagrams_received(batch)
        if was_refused and not self._is_closed:
            receiver.refused()

    def _read_batch(self) -> tuple[list[Packet], bool]:
        """What has come, and whether an earlier datagram of ours was refused."""
        batch: list[Packet] = []
        stats = self._stats
        receive, merges = self._sock.recvmsg, self._merges
        was_refused = False
        batch_bytes = 0
        # Each round reads something or takes away an error: both are bounded together.
        for _ in range(BATCH_DATAGRAMS_MAX):
            try:
                if merges:
                    data, ancillary, _, address = receive(_UDP_BYTES_MAX, _ANCILLARY_BYTES)
                else:
                    data, address = self._sock.recvfrom(_UDP_BYTES_MAX)
                    ancillary = []
            except (BlockingIOError, InterruptedError):
                break
            except OSError as error:
                # An ICMP answer to something that we sent earlier.
                if error.errno == errno.ECONNREFUSED:
                    was_refused = True
                continue
            batch_bytes += len(data)
            size = int.from_bytes(ancillary[0][2][:4], sys.byteorder) if ancillary else len(data)
            if 0 < size < len(data):
                batch += [(data[at : at + size], address) for at in range(0, len(data), size)]
            else:
                batch.append((data, address))
            if len(batch) >= BATCH_DATAGRAMS_MAX or batch_bytes >= _BATCH_BYTES_MAX:
                break
        stats.bytes_received += batch_bytes
        stats.udp_datagrams_received += len(batch)
        return batch, was_refused

    # --- sending ---

    def send(self, datagrams: Sequence[Packet]) -> None:
        if self._is_closed:
            return
        if self._unsent:
            # Somebody who is closing, and will not come again.
            self._send_kept()
            if self._unsent:
                self._stats.udp_datagrams_dropped += len(datagrams)
                return
            # The loop will not tell any more.
            self._loop.call_soon(self._tell_writable)
        sent = self._send_all(datagrams)
        if sent < len(datagrams):
            self._unsent = datagrams[sent:]
            self._stats.udp_send_blocked += 1

    def _send_all(self, datagrams: Sequence[Packet]) -> int:
        """Sends until the kernel takes no more; returns how many are dealt with."""
        count = len(datagrams)
        at = 0
        while at < count:
            run = self._run(datagrams, at) if self._segments and at + 1 < count else 1
            taken = self._send_one(datagrams[at]) if run == 1 else self._send_run(datagrams[at : at + run])
            if not taken:
                break
            at += taken
        return at

    @staticmethod
    def _run(datagrams: Sequence[Packet], start: int) -> int:
        """How many from here on can leave in one system call."""
        first, address = datagrams[start]
        size = len(first)
        count_max = min(_SEGMENTS_MAX, _SEGMENTED_BYTES_MAX // size if size else 1, len(datagrams) - start)
        count = 1
        while count < count_max:
            datagram, to = datagrams[start + count]
            length = len(datagram)
            if length > size or not length or (to is not address and to != address):
                break
            count += 1
            if length < size:
                break
        return count

    def _send_one(self, packet: Packet) -> int:
        """1 when it was dealt with, 0 when the kernel takes nothing now."""
        datagram, address = packet
        try:
            if self._is_connected:
                self._sock.send(datagram)
            else:
                self._sock.sendto(datagram, address)
        except OSError as error:
            return self._not_sent(error, len(datagram), address)
        stats = self._stats
        stats.udp_datagrams_sent += 1
        stats.bytes_sent += len(datagram)
        return 1

    def _send_run(self, run: Sequence[Packet]) -> int:
        """How many were dealt with: all, or the first ones when they had to leave one by one; 0 as `_send_one`."""
        address = run[0][1]
        segments = [datagram for datagram, _ in run]
        size = len(segments[0])
        try:
            sent_bytes = self._sock.sendmsg(
                segments,
                ((_SOL_UDP, _UDP_SEGMENT, struct.pack("=H", size)),),
                0,
                None if self._is_connected else address,
            )
        except OSError as error:
            if error.errno in _NO_SEGMENTATION:
                return self._send_singly(run, error)
            if error.errno == errno.EMSGSIZE:
                return self._send_singly(run, None)
            return self._not_sent(error, size, address, len(run))
        stats = self._stats
        stats.udp_datagrams_sent += len(run)
        stats.bytes_sent += sent_bytes
        return len(run)

    def _send_singly(self, run: Sequence[Packet], refusal: OSError | None) -> int:
        """Sends what segmentation was refused for, one by one, to see what it was about.

        Before Linux 6.14, a segment that is too large for the route is EINVAL as well: where the first
        one alone is too large, that says nothing about segmentation.
        """
        before = self._stats.udp_datagrams_sent
        dealt_with = 0
        for packet in run:
            if not self._send_one(packet):
                break
            dealt_with += 1
            if refusal is not None and self._segments and self._stats.udp_datagrams_sent > before:
                self._segments = False
                self._stats.udp_segmentation_refused += 1
                log.info("udp_segmentation_refused", error=refusal.strerror, segment_bytes=len(run[0][0]))
        return dealt_with

    def _not_sent(self, error: OSError, datagram_bytes: int, address: Address, count: int = 1) -> int:
        """What becomes of datagrams that the kernel has refused: 0 when they are to be kept."""
        if error.errno in (errno.EAGAIN, errno.EINTR):
            self._loop.add_writer(self._sock.fileno(), self._on_writable)
            return 0
        if error.errno == errno.ENOBUFS:
            if self._retry is None:
                self._retry = self._loop.call_later(_DEVICE_RETRY_S, self._on_writable)
            return 0
        # No route, an ICMP error, an address that went away: for QUIC a lost packet.
        self._stats.udp_datagrams_dropped += count
        if error.errno == errno.EMSGSIZE:
            assert self._receiver is not None
            self._receiver.datagram_too_large(datagram_bytes, address)
        elif error.errno == errno.ECONNREFUSED:
            # The kernel tells it once, to whoever asks first: reading will not hear of it any more.
            self._loop.call_soon(self._tell_refused)
        return count

    def _tell_refused(self) -> None:
        if not self._is_closed:
            assert self._receiver is not None
            self._receiver.refused()

    def _send_kept(self) -> None:
        kept, self._unsent = self._unsent, ()
        self._stop_waiting()
        self._unsent = kept[self._send_all(kept) :]

    def _on_writable(self) -> None:
        self._send_kept()
        self._tell_writable()

    def _tell_writable(self) -> None:
        if not self._unsent and not self._is_closed:
            assert self._receiver is not None
            self._receiver.writable()

    def _stop_waiting(self) -> None:
        self._loop.remove_writer(self._sock.fileno())
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None


def bind_udp(family: int, address: Address | None) -> socket.socket:
    """A non-blocking UDP socket with large buffers that splits no datagrams; bound, unless `address` is None.

    Raises:
        OSError: the address is taken or not ours.
    """
    sock = socket.socket(family, socket.SOCK_DGRAM)
    try:
        sock.setblocking(False)
        _enlarge_buffers(sock)
        if family == socket.AF_INET6:
            # `::` serves IPv4 too.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            _set(sock, socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _PMTUDISC_PROBE)
        # Packets leave whole or not at all, and the kernel's own idea of the path's size, which an ICMP message may
        # have given it, does not count: the engine finds out (RFC 8899, 3; RFC 9000, 14.1). Also for IPv4 that a
        # dual-stack socket serves.
        _set(sock, socket.IPPROTO_IP, _IP_MTU_DISCOVER, _PMTUDISC_PROBE)
        if address is not None:
            sock.bind(address)
    except BaseException:
        sock.close()
        raise
    return sock


def _enlarge_buffers(sock: socket.socket) -> None:
    """Asks for `SOCKET_BUFFER_BYTES` each way, past the system's limit where we may (CAP_NET_ADMIN)."""
    small: dict[str, int] = {}
    for option, forced, sysctl in (
        (socket.SO_RCVBUF, _SO_RCVBUFFORCE, "net.core.rmem_max"),
        (socket.SO_SNDBUF, _SO_SNDBUFFORCE, "net.core.wmem_max"),
    ):
        if not _set(sock, socket.SOL_SOCKET, forced, SOCKET_BUFFER_BYTES):
            _set(sock, socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)
        # The kernel doubles what it is asked for, for its own books (socket(7)).
        granted_bytes = sock.getsockopt(socket.SOL_SOCKET, option) // 2
        if granted_bytes < SOCKET_BUFFER_BYTES // 2:
            small[sysctl] = granted_bytes
    global _small_buffers_told
    if small and not _small_buffers_told:
        _small_buffers_told = True
        log.warning(
            "udp_buffer_small",
            wanted_bytes=SOCKET_BUFFER_BYTES,
            granted_bytes=min(small.values()),
            sysctl=", ".join(small),
            hint=f"datagrams are lost when many arrive at once; {next(iter(small))} limits the buffer",
        )


def _set(sock: socket.socket, level: int, option: int, value: int) -> bool:
    """Sets an option; False where the kernel does not know or does not allow it."""
    try:
        sock.setsockopt(level, option, value)
    except OSError:
        return False
    return True
