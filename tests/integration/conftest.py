"""What tests with real sockets share."""

import pytest

from quorate_agent import worker as agent_worker
from quorate_coordinator.certificates import DevelopmentCredentials, ensure_development_credentials
from quorate_protocol.blobs import BlobStore


@pytest.fixture(scope="session")
def credentials(tmp_path_factory: pytest.TempPathFactory) -> DevelopmentCredentials:
    """An authority, a certificate for localhost and the loopback addresses, a key; made once."""
    return ensure_development_credentials(tmp_path_factory.mktemp("credentials"))


@pytest.fixture
def agent_stores(monkeypatch: pytest.MonkeyPatch) -> list[BlobStore]:
    """The stores of the agents that are made from here on, for looking at."""
    stores: list[BlobStore] = []
    make = agent_worker.make_private_store

    def noted() -> BlobStore:
        stores.append(make())
        return stores[-1]

    monkeypatch.setattr(agent_worker, "make_private_store", noted)
    return stores
