"""What the listening process does with the streams that are opened to it.

A stream begins with a header: what to do, and a count.
"""

import asyncio
import struct
import time
from typing import Final

from quorate_coordinator.bench.transport.link import Pipe

#: The service, and how many bytes follow (for `SINK`).
HEADER: Final = struct.Struct("!cQ")
#: The server's clock when it had everything, in seconds. On Linux, `time.monotonic` is one clock for all processes.
RECEIPT: Final = struct.Struct("!d")

#: Reads as many bytes as the header says, sends a receipt, and begins anew with the next header.
SINK: Final = b"S"
#: Sends back what comes.
ECHO: Final = b"E"
#: Reads to the end, sends a receipt, and ends the stream.
CALL: Final = b"C"
#: Reads nothing, ever.
NEGLECT: Final = b"N"

#: Asked of one `receive`, in bytes: all that is there.
_READ_BYTES: Final = 1 << 20


async def serve(pipe: Pipe) -> None:
    """Serves one stream to its end. Implements `Service`."""
    while (header := await receive_exactly(pipe, HEADER.size)) is not None:
        service, count = HEADER.unpack(header)
        if service == SINK:
            if not await _skip(pipe, count):
                return
            await pipe.send(RECEIPT.pack(time.monotonic()))
            continue
        if service == NEGLECT:
            await asyncio.get_running_loop().create_future()
        elif service == ECHO:
            while chunk := await pipe.receive(_READ_BYTES):
                await pipe.send(chunk)
        else:
            while await pipe.receive(_READ_BYTES):
                pass
            await pipe.send(RECEIPT.pack(time.monotonic()))
        await pipe.finish()
        return


async def receive_exactly(pipe: Pipe, count: int) -> bytes | None:
    """As many bytes; None when the stream ends before."""
    data = await pipe.receive(count)
    while 0 < len(data) < count:
        more = await pipe.receive(count - len(data))
        if not more:
            return None
        data += more
    return data or None


async def _skip(pipe: Pipe, count: int) -> bool:
    while count:
        chunk = await pipe.receive(min(count, _READ_BYTES))
        if not chunk:
            return False
        count -= len(chunk)
    return True
