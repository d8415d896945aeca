"""Logging of every Quorate process: events with fields, to standard error.

Call `configure` once, where the process begins. Modules write `structlog.get_logger()` and
`log.info("round_closed", round=…)`.
"""

import logging
import sys
from collections.abc import MutableMapping
from typing import Any, Final, Literal, TextIO, cast

import structlog

from quorate_protocol.errors import ConfigurationError

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["auto", "json", "console"]

_LEVELS: Final[dict[str, int]] = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}

#: Field names whose values never reach a log, whatever code wrote them.
_SECRET_FIELDS: Final = frozenset({"token", "authorization", "password", "secret"})


#: What `configure` was last called with, level and format; None before.
_configured: tuple[str, str] | None = None

#: Longest text of one field, in characters.
_FIELD_CHARS_MAX: Final = 1024

#: Fields that are tracebacks: ours, and many lines by nature.
_MULTILINE_FIELDS: Final = frozenset({"exception", "stack"})


def configure(
    level: str = "info",
    format: str = "auto",
    *,
    stream: TextIO | None = None,
) -> None:
    """Sets up structlog, and sends the standard library's logging through it at WARNING and above.

    Args:
        level: `debug`, `info`, `warning` or `error`: of Quorate's own events.
        format: `json` (one object per line), `console` (for people), or `auto`: console on a terminal.
        stream: where to; None is standard error.

    Raises:
        ConfigurationError: no such level or format.
    """
    output, before, after = _set_up(level, format, stream)
    handler = logging.StreamHandler(cast(TextIO, output))
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*before, structlog.stdlib.add_logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *after],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logging.captureWarnings(True)


def configure_embedded(level: str = "info", format: str = "auto") -> None:
    """Sets up Quorate's own events in a program that is not ours, unless that has set up structlog itself.

    What structlog does by itself is for a developer: everything on standard output, and the values of variables in
    tracebacks, where a token may be among them.

    Raises:
        ConfigurationError: no such level or format.
    """
    if not structlog.is_configured():
        _set_up(level, format, None)


_Processors = list[structlog.typing.Processor]


def _set_up(level: str, format: str, stream: TextIO | None) -> "tuple[_Lossy, _Processors, _Processors]":
    """Sets up structlog; returns where it writes, and what it does before and after the standard library's are met."""
    if level not in _LEVELS:
        raise ConfigurationError("log level", f"{level!r} is none of {', '.join(_LEVELS)}")
    if format not in ("auto", "json", "console"):
        raise ConfigurationError("log format", f"{format!r} is none of auto, json, console")
    global _configured
    _configured = level, format
    stream = sys.stderr if stream is None else stream
    on_terminal = stream.isatty()
    output = _Lossy(stream)
    as_json = format == "json" or (format == "auto" and not on_terminal)

    before: _Processors = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso" if as_json else "%H:%M:%S", utc=as_json),
        _redact,
        _tame,
    ]
    after: _Processors
    if as_json:
        after = [
            structlog.processors.format_exc_info,
            structlog.processors.UnicodeDecoder(),
            structlog.processors.JSONRenderer(default=repr),
        ]
    else:
        # Plain tracebacks: the rich ones print local variables, and a token may be among them.
        after = [structlog.dev.ConsoleRenderer(colors=on_terminal, exception_formatter=structlog.dev.plain_traceback)]
    structlog.configure(
        processors=[*before, *after],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=structlog.WriteLoggerFactory(file=cast(TextIO, output)),
        cache_logger_on_first_use=False,
    )
    return output, before, after


def configured() -> tuple[str, str] | None:
    """Level and format, for a child that shares standard error; None when `configure` was not called."""
    return _configured


def _redact(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for name in _SECRET_FIELDS.intersection(event):
        event[name] = "[not logged]"
    return event


def _tame(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Text that came from elsewhere can neither flood the log nor command the terminal that shows it."""
    for name, value in event.items():
        if isinstance(value, str) and name not in _MULTILINE_FIELDS:
            if len(value) > _FIELD_CHARS_MAX:
                value = f"{value[:_FIELD_CHARS_MAX]}… ({len(value)} characters)"
            event[name] = value if value.isprintable() else ascii(value)[1:-1]
    return event


class _Lossy:
    """A stream whose reader may go, or whose disk may be full: what cannot be written is lost, and nothing else."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError):
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            return
