"""Ceilings that both ends of the wire must share, each with its reason.

A setting that only one process cares about does not belong here but in that process's settings.
"""

from typing import Final

#: Largest frame payload in bytes. A coordination message is small, and one that is not
#: would hold up those behind it. 1 MiB is also what NATS allows a message by default.
FRAME_BYTES_MAX: Final = 1 << 20

#: Largest body (the msgpack of what a task is asked or answers) that travels inline in a frame, in
#: bytes: the frame's other keys must fit beside it.
BODY_BYTES_MAX: Final = FRAME_BYTES_MAX - (16 << 10)

#: Longest time that a message may state, in seconds: a year.
SECONDS_MAX: Final = 86_400 * 365

#: Largest body that travels on a stream of its own, in bytes, unless a process is set otherwise: what one msgpack
#: extension, and so one array, can hold.
BULK_BYTES_MAX: Final = 4 << 30

#: Largest first frame of a bulk stream, in bytes: a hundred, and room for keys of later versions.
BULK_HEADER_BYTES_MAX: Final = 4 << 10

#: Largest frame before `welcome`, in bytes: a hello is a few hundred bytes, and until it is checked
#: its sender is a stranger.
HELLO_BYTES_MAX: Final = 64 << 10

#: Bytes of the length prefix: unsigned, big-endian.
FRAME_PREFIX_BYTES: Final = 4

#: Longest identifier (agent id, task, label key) in characters, all of them ASCII: fits a DNS name,
#: keeps Prometheus labels and log lines readable.
NAME_BYTES_MAX: Final = 255

#: Tasks one agent may announce and labels it may carry: both are copied into every fleet listing.
TASKS_MAX: Final = 256
LABELS_MAX: Final = 64

#: Longest human-readable reason or error text that a peer may send, in characters.
TEXT_CHARS_MAX: Final = 4096

#: Unread bytes that one stream may hold at the receiver: its flow-control window (RFC 9000, 4.1), as it
#: begins and as long as its reader is not faster than the path.
STREAM_WINDOW_BYTES: Final = 1 << 20
#: What it may grow to for a fast reader: 100 ms at 160 MB/s.
STREAM_WINDOW_BYTES_MAX: Final = 16 << 20

#: Unread bytes of all the streams of one connection together, likewise.
CONNECTION_WINDOW_BYTES: Final = 8 << 20
CONNECTION_WINDOW_BYTES_MAX: Final = 24 << 20

#: `Stream.send` returns while less than this waits for acknowledgement, and sleeps above it.
#: Where the path takes more, so does the buffer: it grows with the congestion window.
STREAM_WRITE_BYTES_HIGH: Final = 2 << 20
#: Bytes of all the streams of one connection and of one class that wait for acknowledgement: over it every `send` of
#: that class sleeps. By class, because bulk must not keep anybody from saying something critical.
CLASS_WRITE_BYTES_HIGH: Final = 24 << 20
# A sleeping `send` goes on when what it sleeps over is half empty.

#: Streams a peer may have open at once, each direction: a thousand calls or modalities of one peer at
#: a time are more than anyone has shown us.
STREAMS_MAX: Final = 1024

#: Received datagrams that wait to be read; the oldest is dropped (and counted) beyond this,
#: because a pulse or event that nobody read in time is stale.
DATAGRAM_QUEUE_MAX: Final = 256

#: Largest UDP payload that path MTU discovery may come to, in bytes: what loopback (65,536) and jumbo
#: links (9,000) allow for, up to where a stream frame's length still fits two bytes (RFC 9000, 16).
UDP_PAYLOAD_BYTES_MAX: Final = 16_383

#: Smallest that every QUIC path carries (RFC 9000, 14), and what a connection begins with.
UDP_PAYLOAD_BYTES_MIN: Final = 1200

#: Connections that have not finished their handshake, in all: what a flood of Initials may cost.
HANDSHAKES_MAX: Final = 1024

#: Connections of one endpoint in all.
CONNECTIONS_MAX: Final = 16_384
