"""Peers that say nothing, or hear nothing: who waits for them must find out."""

import asyncio
import contextlib
from pathlib import Path

import pytest

from coordination import PATIENCE_S, coordinating, until
from links import Nat
from quorate_agent import Agent
from quorate_coordinator import fleet as fleet_module
from quorate_protocol.client import Client
from quorate_protocol.errors import CallFailed, Code, ConnectionClosed
from quorate_protocol.messages import PULSE


async def test_an_operator_gives_up_a_coordinator_that_has_fallen_silent(tmp_path: Path) -> None:
    async with coordinating(tmp_path, sessions={"pulse_s": 0.1, "lease_s": 0.6}) as fleet:
        asked, done = asyncio.Event(), asyncio.Event()
        agent = Agent("slow")

        @agent.task("wait")
        async def wait(body: object) -> object:
            asked.set()
            await done.wait()
            return body

        await fleet.join(agent)
        with contextlib.closing(Nat(("127.0.0.1", fleet.port))) as nat:
            url = f"quic://127.0.0.1:{nat.port}"
            async with await Client.connect(url, token=fleet.token, tls=fleet.tls) as client:
                asking = asyncio.ensure_future(client.ask("wait", 1, deadline_s=600.0))
                await asyncio.wait_for(asked.wait(), PATIENCE_S)
                # Longer than a lease, with nothing to say but pulses: no reason to give up.
                quiet_until = asyncio.get_running_loop().time() + 1.0
                await until(lambda: asyncio.get_running_loop().time() > quiet_until)
                assert not asking.done()
                nat.is_cut = True
                with pytest.raises(ConnectionClosed, match="has not been heard for") as caught:
                    await asyncio.wait_for(asking, PATIENCE_S)
                assert caught.value.code == Code.LEASE_EXPIRED
        done.set()
        async with await Client.connect(fleet.url, token=fleet.token, tls=fleet.tls) as client:
            assert (await client.ask("wait", 2)).value == 2


async def test_an_agent_that_lives_and_does_not_read_is_let_go_after_a_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not asked while it is behind, and so would not come to the end of what may wait for it."""
    monkeypatch.setattr(fleet_module, "_BEHIND_BYTES", 1 << 20)
    async with coordinating(tmp_path, sessions={"pulse_s": 0.1, "lease_s": 0.6}) as fleet:
        peer = await fleet.peer()
        await peer.join("deaf", tasks=("work",))

        async def pulse() -> None:
            while not peer.connection.is_closed:
                peer.connection.datagrams.send(PULSE)
                await asyncio.sleep(0.1)

        pulsing = asyncio.create_task(pulse())
        client = await fleet.operator()
        asked = 0
        async with asyncio.timeout(PATIENCE_S):
            while not peer.connection.is_closed:
                with contextlib.suppress(CallFailed):
                    await client.ask("work", "x" * 400_000, deadline_s=0.05)
                    asked += 1
        closed = await peer.closed()
        assert (closed.code, closed.reason) == (Code.BUSY, "too far behind: not reading")
        assert 3 <= asked < 20
        await until(lambda: fleet.infos()["deaf"].state == "lost")
        await pulsing
