"""Development credentials: what is made, for how long, who may read it, and what happens to damaged files."""

import datetime
import ipaddress
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

from quorate_coordinator.certificates import (
    DevelopmentCredentials,
    ensure_certificate,
    ensure_development_credentials,
    ensure_token,
)
from quorate_protocol.errors import ConfigurationError

NOW = datetime.datetime(2030, 1, 15, 12, tzinfo=datetime.UTC)
DAY = datetime.timedelta(days=1)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "some" / "where" / "state"


def make(state: Path, *, names: tuple[str, ...] = (), now: datetime.datetime = NOW) -> DevelopmentCredentials:
    return ensure_development_credentials(state, names=names, now=now)


def certificate_of(files: DevelopmentCredentials) -> x509.Certificate:
    return x509.load_pem_x509_certificate(files.certificate_file.read_bytes())


def names_of(files: DevelopmentCredentials) -> set[str]:
    found = certificate_of(files).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return {str(name.value) for name in found}


def contents(state: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in state.iterdir()}


def is_sound(files: DevelopmentCredentials) -> bool:
    """Whether the certificate is the authority's, and the key the certificate's."""
    certificate = certificate_of(files)
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(files.ca_file.read_bytes()))
    key = serialization.load_pem_private_key(files.key_file.read_bytes(), None)
    return key.public_key() == certificate.public_key()


# --- what is made --------------------------------------------------------------------------------


def test_files_are_for_their_owner_alone_except_what_others_trust(state: Path) -> None:
    make(state)
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in state.iterdir()} == {
        "ca.pem": 0o644,
        "ca-key.pem": 0o600,
        "certificate.pem": 0o644,
        "key.pem": 0o600,
        "token": 0o600,
    }


def test_the_token_is_one_long_random_word(state: Path, tmp_path: Path) -> None:
    token = make(state).token_file.read_text()
    assert len(token) == 44
    assert token.endswith("\n")
    assert token.strip().isascii()
    assert ensure_token(tmp_path / "other").read_text() != token


def test_the_certificate_is_for_this_machine_and_short_lived(state: Path) -> None:
    files = make(state, names=("coordinator.example", "192.0.2.7", "2001:db8::7"))
    certificate = certificate_of(files)
    assert is_sound(files)
    assert {"localhost", "127.0.0.1", "::1", "coordinator.example", "192.0.2.7", "2001:db8::7"} <= names_of(files)
    addresses = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert ipaddress.ip_address("192.0.2.7") in addresses.get_values_for_type(x509.IPAddress)
    # Browsers take at most 14 days of a certificate that they know by its hash only.
    assert certificate.not_valid_after_utc - certificate.not_valid_before_utc <= 14 * DAY
    assert certificate.not_valid_before_utc < NOW
    assert isinstance(certificate.public_key(), ec.EllipticCurvePublicKey)
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.SERVER_AUTH]
    authority = x509.load_pem_x509_certificate(files.ca_file.read_bytes())
    assert authority.not_valid_after_utc > NOW + 9 * 365 * DAY
    constraints = authority.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (constraints.critical, constraints.value.ca, constraints.value.path_length) == (True, True, 0)


def test_a_second_start_changes_nothing(state: Path) -> None:
    make(state, names=("a.example",))
    before = contents(state)
    make(state, names=("a.example",), now=NOW + DAY)
    make(state)  # fewer names than it carries
    assert contents(state) == before


# --- renewal -------------------------------------------------------------------------------------


def test_it_is_renewed_days_before_its_end_and_not_sooner(state: Path) -> None:
    files = make(state)
    before = contents(state)
    end = certificate_of(files).not_valid_after_utc
    assert not ensure_certificate(files, now=end - 5 * DAY - datetime.timedelta(minutes=1))
    assert contents(state) == before
    assert ensure_certificate(files, now=end - 5 * DAY)
    after = contents(state)
    assert certificate_of(files).not_valid_after_utc > end + 7 * DAY
    assert is_sound(files)
    assert {name for name in after if after[name] != before[name]} == {"certificate.pem", "key.pem"}


def test_one_that_was_made_while_the_clock_was_ahead_is_made_anew(state: Path) -> None:
    files = make(state)
    assert not ensure_certificate(files, now=NOW + DAY)
    assert ensure_certificate(files, now=NOW - 365 * DAY)
    assert certificate_of(files).not_valid_before_utc < NOW - 365 * DAY < certificate_of(files).not_valid_after_utc


def test_one_that_has_run_out_is_renewed(state: Path) -> None:
    make(state, now=NOW - 60 * DAY)
    assert certificate_of(make(state)).not_valid_after_utc > NOW + 7 * DAY


def test_a_name_that_is_missing_renews_it(state: Path) -> None:
    make(state)
    ca = (state / "ca.pem").read_bytes()
    files = make(state, names=("new.example",))
    assert "new.example" in names_of(files)
    assert (state / "ca.pem").read_bytes() == ca


def test_a_name_that_is_none_is_named(state: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"tls\.names: 'bücher\.example' is neither a host name nor an IP"):
        make(state, names=("bücher.example",))


# --- damage --------------------------------------------------------------------------------------


