"""Where a client finds its token and whom it trusts."""

import os
from pathlib import Path

import pytest

from quorate_protocol.credentials import find_ca, find_token, state_dir
from quorate_protocol.errors import ConfigurationError

CERTIFICATE = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"


def write(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "state").mkdir()
    return {"QUORATE_STATE_DIR": str(tmp_path / "state")}


def test_the_state_directory_follows_the_environment(tmp_path: Path) -> None:
    assert state_dir({"QUORATE_STATE_DIR": "/a", "STATE_DIRECTORY": "/b", "HOME": "/h"}) == Path("/a")
    assert state_dir({"STATE_DIRECTORY": "/b:/c", "XDG_DATA_HOME": "/x", "HOME": "/h"}) == Path("/b")
    assert state_dir({"XDG_DATA_HOME": "/x", "HOME": "/h"}) == Path("/x/quorate")
    assert state_dir({"XDG_DATA_HOME": "not/absolute", "HOME": "/h"}) == Path("/h/.local/share/quorate")
    assert state_dir({"HOME": "/h"}) == Path("/h/.local/share/quorate")


def test_tokens_are_found_in_order(tmp_path: Path, environ: dict[str, str]) -> None:
    write(tmp_path / "state" / "token", "from-state\n")
    assert find_token(environ=environ) == "from-state"
    environ["QUORATE_TOKEN_FILE"] = str(write(tmp_path / "named", "  from-named\n\n"))
    assert find_token(environ=environ) == "from-named"
    environ["QUORATE_TOKEN"] = "from-environment"
    assert find_token(environ=environ) == "from-environment"
    assert find_token(write(tmp_path / "given", "from-option"), environ=environ) == "from-option"


def test_no_token_at_all_says_where_it_was_looked_for(tmp_path: Path, environ: dict[str, str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        find_token(environ=environ)
    text = str(caught.value)
    assert str(tmp_path / "state" / "token") in text
    assert "--token-file" in text
    assert "QUORATE_TOKEN" in text


def test_a_file_that_was_named_must_be_there(tmp_path: Path, environ: dict[str, str]) -> None:
    with pytest.raises(ConfigurationError, match="absent: no such file"):
        find_token(tmp_path / "absent", environ=environ)
    with pytest.raises(ConfigurationError, match="elsewhere: no such file"):
        find_token(environ={**environ, "QUORATE_TOKEN_FILE": str(tmp_path / "elsewhere")})


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o602, 0o660])
def test_a_token_that_others_may_read_is_refused(tmp_path: Path, environ: dict[str, str], mode: int) -> None:
    path = write(tmp_path / "token", "very-secret", mode)
    with pytest.raises(ConfigurationError) as caught:
        find_token(path, environ=environ)
    assert f"chmod 600 {path}" in str(caught.value)
    assert "very-secret" not in str(caught.value)


def test_credentials_that_systemd_guards_may_show_group_bits(tmp_path: Path, environ: dict[str, str]) -> None:
    path = write(tmp_path / "token", "guarded", 0o440)
    assert find_token(path, environ={**environ, "CREDENTIALS_DIRECTORY": str(tmp_path)}) == "guarded"
    with pytest.raises(ConfigurationError, match="chmod 600"):
        find_token(path, environ={**environ, "CREDENTIALS_DIRECTORY": str(tmp_path / "other")})


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "empty"),
        (" \n\t", "empty"),
        ("two words", "one word"),
        ("first\nsecond", "one word"),
        ("schlüssel", "one word"),
        ("x" * 5000, "longer than"),
    ],
)
def test_what_cannot_be_a_token_is_refused(tmp_path: Path, environ: dict[str, str], content: str, problem: str) -> None:
    path = write(tmp_path / "token", content)
    with pytest.raises(ConfigurationError, match=problem) as caught:
        find_token(path, environ=environ)
    assert str(path) in str(caught.value)
    with pytest.raises(ConfigurationError, match=f"QUORATE_TOKEN: .*{problem}"):
        find_token(environ={**environ, "QUORATE_TOKEN": content})


def test_a_binary_file_is_no_token(tmp_path: Path, environ: dict[str, str]) -> None:
    path = tmp_path / "token"
    path.write_bytes(b"\xff\xfe\x00")
    path.chmod(0o600)
    with pytest.raises(ConfigurationError, match="not text"):
        find_token(path, environ=environ)
    with pytest.raises(ConfigurationError, match="cannot be read: Is a directory"):
        find_token(tmp_path, environ=environ)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_token_that_may_not_be_read_is_named(tmp_path: Path, environ: dict[str, str]) -> None:
    path = write(tmp_path / "token", "x", 0o000)
    with pytest.raises(ConfigurationError, match="Permission denied"):
        find_token(path, environ=environ)


def test_authorities_are_found_in_order(tmp_path: Path, environ: dict[str, str]) -> None:
    assert find_ca(environ=environ) is None, "the system's"
    in_state = write(tmp_path / "state" / "ca.pem", CERTIFICATE)
    assert find_ca(environ=environ) == in_state
    named = write(tmp_path / "named.pem", CERTIFICATE)
    environ["QUORATE_CA"] = str(named)
    assert find_ca(environ=environ) == named
    given = write(tmp_path / "given.pem", CERTIFICATE)
    assert find_ca(given, environ=environ) == given


def test_authorities_that_were_named_must_be_there_and_hold_a_certificate(
    tmp_path: Path, environ: dict[str, str]
) -> None:
    with pytest.raises(ConfigurationError, match=r"absent\.pem: no such file"):
        find_ca(tmp_path / "absent.pem", environ=environ)
    with pytest.raises(ConfigurationError, match=r"empty\.pem: holds no certificate"):
        find_ca(write(tmp_path / "empty.pem", ""), environ=environ)
    with pytest.raises(ConfigurationError, match="cannot be read: Is a directory"):
        find_ca(tmp_path, environ=environ)
