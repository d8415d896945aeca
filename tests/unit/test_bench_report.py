"""A benchmark's rows: what is better by how much, the table, the picture."""

import importlib.util
from pathlib import Path

import pytest
from typer.testing import CliRunner

from quorate_coordinator.bench.picture import draw
from quorate_coordinator.bench.report import number, show, times
from quorate_coordinator.bench.result import Result, Row
from quorate_coordinator.cli.app import app
from quorate_protocol.errors import ConfigurationError

MACHINE = {"cpu": "some", "cores": 2, "kernel": "6", "python": "3.11"}
FASTER = Row("transfer", "MB/s", 30.0, "stock", 10.0, target=300.0, lower_is_better=False, note="over loopback")
SLOWER = Row("round trip, p50", "µs", 400.0, "stock", 100.0, target=500.0)
ALONE = Row("rounds", "1/s", 70.0, lower_is_better=False)


def result(*rows: Row) -> Result:
    return Result("some", list(rows), MACHINE)


def test_a_ratio_over_one_is_better_whichever_way_is_up() -> None:
    assert FASTER.ratio == 3.0
    assert SLOWER.ratio == 0.25
    assert ALONE.ratio is None
    assert Row("growth", "MiB", 0.0, "stock", 5.0).ratio is None
    assert Row("growth", "MiB", 5.0, "stock", 0.0).ratio is None
    assert (FASTER.met, SLOWER.met, ALONE.met) == (False, True, None)


@pytest.mark.parametrize(
    ("value", "text"), [(0.12345, "0.1235 x"), (9999.4, "9999 x"), (123_456.7, "123,457 x"), (3.0, "3 x")]
)
def test_numbers_have_four_digits(value: float, text: str) -> None:
    assert number(value, "x") == text


@pytest.mark.parametrize(("ratio", "text"), [(0.984, "0.98 x"), (3.44, "3.4 x"), (99.6, "100 x"), (1234.5, "1,234 x")])
def test_ratios_have_two(ratio: float, text: str) -> None:
    assert times(ratio) == text


def test_the_table_has_the_ratio_and_each_note_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    show(result(FASTER, SLOWER, ALONE), None)
    shown = capsys.readouterr().out
    (heading,) = [line for line in shown.splitlines() if "measured" in line and "┃" in line]
    assert [cell.strip() for cell in heading.strip("┃").split("┃")] == [
        "measured", "value", "stock", "ratio", "target", "",
    ]  # fmt: skip
    (line,) = [line for line in shown.splitlines() if "transfer" in line and "│" in line]
    assert [cell.strip() for cell in line.strip("│").split("│")] == [
        "transfer", "30 MB/s", "10 MB/s", "3 x", "≥ 300 MB/s", "missed",
    ]  # fmt: skip
    assert shown.count("over loopback") == 1


def test_the_table_has_no_ratio_without_a_peer(capsys: pytest.CaptureFixture[str]) -> None:
    show(result(ALONE), None)
    shown = capsys.readouterr().out
    assert "ratio" not in shown
    assert "peer" in shown


def test_peers_are_named_where_there_are_several(capsys: pytest.CaptureFixture[str]) -> None:
    show(result(FASTER, Row("memory", "KB", 90.0, "websockets", 30.0)), None)
    assert "30 KB (websockets)" in capsys.readouterr().out


def test_a_picture_needs_something_to_compare_with_and_a_place(tmp_path: Path) -> None:
    draw(result(FASTER, SLOWER, ALONE), tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigurationError, match="--picture: there is no row with something to compare with"):
        draw(result(ALONE), tmp_path / "y.png")
    with pytest.raises(ConfigurationError, match=r"--picture: .*y\.words: pictures are drawn as .*png"):
        draw(result(FASTER), tmp_path / "y.words")
    with pytest.raises(ConfigurationError, match=r"--picture: cannot write .*: No such file or directory"):
        draw(result(FASTER), tmp_path / "absent" / "y.png")


def test_what_a_picture_needs_is_said_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    ended = CliRunner().invoke(app, ["bench", "transport", "--picture", "x.png"])
    assert (ended.exit_code, ended.stdout) == (2, "")
    assert ended.stderr == (
        "quorate: a picture needs the extra [bench] (missing: matplotlib); "
        "install it with: pip install 'quorate[bench]'\n"
    )
