"""What the conformance suite shares: its engines, and worlds to put them in."""

from collections.abc import Callable
from typing import Any

import pytest

from conformance.harness import FACTORIES, World, make_world
from quorate_coordinator.certificates import DevelopmentCredentials, ensure_development_credentials


@pytest.fixture(scope="session")
def credentials(tmp_path_factory: pytest.TempPathFactory) -> DevelopmentCredentials:
    """An authority, a certificate for localhost and the loopback addresses, a key; made once."""
    return ensure_development_credentials(tmp_path_factory.mktemp("credentials"))


@pytest.fixture(params=sorted(FACTORIES))
def make_factory(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """What makes the factory of the engine under test."""
    return FACTORIES[request.param]


@pytest.fixture
def unconnected(make_factory: Callable[..., Any], credentials: DevelopmentCredentials) -> Callable[..., World]:
    """Makes worlds before their handshake; see `make_world` for the options."""
    return lambda **options: make_world(make_factory, credentials, **options)


@pytest.fixture
def connected(unconnected: Callable[..., World]) -> Callable[..., World]:
    """Makes worlds after their handshake."""
    return lambda **options: unconnected(**options).connect()


@pytest.fixture
def world(connected: Callable[..., World]) -> World:
    """Two engines that have met, on a good network."""
    return connected()
