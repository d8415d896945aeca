"""Where agents and operators find their token and whom they trust, when they are not told.

The coordinator's side, which makes them, is elsewhere; a client on the same machine finds them in the
coordinator's state directory, so that the quick start needs no flag.
"""

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from quorate_protocol.errors import ConfigurationError
from quorate_protocol.limits import TEXT_CHARS_MAX
from quorate_protocol.state_dir import CA_NAME, TOKEN_NAME, default_state_dir

#: Far over any token or bundle of authorities: a wrong path such as /dev/zero must not be read whole.
_TOKEN_FILE_BYTES_MAX: Final = 64 << 10
_CA_FILE_BYTES_MAX: Final = 16 << 20


def state_dir(environ: Mapping[str, str] | None = None) -> Path:
    """The coordinator's state directory on this machine; it need not exist."""
    return default_state_dir(os.environ if environ is None else environ)


def find_token(token_file: Path | None = None, *, environ: Mapping[str, str] | None = None) -> str:
    """The bearer token: from `token_file`, else `QUORATE_TOKEN`, else the file that `QUORATE_TOKEN_FILE` names,
    else the file `token` in the state directory.

    Raises:
        ConfigurationError: there is none, it is empty or cannot be a token, or its file may be read
            by others. The text names the file and never the token.
    """
    environ = os.environ if environ is None else environ
    if token_file is not None:
        return _read_token(token_file, environ)
    if "QUORATE_TOKEN" in environ:
        return _check_token("QUORATE_TOKEN", environ["QUORATE_TOKEN"])
    if named := environ.get("QUORATE_TOKEN_FILE"):
        return _read_token(Path(named), environ)
    default = state_dir(environ) / TOKEN_NAME
    try:
        return _read_token(default, environ)
    except FileNotFoundError:
        raise ConfigurationError(
            "token",
            f"none given, and {default} does not exist; name a file with --token-file, or set QUORATE_TOKEN, "
            "QUORATE_TOKEN_FILE, or QUORATE_STATE_DIR (to the state directory of a coordinator on this machine)",
        ) from None


def find_ca(ca_file: Path | None = None, *, environ: Mapping[str, str] | None = None) -> Path | None:
    """The PEM file of the authorities to trust: `ca_file`, else the file that `QUORATE_CA` names, else `ca.pem`
    in the state directory when it is there. None is the system's authorities.

    Raises:
        ConfigurationError: the file that was named is not there, cannot be read or holds no certificate.
    """
    environ = os.environ if environ is None else environ
    if ca_file is None and environ.get("QUORATE_CA"):
        ca_file = Path(environ["QUORATE_CA"])
    if ca_file is not None:
        try:
            return _check_ca(ca_file)
        except FileNotFoundError:
            raise ConfigurationError(str(ca_file), "no such file") from None
    try:
        return _check_ca(state_dir(environ) / CA_NAME)
    except FileNotFoundError:
        return None


def _read_token(path: Path, environ: Mapping[str, str]) -> str:
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & 0o077 and not _is_guarded(path, environ):
                raise ConfigurationError(
                    str(path), f"holds a token but others may read it (mode {mode:04o}); run: chmod 600 {path}"
                )
            data = file.read(_TOKEN_FILE_BYTES_MAX + 1)
    except FileNotFoundError:
        if path == state_dir(environ) / TOKEN_NAME:
            raise
        raise ConfigurationError(str(path), "no such file; it should hold the token") from None
    except OSError as error:
        raise ConfigurationError(str(path), f"the token cannot be read: {error.strerror}") from error
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise ConfigurationError(str(path), "is not text, so it holds no token") from None
    return _check_token(str(path), text)


def _is_guarded(path: Path, environ: Mapping[str, str]) -> bool:
    """Whether systemd guards the file: its credentials directory is the unit's alone, but where access is granted
    by an ACL the mode shows the ACL's mask as the group's bits."""
    directory = environ.get("CREDENTIALS_DIRECTORY")
    return bool(directory) and path.resolve().is_relative_to(Path(str(directory)).resolve())


def _check_token(source: str, text: str) -> str:
    token = text.strip()
    if not token:
        raise ConfigurationError(source, "the token is empty")
    if len(token) > TEXT_CHARS_MAX:
        raise ConfigurationError(source, f"the token is longer than {TEXT_CHARS_MAX} characters")
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise ConfigurationError(source, "the token must be one word of printable ASCII characters")
    return token


def _check_ca(path: Path) -> Path:
    try:
        with path.open("rb") as file:
            data = file.read(_CA_FILE_BYTES_MAX)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ConfigurationError(str(path), f"the authorities cannot be read: {error.strerror}") from error
    if b"-----BEGIN CERTIFICATE-----" not in data:
        raise ConfigurationError(str(path), "holds no certificate in PEM form")
    return path
