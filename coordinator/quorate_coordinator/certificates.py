"""Development credentials: an authority, a server certificate signed by it, and a token.

They are made on first use, so that the quick start has TLS and authentication on. The authority stays
for ten years, so that agents which trust it go on trusting; the certificate that the server shows
lives 13 days (browsers accept at most 14 of one that they know only by its hash) and is renewed well
before. Whoever has certificates of their own names them in `[tls]` and none of this happens.
"""

import contextlib
import datetime
import fcntl
import ipaddress
import os
import secrets
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from quorate_coordinator.files import write_file
from quorate_protocol.errors import ConfigurationError
from quorate_protocol.state_dir import CA_NAME, CERTIFICATE_NAME, KEY_NAME, TOKEN_NAME
from quorate_protocol.transport import ServerTls

_AUTHORITY_LIFE: Final = datetime.timedelta(days=3650)
_CERTIFICATE_LIFE: Final = datetime.timedelta(days=13)
#: Renewed when less than this is left: clients get at least five days out of each.
_RENEW_BEFORE: Final = datetime.timedelta(days=5)
#: Clocks of other machines may be behind ours.
_BACKDATE: Final = datetime.timedelta(hours=1)
_TOKEN_BYTES: Final = 32

_AUTHORITY_KEY_NAME: Final = "ca-key.pem"

_RESET_KEY_NAME: Final = "reset-key"
_RESET_KEY_BYTES: Final = 32


@dataclass(frozen=True, slots=True)
class DevelopmentCredentials:
    """Where the files are."""

    #: Authority that agents and operators trust.
    ca_file: Path
    certificate_file: Path
    #: Readable by its owner alone, as is the token.
    key_file: Path
    token_file: Path

    @property
    def tls(self) -> ServerTls:
        """For `listen`."""
        return ServerTls(self.certificate_file, self.key_file)


def ensure_development_credentials(
    state_dir: Path, *, names: Iterable[str] = (), now: datetime.datetime | None = None
) -> DevelopmentCredentials:
    """Makes what is missing or about to expire in `state_dir`, and leaves the rest as it is.

    Args:
        state_dir: created, for its owner alone, where it does not exist.
        names: further host names and IP addresses that the certificate shall carry, beside
            localhost, the loopback addresses and this machine's name.
        now: the time; for tests.

    Raises:
        ConfigurationError: the directory or a file in it cannot be read or written.
    """
    now = now or datetime.datetime.now(datetime.UTC)
    files = DevelopmentCredentials(
        state_dir / CA_NAME, state_dir / CERTIFICATE_NAME, state_dir / KEY_NAME, ensure_token(state_dir)
    )
    ensure_certificate(files, names=names, now=now)
    return files


def ensure_token(state_dir: Path) -> Path:
    """The token's file in `state_dir`; a random token (256 bits, 43 characters) is written where there is none.

    Raises:
        ConfigurationError: it cannot be written.
    """
    token_file = state_dir / TOKEN_NAME
    with _holding(state_dir):
        if not token_file.exists():
            write_file(token_file, secrets.token_urlsafe(_TOKEN_BYTES).encode() + b"\n", private=True)
    return token_file


def ensure_reset_key(state_dir: Path) -> bytes:
    """The secret from which stateless resets are made, kept so that the next run makes the same (RFC 9000, 10.3.2).

    Raises:
        ConfigurationError: it cannot be read or written.
    """
    key_file = state_dir / _RESET_KEY_NAME
    with _holding(state_dir):
        key = key_file.read_bytes() if key_file.exists() else b""
        if len(key) != _RESET_KEY_BYTES:
            key = secrets.token_bytes(_RESET_KEY_BYTES)
            write_file(key_file, key, private=True)
    return key


def ensure_certificate(files: DevelopmentCredentials, *, names: Iterable[str] = (), now: datetime.datetime) -> bool:
    """Renews the server certificate when it is missing, near its end, or lacks a name.

    Returns:
        Whether it was renewed.

    Raises:
        ConfigurationError: a file cannot be read or written, or the authority's hold something else.
    """
    with _holding(files.ca_file.parent):
        return _ensure_certificate(files, _alternative_names(names), now)


