"""Arguments of callers become fields of messages: what is wrong with them is told in the callers' words."""

import contextlib
from collections.abc import Iterator
from typing import Final

from pydantic import ValidationError

from quorate_protocol.errors import ArgumentInvalid

#: Fields whose values are never shown.
_SECRET: Final = frozenset({"token"})

#: Longest value that is shown, in characters.
_SHOWN_MAX: Final = 80


@contextlib.contextmanager
def arguments_checked(**names: str) -> Iterator[None]:
    """For a block that makes messages.

    Args:
        names: what the caller calls a field, where that is not the field's name.

    Raises:
        ArgumentInvalid: a field cannot be what it is.
    """
    try:
        yield
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field, *rest = (str(part) for part in first["loc"])
        given = first["input"]
        if field in _SECRET:
            shown = "what is not shown"
        else:
            shown = f"{len(given)} bytes" if isinstance(given, bytes) else repr(given)
        inside = f" ({rest[0]})" if rest else ""
        cut = shown if len(shown) <= _SHOWN_MAX else shown[: _SHOWN_MAX - 3] + "..."
        raise ArgumentInvalid(names.get(field, field) + inside, f"{first['msg']}, got {cut}") from None
