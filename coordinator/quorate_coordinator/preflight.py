"""What can be known to be wrong before a coordinator starts."""

import os

from quorate_coordinator.modalities import load_consumers
from quorate_coordinator.settings import Settings
from quorate_protocol.credentials import find_token
from quorate_protocol.errors import ConfigurationError
from quorate_protocol.transport import ServerTls
from quorate_protocol.transport.engine import AioquicFactory


def check_files(settings: Settings) -> None:
    """Reads what the settings name, and loads consumers, without making or binding anything.

    Raises:
        ConfigurationError: a file is missing, unreadable, or holds something else.
    """
    if settings.tls.certificate_file is not None and settings.tls.key_file is not None:
        AioquicFactory().set_server(ServerTls(settings.tls.certificate_file, settings.tls.key_file), [])
    if settings.auth.token_file is not None:
        find_token(settings.auth.token_file)
    load_consumers(settings.consumers)
    if settings.state_dir.exists():
        if not settings.state_dir.is_dir():
            raise ConfigurationError("state_dir", f"{settings.state_dir} is not a directory")
    else:
        parent = next(path for path in settings.state_dir.absolute().parents if path.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise ConfigurationError("state_dir", f"{settings.state_dir} cannot be made: {parent} cannot be written")
