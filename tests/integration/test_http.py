"""What supervisors and Prometheus see: `/metrics`, `/healthz`, `/readyz`, over real TCP."""

import asyncio
import re
import socket
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog
from prometheus_client.parser import text_string_to_metric_families

from coordination import PATIENCE_S, Fleet, coordinating, parse_metrics, until
from quorate_agent import Agent, Declined
from quorate_coordinator.gather import AGENTS_COUNTED_MAX
from quorate_coordinator.service import Coordinator
from quorate_coordinator.settings import Settings
from quorate_protocol import __version__
from quorate_protocol.errors import CallFailed, Code, ConfigurationError, Refused
from quorate_protocol.messages import Reply

#: What is promised to dashboards and alerts: name (of a counter without `_total`), type, names of the labels.
CONTRACT = {
    ("quorate_agents", "gauge", ("state",)),
    ("quorate_rounds_open", "gauge", ()),
    ("quorate_rounds", "counter", ("state", "task")),
    ("quorate_round_duration_seconds", "histogram", ("task",)),
    ("quorate_replies", "counter", ("status", "task")),
    ("quorate_agent_replies", "counter", ("agent", "status")),
    ("quorate_agent_reply_latency_seconds", "gauge", ("agent", "quantile")),
    ("quorate_agent_weight", "gauge", ("agent", "task")),
    ("quorate_agent_accuracy", "gauge", ("agent", "task")),
    ("quorate_ensemble_accuracy", "gauge", ("task",)),
    ("quorate_calls", "counter", ("call", "result")),
    ("quorate_calls_repeated", "counter", ()),
    ("quorate_stray_replies", "counter", ("kind",)),
    ("quorate_resumptions", "counter", ("result",)),
    ("quorate_bodies_held_bytes", "gauge", ("place",)),
    ("quorate_bodies_refused", "counter", ("reason",)),
    ("quorate_journal_failing", "gauge", ()),
    ("quorate_journal_records", "counter", ()),
    ("quorate_journal_damaged", "counter", ()),
    ("quorate_journal_commits", "counter", ()),
    ("quorate_journal_pending_bytes", "gauge", ()),
    ("quorate_journal_file_bytes", "gauge", ()),
    ("quorate_feedback", "counter", ("task",)),
    ("quorate_connections", "gauge", ()),
    ("quorate_handshakes", "counter", ("result",)),
    ("quorate_udp_datagrams", "counter", ("direction",)),
    ("quorate_udp_bytes", "counter", ("direction",)),
    ("quorate_udp_trouble", "counter", ("kind",)),
    ("quorate_protocol_errors", "counter", ("code",)),
    ("quorate_build_info", "gauge", ("version",)),
    ("quorate_start_time_seconds", "gauge", ()),
}


@pytest.fixture(autouse=True)
def logged() -> Iterator[Any]:
    with structlog.testing.capture_logs() as entries:
        yield entries


class Served:
    """A fleet with its HTTP side."""

    def __init__(self, fleet: Fleet, http: httpx.AsyncClient) -> None:
        self.fleet = fleet
        self.http = http

    async def get(self, path: str) -> httpx.Response:
        return await self.http.get(path)

    async def metrics(self) -> dict[tuple[str, ...], float]:
        return parse_metrics((await self.get("/metrics")).text)


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with coordinating(tmp_path, http="127.0.0.1:0") as fleet:
        address = fleet.coordinator.http_address
        assert address is not None
        url = f"http://127.0.0.1:{address[1]}"
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S, trust_env=False) as http:
            yield Served(fleet, http)


def answering(name: str, answer: str) -> Agent:
    agent = Agent(name)

    @agent.task("classify")
    async def classify(body: Any) -> Any:
        if body == "decline":
            raise Declined("not this one")
        return answer

    return agent


