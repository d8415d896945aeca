"""A benchmark's result as a picture: for each row, how many times better than its peer, on one scale for all.

Needs the extra [bench] (matplotlib).
"""

import math
import textwrap
from pathlib import Path
from typing import Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from quorate_coordinator.bench.report import notes_of, number, times
from quorate_coordinator.bench.result import Result, Row
from quorate_protocol.errors import ConfigurationError

#: Of Okabe and Ito's palette, which those with a colour vision deficiency can tell apart.
_OURS: Final = "#0072B2"
_MISSED: Final = "#E69F00"
_TARGET: Final = "#000000"
_PEER: Final = "#555555"

_WIDTH_INCHES: Final = 13.6
_ROW_INCHES: Final = 0.42
_FRAME_INCHES: Final = 1.9
_NOTE_INCHES: Final = 0.165
_DPI: Final = 150
#: Columns of text right of the bars: heading, and where its right edge is, in widths of the axes.
_COLUMNS: Final = (("{subject}", 1.15), ("{peer}", 1.33), ("ratio", 1.45), ("target", 1.63), ("", 1.77))


def check_format(file: Path) -> None:
    """Before minutes of measuring, rather than after.

    Raises:
        ConfigurationError: there is no format of the file's suffix.
    """
    formats = Figure().canvas.get_supported_filetypes()
    if file.suffix.removeprefix(".").lower() not in formats:
        raise ConfigurationError("--picture", f"{file}: pictures are drawn as {', '.join(sorted(formats))}")


def draw(result: Result, file: Path) -> None:
    """Draws the rows that have a peer into a file, in the format of its suffix.

    Raises:
        ConfigurationError: no row has a peer, or the file cannot be written.
    """
    check_format(file)
    rows = [row for row in result.rows if row.ratio is not None]
    if not rows:
        raise ConfigurationError("--picture", "there is no row with something to compare with")
    notes = _notes(result, rows)
    notes_inches = _NOTE_INCHES * len(notes)
    height_inches = _FRAME_INCHES + notes_inches + _ROW_INCHES * len(rows)
    figure = Figure(figsize=(_WIDTH_INCHES, height_inches))
    below = (0.95 + notes_inches) / height_inches
    axes = figure.add_axes((0.30, below, 0.38, _ROW_INCHES * len(rows) / height_inches))
    figure.text(0.02, 0.12 / height_inches, "\n".join(notes), va="bottom", fontsize=8, color="#555555")
    _draw_bars(axes, rows)
    _draw_frame(figure, axes, result, rows)
    try:
        figure.savefig(file, dpi=_DPI)
    except OSError as error:
        raise ConfigurationError("--picture", f"cannot write {file}: {error.strerror}") from error


def _draw_bars(axes: Axes, rows: list[Row]) -> None:
    for y, row in enumerate(rows):
        ratio, target = row.ratio, _target_ratio(row)
        assert ratio is not None
        # From the peer's line: on a logarithmic scale a bar has no other beginning.
        low, high = sorted((1.0, ratio))
        colour, hatch = (_MISSED, "///") if row.met is False else (_OURS, None)
        axes.barh(y, high - low, left=low, height=0.5, color=colour, hatch=hatch, edgecolor="white")
        # A bar of next to no length is seen by its end.
        axes.plot((ratio, ratio), (y - 0.3, y + 0.3), color=colour, linewidth=3, zorder=4)
        if target is not None:
            axes.plot(target, y, marker="D", markersize=8, color=_TARGET, markerfacecolor="white", zorder=5)


def _draw_frame(figure: Figure, axes: Axes, result: Result, rows: list[Row]) -> None:
    peer = ", ".join(sorted({row.peer for row in rows if row.peer is not None}))
    marks = [mark for row in rows for mark in (row.ratio, _target_ratio(row)) if mark is not None]
    axes.set_xscale("log")
    low, high = min(0.5, 0.6 * min(marks)), max(4.0, 1.8 * max(marks))
    axes.set_xlim(low, high)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.axvline(1.0, color=_PEER, linewidth=1.6, zorder=3)
    ticks = _ticks(low, high)
    axes.set_xticks(ticks, [f"{tick:g} x" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0, pad=8)
    axes.set_yticks(range(len(rows)), [_label(row) for row in rows], fontsize=9.5)
    axes.set_xlabel(f"times better than {peer} (its own value is 1 x); further right is better", fontsize=10)
    transform = axes.get_yaxis_transform()
    for heading, x in _COLUMNS:
        text = heading.format(peer=peer, subject=result.subject)
        axes.text(x, -0.85, text, transform=transform, ha="right", va="bottom", fontsize=9.5, fontweight="bold")
    for y, row in enumerate(rows):
        assert row.peer_value is not None
        assert row.ratio is not None
        sign = "≤" if row.lower_is_better else "≥"
        cells = (
            number(row.value, row.unit),
            number(row.peer_value, row.unit),
            times(row.ratio),
            "–" if row.target is None else f"{sign} {number(row.target, row.unit)}",
            {True: "met", False: "missed", None: ""}[row.met],
        )
        for (_, x), cell in zip(_COLUMNS, cells, strict=True):
            weight = "bold" if cell == "missed" else "normal"
            axes.text(x, y, cell, transform=transform, ha="right", va="center", fontsize=9.5, fontweight=weight)
        if y:
            axes.axhline(y - 0.5, color="#EEEEEE", linewidth=0.8, zorder=0, xmin=-0.72, xmax=1.77, clip_on=False)
    machine = result.machine
    height_inches = figure.get_figheight()
    title = f"{result.subject[0].upper()}{result.subject[1:]} against {peer}: {result.benchmark}"
    figure.text(0.02, 1 - 0.22 / height_inches, title, va="top", fontsize=14, fontweight="bold")
    figure.text(
        0.02,
        1 - 0.52 / height_inches,
        f"measured in the same run; {machine['cores']} cores of {machine['cpu']}, Python {machine['python']}",
        va="top",
        fontsize=9.5,
        color="#555555",
    )
    figure.text(
        0.02,
        (0.18 + _NOTE_INCHES * len(_notes(result, rows))) / height_inches,
        "solid: target met, or none promised    hatched: target missed    diamond: target    "
        "↑ higher values are better, ↓ lower ones are",
        va="bottom",
        fontsize=9.5,
        color="#333333",
    )


def _notes(result: Result, rows: list[Row]) -> list[str]:
    """Lines that say what the numbers leave unsaid."""
    notes = ["a quick run: the numbers say little"] if result.machine.get("quick") else []
    for note, names in notes_of(rows):
        notes += textwrap.wrap(f"{'; '.join(names)}: {note}", 165)
    return notes


def _ticks(low: float, high: float) -> list[float]:
    """Powers of ten, with their doubles and halves where there are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if high / low < 500 else (1,)
    return [tick for power in powers for step in steps if low <= (tick := step * 10.0**power) <= high]


def _label(row: Row) -> str:
    """The name, broken in two where it is long, and which way is better."""
    arrow = "↓" if row.lower_is_better else "↑"
    name = row.name
    if len(name) > 44 and "," in name:
        head, _, tail = name.partition(", ")
        name = f"{head},\n{tail}"
    return f"{name} {arrow}"


def _target_ratio(row: Row) -> float | None:
    """Where the target is on the scale of `Row.ratio`."""
    if row.target is None or not row.peer_value:
        return None
    ratio = row.peer_value / row.target if row.lower_is_better else row.target / row.peer_value
    return ratio if math.isfinite(ratio) and ratio > 0 else None
