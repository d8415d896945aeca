"""Builds packets as aioquic's builder does, with less work for each 1-RTT packet.

The interface is aioquic's, so that its writers of rare frames (new connection ids, path challenges,
the handshake's) go on working. What differs is the way of a short header packet (RFC 9000, 17.3.1):
it is the only one in its datagram, needs no length, and is put together from its protected parts
instead of being written back into the buffer and copied out of it.
"""

from collections.abc import Sequence
from typing import Any, Final

from aioquic._buffer import Buffer
from aioquic.quic.crypto import CryptoPair
from aioquic.quic.packet import PACKET_FIXED_BIT, QuicFrameType, QuicPacketType
from aioquic.quic.packet_builder import QuicDeliveryHandler, QuicPacketBuilder, QuicPacketBuilderStop
from aioquic.tls import Epoch

#: Bytes of a packet number on the wire. Two tell 32,768 packets apart (RFC 9000, A.2), which is why
#: `PACKETS_IN_FLIGHT_MAX` is below that.
_NUMBER_BYTES: Final = 2

#: Packet number and payload together, before encryption: header protection samples what follows them
#: (RFC 9001, 5.4.2).
_NUMBER_AND_PAYLOAD_BYTES_MIN: Final = 4

#: Packets that may be unacknowledged: fewer than a packet number of two bytes can tell apart.
PACKETS_IN_FLIGHT_MAX: Final = 30_000


class SentPacket:
    """aioquic's `QuicSentPacket` in slots: one is made for every packet."""

    __slots__ = (
        "delivery_handlers",
        "epoch",
        "in_flight",
        "is_ack_eliciting",
        "is_crypto_packet",
        "packet_number",
        "packet_type",
        "quic_logger_frames",
        "sent_bytes",
        "sent_time",
    )

    def __init__(self, packet_number: int) -> None:
        self.epoch = Epoch.ONE_RTT
        self.in_flight = False
        self.is_ack_eliciting = False
        self.is_crypto_packet = False
        self.packet_number = packet_number
        self.packet_type = QuicPacketType.ONE_RTT
        self.sent_time = 0.0
        self.sent_bytes = 0
        self.delivery_handlers: list[tuple[QuicDeliveryHandler, Sequence[Any]]] = []
        self.quic_logger_frames: list[Any] | None = None


