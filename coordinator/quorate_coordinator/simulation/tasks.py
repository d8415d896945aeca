"""What the simulated fleet can be asked: many tasks of a few agents, some of thirty, one of all."""

from typing import Final

from quorate_protocol.bodies import encode_body

#: What a question holds is its right answer; agents say it as often as they are good.
ANSWERS: Final = tuple(encode_body(label) for label in range(4))

#: The task of everybody; asked seldom.
EVERYBODY: Final = "everybody"

_SMALL: Final = 6
_MIDDLE: Final = 30


def tasks_of(number: int) -> tuple[str, ...]:
    """What an agent can do, by its number."""
    return EVERYBODY, f"small-{number // _SMALL}", f"middle-{number // _MIDDLE}"


def small_tasks(agents: int) -> list[str]:
    """The tasks of a fleet that six agents do."""
    return [f"small-{number}" for number in range((agents + _SMALL - 1) // _SMALL)]


def middle_tasks(agents: int) -> list[str]:
    """The tasks of a fleet that thirty agents do."""
    return [f"middle-{number}" for number in range((agents + _MIDDLE - 1) // _MIDDLE)]
