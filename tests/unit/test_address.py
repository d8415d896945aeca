"""Addresses as people write them."""

import re

import pytest

from quorate_protocol.errors import ConfigurationError
from quorate_protocol.transport.address import (
    DEFAULT_PORT,
    LinkUrl,
    format_address,
    join_host_port,
    parse_listen_address,
    parse_memory_name,
    parse_url,
)


@pytest.mark.parametrize(
    ("url", "host", "port"),
    [
        ("quic://localhost:4433", "localhost", 4433),
        ("quic://localhost", "localhost", DEFAULT_PORT),
        ("quic://localhost:", "localhost", DEFAULT_PORT),
        ("quic://localhost/", "localhost", DEFAULT_PORT),
        ("QUIC://Coordinator.Example:1", "coordinator.example", 1),
        ("quic://192.0.2.1:65535", "192.0.2.1", 65_535),
        ("quic://[::1]:4433", "::1", 4433),
        ("quic://[::1]", "::1", DEFAULT_PORT),
        ("quic://[fe80::1%eth0]:4433", "fe80::1%eth0", 4433),
    ],
)
def test_urls_name_a_host_and_perhaps_a_port(url, host, port):
    parsed = parse_url(url)
    assert parsed == LinkUrl("quic", host, port)
    assert parse_url(str(parsed)) == parsed


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("", "does not begin with quic://"),
        ("localhost", "does not begin with quic://"),
        ("localhost:4433", "does not begin with quic://"),
        ("https://localhost:4433", "does not begin with quic://"),
        ("quic:localhost:4433", "names no host"),
        ("quic://", "names no host"),
        ("quic://:4433", "names no host"),
        ("quic://localhost:0", "port 0"),
        ("quic://localhost:65536", "out of range"),
        ("quic://localhost:-1", "Port could not be cast"),
        ("quic://localhost:http", "Port could not be cast"),
        ("quic://localhost:4433/path", "more than host and port"),
        ("quic://localhost:4433?query", "more than host and port"),
        ("quic://localhost:4433#fragment", "more than host and port"),
        ("quic://user@localhost:4433", "more than host and port"),
        ("quic://@localhost:4433", "more than host and port"),
        ("quic://[::1:4433", "Invalid IPv6"),
    ],
)
def test_what_is_no_url_is_shown_with_an_example(url, problem):
    with pytest.raises(ConfigurationError) as caught:
        parse_url(url)
    text = str(caught.value)
    assert repr(url) in text
    assert problem in text
    assert "an address looks like quic://HOST:PORT" in text


@pytest.mark.parametrize("name", ["coordinator", "a", "localhost", "a.b-c_d.9", "x" * 255])
def test_addresses_in_memory_are_names(name):
    parsed = parse_url(f"memory:{name}")
    assert parsed == LinkUrl("memory", name, 0)
    assert str(parsed) == f"memory:{name}"
    assert parse_memory_name(f"memory:{name}", "listen") == name
    assert format_address((name, 0)) == f"memory:{name}"


@pytest.mark.parametrize(
    "name", ["", "//name", "a/b", "a:1", "a b", ".a", "a-", "ä", "x" * 256, "a\n", "client-1", "a?b"]
)
def test_what_is_no_name_in_memory_is_shown_with_an_example(name):
    for read in (parse_url, lambda text: parse_memory_name(text, "coordinator address")):
        with pytest.raises(ConfigurationError, match="one looks like memory:NAME") as caught:
            read(f"memory:{name}")
        assert repr(f"memory:{name}") in str(caught.value)
        assert caught.value.path == "coordinator address"


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("0.0.0.0:4433", "0.0.0.0", 4433),  # noqa: S104
        ("127.0.0.1:0", "127.0.0.1", 0),
        ("localhost:65535", "localhost", 65_535),
        ("[::]:4433", "::", 4433),
        ("[::1]:0", "::1", 0),
        ("localhost:00080", "localhost", 80),
    ],
)
def test_listen_addresses_name_a_host_and_a_port(text, host, port):
    assert parse_listen_address(text) == (host, port)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is not an address"),
        ("localhost", "is not an address"),
        ("4433", "is not an address"),
        (":4433", "is not an address"),
        ("localhost:", "is not an address"),
        ("localhost:http", "is not an address"),
        ("localhost:-1", "is not an address"),
        ("localhost:+1", "is not an address"),
        ("localhost: 1", "is not an address"),
        ("localhost:٣", "is not an address"),
        ("localhost:²", "is not an address"),
        ("localhost:65536", "is not an address"),
        pytest.param("localhost:" + "9" * 5_000, "is not an address", id="more digits than an int takes"),
        ("::1:4433", "needs brackets"),
        ("::1", "needs brackets"),
        ("[::1", "needs brackets"),
        ("::1]:80", "needs brackets"),
        ("[::1]", "is not an address"),
        ("[]:80", "brackets are for IPv6"),
        ("[localhost]:80", "brackets are for IPv6"),
        ("[127.0.0.1]:80", "brackets are for IPv6"),
    ],
)
def test_what_is_no_listen_address_is_shown_with_an_example(text, problem):
    with pytest.raises(ConfigurationError, match=re.escape(problem)) as caught:
        parse_listen_address(text)
    assert caught.value.path == "listen"
    assert repr(text) in str(caught.value)
    assert "0.0.0.0:4433 or [::]:4433" in str(caught.value)


def test_addresses_are_shown_as_they_are_written():
    assert join_host_port("localhost", 1) == "localhost:1"
    assert join_host_port("::1", 1) == "[::1]:1"
    assert format_address(("127.0.0.1", 5)) == "127.0.0.1:5"
    assert format_address(("::1", 5, 0, 0)) == "[::1]:5"
    assert format_address(("::ffff:192.0.2.1", 5, 0, 0)) == "192.0.2.1:5"
    assert format_address(("::ffff:0:1", 5, 0, 0)) == "[::ffff:0:1]:5"
