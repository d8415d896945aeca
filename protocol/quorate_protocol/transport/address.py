"""Addresses and URLs: what people write and what sockets want."""

from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

from quorate_protocol.errors import ConfigurationError

#: Port of the coordinator where none is named.
DEFAULT_PORT: Final = 4433


@dataclass(frozen=True, slots=True)
class LinkUrl:
    """A parsed link address."""

    scheme: str
    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.scheme}://{join_host_port(self.host, self.port)}"


def parse_url(url: str) -> LinkUrl:
    """Reads `quic://HOST[:PORT]`; the port is 4433 where none is named.

    Raises:
        ConfigurationError: not such an address; the text says what is wrong with it.
    """
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
    """A socket's address for people; IPv4 seen through a dual-stack socket is shown as IPv4."""
    host, port = address[0], address[1]
    return join_host_port(host.removeprefix("::ffff:") if "." in host else host, port)
