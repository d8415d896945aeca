"""Path MTU discovery over real links: three hosts in network namespaces, a router between two ends.

The kernel's own sizes, refusals (EMSGSIZE) and silence; nothing leaves the namespaces.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from quorate_coordinator.certificates import ensure_development_credentials

PEER = Path(__file__).with_name("path_peer.py")

#: Headers of IPv4 and UDP.
HEADERS_BYTES = 28


def may_make_namespaces() -> bool:
    if os.geteuid() or shutil.which("ip") is None:
        return False
    name = f"quorate-{os.getpid()}-try"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
        return False
    subprocess.run(["ip", "netns", "del", name], check=True)
    return True


needs_namespaces = pytest.mark.skipif(
    not may_make_namespaces(), reason="network namespaces take root, iproute2 and a kernel that allows them"
)


class Hosts:
    """`near` - `middle` - `far`; the ends are 192.0.2.2 and 198.51.100.2."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._names = {name: f"quorate-{os.getpid()}-{name}" for name in ("near", "middle", "far")}
        for name in self._names.values():
            self._run("netns", "add", name)
            stack.callback(self._run, "netns", "del", name)
        self._wire("near", "middle", "192.0.2.2", "192.0.2.1")
        self._wire("far", "middle", "198.51.100.2", "198.51.100.1")
        self.inside("middle", "sysctl", "-qw", "net.ipv4.ip_forward=1")

    def _run(self, *arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=20)

    def inside(self, name: str, *command: str) -> None:
        subprocess.run(
            ["ip", "netns", "exec", self._names[name], *command], check=True, capture_output=True, timeout=20
        )

    def _wire(self, end: str, router: str, end_address: str, router_address: str) -> None:
        pair = {"netns": self._names[router]}
        link = f"to-{end}"
        self._run(
            *("link", "add", "wire", "netns", self._names[end], "type", "veth"),
            *("peer", "name", link, "netns", pair["netns"]),
        )
        for namespace, device, address in ((end, "wire", end_address), (router, link, router_address)):
            self.inside(namespace, "ip", "address", "add", f"{address}/24", "dev", device)
            self.inside(namespace, "ip", "link", "set", device, "up")
        self.inside(end, "ip", "route", "add", "default", "via", router_address)

    def set_mtu(self, end: str, mtu_bytes: int) -> None:
        """Of both sides of an end's wire."""
        self.inside(end, "ip", "link", "set", "wire", "mtu", str(mtu_bytes))
        self.inside("middle", "ip", "link", "set", f"to-{end}", "mtu", str(mtu_bytes))

    def start(self, name: str, *arguments: str) -> subprocess.Popen[str]:
        process = self._stack.enter_context(
            subprocess.Popen(
                ["ip", "netns", "exec", self._names[name], sys.executable, str(PEER), *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        self._stack.callback(process.kill)
        return process


def answer(process: subprocess.Popen[str]) -> Any:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, "the process has ended"
    return json.loads(line)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with ExitStack() as stack:
        yield Hosts(stack)


def transfer(client: subprocess.Popen[str]) -> int:
    """Sends a megabyte; the packet size that discovery has come to."""
    assert client.stdin is not None
    client.stdin.write("on\n")
    client.stdin.flush()
    told = answer(client)
    assert told["received"] == 1_000_000
    return int(told["udp_payload_bytes"])


def linked(hosts: Hosts, directory: Path) -> subprocess.Popen[str]:
    credentials = ensure_development_credentials(directory)
    for name, file in (
        ("ca.pem", credentials.ca_file),
        ("cert.pem", credentials.certificate_file),
        ("key.pem", credentials.key_file),
    ):
        if file != directory / name:
            shutil.copy(file, directory / name)
    server = hosts.start("far", "serve", "198.51.100.2", str(directory))
    assert answer(server) == {"listens": True}
    client = hosts.start("near", "send", "198.51.100.2", str(directory))
    assert answer(client) == {"connected": True}
    return client


@needs_namespaces
@pytest.mark.parametrize("far_bytes", [1500, 9000, 1400], ids=lambda mtu_bytes: f"MTU {mtu_bytes} beyond the router")
@pytest.mark.parametrize("near_bytes", [1500, 9000], ids=lambda mtu_bytes: f"MTU {mtu_bytes} at our end")
def test_packets_come_to_what_the_whole_path_carries(hosts, tmp_path, near_bytes, far_bytes):
    hosts.set_mtu("near", near_bytes)
    hosts.set_mtu("far", far_bytes)
    client = linked(hosts, tmp_path)
    payload_bytes = min(near_bytes, far_bytes) - HEADERS_BYTES
    sizes = [transfer(client) for _ in range(3)]
    assert max(sizes) <= payload_bytes
    assert sizes[-1] >= 0.9 * payload_bytes
    if payload_bytes in (1472, 8972):
        assert sizes[-1] == payload_bytes


@needs_namespaces
def test_a_path_that_becomes_smaller_without_a_word_is_noticed(hosts, tmp_path):
    hosts.set_mtu("near", 9000)
    hosts.set_mtu("far", 9000)
    client = linked(hosts, tmp_path)
    while transfer(client) < 8972:
        pass
    # The router drops what is too large now, and what it says of it (ICMP) is not listened to.
    hosts.set_mtu("far", 1300)
    assert transfer(client) <= 1300 - HEADERS_BYTES
    assert transfer(client) <= 1300 - HEADERS_BYTES
