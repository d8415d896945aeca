"""Settings: what overrides what, what is refused and in which words, and that each setting is documented."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from quorate_coordinator.learner.fixed_share import LEARNING_RATE, SHARE
from quorate_coordinator.settings import Settings, load_settings, setting_paths
from quorate_protocol.errors import ConfigurationError
from quorate_protocol.state_dir import default_state_dir

REPOSITORY = Path(__file__).resolve().parents[2]
#: Unset means the learner's own: the example shows it.
LEARNER = {"learner.learning_rate": LEARNING_RATE, "learner.share": SHARE}
HOME = {"HOME": "/home/somebody"}


def load(tmp_path: Path, toml: str, environ: dict[str, str] | None = None) -> Settings:
    file = tmp_path / "coordinator.toml"
    file.write_text(toml, encoding="utf-8")
    return load_settings(file, HOME | (environ or {}))


def problem_of(tmp_path: Path, toml: str, environ: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigurationError) as caught:
        load(tmp_path, toml, environ)
    return str(caught.value)


def value_at(settings: Settings, path: str) -> Any:
    value: Any = settings
    for part in path.split("."):
        value = getattr(value, part)
    return value


class TestLayers:
    def test_defaults_are_safe(self) -> None:
        settings = load_settings(None, HOME)
        assert settings.listen_address == ("127.0.0.1", 4433)
        assert settings.http_address == ("127.0.0.1", 9433)
        assert settings.rounds.quorum == 0.5
        assert settings.learner.learning_rate is None

    def test_file_over_defaults(self, tmp_path: Path) -> None:
        settings = load(tmp_path, "[rounds]\ndeadline_s = 3\n")
        assert settings.rounds.deadline_s == 3.0
        assert settings.rounds.grace_s == 0.25

    def test_environment_over_file_one_setting_at_a_time(self, tmp_path: Path) -> None:
        toml = 'listen = "127.0.0.1:1"\n[rounds]\ndeadline_s = 3\ngrace_s = 1\n'
        settings = load(tmp_path, toml, {"QUORATE_ROUNDS__DEADLINE_S": "4.5", "QUORATE_LISTEN": "[::]:2"})
        assert settings.listen_address == ("::", 2)
        assert (settings.rounds.deadline_s, settings.rounds.grace_s) == (4.5, 1.0)

    def test_only_the_environment_that_was_given(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("QUORATE_ROUNDS__DEADLINE_S", "4.5")
        monkeypatch.setenv("QUORATE_LISTEN", "127.0.0.1:7")
        assert load_settings(None, HOME) == Settings(state_dir=Path("/home/somebody/.local/share/quorate"))

    def test_empty_variables_turn_off(self, tmp_path: Path) -> None:
        toml = 'state_dir = "/s"\n[tls]\ncertificate_file = "c"\nkey_file = "k"\n'
        environ = {"QUORATE_HTTP": "", "QUORATE_STATE_DIR": ""}
        environ |= {"QUORATE_TLS__CERTIFICATE_FILE": "", "QUORATE_TLS__KEY_FILE": ""}
        settings = load(tmp_path, toml, environ)
        assert settings.http_address is None
        assert settings.state_dir == Path("/s")
        assert settings.tls.certificate_file is None

    def test_lists_are_separated_by_commas(self, tmp_path: Path) -> None:
        settings = load(tmp_path, "", {"QUORATE_TLS__NAMES": "a.example, 192.0.2.1"})
        assert settings.tls.names == ("a.example", "192.0.2.1")

    def test_variables_of_agents_and_operators_are_not_its_business(self, tmp_path: Path) -> None:
        load(tmp_path, "", {"QUORATE_COORDINATOR": "quic://host:4433", "QUORATE_TOKEN": "x", "OTHER": "y"})

    def test_what_all_programs_read(self, tmp_path: Path) -> None:
        shared = {"QUORATE_LOG_LEVEL": "debug", "QUORATE_LOG_FORMAT": "json"}
        toml = '[log]\nlevel = "error"\n'
        assert load(tmp_path, toml, shared).log.model_dump() == {"level": "debug", "format": "json"}
        assert load(tmp_path, toml, {**shared, "QUORATE_LOG__LEVEL": "warning"}).log.level == "warning"
        assert load(tmp_path, toml, {"QUORATE_LOG_LEVEL": ""}).log.level == "error"

    @pytest.mark.parametrize(
        ("text", "quorum"), [("1", 1), ("1.0", 1.0), ("0.25", 0.25), ("7", 7), ("1e-3", 0.001)], ids=str
    )
    def test_quorum_from_a_variable_is_read_as_in_the_file(self, tmp_path: Path, text: str, quorum: float) -> None:
        from_file = load(tmp_path, f"[rounds]\nquorum = {text}\n").rounds.quorum
        from_variable = load(tmp_path, "", {"QUORATE_ROUNDS__QUORUM": text}).rounds.quorum
        assert from_file == from_variable == quorum
        assert type(from_file) is type(from_variable) is type(quorum)

    def test_settings_cannot_be_changed(self) -> None:
        settings = load_settings(None, HOME)
        with pytest.raises(ValidationError):
            settings.rounds.deadline_s = 1.0  # type: ignore[misc]


class TestPaths:
    def test_relative_paths_are_meant_from_the_file(self, tmp_path: Path) -> None:
        toml = (
            'state_dir = "state"\n[auth]\ntoken_file = "../token"\n[tls]\ncertificate_file = "/c"\nkey_file = "~/k"\n'
        )
        settings = load(tmp_path, toml)
        assert settings.state_dir == tmp_path / "state"
        assert settings.auth.token_file == tmp_path / ".." / "token"
        assert settings.tls.certificate_file == Path("/c")
        assert settings.tls.key_file == Path("/home/somebody/k")

    @pytest.mark.parametrize(
        ("environ", "expected"),
        [
            ({"HOME": "/h"}, "/h/.local/share/quorate"),
            ({"HOME": "/h", "XDG_DATA_HOME": "/data"}, "/data/quorate"),
            ({"HOME": "/h", "XDG_DATA_HOME": "relative"}, "/h/.local/share/quorate"),
            (
                {"HOME": "/h", "XDG_DATA_HOME": "/data", "STATE_DIRECTORY": "/var/lib/quorate:/var/lib/b"},
                "/var/lib/quorate",
            ),
            ({"HOME": "/h", "STATE_DIRECTORY": "/var/lib/quorate", "QUORATE_STATE_DIR": "~/q"}, "/h/q"),
        ],
        ids=["home", "xdg", "xdg-relative", "systemd", "quorate"],
    )
    def test_state_directory(self, environ: dict[str, str], expected: str) -> None:
        assert default_state_dir(environ) == Path(expected)
        assert load_settings(None, environ).state_dir == Path(expected)

    def test_the_file_is_over_systemd(self, tmp_path: Path) -> None:
        settings = load(tmp_path, 'state_dir = "/chosen"\n', {"STATE_DIRECTORY": "/var/lib/quorate"})
        assert settings.state_dir == Path("/chosen")


class TestProblems:
    @pytest.mark.parametrize(
        ("toml", "problem"),
        [
            ("[rounds]\ndeadline_s = -1", "rounds.deadline_s: must be greater than 0, got -1"),
            ("[rounds]\ndeadline_s = true", "rounds.deadline_s: must not be true or false, got true"),
            ("[rounds]\ndeadline_s = inf", "rounds.deadline_s: must be a finite number, got inf"),
            ("[rounds]\ndeadline_s = 99999999", "rounds.deadline_s: must be at most 31536000, got 99999999"),
            ("[rounds]\ndeadline_s = nan", "rounds.deadline_s: must be a finite number, got nan"),
            ('[rounds]\ndeadline_s = "soon"', 'rounds.deadline_s: must be a number, got "soon"'),
            ("[rounds]\nin_flight_max = 1.5", "rounds.in_flight_max: must be a whole number, got 1.5"),
            ("[rounds]\nin_flight_max = 0", "rounds.in_flight_max: must be at least 1, got 0"),
            (
                "[rounds]\nquorum = 0",
                "rounds.quorum: must be a count of at least 1, or a share over 0 and up to 1.0, got 0",
            ),
            (
                "[rounds]\nquorum = 1.5",
                "rounds.quorum: must be a count of at least 1, or a share over 0 and up to 1.0, got 1.5",
            ),
            ("[rounds]\nquorm = 2", "rounds.quorm: unknown setting; did you mean quorum?"),
            (
                "[log]\nzzz = 2",
                "log.zzz: unknown setting; there are level, format",
            ),
            ("[round]\nquorum = 2", "round: unknown section; did you mean rounds?"),
            ('listn = "a:1"', "listn: unknown setting; did you mean listen?"),
            ("rounds = 3", "rounds: must be a section, [rounds]"),
            ("[[rounds]]\nquorum = 2", "rounds: must be a section, [rounds]"),
            (
                'listen = ""',
                "listen: '' is not an address: an address looks like HOST:PORT, such as 0.0.0.0:4433 or [::]:4433",
            ),
            ("listen = 4433", "listen: must be text that is not empty, got 4433"),
            ('[log]\nlevel = "warn"', "log.level: must be 'debug', 'info', 'warning' or 'error', got \"warn\""),
            ("[learner]\nshare = 1", "learner.share: must be less than 1, got 1"),
            ('[journal]\nsync = "maybe"', "journal.sync: must be 'full', 'normal' or 'off', got \"maybe\""),
            ("[journal]\nsync = true", "journal.sync: must not be true or false, got true"),
            ("[journal]\nkeep_days = 0", "journal.keep_days: must be greater than 0, got 0"),
            ("[journal]\nkeep_bytes = 4", "journal.keep_bytes: must be at least 1048576, got 4"),
            ("[journal]\ncheckpoint_rounds = 0", "journal.checkpoint_rounds: must be at least 1, got 0"),
            ('[tls]\nnames = ["a", ""]', 'tls.names: must be text that is not empty, got ""'),
            ("[tls]\nnames = 3", "tls.names: must be a list, got 3"),
            ("[tls]\nkey_file = 3", "tls.key_file: must be the path of a file, got 3"),
            ('[tls]\nkey_file = "k"', "tls.certificate_file: must be set, because tls.key_file is"),
            ('[tls]\ncertificate_file = "c"', "tls.key_file: must be set, because tls.certificate_file is"),
            (
                '[tls]\ncertificate_file = "c"\nkey_file = "k"\nnames = ["a"]',
                "tls.names: is only for the development certificate, but tls.certificate_file is set",
            ),
            (
                "[rounds]\ngrace_s = 3\ndeadline_s = 2",
                "rounds.grace_s: must not exceed rounds.deadline_s (2), got 3",
            ),
            (
                "[sessions]\npulse_s = 10",
                "sessions.lease_s: must be greater than sessions.pulse_s (10), got 10",
            ),
            (
                "[rounds]\ngrace_s = -1\n[log]\nformat = 1",
                "rounds.grace_s: must be at least 0, got -1; log.format: must be 'auto', 'json' or 'console', got 1",
            ),
        ],
    )
    def test_words(self, tmp_path: Path, toml: str, problem: str) -> None:
        assert problem_of(tmp_path, toml) == problem

    def test_the_error_carries_the_path(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError) as caught:
            load(tmp_path, "[rounds]\ndeadline_s = -1")
        assert caught.value.path == "rounds.deadline_s"
        assert caught.value.problem == "must be greater than 0, got -1"

    @pytest.mark.parametrize(
        ("variable", "text", "problem"),
        [
            (
                "QUORATE_ROUNDS__DEADLINE_S",
                "-1",
                'rounds.deadline_s: must be greater than 0, got "-1" (from QUORATE_ROUNDS__DEADLINE_S)',
            ),
            (
                "QUORATE_ROUNDS__DEADLIN_S",
                "1",
                "rounds.deadlin_s: unknown setting; did you mean deadline_s? (from QUORATE_ROUNDS__DEADLIN_S)",
            ),
            (
                "QUORATE_ROUND__DEADLINE_S",
                "1",
                "round: unknown section; did you mean rounds? (from QUORATE_ROUND__DEADLINE_S)",
            ),
            (
                "QUORATE_ROUNDS_DEADLINE_S",
                "1",
                "rounds.deadline_s: is set by QUORATE_ROUNDS__DEADLINE_S, not by QUORATE_ROUNDS_DEADLINE_S",
            ),
            ("QUORATE_ROUNDS", "1", "rounds: is a section; its settings are QUORATE_ROUNDS__... (from QUORATE_ROUNDS)"),
            (
                "QUORATE_HTTP",
                "9433",
                "http: '9433' is not an address: an address looks like HOST:PORT, such as 0.0.0.0:4433 or [::]:4433 "
                "(from QUORATE_HTTP)",
            ),
        ],
    )
    def test_words_about_variables(self, tmp_path: Path, variable: str, text: str, problem: str) -> None:
        assert problem_of(tmp_path, "[rounds]\ngrace_s = 0.1\n", {variable: text}) == problem

    def test_a_short_deadline_ends_the_default_grace(self, tmp_path: Path) -> None:
        assert load(tmp_path, "[rounds]\ndeadline_s = 0.1").rounds.deadline_s == 0.1

    def test_a_long_value_is_not_told_whole(self, tmp_path: Path) -> None:
        assert len(problem_of(tmp_path, f'[log]\nlevel = "{"x" * 1000}"')) < 200

    def test_a_token_in_the_file_is_not_told(self, tmp_path: Path) -> None:
        problem = problem_of(tmp_path, '[auth]\ntoken = "sesame"')
        assert problem == "auth.token: unknown setting; did you mean token_file?"


class TestFiles:
    def test_missing(self, tmp_path: Path) -> None:
        missing = tmp_path / "missing.toml"
        with pytest.raises(ConfigurationError, match="cannot be read: No such file or directory") as caught:
            load_settings(missing, HOME)
        assert caught.value.path == str(missing)

    def test_directory(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match="cannot be read: Is a directory"):
            load_settings(tmp_path, HOME)

    def test_not_toml(self, tmp_path: Path) -> None:
        problem = problem_of(tmp_path, '# fine\nlisten = "a:1"\n[rounds\n')
        assert "is not TOML: " in problem
        assert "at line 3" in problem

    def test_not_text(self, tmp_path: Path) -> None:
        file = tmp_path / "coordinator.toml"
        file.write_bytes(b'listen = "a:1"\n# \xff\n')
        with pytest.raises(ConfigurationError, match=r"is not UTF-8 text \(at line 2\)"):
            load_settings(file, HOME)

    def test_empty_is_the_defaults(self, tmp_path: Path) -> None:
        assert load(tmp_path, "") == load_settings(None, HOME)


class TestDocumentation:
    """`deploy/systemd/coordinator.toml` shows every setting, with its default and its description."""

    shown: dict[str, tuple[str, str]]  # path: (the comment above, the value as written)

    @pytest.fixture(autouse=True)
    def _read(self) -> None:
        self.shown = {}
        section, comment = "", ""
        for line in (REPOSITORY / "deploy/systemd/coordinator.toml").read_text(encoding="utf-8").splitlines():
            if not line:
                comment = ""
            elif line.startswith("# "):
                comment += line.removeprefix("#")
            elif header := re.fullmatch(r"\[(\w+)\]", line):
                section, comment = header[1] + ".", ""
            elif setting := re.fullmatch(r"#(\w+) = (.+)", line):
                self.shown[section + setting[1]] = (comment.strip(), setting[2])
                comment = ""

    def test_every_setting_and_no_other_is_shown(self) -> None:
        assert list(self.shown) == list(setting_paths())

    @pytest.mark.parametrize("path", setting_paths())
    def test_description_and_default(self, path: str) -> None:
        comment, written = self.shown[path]
        *sections, key = path.split(".")
        model: Any = Settings
        for section in sections:
            model = model.model_fields[section].annotation
        description = model.model_fields[key].description
        assert description
        assert comment.startswith(description)
        default = value_at(load_settings(None, HOME), path)
        shown = tomllib.loads(f"value = {written}")["value"]
        if path in LEARNER:
            assert shown == LEARNER[path]
        elif default is not None and path != "state_dir":  # else it is unset by default, and the line is an example
            assert (list(default) if isinstance(default, tuple) else default) == shown

    def test_the_file_itself_is_valid(self) -> None:
        settings = load_settings(REPOSITORY / "deploy/systemd/coordinator.toml", HOME)
        assert settings.listen_address == ("0.0.0.0", 4433)  # noqa: S104  a server's unit serves the network

    def test_the_file_is_valid_with_every_example_taken(self, tmp_path: Path) -> None:
        text = (REPOSITORY / "deploy/systemd/coordinator.toml").read_text(encoding="utf-8")
        text = text.replace('\nlisten = "0.0.0.0:4433"', "")
        settings = load(tmp_path, re.sub(r"(?m)^#(?=\w+ = )", "", text))
        assert settings.state_dir == Path("/var/lib/quorate")
