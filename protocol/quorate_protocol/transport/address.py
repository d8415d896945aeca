"""Addresses and URLs: what people write and what sockets want."""

import re
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

from quorate_protocol.errors import ConfigurationError

#: Port of the coordinator where none is named.
DEFAULT_PORT: Final = 4433

#: What the addresses of links inside one process begin with.
MEMORY_PREFIX: Final = "memory:"

#: As host names, so that a certificate can be made out to one; clients' names are given by the network.
_MEMORY_NAME: Final = re.compile(r"(?!client-)[A-Za-z0-9]([A-Za-z0-9._-]{0,253}[A-Za-z0-9])?", re.ASCII)


@dataclass(frozen=True, slots=True)
class LinkUrl:
    """A parsed link address."""

    #: `quic` or `memory`.
    scheme: str
    #: Host, or the name of a link inside this process.
    host: str
    #: UDP port; 0 for `memory`.
    port: int

    def __str__(self) -> str:
        if self.scheme == "memory":
            return MEMORY_PREFIX + self.host
        return f"{self.scheme}://{join_host_port(self.host, self.port)}"


def parse_url(url: str) -> LinkUrl:
    """Reads `quic://HOST[:PORT]`, the port 4433 where none is named, and `memory:NAME`.

    Raises:
        ConfigurationError: not such an address; the text says what is wrong with it.
    """
    if url.startswith(MEMORY_PREFIX):
        return LinkUrl("memory", parse_memory_name(url, "coordinator address"), 0)
    example = "an address looks like quic://HOST:PORT, such as quic://localhost:4433"
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigurationError("coordinator address", f"{url!r}: {error}; {example}") from error
    if parts.scheme != "quic":
        raise ConfigurationError("coordinator address", f"{url!r} does not begin with quic://; {example}")
    if not host:
        raise ConfigurationError("coordinator address", f"{url!r} names no host; {example}")
    if parts.path not in ("", "/") or parts.query or parts.fragment or parts.username is not None:
        raise ConfigurationError("coordinator address", f"{url!r} has more than host and port; {example}")
    if port == 0:
        raise ConfigurationError("coordinator address", f"{url!r}: port 0 cannot be connected to; {example}")
    return LinkUrl("quic", host, port if port is not None else DEFAULT_PORT)


def parse_memory_name(address: str, setting: str) -> str:
    """The NAME of `memory:NAME`.

    Raises:
        ConfigurationError: not such an address; `setting` is where it was written.
    """
    name = address.removeprefix(MEMORY_PREFIX)
    if not address.startswith(MEMORY_PREFIX) or _MEMORY_NAME.fullmatch(name) is None:
        raise ConfigurationError(
            setting,
            f"{address!r} is not an address in memory: one looks like memory:NAME, with a name of up to 255 letters, "
            "digits, dots, hyphens and underscores, such as memory:coordinator; client-… are the network's own",
        )
    return name


def parse_listen_address(text: str) -> tuple[str, int]:
    """Reads `HOST:PORT`, `[IPV6]:PORT`; port 0 lets the kernel choose.

    Raises:
        ConfigurationError: not such an address.
    """
    example = "an address looks like HOST:PORT, such as 0.0.0.0:4433 or [::]:4433"
    host, colon, port_text = text.rpartition(":")
    is_port = port_text.isascii() and port_text.isdigit() and len(port_text) <= 5 and int(port_text) <= 65_535
    if not colon or not host or not is_port:
        raise ConfigurationError("listen", f"{text!r} is not an address: {example}")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        if ":" not in host:
            raise ConfigurationError("listen", f"{text!r}: brackets are for IPv6 addresses: {example}")
    elif ":" in host or "[" in host or "]" in host:
        raise ConfigurationError("listen", f"{text!r}: an IPv6 address needs brackets: {example}")
    return host, int(port_text)


def join_host_port(host: str, port: int) -> str:
    """`HOST:PORT`, with brackets round an IPv6 host."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def format_address(address: Any) -> str:
    """A socket's address for people; IPv4 seen through a dual-stack socket is shown as IPv4.

    No datagram comes from port 0: that is an address in memory.
    """
    host, port = address[0], address[1]
    if port == 0:
        return f"{MEMORY_PREFIX}{host}"
    return join_host_port(host.removeprefix("::ffff:") if "." in host else host, port)
