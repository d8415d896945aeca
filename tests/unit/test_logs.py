"""Logging, as `configure` sets it up for every process."""

import io
import json
import logging
import warnings

import pytest
import structlog

from quorate_protocol import logs
from quorate_protocol.errors import ConfigurationError

pytestmark = pytest.mark.usefixtures("logging_put_back")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_json_lines_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    logs.configure("info", "auto", stream=stream)
    log = structlog.get_logger()
    log.info("joined", agent="tree-1", odd={1})
    log.debug("not shown")
    (line,) = lines(stream)
    assert line["event"] == "joined"
    assert (line["level"], line["agent"], line["odd"]) == ("info", "tree-1", "{1}")
    assert str(line["timestamp"]).endswith("Z")


def test_text_for_people_on_a_terminal_and_json_where_asked_for() -> None:
    stream = Terminal()
    logs.configure("info", "auto", stream=stream)
    structlog.get_logger().info("joined", agent="tree-1")
    assert "joined" in stream.getvalue()
    with pytest.raises(ValueError, match="Expecting value"):
        lines(stream)
    stream = Terminal()
    logs.configure("info", "json", stream=stream)
    structlog.get_logger().info("joined")
    assert len(lines(stream)) == 1
    plain = io.StringIO()
    logs.configure("info", "console", stream=plain)
    structlog.get_logger().info("joined")
    assert "\x1b" not in plain.getvalue(), "no colours where there is no terminal"


def test_the_level_is_kept() -> None:
    stream = io.StringIO()
    logs.configure("error", "json", stream=stream)
    structlog.get_logger().warning("no")
    structlog.get_logger().error("yes")
    assert [line["event"] for line in lines(stream)] == ["yes"]


def test_the_standard_librarys_warnings_come_the_same_way() -> None:
    stream = io.StringIO()
    logs.configure("debug", "json", stream=stream)
    logging.getLogger("asyncio").warning("slow: %d", 3)
    logging.getLogger("asyncio").info("not shown")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("careful", UserWarning, stacklevel=1)
    slow, careful = lines(stream)
    assert (slow["event"], slow["level"], slow["logger"]) == ("slow: 3", "warning", "asyncio")
    assert "careful" in str(careful["event"])


@pytest.mark.parametrize("format_", ["json", "console"])
def test_a_token_is_never_logged(format_: str) -> None:
    stream = io.StringIO()
    logs.configure("info", format_, stream=stream)
    token = "tok-123"

    def fail(token: str) -> None:
        raise ValueError(f"bad token of {len(token)} characters")

    try:
        fail(token)
    except ValueError:
        structlog.get_logger().exception("failed", token=token, authorization=token)
    assert "ValueError: bad token of 7 characters" in stream.getvalue()
    assert token not in stream.getvalue()


def test_configuring_twice_logs_once() -> None:
    stream = io.StringIO()
    logs.configure("info", "json", stream=stream)
    logs.configure("info", "json", stream=stream)
    logging.getLogger("x").warning("once")
    assert len(lines(stream)) == 1


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ConfigurationError, match="log level"):
        logs.configure("loud")
    with pytest.raises(ConfigurationError, match="log format"):
        logs.configure("info", "xml")


def test_a_program_of_somebody_else_keeps_its_logging(capsys: pytest.CaptureFixture[str]) -> None:
    handlers = logging.getLogger().handlers
    structlog.reset_defaults()
    logs.configure_embedded("warning")
    structlog.get_logger().info("quiet")
    structlog.get_logger().warning("loud", token="t0p")
    out, err = capsys.readouterr()
    assert out == ""
    assert [json.loads(line)["event"] for line in err.splitlines()] == ["loud"]
    assert "t0p" not in err
    assert logging.getLogger().handlers == handlers
    structlog.reset_defaults()
    capture = structlog.testing.LogCapture()
    structlog.configure(processors=[capture])
    logs.configure_embedded("warning")
    structlog.get_logger().info("theirs")
    assert [event["event"] for event in capture.entries] == ["theirs"]
