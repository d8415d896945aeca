"""Round numbers do not come again after a restart."""

import errno
from pathlib import Path

import pytest

from quorate_coordinator import round_numbers
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


def test_a_run_that_began_on_a_full_disk_reserves_before_its_first_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "next-round"
    RoundNumbers(file)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(round_numbers, "write_file", full)
        with pytest.raises(ConfigurationError, match="No space left"):
            RoundNumbers(tmp_path / "new" / "next-round")
        numbers = RoundNumbers(file)
        with pytest.raises(ConfigurationError, match="No space left"):
            numbers.check(numbers.first)
    numbers.check(numbers.first)
    assert RoundNumbers(file).first > numbers.first
