"""What tests of benchmarks share."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A directory whose name is short: the benchmark's sockets have theirs in it."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)