@contextlib.contextmanager
def _holding(state_dir: Path) -> Iterator[None]:
    """Makes the directory where it does not exist, and keeps other coordinators off it for a while.

    Raises:
        ConfigurationError: it, or a file in it, cannot be read or written.
    """
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(state_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # Two coordinators that start at once in one directory must not mix their files. Where a file system
            # cannot lock a directory (NFS), they are on their own.
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)
    except OSError as error:
        problem = f"cannot use {error.filename or state_dir}: {error.strerror or error}"
        raise ConfigurationError("state_dir", problem) from error


def _ensure_certificate(files: DevelopmentCredentials, wanted: list[x509.GeneralName], now: datetime.datetime) -> bool:
    authority_key_file = files.ca_file.with_name(_AUTHORITY_KEY_NAME)
    if files.ca_file.exists() and not authority_key_file.exists():
        raise ConfigurationError(
            "state_dir",
            f"{authority_key_file} is missing, so that the authority in {files.ca_file} can sign nothing; put it back, "
            f"or delete {files.ca_file} to make a new authority, which agents elsewhere have to be given",
        )
    if not files.ca_file.exists():
        new_key = ec.generate_private_key(ec.SECP256R1())
        write_file(authority_key_file, _key_pem(new_key), private=True)
        write_file(files.ca_file, _authority(new_key, now).public_bytes(serialization.Encoding.PEM))
    authority, authority_key = _load_authority(files.ca_file, authority_key_file)
    if _is_good(files, authority, wanted, now):
        return False
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Quorate development coordinator")]))
        .issuer_name(authority.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATE)
        .not_valid_after(now - _BACKDATE + _CERTIFICATE_LIFE)
        .add_extension(x509.SubjectAlternativeName(wanted), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    write_file(files.key_file, _key_pem(key), private=True)
    write_file(files.certificate_file, certificate.public_bytes(serialization.Encoding.PEM))
    return True


def _load_authority(ca_file: Path, key_file: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    remedy = "delete both to make new ones (agents and operators will have to trust the new ca.pem)"
    try:
        authority = x509.load_pem_x509_certificate(ca_file.read_bytes())
        key = serialization.load_pem_private_key(key_file.read_bytes(), None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        problem = str(error).strip().splitlines()[:1] or ["cannot be read"]
        raise ConfigurationError("state_dir", f"{ca_file} or {key_file} is damaged ({problem[0]}); {remedy}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != authority.public_key():
        raise ConfigurationError("state_dir", f"{key_file} is not the key of {ca_file}; {remedy}")
    return authority, key


def _is_good(
    files: DevelopmentCredentials, authority: x509.Certificate, wanted: list[x509.GeneralName], now: datetime.datetime
) -> bool:
    if not (files.certificate_file.exists() and files.key_file.exists()):
        return False
    try:
        certificate = x509.load_pem_x509_certificate(files.certificate_file.read_bytes())
        key = serialization.load_pem_private_key(files.key_file.read_bytes(), None)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.ExtensionNotFound, InvalidSignature):
        return False
    fits = isinstance(key, ec.EllipticCurvePrivateKey) and key.public_key() == certificate.public_key()
    # Made while the clock was ahead, it would be good some day, and nobody takes it until then.
    is_valid = certificate.not_valid_before_utc <= now < certificate.not_valid_after_utc - _RENEW_BEFORE
    return fits and is_valid and set(wanted) <= set(names)


def _authority(key: ec.EllipticCurvePrivateKey, now: datetime.datetime) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Quorate development authority")])
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATE)
        .not_valid_after(now - _BACKDATE + _AUTHORITY_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=False,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                key_cert_sign=True,
                crl_sign=True,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def _alternative_names(names: Iterable[str]) -> list[x509.GeneralName]:
    wanted = dict.fromkeys(["localhost", "127.0.0.1", "::1", socket.gethostname(), *names])
    result: list[x509.GeneralName] = []
    for name in wanted:
        try:
            result.append(x509.IPAddress(ipaddress.ip_address(name)))
        except ValueError:
            try:
                result.append(x509.DNSName(name))
            except ValueError as error:
                raise ConfigurationError("tls.names", f"{name!r} is neither a host name nor an IP address") from error
    return result


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
