"""Tables for a terminal: no wider than it is, and where a cell does not fit in one line, broken between its words."""

import re
from collections.abc import Sequence
from typing import Final

from rich import box
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

#: Characters between two columns.
_GAP: Final = 2

#: A name is broken after a hyphen, too.
_PARTS: Final = re.compile(r"[^-\s]*-+|[^-\s]+")


def fitted_table(width: int, headings: Sequence[str], rows: Sequence[Sequence[Text]], *, left: int = 1) -> Table:
    """A table without a frame, with the columns for these rows, which are still to be added.

    Args:
        width: characters of the terminal.
        headings: of the columns; they are never broken.
        rows: what the table will hold. The first cell is a name, and gets the line breaks that it needs.
        left: so many columns, the first, have their cells on the left; the others on the right.
    """
    widths = _widths(width, headings, rows)
    table = Table(header_style="bold", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for number, (heading, given) in enumerate(zip(headings, widths, strict=True)):
        table.add_column(heading, width=given, overflow="fold", justify="left" if number < left else "right")
    for row in rows:
        _break_name(row[0], widths[0])
    return table


def _widths(width: int, headings: Sequence[str], rows: Sequence[Sequence[Text]]) -> list[int]:
    """Each column holds its longest word; what there is beyond goes to the first that can use it."""
    widths, wanted = [], []
    for number, heading in enumerate(headings):
        cells = [row[number].plain for row in rows]
        words = [word for cell in cells for word in (cell.split() if number else _PARTS.findall(cell))]
        widths.append(max(map(cell_len, (heading, *words))))
        wanted.append(max(map(cell_len, (heading, *cells))))
    spare = width - sum(widths) - _GAP * (len(widths) - 1)
    for number, most in enumerate(wanted):
        more = max(0, min(most - widths[number], spare))
        widths[number] += more
        spare -= more
    while spare < 0 and max(widths) > 1:  # words that no terminal has room for are broken wherever it may be
        widths[widths.index(max(widths))] -= 1
        spare += 1
    return widths


def _break_name(name: Text, width: int) -> None:
    lines = [""]
    for part in _PARTS.findall(name.plain):
        if lines[-1] and cell_len(lines[-1] + part) > width:
            lines.append("")
        lines[-1] += part
    name.plain = "\n".join(lines)
