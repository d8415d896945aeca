"""Links inside this process, and time that jumps: hours of a bad network in milliseconds.

Two ways. `run_virtually(main())` runs a coroutine on a loop of its own, also from a test that is not
asynchronous, such as Hypothesis's. `@virtual_time` marks an asynchronous test: its body runs under
virtual time, asynchronous fixtures do not, so that what arms timers (servers, links) has to be opened
inside it, with `memory_linked`.

Nothing but the loop's timers moves this time: no real sockets, threads or processes inside.
"""

import asyncio
import contextlib
import datetime
import ipaddress
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import looptime
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from links import Link
from quorate_coordinator.certificates import DevelopmentCredentials, ensure_development_credentials
from quorate_protocol.transport import ClientTls, MemoryNetwork, connect, listen
from quorate_protocol.transport.connection import QuicConnection

T = TypeVar("T")

#: Where virtual clocks begin, in seconds. Not at 0, which no real clock shows and which is false.
START_S = 1000.0

#: Turns of the loop without anything ready before the clock jumps. The library's 42 are for code that polls.
_OPTIONS: dict[str, Any] = {"start": START_S, "noop_cycles": 0}

virtual_time = pytest.mark.looptime(**_OPTIONS)


def run_virtually(main: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine to its end on a new loop under virtual time; returns its result."""
    with asyncio.Runner(loop_factory=lambda: looptime.new_event_loop(**_OPTIONS)) as runner:
        return runner.run(main)


@contextlib.asynccontextmanager
async def memory_linked(
    credentials: DevelopmentCredentials,
    network: MemoryNetwork | None = None,
    name: str = "coordinator",
    *,
    timeout_s: float = 60.0,
    **options: Any,
) -> AsyncIterator[Link]:
    """A server in memory with one client; both closed at the end. `options` are of `connect` and `listen` alike."""
    server = await listen(f"memory:{name}", tls=credentials.tls, network=network, **options)
    try:
        tls = ClientTls(ca_file=credentials.ca_file, server_name="localhost")
        here = await connect(f"memory:{name}", tls=tls, network=network, timeout_s=timeout_s, **options)
        async with asyncio.timeout(timeout_s):
            there = await server.accept()
        assert isinstance(here, QuicConnection)
        assert isinstance(there, QuicConnection)
        try:
            yield Link(server, there, here)
        finally:
            await here.close()
    finally:
        await server.close()


def steady_credentials(directory: Path) -> DevelopmentCredentials:
    """Credentials for localhost with an Ed25519 key, whose signatures have one size.

    Those of the usual ECDSA keys differ by a byte or two, and with them all that follows, by microseconds: where
    the same seed has to give the same run to the last bit, it takes these.
    """
    credentials = ensure_development_credentials(directory)
    key = Ed25519PrivateKey.generate()
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "steady")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName(
                [x509.DNSName("localhost"), x509.IPAddress(ipaddress.IPv4Address("127.0.0.1"))]
            ),
            critical=False,
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, None)
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    credentials.ca_file.write_bytes(pem)
    credentials.certificate_file.write_bytes(pem)
    credentials.key_file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return credentials
