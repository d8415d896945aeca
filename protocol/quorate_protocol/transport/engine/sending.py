"""The sending side of a connection: when packets leave, how many, and of which size.

A pass goes through the classes of streams (`lanes`), not through the streams: idle ones cost nothing. It ends
when there is nothing more to send, when congestion control, the pacer or the peer's windows say so, or after
as many datagrams as the endpoint wants at once. What is in the packets is the business of `writing`.
"""

import math
from typing import Any, Final

from aioquic._buffer import Buffer
from aioquic.buffer import size_uint_var
from aioquic.quic.connection import END_STATES, QuicConnectionState, QuicNetworkPath
from aioquic.quic.packet import QuicFrameType, QuicPacketType, pull_quic_transport_parameters
from aioquic.quic.packet_builder import QuicDeliveryState, QuicPacketBuilderStop
from aioquic.tls import Epoch

from quorate_protocol.limits import UDP_PAYLOAD_BYTES_MAX
from quorate_protocol.transport.engine.congestion import ALGORITHM
from quorate_protocol.transport.engine.mtu import PathMtu
from quorate_protocol.transport.engine.packet_builder import PACKETS_IN_FLIGHT_MAX, PacketBuilder
from quorate_protocol.transport.engine.recovery import Recovery
from quorate_protocol.transport.engine.writing import WritingConnection

#: How long an acknowledgement may wait for something to ride with, in seconds. Below the 25 ms that
#: peers allow for (RFC 9000, 18.2), above the usual time of a small reply.
ACK_DELAY_S: Final = 0.008

#: Packets that may wait for their acknowledgement. A sender in slow start has ten under way.
ACK_EVERY_PACKETS: Final = 10

#: Transport parameter (RFC 9000, 18.2).
_MAX_UDP_PAYLOAD_SIZE: Final = 0x03

#: Packets under one key: half of what AES-GCM may protect (RFC 9001, 6.6: 2^23).
KEY_PACKETS_MAX: Final = 1 << 22

#: Timeouts in a row (RFC 9002, 6.2) after which packets larger than the least are taken to be what is lost.
_BLACK_HOLE_TIMEOUTS: Final = 3


