"""The command `quorate` as processes: what it prints where, how it exits, what signals do."""

import asyncio
import json
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from coordination import Fleet, coordinating, until
from processes import PATIENCE_S, CoordinatorProcess, Ended, coordinator_process, quorate, running
from quorate_agent import Agent, Declined
from quorate_agent import backoff as backoff_module
from quorate_agent.events import EndingKind
from quorate_agent.worker import Worker
from quorate_protocol import __version__
from quorate_protocol.client import Client
from quorate_protocol.credentials import find_token
from quorate_protocol.messages import Outcome
from quorate_protocol.transport import ClientTls

# --- the coordinator -----------------------------------------------------------------------------


class Gate:
    """An agent of a coordinator that is another process; its handler waits until it is let go."""

    def __init__(self, coordinator: CoordinatorProcess) -> None:
        self.gate = asyncio.Event()
        self.begun = asyncio.Event()
        agent = Agent("gate")

        @agent.task("wait")
        async def wait(body: Any) -> Any:
            self.begun.set()
            await self.gate.wait()
            return body

        state_dir = coordinator.state_dir
        self.token = find_token(state_dir / "token", environ={})
        self.tls = ClientTls(state_dir / "ca.pem")
        self.url = coordinator.url
        self.worker = Worker(agent, self.url, agent_id="gate", token=self.token, tls=self.tls)
        self.running = asyncio.create_task(self.worker.run())
        self.client: Client

    async def __aenter__(self) -> "Gate":
        self.client = await self.connect()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.client.close()
        self.running.cancel()
        await asyncio.wait([self.running])

    async def connect(self) -> Client:
        return await Client.connect(self.url, token=self.token, tls=self.tls)

    async def joined(self, client: Client) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not any(info.state == "connected" for info in (await client.agents()).agents):
                pass

    async def ask(self) -> "asyncio.Task[Outcome]":
        """A round that is in flight."""
        await self.joined(self.client)
        asking = asyncio.create_task(self.client.ask("wait", "last"))
        await asyncio.wait_for(self.begun.wait(), PATIENCE_S)
        return asking


async def test_sigterm_drains_and_the_outcome_arrives(tmp_path: Path) -> None:
    async with coordinator_process(tmp_path / "state") as coordinator, Gate(coordinator) as gate:
        asking = await gate.ask()
        async with httpx.AsyncClient(base_url=f"http://{coordinator.http}", trust_env=False) as http:
            assert (await http.get("/readyz")).status_code == 200
            coordinator.process.send_signal(signal.SIGTERM)
            assert await coordinator.told() == {"STOPPING": "1", "STATUS": "draining"}
            async with asyncio.timeout(PATIENCE_S):
                while (await http.get("/readyz")).status_code == 200:
                    pass
            assert (await http.get("/healthz")).status_code == 200
        assert not asking.done()
        gate.gate.set()
        async with asyncio.timeout(PATIENCE_S):
            outcome = await asking
        assert (outcome.state, outcome.value) == ("complete", "last")
        ended = await coordinator.process.end()
    assert (ended.code, ended.out) == (0, "")
    events = [entry["event"] for entry in ended.logged]
    assert events[:2] == ["journal_read", "coordinator_started"]
    assert {"agent_joined", "operator_joined", "stopping", "draining"} <= set(events)
    assert events[-1] == "coordinator_stopped"
    assert gate.token not in ended.err


@pytest.mark.parametrize("how", ["second signal", "drain_s"])
async def test_what_does_not_finish_is_interrupted_and_told(tmp_path: Path, how: str) -> None:
    drain_s = "0.2" if how == "drain_s" else "600"
    settings = {"QUORATE_SESSIONS__DRAIN_S": drain_s}
    async with coordinator_process(tmp_path / "state", **settings) as coordinator, Gate(coordinator) as gate:
        asking = await gate.ask()
        coordinator.process.send_signal(signal.SIGINT)
        await coordinator.told()
        if how == "second signal":
            coordinator.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(PATIENCE_S):
            outcome = await asking
        assert (outcome.state, outcome.reason) == ("interrupted", "the coordinator was stopped")
        ended = await coordinator.process.end()
    assert ended.code == 0
    assert "Traceback" not in ended.err


