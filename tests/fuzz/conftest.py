"""What the fuzz tests share."""

from collections.abc import Callable
from typing import Any

import pytest

from conformance.harness import FACTORIES
from quorate_coordinator.certificates import DevelopmentCredentials, ensure_development_credentials


@pytest.fixture(scope="session")
def credentials(tmp_path_factory: pytest.TempPathFactory) -> DevelopmentCredentials:
    """An authority, a certificate for localhost and the loopback addresses, a key; made once."""
    return ensure_development_credentials(tmp_path_factory.mktemp("credentials"))


@pytest.fixture(params=sorted(FACTORIES))
def make_factory(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """What makes the factory of the engine under test."""
    return FACTORIES[request.param]