class SendingConnection(WritingConnection):
    """See the module."""

    def __init__(self, *, udp_payload_bytes_max: int = UDP_PAYLOAD_BYTES_MAX, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._ack_delay = ACK_DELAY_S
        self.mtu = PathMtu(udp_payload_bytes_max)
        self._loss = Recovery(
            mtu=self.mtu,
            congestion_control_algorithm=ALGORITHM,
            initial_rtt=self._configuration.initial_rtt,
            max_datagram_size=self._max_datagram_size,
            peer_completed_address_validation=not self._is_client,
            send_probe=self._send_probe,
        )
        #: What told the peer that we closed, and after how many more of its datagrams it is told again.
        self._last_words: list[tuple[bytes, Any]] = []
        self._close_again_at = 1

    def note_packet(self, now: float) -> None:
        """A datagram was received: see that its acknowledgement does not wait for too long."""
        space = self._space
        if space is None or space.ack_at is None:
            return
        self._packets_since_ack += 1
        if self._packets_since_ack >= ACK_EVERY_PACKETS or len(space.ack_queue) > 1:
            space.ack_at = now

    def has_something_to_send(self, now: float) -> bool:
        """Whether a send pass may yield anything. It may say yes too often, never too rarely."""
        if not self._handshake_confirmed or self._close_pending:
            return True
        if self._state in END_STATES:
            return self._packets_since_close >= self._close_again_at
        if self._lanes.queued or self._datagrams_pending or self._finished or not self._is_steady:
            return True
        ack_at = self._space.ack_at
        if (ack_at is not None and ack_at <= now) or self._has_control():
            return True
        # Whatever held back an earlier pass is gone, or its timer would fire for ever.
        self._pacing_at = None
        return False

    # --- a pass ---

    def datagrams_to_send(self, now: float, count_max: int = 64) -> list[tuple[bytes, Any]]:
        """The datagrams that may leave now, some more than `count_max` at the most."""
        self.clock = now
        if self._close_pending:
            path = self._network_paths[0]
            allowed_bytes = path.bytes_received * 3 - path.bytes_sent
            self._last_words = super().datagrams_to_send(now)
            if not path.is_validated and sum(len(datagram) for datagram, _ in self._last_words) > allowed_bytes:
                # RFC 9000, 8.1: not even that. The peer's own timer will tell it.
                self._last_words = []
            return self._last_words
        if self._state is QuicConnectionState.CLOSING:
            return self._close_again()
        if self._state in END_STATES:
            return []
        self._pacing_at = None
        path = self._network_paths[0]
        return self._steady_pass(path, now, count_max) if self._is_steady else self._early_pass(path, now, count_max)

    def _close_again(self) -> list[tuple[bytes, Any]]:
        """Tells a peer that goes on speaking that we closed, ever more rarely (RFC 9000, 10.2.1)."""
        if self._packets_since_close < self._close_again_at:
            return []
        self._close_again_at = 2 * self._packets_since_close
        path = self._network_paths[0]
        words_bytes = sum(len(datagram) for datagram, _ in self._last_words)
        if not path.is_validated:
            if path.bytes_sent + words_bytes > 3 * path.bytes_received:
                return []
            path.bytes_sent += words_bytes
        return self._last_words

    def _steady_pass(self, path: QuicNetworkPath, now: float, count_max: int) -> list[tuple[bytes, Any]]:
        datagram_bytes = self._max_datagram_size
        congestion = self._loss._cc
        room = congestion.congestion_window - congestion.bytes_in_flight
        if room < datagram_bytes:
            if self._probe_pending:
                # RFC 9002, 7: probes may exceed the window.
                room = datagram_bytes
            elif congestion.bytes_in_flight:
                # What is left of the window would make a small packet of a large one.
                room = 0
        if self._space.ack_eliciting_in_flight >= PACKETS_IN_FLIGHT_MAX and not self._probe_pending:
            room = 0
        if self._packet_number - self._phase_began_at >= KEY_PACKETS_MAX:
            self._update_keys()
        builder = self._builder
        if builder is None:
            builder = self._builder = self._new_builder(datagram_bytes)
        builder.begin_pass(
            packet_number=self._packet_number,
            peer_cid=self._peer_cid.cid,
            spin_bit=self._spin_bit,
            datagram_bytes=datagram_bytes,
            flight_bytes_max=room,
        )
        try:
            self._write_packets(builder, path, now, count_max)
        except QuicPacketBuilderStop:
            pass
        datagrams = self._flush_builder(builder=builder, network_path=path, peer_cid=b"", now=now)
        if (probe_bytes := self.mtu.next_probe_bytes(now)) is not None:
            datagrams += self._write_mtu_probe(probe_bytes, path, now)
        return datagrams

    def _update_keys(self) -> None:
        """Begins another key phase (RFC 9001, 6), once the peer has acknowledged something of this one."""
        if self._space.largest_acked_packet >= self._phase_began_at:
            before = self._crypto.recv.aead
            self._crypto._update_key("local_update")
            # However long the peer takes to hear of it: until then it goes on under the keys before.
            self._keys_updated(before, math.inf)
            self.send_ping(0)

    def _early_pass(self, path: QuicNetworkPath, now: float, count_max: int) -> list[tuple[bytes, Any]]:
        """During the handshake and while the peer's address is not validated."""
        datagram_bytes = self._max_datagram_size
        builder = self._new_builder(datagram_bytes)
        room = self._loss.congestion_window - self._loss.bytes_in_flight
        if room < datagram_bytes and (self._probe_pending or self._handshake_data_stranded()):
            # RFC 9002, 7: probes may exceed the window; so may a handshake that nothing else would wake.
            room = datagram_bytes
        builder.max_flight_bytes = room
        if not path.is_validated:
            builder.max_total_bytes = path.bytes_received * 3 - path.bytes_sent
        try:
            if not self._handshake_confirmed:
                for epoch in (Epoch.INITIAL, Epoch.HANDSHAKE):
                    self._write_handshake(builder, epoch, now)
            self._write_packets(builder, path, now, count_max)
        except QuicPacketBuilderStop:
            pass
        datagrams = self._flush_builder(builder=builder, network_path=path, peer_cid=b"", now=now)
        self._builder = None
        if self._handshake_complete:
            datagrams += self._probe_paths(now)
            self._look_whether_steady(now)
        return datagrams

    def _new_builder(self, datagram_bytes: int) -> PacketBuilder:
        return PacketBuilder(
            host_cid=self.host_cid,
            is_client=self._is_client,
            max_datagram_size=datagram_bytes,
            packet_number=self._packet_number,
            peer_cid=self._peer_cid.cid,
            peer_token=self._peer_token,
            quic_logger=self._quic_logger,
            spin_bit=self._spin_bit,
            version=self._version or 0,
        )

    def _flush_builder(
        self, builder: Any, network_path: QuicNetworkPath, peer_cid: bytes, now: float
    ) -> list[tuple[bytes, Any]]:
        datagrams, packets = builder.flush()
        if packets:
            self._packet_number = builder.packet_number
            if self._handshake_confirmed:
                self._loss.on_packets_sent(packets, self._space, now)
            else:
                for packet in packets:
                    self._loss.on_packets_sent([packet], self._spaces[packet.epoch], now)
                if self._is_client and any(packet.epoch is Epoch.HANDSHAKE for packet in packets):
                    # RFC 9001, 4.9.1: a client discards Initial keys when it first sends a Handshake packet.
                    self._discard_epoch(Epoch.INITIAL)
            if not self._ack_eliciting_sent_since_receipt:
                for packet in packets:
                    if packet.is_ack_eliciting:
                        # RFC 9000, 10.1: the idle timer begins again with the first such packet since one was received.
                        self._close_at = now + self._idle_timeout()
                        self._ack_eliciting_sent_since_receipt = True
                        break
        address = network_path.addr
        if not network_path.is_validated:
            # Only the limit against amplification asks for it (RFC 9000, 8.1).
            network_path.bytes_sent += sum(map(len, datagrams))
        return [(datagram, address) for datagram in datagrams]

    def _probe_paths(self, now: float) -> list[tuple[bytes, Any]]:
        """Path validation on addresses other than the one in use (RFC 9000, 8.2)."""
        if self._is_client and self._handshake_confirmed and self._remote_preferred_address is not None:
            self._probe_preferred_address()
        datagrams: list[tuple[bytes, Any]] = []
        for path in self._network_paths[1:]:
            if not path.remote_challenges and (path.is_validated or path.local_challenge_sent):
                continue
            if path.peer_cid is None and self._peer_cid_available:
                path.peer_cid = self._peer_cid_available.pop(0)
            # RFC 9000, 9.5: without a connection id of its own nothing may be sent there.
            if path.peer_cid is not None:
                datagrams += self._send_probing_frames(network_path=path, now=now)
        return datagrams

    def _write_packets(self, builder: PacketBuilder, network_path: QuicNetworkPath, now: float, count_max: int) -> None:
        """Fills packets with what there is.

        Raises:
            QuicPacketBuilderStop: the window or the path's allowance is used up.
        """
        is_early = self._crypto is None or not self._crypto.send.is_valid()
        crypto = self._cryptos[Epoch.ZERO_RTT] if is_early else self._crypto
        if not crypto.send.is_valid():
            return
        packet_type = QuicPacketType.ZERO_RTT if is_early else QuicPacketType.ONE_RTT
        if self._finished:
            self._drop_finished()
        loss = self._loss
        # A first packet that finds nothing before it on the path need not be paced, nor need small messages ever.
        is_paced = loss._cc.bytes_in_flight > 0
        credit_bytes = loss.pacing_credit_bytes(now) if is_paced else 1
        lanes, queued = self._lanes, self._lanes.queued
        ack_at = None if is_early else self._space.ack_at
        # An acknowledgement that is due is not paced.
        if credit_bytes <= 0 and (ack_at is None or ack_at > now):
            self._pacing_at = loss._pacer.next_send_time(now, 0)
            return
        self._builder = builder
        builder.start_packet(packet_type, crypto)
        if ack_at is not None and (ack_at <= now or queued or self._datagrams_pending):
            self._write_ack(builder, self._space, now)
        if not self._is_steady or self._has_control():
            self._write_control(builder, network_path, now, is_early)
        while True:
            if self._datagrams_pending:
                self._write_datagrams(builder)
            if queued:
                lanes.serve(self._write_stream)
            if not (queued or self._datagrams_pending or self._limits_due) or builder.packet_is_empty:
                return
            self.mtu.want()
            if builder.datagrams_built + 1 >= count_max:
                return
            builder.start_packet(packet_type, crypto)
            if not is_paced:
                is_paced, credit_bytes = True, loss.pacing_credit_bytes(now)
            if builder.bytes_built >= credit_bytes:
                self._pacing_at = loss._pacer.next_send_time(now, builder.bytes_built)
                return
            if self._limits_due:
                self._write_limits(builder)

    # --- packet size ---

    def datagram_refused(self, datagram_bytes: int, now: float) -> None:
        """The network would not take a datagram of this size."""
        self.mtu.refused(datagram_bytes, now)
        self._follow_mtu()

    def _follow_mtu(self) -> None:
        size_bytes = self.mtu.size_bytes
        if size_bytes != self._max_datagram_size:
            self._max_datagram_size = size_bytes
            self._loss.set_segment(size_bytes)

    def _path_changed(self, old: QuicNetworkPath, new: QuicNetworkPath) -> None:
        self.mtu.begin_path()
        self._max_datagram_size = self.mtu.size_bytes
        # RFC 9000, 9.4: another port of the same address is another door of the same house.
        if old.addr[0] != new.addr[0]:
            self._loss.begin_path(self._max_datagram_size)
        else:
            self._loss.set_segment(self._max_datagram_size)

    def _write_mtu_probe(self, size_bytes: int, network_path: QuicNetworkPath, now: float) -> list[tuple[bytes, Any]]:
        """A datagram of PING and PADDING (RFC 9000, 14.4) that neither congestion control nor the timer counts."""
        builder = self._new_builder(size_bytes)
        builder.start_packet(QuicPacketType.ONE_RTT, self._crypto)
        probe = self.mtu.probe_sent(size_bytes, now)
        buf = builder.start_flight_frame(QuicFrameType.PING, 1, self._on_mtu_probe_delivery, (size_bytes, probe))
        buf.push_bytes(bytes(builder.remaining_flight_space))
        packet = builder._packet
        packet.in_flight = packet.is_ack_eliciting = False
        return self._flush_builder(builder=builder, network_path=network_path, peer_cid=self._peer_cid.cid, now=now)

    def _on_mtu_probe_delivery(self, delivery: QuicDeliveryState, size_bytes: int, probe: int) -> None:
        if delivery is QuicDeliveryState.ACKED:
            self.mtu.probe_acknowledged(size_bytes, probe, self.clock)
            self._follow_mtu()
        else:
            self.mtu.probe_lost(probe, self.clock)

    def _parse_transport_parameters(self, data: bytes, from_session_ticket: bool = False) -> None:
        super()._parse_transport_parameters(data, from_session_ticket)
        size_bytes = pull_quic_transport_parameters(Buffer(data=data)).max_udp_payload_size
        if size_bytes is not None:
            self.mtu.limit(size_bytes)

    def _serialize_transport_parameters(self) -> bytes:
        # RFC 9000, 18.2: whoever looks for no larger packets than this wants none either.
        buf = Buffer(16)
        buf.push_uint_var(_MAX_UDP_PAYLOAD_SIZE)
        buf.push_uint_var(size_uint_var(self.mtu.ceiling_bytes))
        buf.push_uint_var(self.mtu.ceiling_bytes)
        return super()._serialize_transport_parameters() + buf.data

    def handle_timer(self, now: float) -> None:
        """The time that `get_timer` gave has come."""
        self.clock = now
        self.mtu.expire(now)
        path = self._network_paths[0] if self._network_paths else None
        super().handle_timer(now)
        if path is not None and self._network_paths[0] is not path:
            # The new address was not validated in time (RFC 9000, 9.3.2).
            self._path_changed(path, self._network_paths[0])
            self._look_whether_steady(now)
        if self._loss._pto_count >= _BLACK_HOLE_TIMEOUTS:
            self.mtu.black_hole()
        self._follow_mtu()

    def get_timer(self) -> float | None:
        """When `handle_timer` wants to be called."""
        if not self._is_steady or self._state in END_STATES:
            return super().get_timer()
        space, loss = self._space, self._loss
        at: float = self._close_at or 0.0
        loss_at = space.loss_time
        if loss_at is None and space.ack_eliciting_in_flight:
            # RFC 9002, 6.2.1.
            timeout_s = loss.get_probe_timeout() * 2**loss._pto_count
            loss_at = loss._time_of_last_sent_ack_eliciting_packet + timeout_s
        self._loss_at = loss_at
        for other in (loss_at, space.ack_at, self._pacing_at, self.mtu.timer()):
            if other is not None and other < at:
                at = other
        return at