async def some_rounds(fleet: Fleet) -> None:
    """One of everything that is counted."""
    await fleet.join(answering("right", "yes"), answering("wrong", "no"))
    operator = await fleet.operator()
    for _ in range(3):
        outcome = await operator.ask("classify", 1, quorum=1.0)
        await operator.reveal(outcome.round, "yes")
    assert (await operator.ask("classify", "decline")).state == "failed"
    with pytest.raises(CallFailed):
        await operator.ask("paint", 1)
    with pytest.raises(Refused):
        await fleet.operator(token="wrong")
    peer = await fleet.peer()
    await peer.join("raw")
    await peer.coordination.send(Reply(round=77, body=b"\x01"))
    await peer.coordination.stream.send(b"\0\0\0\x01\xc0")
    assert (await peer.closed()).code == Code.FRAME_MALFORMED
    await until(lambda: fleet.infos()["raw"].state == "lost")


async def test_every_metric_that_is_promised_is_there_and_right(served: Served) -> None:
    began = time.time()
    await some_rounds(served.fleet)
    response = await served.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=")
    found = {
        (family.name, family.type, tuple(sorted(set().union(*(sample.labels for sample in family.samples)) - {"le"})))
        for family in text_string_to_metric_families(response.text)
        if family.name.startswith("quorate_") and not family.name.endswith("_created")  # the library's own
    }
    assert found == CONTRACT
    metrics = parse_metrics(response.text)
    expected = {
        ("quorate_agents", "connected"): 2,
        ("quorate_agents", "lost"): 1,
        ("quorate_agents", "suspect"): 0,
        ("quorate_rounds_open",): 0,
        ("quorate_rounds_total", "complete", "classify"): 3,
        ("quorate_rounds_total", "failed", "classify"): 1,
        ("quorate_round_duration_seconds_count", "classify"): 4,
        ("quorate_replies_total", "replied", "classify"): 6,
        ("quorate_replies_total", "declined", "classify"): 2,
        ("quorate_agent_replies_total", "right", "replied"): 3,
        ("quorate_agent_replies_total", "wrong", "declined"): 1,
        ("quorate_agent_accuracy", "right", "classify"): 1,
        ("quorate_agent_accuracy", "wrong", "classify"): 0,
        ("quorate_calls_total", "ask", "ok"): 4,
        ("quorate_calls_total", "ask", "no-agents"): 1,
        ("quorate_calls_total", "reveal", "ok"): 3,
        ("quorate_stray_replies_total", "unknown"): 1,
        ("quorate_stray_replies_total", "late"): 0,
        ("quorate_feedback_total", "classify"): 3,
        ("quorate_handshakes_total", "welcome"): 4,
        ("quorate_handshakes_total", "unauthenticated"): 1,
        ("quorate_handshakes_total", "timeout"): 0,
        ("quorate_protocol_errors_total", "FRAME_MALFORMED"): 1,
        ("quorate_protocol_errors_total", "UNKNOWN_TYPE"): 0,
        ("quorate_build_info", __version__): 1,
    }
    assert {key: metrics.get(key) for key in expected} == expected
    assert 0 < metrics["quorate_agent_reply_latency_seconds", "right", "0.5"] < 10
    assert metrics["quorate_agent_weight", "right", "classify"] > metrics["quorate_agent_weight", "wrong", "classify"]
    assert 0 <= metrics["quorate_ensemble_accuracy", "classify"] <= 1
    assert metrics["quorate_connections",] >= 3
    assert began - 60 < metrics["quorate_start_time_seconds",] <= time.time()
    for direction in ("in", "out"):
        assert metrics["quorate_udp_bytes_total", direction] > metrics["quorate_udp_datagrams_total", direction] > 20
    assert any(key[0] == "process_resident_memory_bytes" for key in metrics)


async def test_metrics_are_there_before_anything_has_happened(served: Served) -> None:
    metrics = await served.metrics()
    assert metrics["quorate_agents", "connected"] == 0
    assert metrics["quorate_connections",] == 0
    assert metrics["quorate_handshakes_total", "welcome"] == 0


async def test_prometheus_may_ask_for_openmetrics(served: Served) -> None:
    await some_rounds(served.fleet)
    response = await served.http.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    assert response.text.endswith("# EOF\n")


