"""The state diagrams of ARCHITECTURE.md, drawn (as Mermaid) from the tables that the cores follow.

In a document, `<!-- diagram:rounds -->` and `<!-- /diagram:rounds -->` stand around a drawing.
`python -m quorate_coordinator.diagrams ARCHITECTURE.md` draws anew what stands between them.
"""

import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from quorate_coordinator import membership
from quorate_coordinator.rounds import table


def draw(rows: Iterable[tuple[str, str, str]], *, initial: str, final: Iterable[str] = ()) -> str:
    """A Mermaid state diagram, fenced for Markdown, of rows (source, what moves it, target).

    Several triggers between the same two states share one arrow. Sources and targets are in the order
    of the rows.
    """
    arrows: dict[tuple[str, str], list[str]] = {}
    for source, trigger, target in rows:
        arrows.setdefault((source, target), []).append(trigger)
    ends = set(final)
    lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {initial}"]
    lines += [f"    {source} --> {target}: {' / '.join(texts)}" for (source, target), texts in arrows.items()]
    lines += [f"    {state} --> [*]" for state in dict.fromkeys(target for _, target in arrows) if state in ends]
    return "\n".join([*lines, "```"])


def draw_rounds() -> str:
    """The states of a round."""
    return draw(table.TRANSITIONS, initial="open", final=table.CLOSED)


def draw_membership() -> str:
    """The states of an agent's membership."""
    return draw(membership.TRANSITIONS, initial="connected")


#: The diagrams by the name in their marker.
DIAGRAMS: Final[dict[str, Callable[[], str]]] = {"rounds": draw_rounds, "membership": draw_membership}


def redraw(document: str) -> str:
    """The document with every marked drawing drawn anew; a document without markers as it is.

    Raises:
        ValueError: a marker names no diagram, or is not closed.
    """
    for name in re.findall(r"<!-- diagram:(\S+) -->", document):
        if name not in DIAGRAMS:
            raise ValueError(f"there is no diagram {name!r}; there are {', '.join(DIAGRAMS)}")
        opening, closing = f"<!-- diagram:{name} -->", f"<!-- /diagram:{name} -->"
        before, _, rest = document.partition(opening)
        _, found, after = rest.partition(closing)
        if not found:
            raise ValueError(f"{opening} is not closed by {closing}")
        document = f"{before}{opening}\n{DIAGRAMS[name]()}\n{closing}{after}"
    return document


def main(paths: list[str]) -> None:
    """Redraws these files in place."""
    for path in map(Path, paths):
        document = path.read_text(encoding="utf-8")
        path.write_text(redraw(document), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
