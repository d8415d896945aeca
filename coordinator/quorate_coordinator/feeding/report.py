"""What a person sees of a run: a progress bar while it goes, a table at its end; plain lines on a pipe."""

import time
from collections import Counter
from types import TracebackType
from typing import Self

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from quorate_coordinator.feeding.tally import Tally, quantile
from quorate_coordinator.tables import fitted_table


class LiveProgress:
    """Rounds per second and accuracy so far: a bar on a terminal, now and then a line elsewhere.

    Everything goes to standard error, so that standard output holds the result alone.
    """

    #: Seconds between plain lines.
    _LINE_EVERY_S = 5.0

    def __init__(self, title: str, tally: Tally, total: int | None, *, quiet: bool = False) -> None:
        self._title = title
        self._tally = tally
        self._total = total
        self._quiet = quiet
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._began = time.monotonic()
        self._shown_at = self._began

    def __enter__(self) -> Self:
        if self._quiet:
            return self
        if self._console.is_terminal:
            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TextColumn("{task.fields[accuracy]}"),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=self._total, rate="", accuracy="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self) -> None:
        """After an instance."""
        if self._quiet:
            return
        now = time.monotonic()
        interval_s = 0.1 if self._bar is not None else self._LINE_EVERY_S
        if now - self._shown_at < interval_s:
            return
        self._shown_at = now
        done = self._tally.instances
        rate = f"{done / (now - self._began):.0f} rounds/s"
        accuracy = "" if self._tally.accuracy is None else f"accuracy {self._tally.accuracy:.4f}"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, rate=rate, accuracy=accuracy)
        else:
            of_total = "" if self._total is None else f"/{self._total}"
            typer.echo(f"{self._title}: {done}{of_total}  {rate}  {accuracy}".rstrip(), err=True)


def print_report(title: str, tally: Tally, elapsed_s: float) -> None:
    """The table on a terminal; tab-separated lines on a pipe."""
    console = Console()
    if console.is_terminal:
        console.print(_table(title, tally, console.width))
        console.print(_summary(tally, elapsed_s), highlight=False)
        return
    typer.echo("agent\taccuracy\tweight\treplies\tmissed\tlatency_p50_ms\tlatency_p99_ms")
    for name, cells in _rows(tally):
        typer.echo("\t".join([name, *cells]))
    typer.echo(_summary(tally, elapsed_s))


def _table(title: str, tally: Tally, width: int) -> Table:
    rows = []
    for name, (*cells, p50_ms, p99_ms) in _rows(tally):
        times = p50_ms if p50_ms == p99_ms == "-" else f"{p50_ms}/{p99_ms}"
        rows.append([Text(cell) for cell in (name, *cells, times)])
    table = fitted_table(width, ("agent", "accuracy", "weight", "replies", "missed", "p50/p99 ms"), rows)
    table.title, table.title_justify = Text(title, style="bold"), "left"
    *agents, ensemble = rows
    for row in agents:
        table.add_row(*row)
    table.add_section()
    table.add_row(*ensemble, style="bold green")
    return table


def _rows(tally: Tally) -> list[tuple[str, list[str]]]:
    """Agents, the most accurate first, and the ensemble last."""
    agents = sorted(tally.agents.items(), key=lambda item: (-(item[1].accuracy or 0.0), item[0]))
    rows = [
        (
            name,
            [
                _share(agent.accuracy),
                "-" if agent.weight is None else f"{agent.weight:.3f}",
                str(agent.replies),
                _missed(agent.others),
                _ms(quantile(agent.latencies_s, 0.5)),
                _ms(quantile(agent.latencies_s, 0.99)),
            ],
        )
        for name, agent in agents
    ]
    rows.append(
        (
            "ensemble",
            [
                _share(tally.accuracy),
                "1.000",
                str(tally.answered),
                str(tally.instances - tally.answered),
                _ms(quantile(tally.rounds_s, 0.5)),
                _ms(quantile(tally.rounds_s, 0.99)),
            ],
        )
    )
    return rows


def _summary(tally: Tally, elapsed_s: float) -> str:
    overhead = quantile(tally.overheads_s, 0.5)
    parts = [
        f"{tally.instances} rounds in {elapsed_s:.1f} s",
        f"{tally.instances / elapsed_s:.1f} rounds/s" if elapsed_s > 0 else "",
        "" if overhead is None else f"coordination overhead p50 {overhead * 1000:.2f} ms",
    ]
    unanswered = {state: count for state, count in tally.states.items() if state not in ("complete", "quorate")}
    if unanswered:
        told = ", ".join(f"{count} {state}" for state, count in sorted(unanswered.items()))
        parts.append(f"without an answer: {told}" + (", counted as wrong" if tally.scored else ""))
    return " · ".join(part for part in parts if part)


def _missed(others: Counter[str]) -> str:
    """How an agent's other parts ended: `0`, `1 declined`, or `3 (2 late, 1 failed)`."""
    if not others:
        return "0"
    if len(others) == 1:
        ((status, count),) = others.items()
        return f"{count} {status}"
    return f"{others.total()} ({', '.join(f'{count} {status}' for status, count in others.most_common())})"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.1f}"
