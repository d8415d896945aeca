"""SPEC.md against the code: every message, key, type, default, code and limit that it states is the code's."""

import json
import re
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import msgpack
import numpy
import pytest
from pydantic import BaseModel, Field, StringConstraints, TypeAdapter

from quorate_coordinator.rounds.instructions import RejectReason
from quorate_protocol import limits
from quorate_protocol.bodies import decode_body, encode_body
from quorate_protocol.errors import Code
from quorate_protocol.fields import (
    BodyRef,
    Digest,
    InlineBody,
    Name,
    PositiveSeconds,
    RoundId,
    RoundState,
    Seconds,
    Text,
)
from quorate_protocol.frames import encode_frame
from quorate_protocol.limits import BODY_BYTES_MAX, LABELS_MAX, TASKS_MAX
from quorate_protocol.messages import AgentInfo, AgentResult, Resume, message_types

SPEC = (Path(__file__).resolve().parents[2] / "protocol" / "SPEC.md").read_text(encoding="utf-8")

#: Heading in SPEC.md to model.
MODELS: dict[str, type[BaseModel]] = {
    **{f"`{name}`": model for name, model in message_types().items()},
    "resume": Resume,
    "result": AgentResult,
    "agent": AgentInfo,
    "reference": BodyRef,
}

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]

#: What the words of the tables mean in the code. Ceilings on lists and maps stand in the meaning's column.
TYPES: dict[str, Any] = {
    "name": Name,
    "text": Text,
    "text64": Annotated[str, StringConstraints(max_length=64)],
    "body": InlineBody,
    "round": RoundId,
    "attempt": Annotated[int, Field(ge=1, le=1000)],
    "attempts": Annotated[int, Field(ge=1, le=100)],
    "result": AgentResult,
    "count": Annotated[int, Field(ge=0)],
    "digest": Digest,
    "reference": BodyRef,
    "quorum": Annotated[int, Field(ge=1, le=(1 << 63) - 1)],
    "seconds": Seconds,
    "seconds > 0": PositiveSeconds,
    "fraction": Annotated[float, Field(gt=0, le=1)],
    "share": Annotated[float, Field(ge=0, le=1)],
    "weight": Weight,
    "number": float,
    "boolean": bool,
    "resume": Resume,
    "list of name": list[Name],
    "list of result": list[AgentResult],
    "list of agent": list[AgentInfo],
    "map of text": dict[Name, Text],
    "map of weight": dict[Name, Weight],
    "map of number": dict[Name, float],
    "map of boolean": dict[Name, bool],
    "map from text to int": dict[str, int],
}


def section(heading: str) -> str:
    """The text under a heading, up to the next one of any level."""
    found = re.search(rf"(?m)^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", SPEC, re.DOTALL)
    assert found, f"SPEC.md has no section {heading}"
    return found[1]


def rows(text: str, columns: int) -> list[list[str]]:
    """The cells of a section's tables of so many columns, without the headings."""
    table: list[list[str]] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if len(cells) == columns and not set(cells[0]) <= {"-", " "}:
            table.append(cells)
    return table[1:]


def schema_of(words: str) -> dict[str, Any]:
    """The JSON schema of a type as the tables write it."""
    words, is_optional = re.subn(r" or nil$", "", words)
    quoted = re.findall(r"`([^`]+)`", words)
    if all(item.startswith('"') for item in quoted):
        type_: Any = Literal[tuple(json.loads(item) for item in quoted)]
    else:
        (item,) = quoted
        type_ = TYPES[item]
    return without_words(TypeAdapter(reduce(or_, [type_, None]) if is_optional else type_).json_schema())