def other_key(kind: str) -> bytes:
    key = rsa.generate_private_key(65537, 2048) if kind == "rsa" else ec.generate_private_key(ec.SECP256R1())
    encryption = serialization.BestAvailableEncryption(b"x") if kind == "encrypted" else serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("certificate.pem", b""),
        ("certificate.pem", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"),
        ("certificate.pem", None),
        ("key.pem", b"garbage"),
        ("key.pem", None),
        ("key.pem", "another"),
        ("key.pem", "encrypted"),
        ("key.pem", "rsa"),
    ],
)
def test_a_damaged_certificate_or_key_is_made_anew(state: Path, name: str, content: bytes | str | None) -> None:
    files = make(state)
    ca = files.ca_file.read_bytes()
    damage(state / name, content)
    assert ensure_certificate(files, now=NOW)
    assert is_sound(files)
    assert files.ca_file.read_bytes() == ca
    assert not ensure_certificate(files, now=NOW)


def damage(path: Path, content: bytes | str | None) -> None:
    if content is None:
        path.unlink()
    else:
        path.write_bytes(other_key(content) if isinstance(content, str) else content)


def test_a_certificate_of_another_authority_is_made_anew(state: Path, tmp_path: Path) -> None:
    files, others = make(state), make(tmp_path / "other")
    for name in ("certificate.pem", "key.pem"):
        (state / name).write_bytes((others.ca_file.parent / name).read_bytes())
    assert ensure_certificate(files, now=NOW)
    assert is_sound(files)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("ca.pem", b"", "is damaged"),
        ("ca.pem", b"garbage", "is damaged"),
        ("ca-key.pem", b"garbage", "is damaged"),
        ("ca-key.pem", "encrypted", "is damaged"),
        ("ca-key.pem", "another", "is not the key of"),
        ("ca-key.pem", "rsa", "is not the key of"),
    ],
)
def test_a_damaged_authority_is_not_replaced_behind_the_agents_backs(
    state: Path, name: str, content: bytes | str, problem: str
) -> None:
    make(state)
    damage(state / name, content)
    before = contents(state)
    with pytest.raises(ConfigurationError) as caught:
        make(state)
    assert caught.value.path == "state_dir"
    text = str(caught.value)
    assert problem in text
    assert str(state / "ca.pem") in text
    assert str(state / "ca-key.pem") in text
    assert "delete both to make new ones" in text
    assert "\n" not in text
    assert contents(state) == before


def test_without_its_certificate_an_authority_is_made_anew_and_signs_anew(state: Path) -> None:
    make(state)
    token = (state / "token").read_bytes()
    (state / "ca.pem").unlink()
    assert is_sound(make(state))
    assert (state / "token").read_bytes() == token


def test_an_authority_without_its_key_is_not_replaced_behind_the_agents_backs(state: Path) -> None:
    make(state)
    (state / "ca-key.pem").unlink()
    before = contents(state)
    with pytest.raises(ConfigurationError, match=r"state_dir: .*ca-key\.pem is missing") as caught:
        make(state)
    assert f"delete {state / 'ca.pem'} to make a new authority" in str(caught.value)
    assert contents(state) == before


# --- directories that cannot be used -------------------------------------------------------------


def test_a_file_where_the_directory_should_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for state in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigurationError, match=f"state_dir: cannot use {state}: ") as caught:
            make(state)
        assert caught.value.path == "state_dir"


@pytest.mark.parametrize("name", ["certificate.pem", "key.pem", "ca.pem"])
def test_a_directory_where_a_file_should_be_is_named(state: Path, name: str) -> None:
    make(state)
    (state / name).unlink()
    (state / name).mkdir()
    with pytest.raises(ConfigurationError, match=f"state_dir: cannot use .*{name}.*: Is a directory"):
        make(state)


def test_nothing_is_written_for_a_token_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("mine\n")
    assert ensure_token(tmp_path).read_text() == "mine\n"
    assert contents(tmp_path) == {"token": b"mine\n"}


# --- links and leftovers -------------------------------------------------------------------------


def test_links_are_replaced_and_not_written_through(state: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    absent = tmp_path / "absent"
    state.mkdir(parents=True)
    for name, target in (("token", absent), ("key.pem", victim), ("certificate.pem", victim), ("ca.pem", absent)):
        (state / name).symlink_to(target)
    files = make(state)
    assert is_sound(files)
    assert victim.read_text() == "untouched"
    assert not absent.exists()
    assert not any(path.is_symlink() for path in state.iterdir())
    assert stat.S_IMODE(files.token_file.stat().st_mode) == 0o600


def test_files_elsewhere_may_be_linked_to(state: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("shared\n")
    (tmp_path / "token").chmod(0o600)
    state.mkdir(parents=True)
    (state / "token").symlink_to(tmp_path / "token")
    assert make(state).token_file.read_text() == "shared\n"


def test_leftovers_of_a_crash_are_in_nobodys_way(state: Path) -> None:
    state.mkdir(parents=True)
    for name in (".token.1", ".ca.pem.1", ".key.pem.abcdefgh"):
        (state / name).write_text("half")
    make(state)
    assert (state / ".token.1").read_text() == "half"
    assert len(list(state.iterdir())) == 5 + 3


def test_coordinators_that_start_at_once_agree(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        for attempt in range(6):
            state = tmp_path / str(attempt)
            made = list(pool.map(lambda _, state=state: read_all(make(state)), range(8)))
            assert len(set(made)) == 1
            assert is_sound(make(state))
            assert len(contents(state)) == 5


def read_all(files: DevelopmentCredentials) -> tuple[bytes, ...]:
    return tuple(
        path.read_bytes() for path in (files.ca_file, files.certificate_file, files.key_file, files.token_file)
    )
