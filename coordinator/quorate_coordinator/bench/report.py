"""Shows a benchmark's result: a table, and the JSON file."""

import json
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
    for heading in ("value", "peer", "target"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for row in result.rows:
        mark = {True: Text("met", style="green"), False: Text("missed", style="red"), None: Text("")}[row.met]
        table.add_row(row.name, _number(row.value, row.unit), _peer(row), _target(row), mark)
    console.print(table)
    if json_file is not None:
        try:
            json_file.write_text(json.dumps(result.as_json(), indent=2) + "\n")
        except OSError as error:
            raise ConfigurationError("--json", f"cannot write {json_file}: {error.strerror}") from error


def _number(value: float, unit: str) -> str:
    return f"{value:.4g} {unit}".rstrip()


def _peer(row: Row) -> str:
    if row.peer is None or row.peer_value is None:
        return "-"
    return f"{_number(row.peer_value, row.unit)} ({row.peer})"


def _target(row: Row) -> str:
    if row.target is None:
        return "-"
    return f"{'≤' if row.lower_is_better else '≥'} {_number(row.target, row.unit)}"
