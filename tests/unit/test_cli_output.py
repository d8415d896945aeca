"""What people see: tables that fit their terminal, plain lines on a pipe, and nothing that a peer could paint with."""

import re
import time
from typing import Any

import numpy
import pytest

from quorate_coordinator.cli.ask_command import _outcome_json, _print_outcome
from quorate_coordinator.cli.fleet_commands import _print_fleet
from quorate_coordinator.feeding import report
from quorate_coordinator.feeding.report import LiveProgress, print_report
from quorate_coordinator.feeding.tally import Tally
from quorate_protocol.blobs import blob_of
from quorate_protocol.bodies import encode_body, encode_body_parts
from quorate_protocol.bulk import ref_to
from quorate_protocol.messages import AgentInfo, AgentResult, Fleet, Outcome, Revealed


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard output is 80 columns of a terminal."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


def shown(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines without colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()


def outcome(*results: AgentResult, state: str = "quorate", answer: Any = "cat") -> Outcome:
    return Outcome.model_validate(
        {
            "round": 7,
            "task": "classify",
            "state": state,
            "quorum": 1,
            "answer": encode_body(answer),
            "support": 0.75,
            "results": [result.model_dump() for result in results],
            "duration_s": 0.0123,
        }
    )


AGENTS = [
    AgentInfo(
        agent="extremely-fast-decision-tree",
        state="connected",
        labels={"zone": "north", "kind": "tree"},
        tasks=["classify"],
        assignments=12_345,
        replies=12_344,
        latency_p50_s=0.0123,
        latency_p99_s=1.2345,
        weights={"classify": 0.25},
    ),
    AgentInfo(agent="gone", state="lost", tasks=["classify", "paint"], last_seen_s=125.0),
]


def test_of_an_outcome_without_all_its_results_it_is_said_how_many_are_left_out(
    terminal: None, capsys: pytest.CaptureFixture[str]
) -> None:
    told = outcome(AgentResult(agent="a", status="replied", body=encode_body("cat")))
    _print_outcome(told)
    assert "left out" not in shown(capsys)[-1]
    _print_outcome(told.model_copy(update={"left_out": 7500}))
    assert "7500 more agents are left out" in " ".join("".join(shown(capsys)[-2:]).split())


def test_a_fleet_fits_the_terminal(terminal: None, capsys: pytest.CaptureFixture[str]) -> None:
    fleet = Fleet(software="quorate/1", uptime_s=4000.0, rounds_open=1, rounds_closed={"complete": 3}, agents=AGENTS)
    _print_fleet("quic://[::1]:4433", fleet)
    header, *table = shown(capsys)
    assert header == "quic://[::1]:4433 · quorate/1 · up 1.1 h · 1 rounds open, 3 closed (3 complete)"
    assert max(map(len, table)) <= 80
    # Broken between words, a name after a hyphen; a heading never.
    words = [word for line in table for word in line.split()]
    assert words[:8] == ["agent", "state", "tasks", "labels", "replies", "p50/p99", "ms", "weight"]
    text = "".join(line.split()[0] for line in table if not line.startswith(" "))
    assert "extremely-fast-decision-tree" in text
    for word in ("connected", "lost", "classify", "zone=north", "kind=tree", "12344/12345", "12.3/1234.5", "0.250"):
        assert word in words, word


def test_the_names_of_the_demos_agents_are_whole(terminal: None, capsys: pytest.CaptureFixture[str]) -> None:
    agents = [AGENTS[0].model_copy(update={"labels": {}, "assignments": 2310, "replies": 2309, "latency_p99_s": 0.023})]
    _print_fleet(
        "quic://localhost:4433",
        Fleet(software="quorate/0.1.0", uptime_s=4e4, rounds_open=0, rounds_closed={"complete": 9999}, agents=agents),
    )
    *header, _, _, row = shown(capsys)
    assert max(map(len, header)) <= 80
    assert row.split() == ["extremely-fast-decision-tree", "connected", "classify", "2309/2310", "12.3/23.0", "0.250"]


def test_words_longer_than_the_terminal_still_fit(terminal: None, capsys: pytest.CaptureFixture[str]) -> None:
    agents = [AGENTS[0].model_copy(update={"labels": {"path": "x" * 100}})]
    _print_fleet("quic://h", Fleet(software="q", uptime_s=1.0, rounds_open=0, agents=agents))
    lines = shown(capsys)
    assert max(map(len, lines)) <= 80
    assert sum(line.count("x") for line in lines) == 101
    assert "weight" in lines[1]


def test_a_fleet_without_labels_has_no_such_column(terminal: None, capsys: pytest.CaptureFixture[str]) -> None:
    _print_fleet("quic://h", Fleet(software="q", uptime_s=1.0, rounds_open=0, agents=AGENTS[1:], draining=True))
    lines = shown(capsys)
    assert lines[0].endswith(" · draining")
    assert "labels" not in lines[1]


def test_of_agents_that_are_not_listed_it_is_said_how_many_there_are(
    pipe: None, capsys: pytest.CaptureFixture[str]
) -> None:
    _print_fleet("quic://h", Fleet(software="q", uptime_s=1.0, rounds_open=0, agents=AGENTS, left_out=1200))
    shown = capsys.readouterr()
    assert shown.err == "1200 agents more have no room in one listing; metrics tell of all\n"
    assert len(shown.out.splitlines()) == 2 + len(AGENTS)


def test_a_fleet_on_a_pipe_is_one_line_for_each_agent(pipe: None, capsys: pytest.CaptureFixture[str]) -> None:
    _print_fleet("quic://h", Fleet(software="q", uptime_s=1.0, rounds_open=0, agents=AGENTS))
    columns, *rows = [line.split("\t") for line in shown(capsys)[1:]]
    assert columns == [
        "agent",
        "state",
        "tasks",
        "labels",
        "replies",
        "latency_p50_ms",
        "latency_p99_ms",
        "weight",
        "seen",
    ]
    assert rows == [
        [
            "extremely-fast-decision-tree",
            "connected",
            "classify",
            "zone=north,kind=tree",
            "12344/12345",
            "12.3",
            "1234.5",
            "0.250",
            "0 s ago",
        ],
        ["gone", "lost", "classify,paint", "", "0/0", "-", "-", "-", "2.1 min ago"],
    ]


def test_an_outcome_fits_the_terminal_and_tells_each_agents_part(
    terminal: None, capsys: pytest.CaptureFixture[str]
) -> None:
    _print_outcome(
        outcome(
            AgentResult(agent="a", status="replied", body=encode_body({"x": [1]}), latency_s=0.0021, weight=0.5),
            AgentResult(agent="b", status="failed", error="ValueError: no such class", latency_s=0.001),
            AgentResult(agent="c", status="late"),
            AgentResult(agent="d", status="replied", body=b"\xc1", latency_s=0.001, weight=0.5),
        )
    )
    lines = shown(capsys)
    assert lines[0] == '"cat"'
    assert max(map(len, lines)) <= 80
    rows = {line.split()[0]: re.split(r"\s{2,}", line.strip()) for line in lines[3:7]}
    assert rows["a"] == ["a", "replied", '{"x": [1]}', "0.500", "2.1", "0.0"]
    assert rows["b"] == ["b", "failed", "ValueError: no such class", "-", "1.0", "-"]
    assert rows["c"][:2] == ["c", "late"]
    assert rows["d"][2].startswith("its answer cannot be")
    assert lines[-1] == "round 7 quorate in 12.3 ms · 2 of 4 replied, quorum 1 · support 75%"


def test_what_agents_say_is_no_command_for_the_terminal(terminal: None, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "\x1b]0;title\x07\x1b[2J[red]two\nlines[/red]"
    _print_outcome(
        outcome(AgentResult(agent="a", status="failed", error=evil), answer=evil),
    )
    raw = capsys.readouterr().out
    assert "\x1b]0" not in raw
    assert "\x1b[2J" not in raw
    assert "\x07" not in raw
    # The answer as JSON escapes it, the error on one line; the markup is text.
    assert r"\u001b]0;title\u0007" in raw
    assert "[red]two" in raw.split("failed", 1)[1]
    assert "lines[/red]" in raw.split("failed", 1)[1]


def run_tally() -> Tally:
    tally = Tally()
    result = AgentResult(agent="tree", status="replied", body=b"\x01", latency_s=0.002, weight=1.0)
    tally.add_outcome(outcome(result, state="complete"), 0.01)
    tally.add_truth(Revealed(round=7, correct=True, right={"tree": True}, weights={"tree": 1.0}))
    return tally


def test_a_report_is_a_table_on_a_terminal(terminal: None, capsys: pytest.CaptureFixture[str]) -> None:
    print_report("data[red].csv", run_tally(), 2.0)
    lines = shown(capsys)
    assert lines[0].strip() == "data[red].csv"
    assert max(map(len, lines)) <= 80
    cells = [line.split() for line in lines]
    assert cells[1] == ["agent", "accuracy", "weight", "replies", "missed", "p50/p99", "ms"]
    assert ["tree", "1.0000", "1.000", "1", "0", "2.0/2.0"] in cells
    assert ["ensemble", "1.0000", "1.000", "1", "0", "10.0/10.0"] in cells
    assert lines[-1] == "1 rounds in 2.0 s · 0.5 rounds/s · coordination overhead p50 10.00 ms"


def test_a_report_with_long_names_fits_the_terminal(terminal: None, capsys: pytest.CaptureFixture[str]) -> None:
    tally = run_tally()
    name = "extremely-fast-decision-tree"
    for number in range(1200):
        status = "replied" if number % 2 else "declined"
        result = AgentResult(agent=name, status=status, latency_s=0.0123, weight=0.25)  # type: ignore[arg-type]
        tally.add_outcome(outcome(result), 0.01)
    print_report("data.csv", tally, 2.0)
    lines = shown(capsys)
    assert max(map(len, lines)) <= 80
    assert any(line.startswith(f"{name} ") for line in lines)


def test_the_demos_report_has_a_line_for_each_agent(terminal: None, capsys: pytest.CaptureFixture[str]) -> None:
    tally = run_tally()
    name = "extremely-fast-decision-tree"
    tally.add_outcome(outcome(AgentResult(agent=name, status="replied", latency_s=0.0123, weight=0.25)), 0.01)
    tally.add_outcome(outcome(AgentResult(agent=name, status="declined"), state="failed"), 0.01)
    print_report("image-segments", tally, 2.0)
    (row,) = [line for line in shown(capsys) if line.startswith("extremely")]
    assert re.split(r"\s{2,}", row) == [name, "-", "0.250", "1", "1 declined", "12.3/12.3"]


def test_a_report_is_plain_lines_on_a_pipe(pipe: None, capsys: pytest.CaptureFixture[str]) -> None:
    print_report("data.csv", run_tally(), 2.0)
    assert shown(capsys)[:3] == [
        "agent\taccuracy\tweight\treplies\tmissed\tlatency_p50_ms\tlatency_p99_ms",
        "tree\t1.0000\t1.000\t1\t0\t2.0\t2.0",
        "ensemble\t1.0000\t1.000\t1\t0\t10.0\t10.0",
    ]


def test_progress_on_a_pipe_is_a_line_now_and_then_on_standard_error(
    pipe: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(report.time, "monotonic", lambda: now)
    tally = run_tally()
    with LiveProgress("feed x.csv", tally, 50) as progress:
        progress.update()
        now += 4.9
        progress.update()
        now += 0.2
        progress.update()
        progress.update()
    with LiveProgress("quiet", tally, 50, quiet=True) as progress:
        now += 60
        progress.update()
    assert capsys.readouterr() == ("", "feed x.csv: 1/50  0 rounds/s  accuracy 1.0000\n")


def test_progress_on_a_terminal_is_a_bar_that_goes(
    terminal: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with LiveProgress("feed [red]x.csv", run_tally(), 50) as progress:
        progress._shown_at = time.monotonic() - 1
        progress.update()
    out, err = capsys.readouterr()
    assert out == ""
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", err)
    assert "feed [red]x.csv" in plain
    assert "1/50" in plain
    assert "accuracy 1.0000" in plain


@pytest.mark.usefixtures("pipe")
def test_a_large_answer_is_said_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    blob = blob_of(encode_body_parts(numpy.zeros((512, 1024), "f4")))
    gone = ref_to(blob).model_copy(update={"gone": True})
    told = outcome(AgentResult(agent="a", status="replied", bulk=gone))
    _print_outcome(told.model_copy(update={"answer": None, "bulk": ref_to(blob).with_content(blob)}))
    lines = " ".join(shown(capsys))
    assert f"array of float32, 512 x 1024 ({len(blob)} bytes)" in lines
    assert f"the body of {len(blob)}" in lines


def test_of_a_large_answer_json_says_that_it_is_one() -> None:
    """No agent could have answered that: it is beside the answer."""
    blob = blob_of(encode_body_parts({"grid": numpy.zeros((512, 1024), numpy.float32), "who": "a"}))
    bulk = ref_to(blob).with_content(blob)
    result = AgentResult(agent="a", status="replied", bulk=bulk)
    outcome = Outcome(round=1, task="t", state="complete", quorum=1, bulk=bulk, results=[result], duration_s=0.1)
    shown = _outcome_json(outcome)
    wanted = {"size": len(blob), "digest": blob.digest.hex(), "is": f"dict of 2 ({len(blob)} bytes)"}
    assert (shown["answer"], shown["answer_ref"]) == (None, wanted)
    assert (shown["results"][0]["answer"], shown["results"][0]["answer_ref"]) == (None, wanted)
    # One that travelled by itself because there was no room for all is shown as it is.
    middling = blob_of([encode_body("x" * 400_000)])
    moved = outcome.model_copy(update={"bulk": ref_to(middling).with_content(middling), "results": []})
    assert (_outcome_json(moved)["answer"], "answer_ref" in _outcome_json(moved)) == ("x" * 400_000, False)
    small = outcome.model_copy(update={"bulk": None, "answer": encode_body("dict of 2"), "results": []})
    assert (_outcome_json(small)["answer"], "answer_ref" in _outcome_json(small)) == ("dict of 2", False)
