"""Messages: what pydantic adds to the bytes of the golden vectors: defaults, strictness, and what errors tell."""

from typing import Any

import pytest
from pydantic import ValidationError

from quorate_protocol.errors import FrameTooLarge, LocalError, MessageInvalid, UnknownType
from quorate_protocol.fields import BodyRef
from quorate_protocol.frames import FrameDecoder
from quorate_protocol.limits import BODY_BYTES_MAX, FRAME_BYTES_MAX, FRAME_PREFIX_BYTES, LABELS_MAX, TASKS_MAX
from quorate_protocol.messages import (
    AgentResult,
    Ask,
    Assignment,
    Bulk,
    Feedback,
    Goodbye,
    Hello,
    Message,
    Outcome,
    Reply,
    Reveal,
    message_types,
    parse_message,
)


def through_the_wire(message: Message) -> Message:
    (raw,) = FrameDecoder().feed(message.to_frame())
    return parse_message(raw)


class TestTypes:
    def test_the_types_of_this_version(self) -> None:
        assert list(message_types()) == [
            "hello",
            "welcome",
            "refusal",
            "drain",
            "goodbye",
            "coordination",
            "assignment",
            "cancellation",
            "feedback",
            "reply",
            "bulk",
            "modality",
            "telemetry",
            "experience",
            "ask",
            "opened",
            "part",
            "outcome",
            "reveal",
            "revealed",
            "agents",
            "fleet",
            "drain-agent",
            "draining",
            "error",
        ]

    def test_each_model_knows_its_wire_name(self) -> None:
        assert all(model.wire_type == name for name, model in message_types().items())

    @pytest.mark.parametrize("model", message_types().values(), ids=lambda model: model.wire_type)
    def test_no_key_hides_the_type(self, model: type[Message]) -> None:
        assert "type" not in model.model_fields

    @pytest.mark.parametrize("raw", [{}, {"type": None}, {"type": ["hello"]}, {"type": "x" * 10_000}])
    def test_unknown(self, raw: dict[str, object]) -> None:
        with pytest.raises(UnknownType) as caught:
            parse_message(raw)
        assert caught.value.type == raw.get("type")
        assert len(str(caught.value)) < 120


class TestDefaults:
    def test_left_out_on_the_wire(self) -> None:
        (raw,) = FrameDecoder().feed(Goodbye().to_frame())
        assert raw == {"type": "goodbye"}

    def test_left_out_inside_results_too(self) -> None:
        outcome = Outcome(
            round=1,
            task="t",
            state="complete",
            quorum=1,
            results=[AgentResult(agent="a", status="lost")],
            duration_s=1.0,
        )
        (raw,) = FrameDecoder().feed(outcome.to_frame())
        assert raw["results"] == [{"agent": "a", "status": "lost"}]
        assert through_the_wire(outcome) == outcome

    def test_messages_do_not_share_their_defaults(self) -> None:
        one, other = Hello(id="a", token="t"), Hello(id="b", token="t")
        assert one.tasks is not other.tasks
        assert one.labels is not other.labels


class TestValues:
    def test_messages_cannot_be_changed(self) -> None:
        message = Goodbye(reason="x")
        with pytest.raises(ValidationError):
            message.reason = "y"  # type: ignore[misc]

    def test_an_empty_body_is_not_no_body(self) -> None:
        assert through_the_wire(Reply(round=1, body=b"")).body == b""  # type: ignore[attr-defined]
        assert through_the_wire(Reply(round=1)).body is None  # type: ignore[attr-defined]

    def test_a_reply_of_the_largest_body_fits_a_frame(self) -> None:
        reply = Reply(
            round=(1 << 63) - 1, attempt=1000, body=bytes(BODY_BYTES_MAX), error="é" * 4096, compute_s=1.5, waited_s=1.5
        )
        assert len(reply.to_frame()) <= FRAME_PREFIX_BYTES + FRAME_BYTES_MAX
        assert through_the_wire(reply) == reply

    def test_an_assignment_of_the_largest_body_fits_a_frame(self) -> None:
        assignment = Assignment(
            round=(1 << 63) - 1, task="t" * 255, body=bytes(BODY_BYTES_MAX), attempt=1000, deadline_s=31_536_000.0
        )
        assert through_the_wire(assignment) == assignment

    def test_one_byte_more_is_refused_by_the_model(self) -> None:
        with pytest.raises(MessageInvalid, match="body: "):
            Reply.from_map({"round": 1, "body": bytes(BODY_BYTES_MAX + 1)})

    def test_many_labels_and_the_largest_body_are_too_much_together(self) -> None:
        labels = {f"label-{n}": "x" * 4096 for n in range(LABELS_MAX)}
        with pytest.raises(FrameTooLarge):
            Ask(task="t", body=bytes(BODY_BYTES_MAX), labels=labels).to_frame()

    def test_as_many_tasks_and_labels_as_allowed(self) -> None:
        hello = Hello(
            id="a",
            token="t" * 4096,
            tasks=[f"task-{n}" for n in range(TASKS_MAX)],
            labels={f"label-{n}": "" for n in range(LABELS_MAX)},
        )
        assert through_the_wire(hello) == hello

    def test_text_is_counted_in_characters(self) -> None:
        assert through_the_wire(Goodbye(reason="🏔" * 4096)) == Goodbye(reason="🏔" * 4096)
        with pytest.raises(MessageInvalid):
            Goodbye.from_map({"reason": "🏔" * 4097})