class PacketBuilder(QuicPacketBuilder):
    """See the module. `datagrams_built` counts what is complete."""

    _packet: Any
    _packet_crypto: CryptoPair
    _buffer: Buffer

    def begin_pass(
        self, *, packet_number: int, peer_cid: bytes, spin_bit: bool, datagram_bytes: int, flight_bytes_max: int
    ) -> None:
        """Makes a builder that was flushed ready for another pass of a connection whose handshake is confirmed."""
        self._packet_number = packet_number
        self._peer_cid = peer_cid
        self._spin_bit = spin_bit
        self._flight_bytes = self._total_bytes = 0
        self.max_flight_bytes = flight_bytes_max
        if datagram_bytes != self._buffer_capacity:
            self._buffer_capacity = datagram_bytes
            self._buffer = Buffer(datagram_bytes)

    def flush(self) -> tuple[list[bytes], list[Any]]:
        """Returns the datagrams and what is in them."""
        if self._packet is not None:
            self._end_packet()
        if self._buffer.tell():
            self._flush_current_datagram()
        datagrams, packets = self._datagrams, self._packets
        self._datagrams, self._packets = [], []
        return datagrams, packets

    @property
    def datagrams_built(self) -> int:
        """Datagrams that are complete; the one under way is not counted."""
        return len(self._datagrams)

    @property
    def bytes_built(self) -> int:
        """Bytes of them."""
        return self._total_bytes

    def start_packet(self, packet_type: QuicPacketType, crypto: CryptoPair) -> None:
        """Starts a packet.

        Raises:
            QuicPacketBuilderStop: there is no room for one.
        """
        if self._packet is not None:
            self._end_packet()
        if packet_type is not QuicPacketType.ONE_RTT or self._buffer.tell() or self.max_total_bytes is not None:
            super().start_packet(packet_type, crypto)
            return
        capacity = self._buffer_capacity
        self._flight_capacity = (
            capacity if self.max_flight_bytes is None else min(capacity, self.max_flight_bytes - self._flight_bytes)
        )
        self._datagram_flight_bytes = 0
        self._datagram_init = False
        self._datagram_needs_padding = False
        self._header_size = 1 + len(self._peer_cid) + _NUMBER_BYTES
        self._packet = SentPacket(self._packet_number)
        self._packet_crypto = crypto
        self._packet_start = 0
        self._packet_type = packet_type
        self._buffer.seek(self._header_size)

    def start_flight_frame(
        self, frame_type: int, capacity: int, handler: QuicDeliveryHandler | None, handler_args: Sequence[Any]
    ) -> Buffer:
        """As `start_frame`, for a frame that elicits an acknowledgement and counts as in flight.

        Raises:
            QuicPacketBuilderStop: there is no room for it.
        """
        buf = self._buffer
        if self._flight_capacity - buf.tell() - 16 < capacity:
            raise QuicPacketBuilderStop
        packet = self._packet
        packet.is_ack_eliciting = packet.in_flight = True
        buf.push_uint_var(frame_type)
        if handler is not None:
            packet.delivery_handlers.append((handler, handler_args))
        return buf

    def start_ack_frame(self, capacity: int, handler: QuicDeliveryHandler, handler_args: Sequence[Any]) -> Buffer:
        """As `start_frame`, for an ACK frame: neither congestion control nor an acknowledgement is about it.

        Raises:
            QuicPacketBuilderStop: there is no room for it.
        """
        buf = self._buffer
        if self._buffer_capacity - buf.tell() - 16 < capacity:
            raise QuicPacketBuilderStop
        buf.push_uint8(QuicFrameType.ACK)
        self._packet.delivery_handlers.append((handler, handler_args))
        return buf

    def _end_packet(self) -> None:
        if self._packet_type is not QuicPacketType.ONE_RTT or self._packet_start or self._datagram_needs_padding:
            super()._end_packet()
            return
        buf = self._buffer
        packet = self._packet
        header_size = self._header_size
        plain_bytes = buf.tell() - header_size
        self._packet = None
        if plain_bytes <= 0:
            buf.seek(0)
            return
        if plain_bytes < _NUMBER_AND_PAYLOAD_BYTES_MIN - _NUMBER_BYTES:
            buf.push_bytes(bytes(_NUMBER_AND_PAYLOAD_BYTES_MIN - _NUMBER_BYTES - plain_bytes))
            packet.in_flight = True
        crypto = self._packet_crypto
        if crypto._update_key_requested:
            crypto._update_key("local_update")
        context: Any = crypto.send
        aead = context.aead
        number = self._packet_number
        first = PACKET_FIXED_BIT | self._spin_bit << 5 | context.key_phase << 2 | (_NUMBER_BYTES - 1)
        peer_cid = self._peer_cid
        sealed = aead._aead.encrypt(
            (aead._iv ^ number).to_bytes(12, "big"),
            buf.data_slice(header_size, buf.tell()),
            b"%c%b%b" % (first, peer_cid, (number & 0xFFFF).to_bytes(2, "big")),
        )
        mask = context.hp._mask(sealed[2:18])
        datagram = b"%c%b%b%b" % (
            first ^ mask[0] & 0x1F,
            peer_cid,
            (number & 0xFFFF ^ (mask[1] << 8 | mask[2])).to_bytes(2, "big"),
            sealed,
        )
        packet.sent_bytes = len(datagram)
        self._packets.append(packet)
        self._datagrams.append(datagram)
        if packet.in_flight:
            self._flight_bytes += packet.sent_bytes
        self._total_bytes += packet.sent_bytes
        self._datagram_init = True
        buf.seek(0)
        self._packet_number = number + 1