async def test_after_kill_9_a_new_one_gets_its_agents_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backoff_module.compute_delay_s, "__kwdefaults__", {"base_s": 0.05, "max_s": 0.1})
    short = {"QUORATE_SESSIONS__PULSE_S": "0.1", "QUORATE_SESSIONS__LEASE_S": "0.5"}
    async with coordinator_process(tmp_path, **short) as first, Gate(first) as gate:
        await gate.joined(gate.client)
        first.process.send_signal(signal.SIGKILL)
        await first.process.end()
        async with coordinator_process(tmp_path, listen=first.listen, **short):
            client = await gate.connect()
            await gate.joined(client)
            gate.gate.set()
            outcome = await client.ask("wait", "again")
            assert (outcome.state, outcome.value) == ("complete", "again")
            await client.close()


async def test_agents_that_are_told_to_stop_leave_the_daemon_properly(tmp_path: Path) -> None:
    async with coordinator_process(tmp_path) as coordinator, Gate(coordinator) as gate:
        await gate.joined(gate.client)
        gate.worker.request_stop("SIGTERM")
        async with asyncio.timeout(PATIENCE_S):
            assert (await gate.running).kind is EndingKind.STOPPED
            while (state := (await gate.client.agents()).agents[0].state) != "left":
                assert state in ("connected", "draining")


async def test_addresses_that_are_taken_are_named(tmp_path: Path) -> None:
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
        socket.create_server(("127.0.0.1", 0)) as tcp,
    ):
        udp.bind(("127.0.0.1", 0))
        taken_udp, taken_tcp = (f"127.0.0.1:{sock.getsockname()[1]}" for sock in (udp, tcp))
        listen, http = await asyncio.gather(
            quorate(
                "coordinator", QUORATE_LISTEN=taken_udp, QUORATE_HTTP="", QUORATE_STATE_DIR=str(tmp_path / "state")
            ),
            quorate(
                "coordinator",
                QUORATE_LISTEN="127.0.0.1:0",
                QUORATE_HTTP=taken_tcp,
                QUORATE_STATE_DIR=str(tmp_path / "another"),
            ),
        )
    assert (listen.code, listen.out) == (2, "")
    assert listen.line == f"quorate: listen: cannot listen on {taken_udp}: Address already in use"
    assert (http.code, http.out) == (2, "")
    assert http.line == f"quorate: http: cannot listen on {taken_tcp}: Address already in use"


async def test_check_prints_the_settings_and_makes_nothing(tmp_path: Path) -> None:
    config = tmp_path / "coordinator.toml"
    write(config, 'state_dir = "state"\n[rounds]\ndeadline_s = 3\n')
    ended = await quorate("coordinator", "--check", "--config", str(config), QUORATE_ROUNDS__QUORUM="2")
    assert (ended.code, ended.err) == (0, "")
    settings = json.loads(ended.out)
    assert settings["state_dir"] == str(tmp_path / "state")
    assert (settings["rounds"]["deadline_s"], settings["rounds"]["quorum"]) == (3.0, 2)
    assert names_in(tmp_path) == ["coordinator.toml"]


async def test_a_wrong_setting_is_named(tmp_path: Path) -> None:
    config = write(tmp_path / "coordinator.toml", "[rounds]\ndeadline_s = -1\n")
    for arguments in (("coordinator", "--config", config), ("coordinator", "--check", "--config", config)):
        ended = await quorate(*arguments)
        assert (ended.code, ended.out) == (2, "")
        assert ended.line == f"quorate: {config}: rounds.deadline_s: must be greater than 0, got -1"


async def test_a_state_directory_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    write(tmp_path / "file", "")
    ended = await quorate(
        "coordinator", QUORATE_LISTEN="127.0.0.1:0", QUORATE_HTTP="", QUORATE_STATE_DIR=str(tmp_path / "file")
    )
    assert (ended.code, ended.line) == (2, f"quorate: state_dir: cannot use {tmp_path}/file: File exists")


# --- operators -----------------------------------------------------------------------------------


