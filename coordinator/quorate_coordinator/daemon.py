"""The coordinator as a daemon: signals, readiness, exit code."""

import asyncio
import os
import resource
import signal
import socket
from collections.abc import Mapping
from typing import Final

import structlog

from quorate_coordinator.service import Coordinator
from quorate_coordinator.settings import Settings
from quorate_protocol.blobs import SPOOL_BYTES
from quorate_protocol.transport.address import join_host_port

log = structlog.get_logger()

EXIT_STOPPED: Final = 0

#: Files that may be open beside spooled bodies: HTTP connections, the journal's readers, a socket.
_OTHER_FILES: Final = 1024


async def run_daemon(settings: Settings) -> int:
    """Serves until SIGTERM or SIGINT, then drains; a second signal ends it at once.

    Returns:
        The exit code: 0.

    Raises:
        ConfigurationError: an address is taken, a file cannot be read.
    """
    raise_file_limit(settings.bodies.spool_bytes_max)
    loop = asyncio.get_running_loop()
    signals: asyncio.Queue[signal.Signals] = asyncio.Queue()
    for caught in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(caught, signals.put_nowait, caught)
    try:
        async with Coordinator(settings) as coordinator:
            http = coordinator.http_address
            notify_supervisor(
                os.environ,
                READY="1",
                STATUS=f"listening on {join_host_port(*coordinator.address)}",
                X_QUORATE_LISTEN=join_host_port(*coordinator.address),
                X_QUORATE_HTTP="" if http is None else join_host_port(*http),
            )
            caught = await signals.get()
            log.info("stopping", signal=caught.name)
            notify_supervisor(os.environ, STOPPING="1", STATUS="draining")
            draining = asyncio.ensure_future(coordinator.drain())
            again = asyncio.ensure_future(signals.get())
            await asyncio.wait((draining, again), return_when=asyncio.FIRST_COMPLETED)
            for waiting in (draining, again):
                waiting.cancel()
            await asyncio.gather(draining, again, return_exceptions=True)
            if not draining.cancelled():
                draining.result()
    finally:
        for caught in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(caught)
    return EXIT_STOPPED


def raise_file_limit(spool_bytes_max: int) -> None:
    """Lets this process have as many files open as so full a spool has, and what else it needs.

    Its soft limit is often 1024, for the sake of programs that call select(2), which ours is not.
    """
    wanted = spool_bytes_max // SPOOL_BYTES + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        except (OSError, ValueError):  # over what the kernel allows at all
            allowed = soft
    if allowed < wanted:
        log.warning("few_files_may_be_open", limit=allowed, wanted=wanted, remedy="raise LimitNOFILE, or ulimit -Hn")


def notify_supervisor(environ: Mapping[str, str], **fields: str) -> None:
    """Tells systemd, or whoever listens where NOTIFY_SOCKET says, how the service is (sd_notify(3)).

    Does nothing where nobody listens.
    """
    address = environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    # A name that begins with @ is in Linux's abstract namespace.
    target = "\0" + address[1:] if address.startswith("@") else address
    text = "\n".join(f"{key}={value}" for key, value in fields.items())
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.connect(target)
            sock.sendall(text.encode())
        except OSError as error:
            log.warning("supervisor_not_notified", address=address, problem=str(error))
