"""What the commands share: exit codes, options, how errors are shown."""

import asyncio
import contextlib
import importlib.util
import json
import math
import re
import sys
from collections.abc import Coroutine, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn, TypeVar

import typer

from quorate_protocol.client import Client
from quorate_protocol.command import EXIT_INTERRUPTED, interruptible
from quorate_protocol.credentials import find_ca, find_token
from quorate_protocol.errors import (
    ArgumentInvalid,
    CallFailed,
    ConfigurationError,
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

#: What each extra brings that the commands need, as import name.
_EXTRA_MODULES: Final = {
    "coordinator": ("river", "prometheus_client", "starlette", "uvicorn", "pydantic_settings"),
    "bench": ("matplotlib",),
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

#: Rows or rounds that one command goes through at the most: over anybody's patience, and a slice can count so far.
COUNT_MAX: Final = 1_000_000_000

#: Argument that stands for standard input.
STDIN: Final = "-"


def fail(message: str, code: int, *, details: Iterable[str] = ()) -> NoReturn:
    """Shows one line on standard error, under it one for each detail, and exits."""
    typer.echo(f"quorate: {one_line(message)}", err=True)
    for detail in details:
        typer.echo(f"  {one_line(detail)}", err=True)
    raise typer.Exit(code)


def one_line(text: str) -> str:
    """The text without line breaks, and without what a terminal would take as a command."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


@contextlib.contextmanager
def errors_shown() -> Iterator[None]:
    """Errors become one line and an exit code, and so does Ctrl-C."""
    try:
        with interruptible():
            yield
    except (QuorateError, KeyboardInterrupt) as error:
        fail(*explain(error))


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Runs a command's coroutine; errors become one line and an exit code."""
    with errors_shown():
        return asyncio.run(coroutine)


def explain(error: QuorateError | KeyboardInterrupt) -> tuple[str, int]:
    """An error's line for people, and the exit code."""
    match error:
        case KeyboardInterrupt():
            return "interrupted", EXIT_INTERRUPTED
        case ArgumentInvalid(argument=argument, problem=problem):
            name, *inside = argument.split(" ", 1)
            return f"{' '.join((_ARGUMENTS.get(name, name), *inside))}: {problem}", EXIT_USAGE
        case Refused():
            hint = "; is the token that of this coordinator? See --token-file" if not error.retry else ""
            return f"the coordinator refused us ({error.reason}): {error.message}{hint}", EXIT_REFUSED
        case CallFailed():
            return str(error), EXIT_NO_ANSWER
        case LinkError():
            return str(error), EXIT_UNREACHABLE
        case LocalError():
            return str(error), EXIT_USAGE
        case _:
            return str(error), EXIT_OTHER


#: Where a call's argument comes from.
_ARGUMENTS: Final = {
    "task": "TASK",
    "round": "ROUND",
    "quorum": "--quorum",
    "grace_s": "--grace",
    "deadline_s": "--deadline",
    "labels": "--label",
    "count": "--count",
    "attempts": "--attempts",
    "key": "--key",
    "agent": "AGENT",
    "reason": "--reason",
}


def require_extra(extra: str, what: str = "this command") -> None:
    """Exits when an extra's packages are not installed, saying which and how to get them."""
    missing = [name for name in _EXTRA_MODULES[extra] if importlib.util.find_spec(name) is None]
    if missing:
        fail(
            f"{what} needs the extra [{extra}] (missing: {', '.join(missing)}); "
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
            value = int(text) if text.strip().isdecimal() else float(text)
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


def read_json(what: str, text: str) -> Any:
    """The value of a JSON argument, or of standard input where the argument is `-`.

    Raises:
        ConfigurationError: not JSON; the text says where, and how text is written.
    """
    if text == STDIN:
        what = "standard input"
        try:
            text = sys.stdin.buffer.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ConfigurationError(what, f"not UTF-8 text (at byte {error.start})") from None
        except OSError as error:
            raise ConfigurationError(what, f"cannot be read: {error.strerror}") from None
    return parse_json(what, text)


def parse_json(what: str, text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ConfigurationError: not JSON; the text says where, and how text is written.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        hint = f"; text needs quotes: '\"{text}\"'" if re.fullmatch(r"[\w .-]{1,40}", text) else ""
        raise ConfigurationError(what, f"{text[:60]!r} is not JSON ({error}){hint}") from None


def as_json(value: Any) -> Any:
    """A body's value as something that JSON can say; see `_as_json`.

    Raises:
        LocalError: it is nested too deep.
    """
    try:
        return _as_json(value)
    except RecursionError:
        raise LocalError("the answer is nested too deep to be shown") from None


def _as_json(value: Any) -> Any:
    """A body's value as something that JSON can say.

    Bytes are hexadecimal, arrays lists, times ISO 8601, complex numbers pairs; what JSON has no word for
    (NaN, infinities) is null.
    """
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key if isinstance(key, str) else str(key): _as_json(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_as_json(inner) for inner in value]
        case bytes():
            return value.hex()
        case complex():
            return [_as_json(value.real), _as_json(value.imag)]
    if hasattr(value, "tolist"):  # of NumPy, which need not be installed
        return _as_json(value.tolist())
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def json_text(value: Any, *, indent: int | None = None) -> str:
    """JSON that a terminal can be shown: what it would obey stands as an escape, as JSON has it.

    Raises:
        LocalError: the value is nested too deep.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)
    except RecursionError:
        raise LocalError("the answer is nested too deep to be shown") from None
    if text.replace("\n", " ").isprintable():
        return text
    return "".join(char if char.isprintable() or char == "\n" else _escape(char) for char in text)


def print_json(value: Any) -> None:
    """One object on standard output."""
    with errors_shown():
        typer.echo(json_text(value, indent=2 if sys.stdout.isatty() else None))


def _escape(char: str) -> str:
    """The character as JSON's escape: U+007F too, which json.dumps leaves as it is."""
    return f"\\u{ord(char):04x}" if ord(char) < 0x10000 else json.dumps(char)[1:-1]
