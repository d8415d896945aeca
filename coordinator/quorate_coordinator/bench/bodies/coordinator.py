"""`python -m quorate_coordinator.bench.bodies.coordinator FILE`: a coordinator that notes its loop's turns."""

import asyncio
import os
import sys
from pathlib import Path

from quorate_coordinator.bench.bodies.loop_watch import WatchedSelector
from quorate_coordinator.daemon import run_daemon
from quorate_coordinator.settings import load_settings
from quorate_protocol import logs
from quorate_protocol.garbage import relax_collector


def main() -> None:
    """As `quorate coordinator`, with settings from the environment."""
    settings = load_settings(None, os.environ)
    logs.configure(settings.log.level, settings.log.format)
    relax_collector()
    notes = Path(sys.argv[1])
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(WatchedSelector(notes))) as runner:
        runner.run(run_daemon(settings))


if __name__ == "__main__":
    main()