def without_words(schema: Any) -> Any:
    """A schema without titles and defaults, and without ceilings on the number of items."""
    if isinstance(schema, list):
        return [without_words(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    dropped = {"title", "description", "default", "$defs", "maxItems", "maxProperties"}
    return {key: without_words(value) for key, value in schema.items() if key not in dropped}


@pytest.mark.parametrize("heading", MODELS)
class TestMessages:
    def test_keys(self, heading: str) -> None:
        keys = [row[0].strip("`") for row in rows(section(heading), 4)]
        assert keys == list(MODELS[heading].model_fields)

    def test_types(self, heading: str) -> None:
        properties = MODELS[heading].model_json_schema().get("properties", {})
        for key, type_, _, _ in rows(section(heading), 4):
            stated, found = schema_of(type_), without_words(properties[key.strip("`")])
            if "$ref" in found:  # a map by itself, whose keys have a section of their own
                assert TYPES[type_.strip("`")].__name__ == found["$ref"].rpartition("/")[2], key
            else:
                assert stated == found, key

    def test_defaults(self, heading: str) -> None:
        model = MODELS[heading]
        for key, _, default, _ in rows(section(heading), 4):
            field = model.model_fields[key.strip("`")]
            if default == "required":
                assert field.is_required(), key
            else:
                written = default.strip("`")
                assert not field.is_required(), key
                assert field.get_default(call_default_factory=True) == (
                    None if written == "nil" else json.loads(written)
                ), key


def test_no_section_is_about_a_message_that_is_not_there() -> None:
    chapter = SPEC[SPEC.index("\n## 6.") : SPEC.index("\n## 7.")]
    assert re.findall(r"(?m)^### (.+)$", chapter) == sorted(
        MODELS, key=lambda heading: chapter.find(f"\n### {heading}\n")
    )


def test_ceilings_of_lists_and_maps() -> None:
    for name, key, word, number in (
        ("hello", "labels", "maxProperties", LABELS_MAX),
        ("hello", "tasks", "maxItems", TASKS_MAX),
        ("ask", "labels", "maxProperties", LABELS_MAX),
    ):
        assert message_types()[name].model_json_schema()["properties"][key][word] == number
        (meaning,) = [row[3] for row in rows(section(f"`{name}`"), 4) if row[0] == f"`{key}`"]
        assert f"at most {number}" in meaning


def test_the_ceilings_in_the_table_of_types() -> None:
    said = {row[0].strip("`"): row[2] for row in rows(section("Types in the tables"), 3)}
    assert f"at most {BODY_BYTES_MAX:,} bytes" in said["body"]
    assert f"A body over {BODY_BYTES_MAX:,} bytes" in section("7. Bodies")
    assert f"is {limits.BULK_BYTES_MAX:,} bytes by default" in section("7. Bodies")
    assert f"at most {limits.BULK_HEADER_BYTES_MAX:,} bytes" in section("4. Streams")
    assert f"1 to {limits.NAME_BYTES_MAX} characters" in said["name"]
    assert f"at most {limits.TEXT_CHARS_MAX} Unicode code points" in said["text"]
    used = {
        words for heading in MODELS for row in rows(section(heading), 4) for words in re.findall(r"`([^`]+)`", row[1])
    }
    explained = set(said) | {"list of T", "map of T"}
    for words in used:
        parts = re.split(r"^(?:list|map) of ", words)
        assert (
            parts[-1] in explained or words.startswith(('"', "map from")) or parts[-1] in ("resume", "result", "agent")
        ), words


def test_every_state_of_a_round_is_explained() -> None:
    states = {row[0].strip("`") for row in rows(section("`outcome`"), 2)}
    assert states == set(get_args(RoundState))


def test_every_reason_of_the_round_book_is_named() -> None:
    text = section("`error`")
    assert all(f"`{reason}`" in text for reason in get_args(RejectReason))


def test_codes() -> None:
    stated = {row[1].strip("`"): int(row[0].strip("`"), 16) for row in rows(section("9. Errors"), 3)}
    assert stated == {code.name: code.value for code in Code}


def test_limits() -> None:
    stated = {row[0].strip("`"): int(row[1]) for row in rows(section("10. Limits"), 3)}
    assert stated == {name: getattr(limits, name) for name in stated}
    # Those that are one end's own business are not part of the wire.
    own = {
        "STREAM_WRITE_BYTES_HIGH",
        "CLASS_WRITE_BYTES_HIGH",
        "HANDSHAKES_MAX",
        "CONNECTIONS_MAX",
        "UDP_PAYLOAD_BYTES_MAX",
        "UDP_PAYLOAD_BYTES_MIN",
    }
    assert set(stated) | own >= {name for name in vars(limits) if name.isupper()}


def test_the_frame_in_the_text() -> None:
    assert "0000000e  81 a4 74797065 a7 676f6f64627965" in SPEC
    assert encode_frame({"type": "goodbye"}) == bytes.fromhex("0000000e 81a474797065a7676f6f64627965")


def test_the_array_in_the_text() -> None:
    block = section("7. Bodies").split("The array `[1.5]`:")[1].split("```")[1]
    written = [re.split(r" {2,}", line.strip())[0] for line in block.strip("\n").splitlines()]
    assert bytes.fromhex("".join(written)) == encode_body(numpy.array([1.5]))


def test_the_pulse_in_the_text() -> None:
    assert msgpack.packb({"type": "pulse"}).hex(" ") == "81 a4 74 79 70 65 a5 70 75 6c 73 65"
    assert "81 a4 74797065 a5 70756c7365" in SPEC


def test_every_dtype_in_the_table_travels() -> None:
    text = section("7. Bodies")
    table = text[text.index("| dtype | values |") :].split("\n\n")[0].replace("&#124;", "|")
    written = re.findall(r"[<|][a-zA-Z][0-9n]+(?:\[unit\])?", table)
    assert len(written) == 18
    units = re.findall(r"\w+", re.findall(r"which is `([^`]+)`", table)[0])
    assert len(units) == 13
    for name in written:
        for kind in {name.replace("unit", unit) for unit in units} if "unit" in name else {name.replace("n", "3")}:
            for dtype in {kind, kind.replace("<", ">")}:
                array = numpy.zeros(2, dtype=dtype)
                assert array.dtype.str == dtype
                assert (decode_body(encode_body(array)) == array).all()