async def test_scrapes_while_rounds_run_disturb_nobody(served: Served) -> None:
    await served.fleet.join(answering("a", "yes"))
    operator = await served.fleet.operator()
    outcomes, *_ = await asyncio.gather(
        asyncio.gather(*(operator.ask("classify", n) for n in range(40))), *(served.metrics() for _ in range(10))
    )
    assert {outcome.state for outcome in outcomes} == {"complete"}


async def test_agents_that_come_and_go_do_not_pile_up(fleet_of_few: Fleet) -> None:
    operator = await fleet_of_few.operator()
    for n in range(5):
        await fleet_of_few.join(answering(f"agent-{n}", "yes"))
        await operator.ask("classify", n)
        await fleet_of_few.stop(f"agent-{n}")
        await until(lambda: not fleet_of_few.connected)
    counted = {key[1] for key in fleet_of_few.metrics() if key[0] == "quorate_agent_replies_total"}
    assert counted == {"agent-3", "agent-4"}


@pytest.fixture
async def fleet_of_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Fleet]:
    assert AGENTS_COUNTED_MAX > 10_000
    monkeypatch.setattr("quorate_coordinator.gather.AGENTS_COUNTED_MAX", 2)
    async with coordinating(tmp_path) as fleet:
        yield fleet


async def test_ready_until_it_drains_and_healthy_until_the_end(served: Served) -> None:
    for path, text in (("/healthz", "ok\n"), ("/readyz", "ready\n")):
        response = await served.get(path)
        assert (response.status_code, response.text) == (200, text)
    await served.fleet.coordinator.drain()
    draining = await served.get("/readyz")
    assert (draining.status_code, draining.text) == (503, "not ready\n")
    assert (await served.get("/healthz")).status_code == 200
    assert (await served.metrics())["quorate_rounds_open",] == 0
    await served.fleet.coordinator.close()
    with pytest.raises(httpx.TransportError):
        await served.get("/healthz")


async def test_other_paths_and_garbage_are_turned_away(served: Served) -> None:
    assert (await served.get("/")).status_code == 404
    assert (await served.http.post("/metrics")).status_code == 405
    address = served.fleet.coordinator.http_address
    assert address is not None
    reader, writer = await asyncio.open_connection(*address)
    writer.write(b"\x16\x03\x01 this is no HTTP\r\n\r\n")
    async with asyncio.timeout(PATIENCE_S):
        assert b" 400 " in await reader.read()
    writer.close()
    await writer.wait_closed()
    assert (await served.get("/healthz")).status_code == 200


async def test_a_scraper_that_keeps_its_connection_does_not_hold_up_the_end(served: Served) -> None:
    await served.get("/metrics")
    async with asyncio.timeout(5):
        await served.fleet.coordinator.close()


async def test_a_port_that_is_taken_is_named_and_nothing_stays_bound(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        http = f"127.0.0.1:{taken.getsockname()[1]}"
        coordinator = Coordinator(Settings(listen="127.0.0.1:0", http=http, state_dir=tmp_path))
        problem = re.escape(f"http: cannot listen on {http}: Address already in use")
        with pytest.raises(ConfigurationError, match=problem) as caught:
            await coordinator.start()
    assert caught.value.path == "http"
    assert not coordinator.is_ready
    with pytest.raises(ConfigurationError, match=r"http: cannot listen on no\.such\.host\.invalid:1: "):
        await Coordinator(Settings(listen="127.0.0.1:0", http="no.such.host.invalid:1", state_dir=tmp_path)).start()


async def test_two_coordinators_do_not_share_a_port(tmp_path: Path) -> None:
    async with coordinating(tmp_path / "a", http="127.0.0.1:0") as fleet:
        address = fleet.coordinator.http_address
        assert address is not None
        with pytest.raises(ConfigurationError, match="http: cannot listen on"):
            await Coordinator(
                Settings(listen="127.0.0.1:0", http=f"127.0.0.1:{address[1]}", state_dir=tmp_path / "b")
            ).start()


async def test_http_can_be_off(tmp_path: Path) -> None:
    async with coordinating(tmp_path) as fleet:
        assert fleet.coordinator.http_address is None
