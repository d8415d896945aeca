"""A worker as a process of its own: signals, and an end that nothing holds up."""

import asyncio
import os
import signal
import sys
from types import FrameType

from quorate_agent.worker import Ending, Worker
from quorate_protocol.command import EXIT_INTERRUPTED
from quorate_protocol.garbage import relax_collector


def serve(worker: Worker) -> Ending:
    """Runs the worker in an event loop of its own until it ends. To be called in the main thread.

    SIGTERM and SIGINT drain it: its handlers finish, the coordinator is told. A second SIGINT ends the
    process at once.

    Raises:
        ConfigurationError: as `Worker.run`.
    """
    relax_collector()
    return asyncio.run(_serve(worker))


async def _serve(worker: Worker) -> Ending:
    loop = asyncio.get_running_loop()
    interrupts = 0

    def on_signal(number: int, frame: FrameType | None) -> None:
        # Python runs this in the main thread also while a handler blocks the event loop, which
        # `loop.add_signal_handler` would not.
        nonlocal interrupts
        if number == signal.SIGINT:
            interrupts += 1
            if interrupts > 1:
                os.write(2, b"interrupted twice: ending at once\n")
                os._exit(EXIT_INTERRUPTED)
            if sys.stderr.isatty():
                os.write(2, b"\nfinishing what runs; interrupt again to end at once\n")
        loop.call_soon_threadsafe(worker.request_stop, signal.Signals(number).name)

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return await worker.run()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
