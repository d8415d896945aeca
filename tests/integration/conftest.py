"""What tests with real sockets share."""

import pytest

from quorate_coordinator.certificates import DevelopmentCredentials, ensure_development_credentials


@pytest.fixture(scope="session")
def credentials(tmp_path_factory: pytest.TempPathFactory) -> DevelopmentCredentials:
    """An authority, a certificate for localhost and the loopback addresses, a key; made once."""
    return ensure_development_credentials(tmp_path_factory.mktemp("credentials"))
