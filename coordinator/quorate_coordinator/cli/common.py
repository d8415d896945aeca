"""What the commands share: exit codes, options, how errors are shown."""

import asyncio
import importlib.util
import json
import re
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn, TypeVar

import typer

from quorate_protocol.client import Client
from quorate_protocol.credentials import find_ca, find_token
from quorate_protocol.errors import (
    CallFailed,
    ConfigurationError,
    ConnectFailed,
    LinkError,
    LocalError,
    QuorateError,
    Refused,
)
from quorate_protocol.transport import ClientTls

T = TypeVar("T")

EXIT_OTHER: Final = 1
EXIT_USAGE: Final = 2
EXIT_REFUSED: Final = 3
EXIT_UNREACHABLE: Final = 5
EXIT_NO_ANSWER: Final = 6
EXIT_INTERRUPTED: Final = 130

#: What each extra brings that the commands need, as import name.
_EXTRA_MODULES: Final = {
    "coordinator": ("river", "prometheus_client", "starlette", "uvicorn", "pydantic_settings", "rich"),
}

CoordinatorOption = Annotated[
    str, typer.Option("--coordinator", envvar="QUORATE_COORDINATOR", metavar="URL", help="Address of the coordinator.")
]
TokenFileOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="File that holds the token (mode 0600). Otherwise QUORATE_TOKEN, the file QUORATE_TOKEN_FILE, or that of "
        "a coordinator on this machine.",
    ),
]
CaOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="PEM file of the authorities to trust. Otherwise the file QUORATE_CA, that of a coordinator on this "
        "machine, or the system's.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
QuorumOption = Annotated[
    str | None,
    typer.Option(metavar="N|SHARE", help="Replies needed: a count (3), or a share of the asked (0.5, 50%)."),
]
GraceOption = Annotated[
    str | None, typer.Option(metavar="TIME", help="Time left to stragglers once the quorum is met: 250ms, 2s, 1m.")
]
DeadlineOption = Annotated[
    str | None, typer.Option(metavar="TIME", help="Time after which the round closes, whoever is missing: 2s, 1m.")
]
LabelOption = Annotated[
    list[str] | None, typer.Option("--label", metavar="KEY=VALUE", help="Ask only agents with this label. Repeatable.")
]

DEFAULT_COORDINATOR: Final = "quic://localhost:4433"


def fail(message: str, code: int) -> NoReturn:
    """Shows one line on standard error and exits."""
    typer.echo(f"quorate: {message}", err=True)
    raise typer.Exit(code)


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Runs a command's coroutine; errors become one line and an exit code."""
    try:
        return asyncio.run(coroutine)
    except QuorateError as error:
        fail_with(error)
    except KeyboardInterrupt:
        fail("interrupted", EXIT_INTERRUPTED)


def fail_with(error: QuorateError) -> NoReturn:
    """Shows an error of ours and exits with its code."""
    match error:
        case Refused():
            code = EXIT_REFUSED
        case CallFailed():
            code = EXIT_NO_ANSWER
        case ConnectFailed() | LinkError():
            code = EXIT_UNREACHABLE
        case ConfigurationError() | LocalError():
            code = EXIT_USAGE
        case _:
            code = EXIT_OTHER
    fail(str(error), code)


def require_extra(extra: str) -> None:
    """Exits when an extra's packages are not installed, saying which and how to get them."""
    missing = [name for name in _EXTRA_MODULES[extra] if importlib.util.find_spec(name) is None]
    if missing:
        fail(
            f"this command needs the extra [{extra}] (missing: {', '.join(missing)}); "
            f"install it with: pip install 'quorate[{extra}]'",
            EXIT_USAGE,
        )


async def connect(url: str, token_file: Path | None, ca: Path | None) -> Client:
    """A client with the credentials that the options and the environment name."""
    return await Client.connect(url, token=find_token(token_file), tls=ClientTls(find_ca(ca)))


def parse_duration(option: str, text: str | None) -> float | None:
    """Seconds of `250ms`, `2s`, `1.5m`, `1h` or a plain number of seconds.

    Raises:
        ConfigurationError: not such a time.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*(ms|s|m|h)?", text.strip())
    if match is None:
        raise ConfigurationError(option, f"{text!r} is not a time; write 250ms, 2s, 1.5m, 1h or a number of seconds")
    return float(match[1]) * {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}[match[2] or "s"]


def parse_quorum(text: str | None) -> int | float | None:
    """A count (`3`) as int, a share (`0.5`, `50%`) as float in (0, 1].

    Raises:
        ConfigurationError: neither.
    """
    if text is None:
        return None
    wrong = ConfigurationError("--quorum", f"{text!r} is neither a count (3) nor a share over 0 and up to 1 (0.5, 50%)")
    try:
        if text.endswith("%"):
            value: int | float = float(text[:-1]) / 100
        else:
            value = float(text) if "." in text else int(text)
    except ValueError:
        raise wrong from None
    if isinstance(value, float) and not 0 < value <= 1:
        raise wrong
    if value < 1 and isinstance(value, int):
        raise wrong
    return value


def parse_labels(labels: list[str] | None) -> dict[str, str]:
    """`KEY=VALUE` options as a map.

    Raises:
        ConfigurationError: one of them has no `=`, or a key comes twice.
    """
    parsed: dict[str, str] = {}
    for label in labels or []:
        key, equals, value = label.partition("=")
        if not equals or not key:
            raise ConfigurationError("--label", f"{label!r} is not KEY=VALUE")
        if key in parsed:
            raise ConfigurationError("--label", f"{key!r} is given twice")
        parsed[key] = value
    return parsed


def parse_json(what: str, text: str) -> Any:
    """The value of a JSON argument.

    Raises:
        ConfigurationError: not JSON; the text says where, and how text is written.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(
            what, f"{text[:60]!r} is not JSON ({error}); text needs quotes: '\"{text[:20]}\"'"
        ) from None


def as_json(value: Any) -> Any:
    """A body's value as something that JSON can say: bytes as hex, arrays as lists, times as ISO 8601."""
    if isinstance(value, dict):
        return {key if isinstance(key, str) else str(key): as_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(inner) for inner in value]
    if isinstance(value, bytes):
        return value.hex()
    if hasattr(value, "tolist"):
        return as_json(value.tolist())
    if hasattr(value, "isoformat"):
        return value.isoformat()
    if isinstance(value, float) and value != value:
        return None
    return value


def print_json(value: Any) -> None:
    """One object on standard output."""
    typer.echo(json.dumps(value, ensure_ascii=False, indent=2 if _on_terminal() else None))


def _on_terminal() -> bool:
    import sys

    return sys.stdout.isatty()
