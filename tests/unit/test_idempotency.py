"""Keys: the same question under the same key is the same round."""

from typing import Any

import pytest

from quorate_coordinator.idempotency import Keys, digest_of, earlier_digest_of, is_final
from quorate_protocol.blobs import blob_of
from quorate_protocol.bodies import encode_body
from quorate_protocol.bulk import ref_to
from quorate_protocol.errors import CallFailed
from quorate_protocol.fields import RoundState
from quorate_protocol.messages import AgentResult, Ask, Outcome

D1, D2 = b"1" * 16, b"2" * 16


def outcome(round: int = 1, state: RoundState = "complete", *, body: bytes | None = None, error: str = "") -> Outcome:
    status = "failed" if error else "replied"
    results = [AgentResult(agent="a", status=status, body=None if error else body or b"\xc0", error=error)]
    return Outcome(round=round, task="t", state=state, quorum=1, results=results, duration_s=0.1)


def ask(**fields: Any) -> Ask:
    return Ask(task="t", body=encode_body(1), **fields)


class TestDigest:
    def test_key_and_streaming_are_no_part_of_the_question(self) -> None:
        assert digest_of(ask()) == digest_of(ask(key="k", stream=True)) == digest_of(ask(key="other"))

    def test_the_order_of_labels_is_no_part_of_the_question(self) -> None:
        assert digest_of(ask(labels={"a": "1", "b": "2"})) == digest_of(ask(labels={"b": "2", "a": "1"}))

    def test_however_its_body_came_it_is_the_same_question(self) -> None:
        blob = blob_of([encode_body(1)])
        assert digest_of(Ask(task="t", bulk=ref_to(blob))) == digest_of(ask())
        assert digest_of(Ask(task="t", bulk=ref_to(blob).model_copy(update={"gone": True}))) == digest_of(ask())

    def test_those_that_journals_have_stay(self) -> None:
        """Also the digest of an inline body from before, which was over the body as it is."""
        body = encode_body({"x": 1.5})
        inline = Ask(task="classify", body=body, quorum=2, labels={"b": "2", "a": "1"}, key="k", stream=True)
        assert digest_of(inline).hex() == "1ab155f73a46a2ef63e3090ab8e19703"
        assert earlier_digest_of(inline).hex() == "fadd8c6fe4b0a45f1931ac76bbb5584a"

    @pytest.mark.parametrize(
        "other",
        [
            ask(quorum=1),
            ask(quorum_fraction=1.0),
            ask(grace_s=1.0),
            ask(deadline_s=1.0),
            ask(labels={"a": "1"}),
            ask(count=1),
            ask(attempts=1),
            Ask(task="t", body=encode_body(1.0)),
            Ask(task="u", body=encode_body(1)),
        ],
        ids=lambda other: str(other.model_dump(exclude_defaults=True)),
    )
    def test_everything_else_is(self, other: Ask) -> None:
        assert digest_of(other) != digest_of(ask())


class TestKeys:
    def test_a_key_is_its_call_while_in_flight_and_its_outcome_after(self) -> None:
        keys = Keys()
        assert keys.find("k", D1) is None
        keys.open("k", D1, 7)
        found = keys.find("k", D1)
        assert found is not None
        assert (found.request_id, found.outcome) == (7, None)
        told = outcome()
        keys.keep("k", 7, told)
        found = keys.find("k", D1)
        assert found is not None
        assert (found.request_id, found.outcome) == (None, told)
        assert len(keys) == 1

    def test_another_question_is_refused_in_flight_and_after(self) -> None:
        keys = Keys()
        keys.open("k", D1, 7)
        for _ in range(2):
            with pytest.raises(CallFailed, match="key: 'k' was used for another question") as caught:
                keys.find("k", D2)
            assert (caught.value.reason, caught.value.retry) == ("bad-request", False)
            keys.keep("k", 7, outcome())

    @pytest.mark.parametrize("state", ["complete", "quorate", "expired", "failed"])
    def test_what_is_over_stays(self, state: RoundState) -> None:
        assert is_final(outcome(state=state))

    @pytest.mark.parametrize("state", ["cancelled", "interrupted"])
    def test_what_came_to_nothing_frees_its_key(self, state: RoundState) -> None:
        keys = Keys()
        keys.open("k", D1, 7)
        keys.keep("k", 7, outcome(state=state))
        assert keys.find("k", D2) is None
        keys.open("k", D2, 8)
        assert len(keys) == 1

    def test_who_was_refused_frees_its_key(self) -> None:
        keys = Keys()
        keys.open("k", D1, 7)
        keys.drop("k", 7)
        assert keys.find("k", D2) is None

    def test_the_end_of_a_call_says_nothing_of_the_next_one_under_its_key(self) -> None:
        """A round was cancelled and asked for again, before its end was durable."""
        keys = Keys()
        keys.open("k", D1, 7)
        keys.drop("k", 7)
        keys.open("k", D1, 8)
        keys.drop("k", 7)
        keys.keep("k", 7, outcome(1, "cancelled"))
        found = keys.find("k", D1)
        assert found is not None
        assert found.request_id == 8
        keys.keep("k", 8, outcome(2))
        found = keys.find("k", D1)
        assert found is not None
        assert found.outcome is not None
        assert found.outcome.round == 2

    def test_only_so_many_are_kept_the_newest(self) -> None:
        keys = Keys(kept_max=3)
        for number in range(10):
            keys.open(f"k{number}", D1, number)
            keys.keep(f"k{number}", number, outcome(number + 1))
        assert len(keys) == 3
        assert [number for number in range(10) if keys.find(f"k{number}", D1)] == [7, 8, 9]

    def test_only_so_many_bytes_are_kept(self) -> None:
        keys = Keys(kept_bytes_max=10_000)
        for number in range(10):
            keys.open(f"k{number}", D1, number)
            keys.keep(f"k{number}", number, outcome(number + 1, body=b"\xc4\xff" + b"x" * 2000))
        assert [number for number in range(10) if keys.find(f"k{number}", D1)] == [7, 8, 9]
        # One that is too large for itself leaves nothing behind.
        keys.open("huge", D1, 99)
        keys.keep("huge", 99, outcome(99, body=b"x" * 20_000))
        assert len(keys) == 0
        keys.open("small", D1, 100)
        keys.keep("small", 100, outcome(100))
        assert len(keys) == 1

    def test_those_in_flight_are_not_pushed_out(self) -> None:
        keys = Keys(kept_max=1)
        for number in range(5):
            keys.open(f"k{number}", D1, number)
        assert all(keys.find(f"k{number}", D1) for number in range(5))
