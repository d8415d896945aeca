"""Links between coordinator and agents: connections, streams with priorities, datagrams.

>>> server = await listen("127.0.0.1:0", tls=ServerTls(certificate, key))      # doctest: +SKIP
>>> connection = await connect("quic://localhost:4433", tls=ClientTls(ca))     # doctest: +SKIP

Inside one process, and for simulation, an address is `memory:NAME` and `MemoryNetwork` the wire.
"""

from quorate_protocol.transport.api import (
    BiStream,
    ClientTls,
    Connection,
    ConnectionStats,
    Datagrams,
    Priority,
    ReceiveStream,
    SendStream,
    Server,
    ServerStats,
    ServerTls,
)
from quorate_protocol.transport.memory import MemoryNetwork
from quorate_protocol.transport.quic import ALPN, connect, listen

__all__ = [
    "ALPN",
    "BiStream",
    "ClientTls",
    "Connection",
    "ConnectionStats",
    "Datagrams",
    "MemoryNetwork",
    "Priority",
    "ReceiveStream",
    "SendStream",
    "Server",
    "ServerStats",
    "ServerTls",
    "connect",
    "listen",
]
