"""What simulation tests share."""

import pytest


@pytest.fixture(autouse=True)
def quiet_afterwards(logging_put_back: None) -> None:
    """The command sets up logging for its process, which is ours here."""
