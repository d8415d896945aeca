"""What people write after options, and what they are told when it is wrong."""

import json
import math
from typing import Any

import numpy
import pytest
import typer

from quorate_coordinator.cli import common
from quorate_protocol.arguments import arguments_checked
from quorate_protocol.errors import (
    ArgumentInvalid,
    CallFailed,
    ConfigurationError,
    ConnectFailed,
    ConnectionClosed,
    FrameMalformed,
    LocalError,
    QuorateError,
    Refused,
    ResetByPeer,
)
from quorate_protocol.messages import Ask, Reveal


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (None, None),
        ("2", 2.0),
        ("2.5", 2.5),
        (".5", 0.5),
        ("0", 0.0),
        ("250ms", 0.25),
        ("2s", 2.0),
        ("1.5m", 90.0),
        ("1h", 3600.0),
        (" 3 s ", 3.0),
    ],
)
def test_durations(text: str | None, seconds: float | None) -> None:
    assert common.parse_duration("--grace", text) == (None if seconds is None else pytest.approx(seconds))


@pytest.mark.parametrize("text", ["", "soon", "-1s", "1 day", "1ms2s", "1e3", "s", "1.2.3", "inf", "nan", "1,5s"])
def test_wrong_durations_name_the_option_and_how_it_is_written(text: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        common.parse_duration("--grace", text)
    assert str(caught.value) == (f"--grace: {text!r} is not a time; write 250ms, 2s, 1.5m, 1h or a number of seconds")


@pytest.mark.parametrize(
    ("text", "quorum"),
    [
        (None, None),
        ("1", 1),
        ("17", 17),
        ("0.5", 0.5),
        ("1.0", 1.0),
        ("1e-1", 0.1),
        ("50%", 0.5),
        ("100%", 1.0),
        ("33.3%", 0.333),
        ("0.1%", 0.001),
    ],
)
def test_quorum_is_a_count_or_a_share(text: str | None, quorum: int | float | None) -> None:
    parsed = common.parse_quorum(text)
    assert parsed == (None if quorum is None else pytest.approx(quorum))
    assert type(parsed) is type(quorum)


@pytest.mark.parametrize("text", ["", "0", "-1", "0.0", "1.5", "0%", "101%", "half", "%", "nan", "nan%", "inf", "1/2"])
def test_a_wrong_quorum_is_explained(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"--quorum: .* is neither a count \(3\) nor a share"):
        common.parse_quorum(text)


def test_labels() -> None:
    assert common.parse_labels(None) == {}
    assert common.parse_labels(["zone=a", "kind=", "expression=a=b"]) == {"zone": "a", "kind": "", "expression": "a=b"}
    for wrong, problem in ((["zone"], "'zone' is not KEY=VALUE"), (["=a"], "'=a' is not KEY=VALUE")):
        with pytest.raises(ConfigurationError, match=f"--label: {problem}"):
            common.parse_labels(wrong)
    with pytest.raises(ConfigurationError, match="--label: 'zone' is given twice"):
        common.parse_labels(["zone=a", "zone=a"])


def test_json() -> None:
    assert common.parse_json("JSON", '{"x": [1, 2.5, null, true, "ü"]}') == {"x": [1, 2.5, None, True, "ü"]}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("cat", "JSON: 'cat' is not JSON (Expecting value: line 1 column 1 (char 0)); text needs quotes: '\"cat\"'"),
        ("{x: 1}", "JSON: '{x: 1}' is not JSON (Expecting property name enclosed in double quotes: line 1"),
        ("", "JSON: '' is not JSON (Expecting value: line 1 column 1 (char 0))"),
        ("[" * 100_000, "JSON: '[[["),
        ('{"a": 1} x', "JSON: '{\"a\": 1} x' is not JSON (Extra data: line 1 column 10 (char 9))"),
    ],
    ids=["bare", "keys", "empty", "deep", "extra"],
)
def test_what_is_not_json_is_shown_and_explained(text: str, problem: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        common.parse_json("JSON", text)
    assert str(caught.value).startswith(problem)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ({"a": (1, b"\xff\x00")}, {"a": [1, "ff00"]}),
        ({1: {None: True}}, {"1": {"None": True}}),
        ([math.nan, math.inf, -math.inf, 1.5], [None, None, None, 1.5]),
        (numpy.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        (numpy.array([1.5, math.nan]), [1.5, None]),
        (numpy.array([1 + 2j]), [[1.0, 2.0]]),
        (numpy.array(["2024-05-06T07:08:09"], dtype="M8[s]"), ["2024-05-06T07:08:09"]),
        (numpy.array(["2024-05-06"], dtype="M8[ns]"), [1714953600000000000]),
        (numpy.array([5], dtype="m8[s]"), ["0:00:05"]),
        (numpy.array([b"ab"]), ["6162"]),
    ],
    ids=str,
)
def test_whatever_a_body_holds_can_be_printed_as_json(value: Any, shown: Any) -> None:
    printed = common.as_json(value)
    assert printed == shown
    json.dumps(printed, allow_nan=False)