class Operated:
    """A fleet in this process, and the command as an operator of this machine has it."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.environ = {"QUORATE_STATE_DIR": str(fleet.state_dir), "QUORATE_COORDINATOR": fleet.url}

    async def run(self, *arguments: str, stdin: str | bytes = "", **environ: str) -> Ended:
        return await quorate(*arguments, stdin=stdin, **{**self.environ, **environ})

    async def run_all(self, *commands: tuple[str, ...], **environ: str) -> list[Ended]:
        return await in_turn(*commands, **{**self.environ, **environ})


async def in_turn(*commands: tuple[str, ...], **environ: str) -> list[Ended]:
    """Runs commands two at a time."""
    turns = asyncio.Semaphore(2)

    async def one(arguments: tuple[str, ...]) -> Ended:
        async with turns:
            return await quorate(*arguments, **environ)

    return await asyncio.gather(*(one(arguments) for arguments in commands))


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def voter(name: str, answer: Any, **options: Any) -> Agent:
    """Answers with `answer`, or as it is told by what it is asked."""
    agent = Agent(name, **options)

    @agent.task("classify")
    async def classify(body: Any) -> Any:
        if body == "hang":
            await asyncio.Event().wait()
        if body == "raise":
            raise ValueError("no such class")
        if isinstance(body, dict) and body.get("decline"):
            raise Declined("not this one")
        return answer

    return agent


@pytest.fixture
async def operated(tmp_path: Path) -> AsyncIterator[Operated]:
    async with coordinating(tmp_path / "state") as fleet:
        await fleet.join(voter("a", "cat", labels={"zone": "x"}), voter("b", "cat"), voter("c", "dog"))
        yield Operated(fleet)


async def test_ask_reveal_and_status(operated: Operated) -> None:
    asked, with_json, from_stdin, of_zone = await asyncio.gather(
        operated.run("ask", "classify", '{"x": 1}', "--quorum", "100%"),
        operated.run("ask", "classify", '{"x": 1}', "--quorum", "3", "--deadline", "20s", "--grace", "500ms", "--json"),
        operated.run("ask", "classify", "-", "--quorum", "1.0", stdin='\ufeff{"x": 1}\n'),
        operated.run("ask", "classify", "null", "--label", "zone=x", "--json"),
    )
    assert asked == from_stdin == Ended(0, '"cat"\n', "")
    assert (with_json.code, with_json.err) == (0, "")
    outcome = json.loads(with_json.out)
    assert list(outcome) == [
        "round",
        "task",
        "state",
        "reason",
        "quorum",
        "answer",
        "support",
        "duration_ms",
        "results",
        "left_out",
    ]
    assert (outcome["state"], outcome["quorum"], outcome["answer"]) == ("complete", 3, "cat")
    assert [(r["agent"], r["status"], r["answer"], r["error"]) for r in outcome["results"]] == [
        ("a", "replied", "cat", ""),
        ("b", "replied", "cat", ""),
        ("c", "replied", "dog", ""),
    ]
    assert [r["agent"] for r in json.loads(of_zone.out)["results"]] == ["a"]

    others = [str(number) for number in range(1, 5) if number != outcome["round"]]
    revealed, plain, status, status_json = await operated.run_all(
        ("reveal", str(outcome["round"]), '"dog"', "--json"),
        ("reveal", others[0], '"cat"'),
        ("status",),
        ("status", "--json"),
    )
    result = json.loads(revealed.out)
    assert (revealed.code, result["round"], result["correct"]) == (0, outcome["round"], False)
    assert result["right"] == {"a": False, "b": False, "c": True}
    assert plain.code == 0
    assert plain.out.startswith(f"round {others[0]} was right\n  a  right  weight ")
    assert status.code == 0
    header, columns, *lines = status.out.splitlines()
    assert columns.startswith("agent\tstate\ttasks\t")
    assert header.startswith(f"{operated.fleet.url} · quorate/{__version__} · up ")
    assert "0 rounds open, 4 closed (4 complete)" in header
    assert [line.split("\t")[:3] for line in lines] == [[name, "connected", "classify"] for name in "abc"]
    listing = json.loads(status_json.out)
    assert [info["agent"] for info in listing["agents"]] == ["a", "b", "c"]
    assert listing["rounds_closed"] == {"complete": 4}


async def test_an_answer_that_json_cannot_say_is_said_in_other_words(operated: Operated) -> None:
    odd = Agent("odd")

    @odd.task("odd")
    async def answer(body: Any) -> Any:
        return {"bytes": b"\x01\xff", "nan": float("nan"), "big": float("inf")}

    await operated.fleet.join(odd)
    ended = await operated.run("ask", "odd", "1")
    assert ended == Ended(0, '{"bytes": "01ff", "nan": null, "big": null}\n', "")


async def test_status_without_agents(tmp_path: Path) -> None:
    async with coordinating(tmp_path) as fleet:
        ended = await Operated(fleet).run("status")
    assert ended.code == 0
    assert ended.out.splitlines()[1] == "no agents have joined yet; start one with: quorate-agent run MODULE:ATTRIBUTE"


async def test_rounds_without_an_answer_exit_with_6_and_say_why(operated: Operated) -> None:
    nobody, expired, failed, failed_json, labels, unknown = await operated.run_all(
        ("ask", "paint", "1"),
        ("ask", "classify", '"hang"', "--deadline", "50ms"),
        ("ask", "classify", '"raise"'),
        ("ask", "classify", '"raise"', "--json"),
        ("ask", "classify", "1", "--label", "zone=nowhere"),
        ("reveal", "99", "1"),
    )
    for ended in (nobody, expired, failed, failed_json, labels, unknown):
        assert ended.code == 6
    assert nobody.line == "quorate: no connected agent does the task 'paint' (no-agents)"
    assert expired.out == failed.out == ""
    reason, *parts = expired.err.splitlines()
    assert reason.endswith("expired: 0 of 2 replies needed had come at the deadline of 0.05 s")
    assert parts == ["  a late", "  b late", "  c late"]
    reason, *parts = failed.err.splitlines()
    assert reason.endswith("failed: quorum of 2 is out of reach: of 3 selected 2 failed")
    assert sorted(part[4:] for part in parts) == ["cancelled"] + ["failed: ValueError: no such class"] * 2
    assert failed_json.line.endswith("failed: quorum of 2 is out of reach: of 3 selected 2 failed")
    results = json.loads(failed_json.out)["results"]
    assert {result["error"] for result in results} <= {"ValueError: no such class", ""}
    assert labels.line == "quorate: no connected agent with labels zone=nowhere does the task 'classify' (no-agents)"
    assert unknown.line == "quorate: there is no round 99 (unknown-round)"


async def test_wrong_arguments_exit_with_2_and_nobody_is_asked(operated: Operated) -> None:
    wrong = {
        ("ask", "classify", "cat"): "quorate: JSON: 'cat' is not JSON",
        ("ask", "classify", "18446744073709551616"): "quorate: body cannot be sent: ",
        ("ask", "two words", "1"): "quorate: TASK: String should match pattern",
        ("reveal", "9223372036854775808", "1"): "quorate: ROUND: Input should be less than or equal to",
    }
    for arguments, ended in zip(wrong, await operated.run_all(*wrong), strict=True):
        assert (ended.code, ended.out) == (2, ""), arguments
        assert ended.line.startswith(wrong[arguments]), arguments
    assert operated.fleet.coordinator.list_fleet().rounds_closed == {}


async def test_standard_input_that_is_no_text_is_named(operated: Operated) -> None:
    garbage, nothing = await asyncio.gather(
        operated.run("ask", "classify", "-", stdin=b'"\xff"'), operated.run("ask", "classify", "-")
    )
    assert (garbage.code, garbage.line) == (2, "quorate: standard input: not UTF-8 text (at byte 1)")
    assert nothing.code == 2
    assert nothing.line.startswith("quorate: standard input: '' is not JSON")


async def test_a_wrong_token_exits_with_3_and_nobody_there_with_5(operated: Operated, tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nobody = f"quic://127.0.0.1:{port}"
    (await_refused, refused_feed, absent, status) = await asyncio.gather(
        operated.run("ask", "classify", "1", QUORATE_TOKEN="wrong"),
        operated.run("feed", write(tmp_path / "x.csv", "x\n1\n"), "--task", "classify", QUORATE_TOKEN="wrong"),
        operated.run("ask", "classify", "1", "--coordinator", nobody),
        operated.run("status", "--coordinator", nobody),
    )
    for ended in (await_refused, refused_feed):
        assert (ended.code, ended.out) == (3, "")
        assert ended.line == (
            "quorate: the coordinator refused us (unauthenticated): the token is not this coordinator's; "
            "is the token that of this coordinator? See --token-file"
        )
    for ended in (absent, status):
        assert (ended.code, ended.out) == (5, "")
        assert ended.line == f"quorate: cannot connect to {nobody}: connection refused: nothing listens there"


async def test_a_coordinator_that_is_not_trusted_is_named(operated: Operated, tmp_path: Path) -> None:
    async with coordinating(tmp_path / "other") as other:
        ca = str(other.state_dir / "ca.pem")
        ended = await operated.run("status", "--ca", ca)
    assert ended.code == 5
    assert f"the server's certificate is not trusted by the authorities in {ca}" in ended.line


async def test_ctrl_c_ends_an_ask_and_its_round(operated: Operated) -> None:
    async with running("ask", "classify", '"hang"', **operated.environ) as asking:
        await until(lambda: operated.fleet.coordinator.list_fleet().rounds_open)
        asking.send_signal(signal.SIGINT)
        ended = await asking.end()
    assert (ended.code, ended.out, ended.err) == (130, "", "quorate: interrupted\n")
    await until(lambda: operated.fleet.coordinator.list_fleet().rounds_closed == {"cancelled": 1})


# --- feeding -------------------------------------------------------------------------------------


class Memory:
    """An agent that answers with the truth that it was told of the same features, or declines."""

    def __init__(self, name: str) -> None:
        self.agent = Agent(name)
        known: dict[str, Any] = {}

        @self.agent.task("recall")
        async def recall(body: dict[str, Any]) -> Any:
            if (key := json.dumps(body)) not in known:
                raise Declined("never seen")
            return known[key]

        @self.agent.feedback("recall")
        async def learn(body: dict[str, Any], truth: Any) -> None:
            known[json.dumps(body)] = truth


async def test_feed_asks_reveals_and_reports(operated: Operated, tmp_path: Path) -> None:
    await operated.fleet.join(Memory("memory").agent)
    csv = write(tmp_path / "data.csv", "x,label\n" + "1,cat\n2,dog\n" * 10)
    fed = await operated.run("feed", csv, "--task", "recall", "--target", "label")
    assert fed.code == 0
    header, memory, ensemble, summary = fed.out.splitlines()
    assert header.split("\t") == [
        "agent",
        "accuracy",
        "weight",
        "replies",
        "missed",
        "latency_p50_ms",
        "latency_p99_ms",
    ]
    assert memory.split("\t")[:5] == ["memory", "1.0000", "1.000", "18", "2 declined"]
    assert ensemble.split("\t")[:5] == ["ensemble", "0.9000", "1.000", "18", "2"]
    assert summary.startswith("20 rounds in ")
    assert "without an answer: 2 failed" in summary
    limited = await operated.run(
        "feed", csv, "--task", "recall", "--target", "label", "--limit", "3", "--json", "--quorum", "1"
    )
    assert (limited.code, limited.err) == (0, "")
    result = json.loads(limited.out)
    assert (result["file"], result["instances"], result["states"]) == (csv, 3, {"complete": 3})
    assert result["ensemble"] == {"accuracy": 1.0}
    assert result["agents"]["memory"]["replies"] == 3


async def test_feed_reads_json_lines_from_standard_input_as_they_come(operated: Operated) -> None:
    arguments = ["feed", "-", "--format", "jsonl", "--task", "classify", "--target", "y", "--json"]
    async with running(*arguments, **operated.environ) as feeding:

        def closed() -> int:
            return sum(operated.fleet.coordinator.list_fleet().rounds_closed.values())

        for number in range(1, 4):
            await feeding.write('{"x": [1, {"deep": null}], "y": "cat"}\n')
            # It does not wait for more of its input before it asks.
            await until(lambda number=number: closed() == number)
        # And it is still there: the connection is looked after while nothing comes.
        ended = await feeding.end()
    assert (ended.code, ended.err) == (0, "")
    assert json.loads(ended.out)["states"] == {"complete": 3}


async def test_feed_without_a_target_reveals_nothing(operated: Operated, tmp_path: Path) -> None:
    fed = await operated.run("feed", write(tmp_path / "x.csv", "x\n1\n2\n"), "--task", "classify", "--json")
    assert fed.code == 0
    result = json.loads(fed.out)
    assert (result["instances"], result["ensemble"]) == (2, {"accuracy": None})
    assert ("quorate_feedback_total", "classify") not in operated.fleet.metrics()


async def test_what_is_wrong_in_a_file_is_named_and_what_was_answered_is_reported(
    operated: Operated, tmp_path: Path
) -> None:
    """Name of the file: its content, what is said, and how many rows were answered before."""
    good = "x,y\n" + "1,cat\n" * 3
    wrong: dict[str, tuple[str | bytes, str, int]] = {
        "no-target.csv": ("x,z\n1,2\n", ": no column 'y'; there are x, z", 0),
        "empty.csv": ("", " is empty: the first line has to name the columns", 0),
        "missing.csv": (good + "5,\n6,cat\n", ", line 5: no value for the target 'y'", 3),
        "ragged.csv": (good + "5\n", ", line 5: 1 values for 2 columns", 3),
        "latin.csv": (good.encode() + b"caf\xe9,cat\n", ", line 5: not UTF-8 text", 3),
        "utf16.csv": (good.encode("utf-16"), ", line 1: not UTF-8 text", 0),
        "broken.jsonl": ('{"x": 1, "y": "cat"}\n{"x": 1\n', ", line 2: not JSON (Expecting ',' delimiter", 1),
        "large.jsonl": ('{"y": 1}\n{"x": 99999999999999999999, "y": 1}\n', ", line 2: body cannot be sent: ", 1),
    }
    names = {write(tmp_path / name, content): name for name, (content, _, _) in wrong.items()}
    commands = [("feed", path, "--task", "classify", "--target", "y") for path in names]
    for (path, name), ended in zip(names.items(), await operated.run_all(*commands), strict=True):
        _, problem, answered = wrong[name]
        assert ended.code == 2, name
        assert ended.line.startswith(f"quorate: {path}{problem}"), name
        if answered:
            assert ended.out.splitlines()[-1].startswith(f"{answered} rounds in "), name
        else:
            assert ended.out == "", name
    path = str(tmp_path / "ragged.csv")
    ended = await operated.run("feed", path, "--task", "classify", "--target", "y", "--json")
    result = json.loads(ended.out)
    assert (ended.code, result["instances"], result["ensemble"]) == (2, 3, {"accuracy": 1.0})
    assert result["error"] == f"{path}, line 5: 1 values for 2 columns"


async def test_feed_says_at_which_row_nobody_was_there(operated: Operated, tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", "x\n1\n")
    nobody, unanswered = await operated.run_all(
        ("feed", path, "--task", "paint"),
        ("feed", write(tmp_path / "y.jsonl", '{"decline": 1}\n'), "--task", "classify"),
    )
    assert nobody.code == 6
    assert nobody.line == f"quorate: {path}, line 2: no connected agent does the task 'paint' (no-agents)"
    assert unanswered.code == 6
    assert unanswered.line == "quorate: no round brought an answer"
    assert "without an answer: 1 failed" in unanswered.out


async def test_ctrl_c_ends_a_feed_with_its_report(operated: Operated) -> None:
    async with running("feed", "-", "--task", "classify", "--target", "y", **operated.environ) as feeding:
        await feeding.write("x,y\n1,cat\n2,cat\n")
        await until(lambda: ("quorate_feedback_total", "classify") in operated.fleet.metrics())
        await until(lambda: operated.fleet.metrics()["quorate_feedback_total", "classify"] == 2)
        feeding.send_signal(signal.SIGINT)
        async with asyncio.timeout(PATIENCE_S):
            await feeding.process.wait()
        ended = await feeding.end()
    assert (ended.code, ended.line) == (130, "quorate: interrupted")
    assert ended.out.splitlines()[-1].startswith("2 rounds in ")


# --- the command itself --------------------------------------------------------------------------


async def test_version_and_usage() -> None:
    version, nothing = await in_turn(("--version",), ())
    assert version == Ended(0, f"quorate {__version__}\n", "")
    assert nothing.code == 2
    for command in ("coordinator", "ask", "reveal", "status", "feed", "demo", "bench"):
        assert f"\n  {command} " in nothing.err
