"""Shows a benchmark's result: a table, and the JSON file."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from quorate_coordinator.bench.result import Result, Row
from quorate_protocol.errors import ConfigurationError


def show(result: Result, json_file: Path | None) -> None:
    """Prints the rows, and writes them where asked.

    Raises:
        ConfigurationError: the file cannot be written.
    """
    console = Console()
    machine = result.machine
    table = Table(
        title=f"{result.benchmark} · {machine['cores']} cores of {machine['cpu']} · Python {machine['python']}",
        title_justify="left",
        header_style="bold",
    )
    table.add_column("measured")
    compared = any(row.ratio is not None for row in result.rows)
    peers = {row.peer for row in result.rows if row.peer is not None}
    peer = peers.pop() if len(peers) == 1 else "peer"
    for heading in ("value", peer, *(("ratio",) if compared else ()), "target"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for row in result.rows:
        mark = {True: Text("met", style="green"), False: Text("missed", style="red"), None: Text("")}[row.met]
        ratio = (_ratio(row),) if compared else ()
        theirs = _peer(row, named=peer == "peer")
        table.add_row(row.name, number(row.value, row.unit), theirs, *ratio, _target(row), mark)
    console.print(table)
    if compared:
        console.print(
            f"ratio: how many times better than {peer}, measured in the same run", style="dim", highlight=False
        )
    for note, rows in notes_of(result.rows):
        console.print(f"{', '.join(rows)}: {note}", style="dim", highlight=False)
    if json_file is not None:
        try:
            json_file.write_text(json.dumps(result.as_json(), indent=2) + "\n")
        except OSError as error:
            raise ConfigurationError("--json", f"cannot write {json_file}: {error.strerror}") from error


@contextlib.contextmanager
def showing_progress(title: str) -> Iterator[Callable[[str], None]]:
    """What is being done, in one line on standard error while it is a terminal, and nothing otherwise."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text: None
        return
    with console.status(title) as status:
        yield lambda text: status.update(f"{title}  {text}")


def check_writable(option: str, file: Path | None) -> None:
    """Before minutes of measuring, rather than after.

    Raises:
        ConfigurationError: it is plain that the file cannot be written.
    """
    if file is None:
        return
    if file.is_dir():
        raise ConfigurationError(option, f"{file} is a directory")
    if not file.parent.is_dir():
        raise ConfigurationError(option, f"cannot write {file}: there is no directory {file.parent}")
    file = file.resolve()
    existed = file.exists()
    if existed and not file.is_file():
        # To open a pipe is to use it.
        return
    try:
        file.open("ab").close()
    except OSError as error:
        raise ConfigurationError(option, f"cannot write {file}: {error.strerror}") from error
    if not existed:
        file.unlink()


def number(value: float, unit: str) -> str:
    """Four digits, or what is before the point when that is more, and the unit where there is one."""
    return (f"{value:,.0f} {unit}" if abs(value) >= 10_000 else f"{value:.4g} {unit}").rstrip()


def notes_of(rows: list[Row]) -> list[tuple[str, list[str]]]:
    """Each note once, with the rows that it is about."""
    notes: dict[str, list[str]] = {}
    for row in rows:
        if row.note is not None:
            notes.setdefault(row.note, []).append(row.name)
    return list(notes.items())


def times(ratio: float) -> str:
    """A ratio, such as `3.4 x`."""
    return f"{ratio:.2g} x" if ratio < 99.5 else f"{ratio:,.0f} x"


def _ratio(row: Row) -> str:
    return "-" if row.ratio is None else times(row.ratio)


def _peer(row: Row, *, named: bool) -> str:
    if row.peer is None or row.peer_value is None:
        return "-"
    return number(row.peer_value, row.unit) + (f" ({row.peer})" if named else "")


def _target(row: Row) -> str:
    if row.target is None:
        return "-"
    return f"{'≤' if row.lower_is_better else '≥'} {number(row.target, row.unit)}"
