"""SIGTERM for a command that must end what it started before it ends itself."""

import asyncio
import contextlib
import signal
from collections.abc import Iterator

from quorate_protocol.errors import QuorateError


class EndedBySigterm(QuorateError):
    """SIGTERM came."""

    def __init__(self) -> None:
        super().__init__("ended by SIGTERM")


@contextlib.contextmanager
def raised_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the task, so that what it started is ended, too.

    Raises:
        EndedBySigterm: it came.
    """
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None
    came = False

    def on_signal() -> None:
        nonlocal came
        came = True
        task.cancel()

    loop.add_signal_handler(signal.SIGTERM, on_signal)
    try:
        yield
    except asyncio.CancelledError:
        if not came:
            raise
        task.uncancel()
        raise EndedBySigterm from None
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
