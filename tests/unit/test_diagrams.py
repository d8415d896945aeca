"""The state diagrams: drawn from the tables, and the same in ARCHITECTURE.md."""

from pathlib import Path

import pytest

from quorate_coordinator.diagrams import DIAGRAMS, draw, draw_rounds, main, redraw
from quorate_coordinator.membership import TRANSITIONS as MEMBERSHIP
from quorate_coordinator.rounds.table import CLOSED
from quorate_coordinator.rounds.table import TRANSITIONS as ROUNDS

ARCHITECTURE = Path(__file__).parents[2] / "ARCHITECTURE.md"


def test_architecture_shows_the_rounds_as_they_are() -> None:
    document = ARCHITECTURE.read_text(encoding="utf-8")
    assert "<!-- diagram:rounds -->" in document
    assert redraw(document) == document, "run: python -m quorate_coordinator.diagrams ARCHITECTURE.md"


def test_every_row_is_in_its_diagram() -> None:
    for name, rows in (("rounds", ROUNDS), ("membership", MEMBERSHIP)):
        lines = DIAGRAMS[name]().splitlines()
        assert (lines[0], lines[1], lines[-1]) == ("```mermaid", "stateDiagram-v2", "```")
        for source, trigger, target in rows:
            assert any(line.startswith(f"    {source} --> {target}: ") and trigger in line for line in lines)


def test_a_round_ends_where_it_is_closed() -> None:
    ends = {line.split()[0] for line in draw_rounds().splitlines() if line.endswith("--> [*]")}
    assert ends == CLOSED


def test_triggers_between_the_same_states_share_an_arrow() -> None:
    assert draw([("a", "x", "b"), ("b", "z", "c"), ("a", "y", "b")], initial="a", final=["c"]).splitlines() == [
        "```mermaid",
        "stateDiagram-v2",
        "    [*] --> a",
        "    a --> b: x / y",
        "    b --> c: z",
        "    c --> [*]",
        "```",
    ]


def test_redrawing_replaces_what_is_between_the_markers_alone(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text("before\n<!-- diagram:rounds -->\nstale\n<!-- /diagram:rounds -->\nafter\n", encoding="utf-8")
    main([str(path)])
    drawn = path.read_text(encoding="utf-8")
    assert drawn == f"before\n<!-- diagram:rounds -->\n{draw_rounds()}\n<!-- /diagram:rounds -->\nafter\n"
    assert redraw(drawn) == drawn
    assert redraw("no markers") == "no markers"


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ("<!-- diagram:rounds -->\n", "not closed"),
        ("<!-- diagram:planets -->\n<!-- /diagram:planets -->\n", "no diagram 'planets'"),
    ],
)
def test_wrong_markers_are_named(document: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        redraw(document)
