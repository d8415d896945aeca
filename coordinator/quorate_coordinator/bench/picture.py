"""A benchmark's result as a picture: for each row, how many times better than its peer, on one scale for all.

Needs the extra [bench] (matplotlib).
"""

import math
from pathlib import Path
from typing import Final

import matplotlib

from quorate_coordinator.bench.report import number
from quorate_coordinator.bench.result import Result, Row
from quorate_protocol.errors import ConfigurationError

matplotlib.use("Agg")  # no display is needed

from matplotlib.axes import Axes  # noqa: E402  after the backend was chosen
from matplotlib.figure import Figure  # noqa: E402

#: Of Okabe and Ito's palette, which those with a colour vision deficiency can tell apart.
_OURS: Final = "#0072B2"
_MISSED: Final = "#E69F00"
_TARGET: Final = "#000000"
_PEER: Final = "#555555"

_WIDTH_INCHES: Final = 13.0
_ROW_INCHES: Final = 0.42
_FRAME_INCHES: Final = 1.9
_DPI: Final = 150
#: Columns of text right of the bars: heading, and where its right edge is, in widths of the axes.
_COLUMNS: Final = (("Quorate", 1.17), ("{peer}", 1.35), ("target", 1.53))


def draw(result: Result, file: Path) -> None:
    """Draws the rows that have a peer into a file, in the format of its suffix.

    Raises:
        ConfigurationError: no row has a peer, or the file cannot be written.
    """
    rows = [row for row in result.rows if row.ratio is not None]
    if not rows:
        raise ConfigurationError("--picture", "there is no row with something to compare with")
    height_inches = _FRAME_INCHES + _ROW_INCHES * len(rows)
    figure = Figure(figsize=(_WIDTH_INCHES, height_inches))
    axes = figure.add_axes((0.31, 0.95 / height_inches, 0.40, _ROW_INCHES * len(rows) / height_inches))
    _draw_bars(axes, rows)
    _draw_frame(figure, axes, result, rows)
    try:
        figure.savefig(file, dpi=_DPI)
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or str(error)
        raise ConfigurationError("--picture", f"cannot write {file}: {problem}") from error


def _draw_bars(axes: Axes, rows: list[Row]) -> None:
    for y, row in enumerate(rows):
        ratio, target = row.ratio, _target_ratio(row)
        assert ratio is not None
        # From the peer's line: on a logarithmic scale a bar has no other beginning.
        low, high = sorted((1.0, ratio))
        axes.barh(
            y,
            high - low,
            left=low,
            height=0.58,
            color=_MISSED if row.met is False else _OURS,
            hatch="///" if row.met is False else None,
            edgecolor="white",
        )
        if target is not None:
            axes.plot(target, y, marker="D", markersize=8, color=_TARGET, markerfacecolor="white", zorder=4)
        # Beside the bar, and beside the target where that would be in the way.
        edges = [high] + [target] * (target is not None and high / 1.1 < target < high * 4)
        axes.annotate(
            f"{ratio:.2g} x" if ratio < 100 else f"{ratio:.0f} x",
            (max(edges), y),
            xytext=(9, 0),
            textcoords="offset points",
            va="center",
            fontsize=9.5,
            color="#222222",
        )


def _draw_frame(figure: Figure, axes: Axes, result: Result, rows: list[Row]) -> None:
    peer = ", ".join(sorted({row.peer for row in rows if row.peer is not None}))
    marks = [mark for row in rows for mark in (row.ratio, _target_ratio(row)) if mark is not None]
    axes.set_xscale("log")
    axes.set_xlim(min(0.5, 0.6 * min(marks)), max(2.0, 2.6 * max(marks)))
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.axvline(1.0, color=_PEER, linewidth=1.6, zorder=3)
    axes.xaxis.set_major_formatter(lambda value, position: f"{value:g} x")
    axes.xaxis.set_minor_formatter(lambda value, position: "")
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0, pad=8)
    axes.set_yticks(range(len(rows)), [_label(row) for row in rows], fontsize=9.5)
    axes.set_xlabel(f"times better than {peer} (its own value is 1 x); further right is better", fontsize=10)
    transform = axes.get_yaxis_transform()
    for heading, x in _COLUMNS:
        text = heading.format(peer=peer)
        axes.text(x, -0.85, text, transform=transform, ha="right", va="bottom", fontsize=9.5, fontweight="bold")
    for y, row in enumerate(rows):
        assert row.peer_value is not None
        sign = "≤" if row.lower_is_better else "≥"
        cells = (
            number(row.value, row.unit),
            number(row.peer_value, row.unit),
            "–" if row.target is None else f"{sign} {number(row.target, row.unit)}",
        )
        for (_, x), cell in zip(_COLUMNS, cells, strict=True):
            axes.text(x, y, cell, transform=transform, ha="right", va="center", fontsize=9.5)
        if y:
            axes.axhline(y - 0.5, color="#EEEEEE", linewidth=0.8, zorder=0, xmin=-0.8, xmax=1.55, clip_on=False)
    machine = result.machine
    height_inches = figure.get_figheight()
    figure.text(
        0.02, 1 - 0.22 / height_inches, f"Quorate against {peer}: {result.benchmark}",
        va="top", fontsize=14, fontweight="bold",
    )  # fmt: skip
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
        0.14 / height_inches,
        "solid: target met, or none promised    hatched: target missed    diamond: target    "
        "↑ higher values are better, ↓ lower ones are",
        va="bottom",
        fontsize=9.5,
        color="#333333",
    )


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
