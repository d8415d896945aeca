"""The command `quorate` given what is wrong before anybody is connected to: one line that names it, and exit code 2."""

import json
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from quorate_coordinator.cli.app import app


class Command:
    """Runs `quorate` in this process, where no coordinator has ever been."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, *arguments: str, **environ: str) -> Result:
        variables: dict[str, str | None] = {"QUORATE_STATE_DIR": str(self.folder / "state"), **environ}
        for name in ("QUORATE_COORDINATOR", "QUORATE_TOKEN", "QUORATE_TOKEN_FILE", "QUORATE_CA", "QUORATE_CONFIG"):
            variables.setdefault(name, None)
        return CliRunner().invoke(
            app, [argument.replace("DIR", str(self.folder)) for argument in arguments], env=variables
        )

    def fails(self, *arguments: str, **environ: str) -> str:
        """The line that is said; nothing else may be."""
        ended = self(*arguments, **environ)
        assert (ended.exit_code, ended.stdout) == (2, ""), ended.output
        (line,) = ended.stderr.splitlines()
        assert line.startswith("quorate: ")
        return line.removeprefix("quorate: ").replace(str(self.folder), "DIR")


@pytest.fixture
def quorate(tmp_path: Path) -> Command:
    (tmp_path / "token").write_text("secret\n")
    (tmp_path / "token").chmod(0o600)
    (tmp_path / "open-token").write_text("secret\n")
    (tmp_path / "open-token").chmod(0o644)
    (tmp_path / "garbage").write_text("garbage")
    (tmp_path / "x.csv").write_text("x,y\n1,2\n")
    return Command(tmp_path)


@pytest.mark.parametrize(
    ("toml", "problem"),
    [
        ("[rounds]\ndeadline_s = -1", "rounds.deadline_s: must be greater than 0, got -1"),
        ("[rounds]\ndedline_s = 1", "rounds.dedline_s: unknown setting; did you mean deadline_s?"),
        ("[round]\ndeadline_s = 1", "round: unknown section; did you mean rounds?"),
        ('listen = "4433"', "listen: '4433' is not an address: an address looks like HOST:PORT"),
        ("[rounds\n", "is not TOML: "),
        ('[auth]\ntoken_file = "absent"', "DIR/absent: no such file; it should hold the token"),
        ('[auth]\ntoken_file = "open-token"', "DIR/open-token: holds a token but others may read it (mode 0644)"),
        ('[tls]\ncertificate_file = "garbage"\nkey_file = "garbage"', "tls.certificate_file: cannot read "),
        ('[tls]\ncertificate_file = "absent"\nkey_file = "garbage"', "tls.certificate_file: cannot read "),
        ('[consumers]\nvideo = "absent:take"', "consumers.video: cannot load absent"),
        ('[tls]\nkey_file = "garbage"', "tls.certificate_file: must be set, because tls.key_file is"),
    ],
)
def test_what_is_wrong_with_the_settings_is_named(quorate: Command, toml: str, problem: str) -> None:
    (quorate.folder / "coordinator.toml").write_text(toml)
    line = quorate.fails("coordinator", "--check", "--config", "DIR/coordinator.toml")
    assert line.startswith(f"DIR/coordinator.toml: {problem}")


def test_settings_from_variables_and_a_file_that_is_not_there(quorate: Command) -> None:
    assert quorate.fails("coordinator", "--check", QUORATE_ROUNDS__DEADLINE_S="soon") == (
        'rounds.deadline_s: must be a number, got "soon" (from QUORATE_ROUNDS__DEADLINE_S)'
    )
    garbage = str(quorate.folder / "garbage")
    assert quorate.fails("coordinator", "--check", QUORATE_STATE_DIR=garbage) == (
        "state_dir: DIR/garbage is not a directory"
    )
    assert quorate.fails("coordinator", "--check", QUORATE_STATE_DIR=f"{garbage}/state") == (
        "state_dir: DIR/garbage/state cannot be made: DIR/garbage cannot be written"
    )
    for arguments, environ in (
        (("--config", "DIR/absent.toml"), {}),
        ((), {"QUORATE_CONFIG": str(quorate.folder / "absent.toml")}),
    ):
        line = quorate.fails("coordinator", "--check", *arguments, **environ)
        assert line.endswith("DIR/absent.toml: cannot be read: No such file or directory")


def test_good_settings_are_printed(quorate: Command) -> None:
    (quorate.folder / "coordinator.toml").write_text('[auth]\ntoken_file = "token"\n')
    ended = quorate("coordinator", "--check", "--config", "DIR/coordinator.toml")
    assert (ended.exit_code, ended.stderr) == (0, "")
    assert json.loads(ended.stdout)["auth"]["token_file"] == str(quorate.folder / "token")
    assert "secret" not in ended.stdout


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("ask t cat", "JSON: 'cat' is not JSON"),
        ("ask t 1 --quorum most", "--quorum: 'most' is neither a count (3) nor a share"),
        ("ask t 1 --deadline soon", "--deadline: 'soon' is not a time; write 250ms"),
        ("ask t 1 --grace -1s", "--grace: '-1s' is not a time; write 250ms"),
        ("ask t 1 --label zone", "--label: 'zone' is not KEY=VALUE"),
        ("ask t 1 --label a=1 --label a=2", "--label: 'a' is given twice"),
        ("ask t 1 --token-file DIR/absent", "DIR/absent: no such file; it should hold the token"),
        ("ask t 1 --token-file DIR/open-token", "DIR/open-token: holds a token but others may read it"),
        ("ask t 1", "token: none given, and DIR/state/token does not exist; name a file with --token-file"),
        ("ask t 1 --token-file DIR/token --ca DIR/absent", "DIR/absent: no such file"),
        ("ask t 1 --token-file DIR/token --ca DIR/garbage", "DIR/garbage: holds no certificate in PEM form"),
        ("ask t 1 --token-file DIR/token --coordinator http://x", "coordinator address: 'http://x' does not begin"),
        ("status --token-file DIR/token --coordinator quic://", "coordinator address: 'quic://' names no host"),
        ("status --token-file DIR/token --coordinator quic://h:99999", "coordinator address: 'quic://h:99999': "),
        ("reveal 1 cat", "JSON: 'cat' is not JSON"),
        ("feed DIR/absent.csv --task t", "DIR/absent.csv: No such file or directory"),
        ("feed DIR --task t", "DIR: Is a directory"),
        ("feed DIR/x.csv --task t --target z", "DIR/x.csv: no column 'z'; there are x, y"),
        ("feed DIR/x.csv --task t --format xml", "--format: 'xml' is neither csv nor jsonl"),
        ("feed DIR/x.csv --task t --format jsonl", "DIR/x.csv, line 1: not JSON"),
        ("feed DIR/x.csv --task t --quorum 0", "--quorum: '0' is neither a count (3) nor a share"),
        ("bench coordination --json DIR", "--json: DIR is a directory"),
        ("bench coordination --json DIR/absent/x", "--json: cannot write DIR/absent/x: there is no directory"),
        ("demo --dataset titanic", "--dataset: 'titanic' is none of image-segments, phishing, bananas, shuttle"),
    ],
)
def test_wrong_arguments_are_named(quorate: Command, arguments: str, problem: str) -> None:
    line = quorate.fails(*arguments.split())
    assert line.startswith(problem)
    assert len(line) < 400


@pytest.mark.parametrize(
    "arguments",
    [
        "ask t",
        "feed x.csv",
        "reveal 0 1",
        "feed x.csv --task t --limit 0",
        "feed x.csv --task t --limit 99999999999999999999",
        "feed x.csv --task t --skip 99999999999999999999",
        "journal export --after 99999999999999999999",
        "journal export --round 99999999999999999999",
        "demo --limit 99999999999999999999",
        "bench coordination --instances 99999999999999999999",
        "fed",
    ],
)
def test_what_the_parser_finds_shows_the_usage(quorate: Command, arguments: str) -> None:
    ended = quorate(*arguments.split())
    assert ended.exit_code == 2
    assert ended.stderr.startswith("Usage: ")


def test_every_command_has_a_short_text_that_fits(quorate: Command) -> None:
    listing = quorate("--help").stdout.split("Commands:")[1].strip().splitlines()
    assert len(listing) == 10
    assert not [line for line in listing if line.endswith("...")]
