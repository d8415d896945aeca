"""What all tests share."""

import asyncio
import logging
from collections.abc import Iterator

import pytest
import structlog
from hypothesis import settings

# As structlog is by itself: pytest catches what is printed when it is printed, and not where that went at first.
structlog.configure()

# No time limit for one example: the machine may be busy. A failure prints what reproduces it.
settings.register_profile("quorate", deadline=None, print_blob=True)
settings.load_profile("quorate")

# Otherwise pytest-asyncio's first question for the current loop makes one that nobody closes, and some later test gets
# the blame.
asyncio.set_event_loop(None)


@pytest.fixture
def logging_put_back() -> Iterator[None]:
    """Undoes what a test does to logging, for all that come after it."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    yield
    root.handlers, root.level = handlers, level
    logging.captureWarnings(False)
    structlog.reset_defaults()
    structlog.configure()
