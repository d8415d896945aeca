"""Round numbers do not come again after a restart."""

from pathlib import Path

import pytest

from quorate_coordinator.round_numbers import RoundNumbers
from quorate_protocol.errors import ConfigurationError


def test_the_first_run_begins_with_one(tmp_path: Path) -> None:
    assert RoundNumbers(tmp_path / "state" / "next-round").first == 1


def test_no_number_comes_again_however_many_rounds_a_run_had(tmp_path: Path) -> None:
    file = tmp_path / "next-round"
    highest = 0
    for rounds in (0, 1, 25_000, 9_000, 9_001):
        numbers = RoundNumbers(file)
        assert numbers.first > highest
        for number in range(numbers.first, numbers.first + rounds):
            numbers.use(number)
            highest = number


@pytest.mark.parametrize("content", ["", "three", "0", "-5"])
def test_a_damaged_file_is_named(tmp_path: Path, content: str) -> None:
    file = tmp_path / "next-round"
    file.write_text(content)
    with pytest.raises(ConfigurationError, match="next-round"):
        RoundNumbers(file)
    assert file.read_text() == content