def invalid(message: type[Ask] | type[Reveal], **keys: Any) -> ArgumentInvalid:
    with pytest.raises(ArgumentInvalid) as caught, arguments_checked(quorum_fraction="quorum"):
        message(**{"task": "t", "body": b"", "round": 1, "truth": b"", **keys})
    return caught.value


@pytest.mark.parametrize(
    ("error", "text", "code"),
    [
        (KeyboardInterrupt(), "interrupted", 130),
        (ConfigurationError("--grace", "is no time"), "--grace: is no time", 2),
        (LocalError("body cannot be sent"), "body cannot be sent", 2),
        (
            Refused("unauthenticated", "the token is wrong"),
            "the coordinator refused us (unauthenticated): the token is wrong; is the token that of this coordinator? "
            "See --token-file",
            3,
        ),
        (Refused("draining", "it drains", retry=True), "the coordinator refused us (draining): it drains", 3),
        (ConnectFailed("quic://h", "nobody there"), "cannot connect to quic://h: nobody there", 5),
        (ConnectionClosed(10, "bye", by_peer=True), "connection closed by the peer: SHUTDOWN (0xa): bye", 5),
        (CallFailed("no-agents", "nobody does it"), "nobody does it (no-agents)", 6),
        (ResetByPeer(1), "the peer gave the stream up: INTERNAL (0x1)", 1),
        (FrameMalformed("body is nothing"), "body is nothing", 1),
        (invalid(Ask, task="a b"), "TASK: String should match pattern", 2),
        (invalid(Ask, deadline_s=0.0), "--deadline: Input should be greater than 0, got 0.0", 2),
        (invalid(Ask, labels={"a b": "c"}), "--label (a b): String should match pattern", 2),
        (invalid(Ask, quorum_fraction=2.0), "--quorum: Input should be less than or equal to 1, got 2.0", 2),
        (invalid(Reveal, round=1 << 63), "ROUND: Input should be less than or equal to 9223372036854775807", 2),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_every_error_has_a_line_and_an_exit_code(error: QuorateError | KeyboardInterrupt, text: str, code: int) -> None:
    line, found = common.explain(error)
    assert (line[: len(text)], found) == (text, code)
    assert len(line) < 400


def test_a_failure_is_one_line_and_no_terminal_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as caught:
        common.fail("two\nlines \x1b[31mred\x1b[0m \x07 end", 7)
    assert caught.value.exit_code == 7
    assert capsys.readouterr() == ("", "quorate: two lines [31mred [0m end\n")


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(common._EXTRA_MODULES, "coordinator", ("json", "no_such_module_here"))
    with pytest.raises(typer.Exit) as caught:
        common.require_extra("coordinator")
    assert caught.value.exit_code == 2
    assert capsys.readouterr().err == (
        "quorate: this command needs the extra [coordinator] (missing: no_such_module_here); "
        "install it with: pip install 'quorate[coordinator]'\n"
    )