REF = BodyRef(size=1 << 30, digest=bytes(range(32)))

#: Of each message with a body: its other keys, and the key of the body.
WITH_BODY: dict[type[Message] | type[AgentResult], tuple[dict[str, Any], str]] = {
    Assignment: ({"round": 1, "task": "t", "deadline_s": 1.0}, "body"),
    Feedback: ({"round": 1, "task": "t"}, "truth"),
    Reply: ({"round": 1}, "body"),
    Ask: ({"task": "t"}, "body"),
    Reveal: ({"round": 1}, "truth"),
    Outcome: (
        {"round": 1, "task": "t", "state": "complete", "quorum": 1, "results": [], "duration_s": 1.0},
        "answer",
    ),
    AgentResult: ({"agent": "a", "status": "replied"}, "body"),
}


class TestReferences:
    @pytest.mark.parametrize("model", WITH_BODY, ids=lambda model: model.__name__)
    def test_a_body_or_a_reference(self, model: type[Message]) -> None:
        keys, body = WITH_BODY[model]
        assert getattr(model(**keys, **{body: b"\x01"}), body) == b"\x01"
        referring = model(**keys, bulk=REF)
        assert getattr(referring, body) is None
        assert referring.bulk == REF  # type: ignore[attr-defined]
        if isinstance(referring, Message):
            assert through_the_wire(referring) == referring

    @pytest.mark.parametrize("model", WITH_BODY, ids=lambda model: model.__name__)
    def test_not_both(self, model: type[Message]) -> None:
        keys, body = WITH_BODY[model]
        with pytest.raises(ValidationError, match=f"both {body} and bulk are given, only one of them may be"):
            model(**keys, **{body: b""}, bulk=REF)

    @pytest.mark.parametrize("model", [Assignment, Feedback, Ask, Reveal], ids=lambda model: model.__name__)
    def test_not_neither_where_one_has_to_be(self, model: type[Message]) -> None:
        keys, body = WITH_BODY[model]
        with pytest.raises(MessageInvalid, match=f"message: .*neither {body} nor bulk is given, one of them must be"):
            model.from_map(keys)

    def test_the_value_of_a_body_that_is_elsewhere(self) -> None:
        for model in (Outcome, AgentResult):
            keys, _ = WITH_BODY[model]
            with pytest.raises(LocalError, match="body of 1073741824 bytes is not here: it was not received"):
                model(**keys, bulk=REF).value  # type: ignore[union-attr]  # noqa: B018

    def test_references_are_compared_and_looked_up_by_what_they_say(self) -> None:
        header = Bulk(of="reply", round=1, size=REF.size, digest=REF.digest)
        assert header.ref == REF
        assert {REF: 1}[header.ref] == 1


class TestErrors:
    def test_the_key_is_named_and_the_value_is_not_told(self) -> None:
        with pytest.raises(MessageInvalid) as caught:
            parse_message({"type": "hello", "id": "a", "token": ["sesame"]})
        assert str(caught.value).startswith("invalid hello message: token: ")
        assert "sesame" not in str(caught.value)
        assert caught.value.type == "hello"

    def test_the_place_inside_a_list_is_named(self) -> None:
        raw = {"type": "outcome", "round": 1, "task": "t", "state": "complete", "quorum": 1, "duration_s": 1.0}
        with pytest.raises(MessageInvalid, match=r"results\.1\.status: "):
            parse_message(raw | {"results": [{"agent": "a", "status": "lost"}, {"agent": "b", "status": "gone"}]})

    def test_the_number_of_further_errors_is_told(self) -> None:
        with pytest.raises(MessageInvalid, match=r"\(and 1 more\)$"):
            parse_message({"type": "hello"})

    def test_the_token_is_not_shown(self) -> None:
        assert "sesame" not in repr(Hello(id="a", token="sesame"))

    def test_the_cause_does_not_carry_the_value_either(self) -> None:
        with pytest.raises(MessageInvalid) as caught:
            parse_message({"type": "hello", "id": "a", "token": ["sesame"]})
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__
