"""Where a coordinator keeps what it must not lose, and where operators and agents on the same machine look for it.

The directory holds the certificate authority and the token of a coordinator that was not given its own.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

#: The authority that signed the development certificate: what clients trust.
CA_NAME: Final = "ca.pem"
#: The development certificate and its key (mode 0600).
CERTIFICATE_NAME: Final = "certificate.pem"
KEY_NAME: Final = "key.pem"
#: The bearer token (mode 0600).
TOKEN_NAME: Final = "token"  # noqa: S105  a file's name


def default_state_dir(environ: Mapping[str, str]) -> Path:
    """The state directory when nothing else is said.

    In this order: `QUORATE_STATE_DIR`; the first of `STATE_DIRECTORY` (systemd's `StateDirectory=`
    joins several with colons); `XDG_DATA_HOME/quorate`; `~/.local/share/quorate`.
    """
    if chosen := environ.get("QUORATE_STATE_DIR"):
        return expand_home(chosen, environ)
    if given := environ.get("STATE_DIRECTORY"):
        return Path(given.split(":", 1)[0])
    # The XDG base directory specification has relative paths ignored.
    data_home = Path(environ.get("XDG_DATA_HOME", ""))
    if not data_home.is_absolute():
        data_home = _home(environ) / ".local" / "share"
    return data_home / "quorate"


def expand_home(text: str, environ: Mapping[str, str]) -> Path:
    """A path whose leading `~` is the home directory, as a shell would have it; files and units have no shell."""
    return _home(environ) / text[2:] if text == "~" or text.startswith("~/") else Path(text)


def _home(environ: Mapping[str, str]) -> Path:
    home = environ.get("HOME")
    return Path(home) if home else Path.home()
