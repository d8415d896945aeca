"""Makes a journal of this version, and what it says as JSON beside it: once for each version, to be kept for good.

Usage, from the repository: PYTHONPATH=tests python tests/journals/make.py tests/journals/v1

It holds every kind of record; rounds that were pruned; a checkpoint, and the one before it; a truth that came after the
checkpoint for a round from before it; a round that was interrupted, and one that is still open. The checkpoints are a
vote learner's, fed with the same rounds: `learner` in the JSON is its state at the end, in hexadecimal.
"""

import asyncio
import json
import sys
from pathlib import Path

from journal_making import EPOCH_S, Heard
from quorate_coordinator.cli.journal_commands import record_json
from quorate_coordinator.journal.prune import Retention
from quorate_coordinator.journal.reader import JournalReader
from quorate_coordinator.journal.records import (
    ExperienceTaken,
    Record,
    RecordedResult,
    ReplyLate,
    RoundClosed,
    RoundOpened,
    TruthTold,
)
from quorate_coordinator.journal.schema import JOURNAL_NAME
from quorate_coordinator.journal.writer import Journal
from quorate_coordinator.learner.api import AgentReply, ClosedRound, LateReply
from quorate_coordinator.learner.vote import VoteLearner
from quorate_protocol.bodies import encode_body

AGENTS = ("fickle", "slow", "steady")
TASK = "classify"


class _Maker:
    """Writes rounds, and lets a learner live through them."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self.learner = VoteLearner()
        self._closed: dict[int, ClosedRound] = {}

    def append(self, record: Record) -> None:
        self._journal.append(record, at=EPOCH_S + self._journal.last_seq * 0.1)

    def checkpoint(self) -> None:
        self._journal.append_checkpoint(
            self._journal.last_seq, self.learner.snapshot(), at=EPOCH_S + self._journal.last_seq * 0.1
        )

    def open(self, number: int, key: str | None = None) -> None:
        digest = None if key is None else bytes(range(16))
        body = encode_body({"x": [number, number / 3], "text": "größer"})
        self.append(RoundOpened(number, TASK, body, AGENTS, 2, 0.25, 10.0, "operator-1", key, digest))

    def close(self, number: int, *, is_late: bool = False, key: str | None = None) -> None:
        """Steady is right, fickle in odd rounds; slow says what steady says, when it comes in time."""
        right, wrong = encode_body("cat"), encode_body("dog")
        replies = [
            AgentReply("fickle", right if number % 2 else wrong, 0.01 * number),
            *([] if is_late else [AgentReply("slow", right, 0.7)]),
            AgentReply("steady", right, 0.1 + 0.2),
        ]
        seen = ClosedRound(number, TASK, tuple(replies))
        answer = self.learner.combine(seen)
        self._closed[number] = ClosedRound(number, TASK, tuple(replies), answer.body)
        results = [RecordedResult(one.agent, "replied", one.body, "", one.latency_s, 0.005, 0.001) for one in replies]
        if is_late:
            results.insert(1, RecordedResult("slow", "cancelled", error="grace elapsed"))
        self.append(
            RoundClosed(
                number,
                TASK,
                "quorate" if is_late else "complete",
                2,
                tuple(results),
                1 / 3 + number,
                answer=answer.body,
                support=answer.support,
                weights=answer.weights,
                key=key,
                digest=None if key is None else bytes(range(16)),
            )
        )

    def late(self, number: int) -> None:
        late = ReplyLate(number, TASK, "slow", encode_body("dog"), 12.5, 12.25, 0.0)
        self.append(late)
        self.learner.take_late(LateReply(number, TASK, AgentReply(late.agent, late.body, late.latency_s)))

    def tell(self, number: int) -> None:
        truth = encode_body("cat")
        self.append(TruthTold(number, truth))
        self.learner.learn(self._closed[number], truth)


async def write(file: Path) -> VoteLearner:
    """Writes the journal; returns the learner as it is at its end."""
    journal, heard = Journal.open(file), Heard()
    heard.start(journal)
    maker = _Maker(journal)
    for number in (1, 2):
        maker.open(number)
        maker.close(number)
        maker.tell(number)
    maker.checkpoint()
    await journal.prune(Retention(keep_s=0.0), now_s=EPOCH_S * 2)
    maker.open(3, key="question-3")
    maker.open(4)
    maker.close(4, is_late=True)
    maker.close(3, key="question-3")
    maker.late(4)
    maker.tell(3)
    maker.checkpoint()
    maker.tell(4)
    maker.open(5)
    maker.append(ExperienceTaken("steady", "reward", encode_body({"reward": 0.1 + 0.2, "step": 7})))
    maker.append(ExperienceTaken("fickle", "sound", b"\xc1 is no msgpack"))
    maker.append(
        RoundClosed(
            5,
            TASK,
            "interrupted",
            2,
            (
                RecordedResult("fickle", "replied", encode_body("dog"), "", 0.25, 0.125),
                RecordedResult("slow", "unavailable", error="no link"),
                RecordedResult("steady", "failed", error="ValueError: no such picture"),
            ),
            2.5,
            "the coordinator stopped",
        )
    )
    maker.open(6, key="question-6")
    assert journal.close(60)
    return maker.learner


def main(folder: Path) -> None:
    folder.mkdir(parents=True)
    learner = asyncio.run(write(folder / JOURNAL_NAME))
    with JournalReader(folder / JOURNAL_NAME) as reader:
        expected = {
            "records": [
                {"seq": seq, "at": at, "kind": record.kind, **record_json(record)}
                for seq, at, record in reader.records()
            ],
            "checkpoints": [[seq, reader.read_checkpoint(seq).snapshot.hex()] for seq in reader.checkpoint_seqs()],
            "learner": learner.snapshot().hex(),
        }
    for beside in (".lock", "-shm", "-wal"):  # of whoever wrote and read
        (folder / (JOURNAL_NAME + beside)).unlink(missing_ok=True)
    text = json.dumps(expected, indent=1, ensure_ascii=False)
    (folder / "expected.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
