"""What our engine takes for granted of the library beneath it: an upgrade is a decision."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest

from quorate_protocol.transport.engine import (
    packet_builder,
    pins,
    quic_connection,
    receive_buffer,
    receiving,
    recovery,
    send_buffer,
    sending,
    writing,
)

ROOT = Path(__file__).parents[2]


def test_the_private_methods_that_we_rely_on_are_as_they_were():
    found = pins.relied_on_digests()
    changed = sorted(name for name, digest in pins.RELIED_ON.items() if found[name] != digest)
    assert not changed, (
        f"aioquic {importlib.metadata.version('aioquic')} has changed {', '.join(changed)}. Read what is new there, "
        "see whether the modules in quorate_protocol/transport/engine still do what they "
        "say (they replace these methods or rely on how they work), run the tests of the transport, and only then put "
        "the new digests (relied_on_digests()) in RELIED_ON in pins.py there."
    )


@pytest.mark.parametrize(
    "ours",
    [
        quic_connection.Connection,
        sending.SendingConnection,
        writing.WritingConnection,
        receiving.ReceivingConnection,
        packet_builder.PacketBuilder,
        recovery.Recovery,
        send_buffer.SendBuffer,
        receive_buffer.ReceiveBuffer,
    ],
    ids=lambda kind: kind.__name__,
)
def test_every_method_that_we_override_is_pinned(ours):
    """A method that is replaced here and changes there would be replaced by something else than was meant."""
    theirs = next(kind for kind in ours.__mro__ if kind.__module__.startswith("aioquic."))
    overridden = {
        f"{theirs.__name__}.{name}"
        for name, value in vars(ours).items()
        if (callable(value) or isinstance(value, property)) and name in vars(theirs)
    }
    assert len(overridden) > 1
    assert overridden <= set(pins.RELIED_ON)


def test_the_pinned_release_is_the_installed_one():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (pin,) = [entry for entry in project["dependencies"] if re.match(r"aioquic\b", entry)]
    assert pin == f"aioquic=={importlib.metadata.version('aioquic')}", "the pin is exact, or it pins nothing"
    constraints = (ROOT / "constraints.txt").read_text()
    assert pin in constraints.split(), "constraints.txt and pyproject.toml name different releases"
