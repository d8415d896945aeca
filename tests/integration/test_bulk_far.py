"""Bodies over a long way, under virtual time: keeping little under way must not make them slow."""

import asyncio
from pathlib import Path

import pytest

from quorate_coordinator.certificates import DevelopmentCredentials
from quorate_protocol.blobs import BlobBudget, BlobStore, blob_of
from quorate_protocol.bulk import BulkInbox, header_for, ref_to, send_blob
from quorate_protocol.errors import ConnectionClosed
from quorate_protocol.transport import MemoryNetwork
from virtual import memory_linked, virtual_time

BODY_BYTES = 48 << 20


@virtual_time
@pytest.mark.parametrize("streams", [1, 6])
async def test_a_long_way_is_filled(credentials: DevelopmentCredentials, tmp_path: Path, streams: int) -> None:
    """100 ms there and back, and as fast as one likes: the first round trips are slow, the others carry megabytes."""
    loop = asyncio.get_running_loop()
    data = bytes(BODY_BYTES // streams)
    blob = blob_of([data])
    # In memory: threads do not know of virtual time.
    store = BlobStore(tmp_path, BlobBudget(), spool_bytes=BODY_BYTES)
    async with memory_linked(credentials, MemoryNetwork(delay_s=0.05)) as link:

        async def send_unpaced() -> None:
            stream = await link.here.open_uni_stream()
            await stream.send(data)
            await stream.finish()
            await stream.flush()

        async def read_unpaced() -> None:
            stream = await link.there.accept_uni_stream()
            while await stream.receive(1 << 20):
                pass

        # Once for the congestion window and the packets' size, so that both ways of sending begin with the same.
        for _ in range(2):
            began_at = loop.time()
            async with asyncio.TaskGroup() as tasks:
                for _ in range(streams):
                    tasks.create_task(send_unpaced())
                    tasks.create_task(read_unpaced())
            unpaced_s = loop.time() - began_at

        inbox = BulkInbox(store)
        serving = asyncio.create_task(inbox.serve(link.there))
        began_at = loop.time()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(streams):
                tasks.create_task(send_blob(link.here, blob, header_for(blob, "reply", round=1)))
                tasks.create_task(inbox.get(ref_to(blob), 600))
        paced_s = loop.time() - began_at
        inbox.close()
    with pytest.raises(ConnectionClosed):
        await serving
    # Its window begins with 512 KiB and doubles: some six round trips until it is wide.
    assert paced_s < unpaced_s + 1.0, f"{paced_s:.2f} s, and {unpaced_s:.2f} s without a pace"
