"""Journals of each version that was ever released are read for good: `tests/journals/make.py` made them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from quorate_coordinator.cli.journal_commands import record_json
from quorate_coordinator.journal.reader import JournalReader, Pruned
from quorate_coordinator.journal.records import KINDS
from quorate_coordinator.journal.schema import JOURNAL_NAME, SCHEMA_VERSION
from quorate_coordinator.journal.verify import verify
from quorate_coordinator.journal.writer import Journal
from quorate_coordinator.learner.vote import VoteLearner
from quorate_coordinator.recovery import recover

JOURNALS = Path(__file__).parents[1] / "journals"
VERSIONS = [f"v{version}" for version in range(1, SCHEMA_VERSION + 1)]


@pytest.fixture(params=VERSIONS)
def old(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A copy that the coordinator has opened, and what it has to say."""
    folder = JOURNALS / request.param
    file = tmp_path / JOURNAL_NAME
    shutil.copy(folder / JOURNAL_NAME, file)
    Journal.open(file).close(0)  # brings it to this version
    return file, json.loads((folder / "expected.json").read_text(encoding="utf-8"))


def test_it_says_what_it_said(old: tuple[Path, dict[str, Any]]) -> None:
    file, expected = old
    with JournalReader(file) as reader:
        read = [
            {"seq": seq, "at": at, "kind": record.kind, **record_json(record)} for seq, at, record in reader.records()
        ]
        # A later version may know more, and says nothing else about what this one knew.
        assert [
            {name: line[name] for name in known} for line, known in zip(read, expected["records"], strict=True)
        ] == expected["records"]
        assert {line["kind"] for line in read} == set(KINDS)
        assert [[seq, reader.read_checkpoint(seq).snapshot.hex()] for seq in reader.checkpoint_seqs()] == (
            expected["checkpoints"]
        )


def test_it_is_whole(old: tuple[Path, dict[str, Any]]) -> None:
    file, _ = old
    found = verify(file)
    assert found.problems == []
    assert found.rounds == {"complete": 1, "quorate": 1, "interrupted": 1, "open": 1}


def test_what_the_coordinator_asks_at_its_start(old: tuple[Path, dict[str, Any]]) -> None:
    file, expected = old
    with JournalReader(file) as reader:
        assert reader.open_rounds() == [6]
        assert reader.next_round() == 7
        assert reader.pruned() == Pruned(6, 2)
        assert reader.last_seq() == expected["records"][-1]["seq"]
        newest = reader.checkpoint()
        assert newest is not None
        assert newest.seq == 12
        known = reader.find_key("question-3")
        assert known is not None
        assert known.closed is not None
        assert known.closed.key == "question-3"
        assert known.truth is not None


def test_the_learner_is_what_it_was(old: tuple[Path, dict[str, Any]]) -> None:
    file, expected = old
    with JournalReader(file) as reader:
        recovered = recover(reader, VoteLearner, VoteLearner.restore, remembered_max=100)
    assert recovered.ledger.learner.snapshot().hex() == expected["learner"]
    assert [closed.round for closed in recovered.awaiting] == [5]
    assert [opened.round for opened in recovered.cut_off] == [6]
    assert recovered.next_round == 7
    assert recovered.replayed == expected["records"][-1]["seq"] - expected["checkpoints"][0][0]


def test_every_version_has_one() -> None:
    assert sorted(path.name for path in JOURNALS.iterdir() if path.is_dir() and path.name.startswith("v")) == VERSIONS
