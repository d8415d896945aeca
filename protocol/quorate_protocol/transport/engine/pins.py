"""What the engine takes for granted of aioquic's inside: an upgrade that touches it fails a test.

`RELIED_ON` names the methods that `quic_connection` replaces, and those on whose inner workings it or
`aioquic_engine` relies (what they count, when they move a timer, what they leave in a buffer).
"""

import hashlib
import inspect
from typing import Final

from aioquic.quic.connection import QuicConnection
from aioquic.quic.stream import QuicStreamReceiver, QuicStreamSender

_CLASSES: Final = {kind.__name__: kind for kind in (QuicConnection, QuicStreamReceiver, QuicStreamSender)}

#: Method to the SHA-256 of its source in the pinned release.
RELIED_ON: Final = {
    "QuicConnection._close_begin": "d8cdcfd4513906bf0e5649264b7fa66266c1dc81793811a4e2dbc2c307098895",
    "QuicConnection._close_end": "7e32d95840a68634873c105dd061c9f09eb1f25a0011c6afd737a723ed7cb8dc",
    "QuicConnection._flush_builder": "ac4bd66d7c3892dfcbf50705c53660390e1c6d5e0cadf24ffc375dee3dc14d05",
    "QuicConnection._get_or_create_stream": "aee09c84cd0da1143626d2c4a19efc004219ca996476cad0973316d9617ef2f3",
    "QuicConnection._get_or_create_stream_for_send": "b68479a29862b421faa7443d42a9126dcea4317225d522c258792bf3d9bfc2a3",
    "QuicConnection._handle_max_data_frame": "e5c49776cb2c9b0b8acb081affde8722ae4eada438225d35115c43c80dc459cf",
    "QuicConnection._handle_max_stream_data_frame": "c94e4873026aaa6835adad6d443c8d5962e33c2192816f1c75f389813164f4ae",
    "QuicConnection._handle_reset_stream_frame": "0a1801842064e9dd87bd6360444007d154e4470ad5ed68a94caedf355b423e53",
    "QuicConnection._handle_stop_sending_frame": "57b0b54a8467ecb5d63f922bb2100484a6a83f569273cb684a3b91c2ae1d2faf",
    "QuicConnection._handle_stream_frame": "8c79348a854e307d437866c7cd10d6015303a166a9fc3b94b568c33ce4f60d6d",
    "QuicConnection._on_connection_limit_delivery": "ffc582d72ac9685a26b2d6bcd54e16a810ef59fcddbcdfc598de90a28eb1bdd1",
    "QuicConnection._on_max_stream_data_delivery": "76e906ea95ee03fea7710173a27356c23fad3ffeff342880f9043b6fbb83af9a",
    "QuicConnection._stream_limit": "32d840c7ec072814917316069218c2df34d5d629d5cec39916892492c9fa906b",
    "QuicConnection._unblock_streams": "cfde0b0287e2a38d7b763257535b9b535eb3e294a6fd3c29b8d9bfa012dbea5d",
    "QuicConnection._write_ack_frame": "dc0bde63adda7ae410b18806e21938cf8824377da3a6c5bc042edb8811fc92a0",
    "QuicConnection._write_application": "c37bf64378f72b2f93f2f1b01f67bd8c5cb9c042ab908ca7fda80f2ae92cdc0b",
    "QuicConnection._write_connection_limits": "02c42c5455ae1a31ba5838804b5639588e2f3700e6d714e859e0b87037ff0d39",
    "QuicConnection._write_datagram_frame": "ec62fd6f1ce24a1023de80af2b0944df17409de75ff756a19d1b1cb23d744f62",
    "QuicConnection._write_reset_stream_frame": "72c28abb1c9bb5e0fcb511a3cce236295f47ea1d4897f0bcd7811e162d9bded7",
    "QuicConnection._write_stop_sending_frame": "057f50750f9f51baddc045c244ea384c963ca97a423a9248826c0282412bbd44",
    "QuicConnection._write_stream_frame": "9bc0be962394a322216fedcf71a7da3e4941c01b64779e730e806a95d4935e00",
    "QuicConnection._write_stream_limits": "398d4a898f7c580f93d42cdb39885641aa8939764da68aabd054beb761df07ce",
    "QuicConnection.close": "f24ea1b2912e68d7a2fa48bc9aa28edcbb7076f0dc10ae764c964a4c08432eef",
    "QuicConnection.datagrams_to_send": "f4eb22c8add260fe863a12c5ccc3b77887a1c93da3c7e0236722e2d5263560f5",
    "QuicConnection.get_timer": "07184a05f894e968501fe9d2ce7d2b71a35f870ba0aa7e6babd91be241c49b0b",
    "QuicConnection.handle_timer": "8ebd76a179bf5e25b91698bcae4327b1b45bfa6d75c9f2db192287b1bb272611",
    "QuicConnection.receive_datagram": "3c7f29826050cbfe326c3a05400792ce8757bd0be07a2f41b6b1562f22588278",
    "QuicStreamReceiver.handle_frame": "c54bce9f11e6f2deea60a890cf9e3217e1bded28dbc53649bbb5646810b0fa44",
    "QuicStreamReceiver.handle_reset": "3a2b7a53512a95cc8037a6c897f69160f20e23cb5ffce68d96942cc4a13d05d7",
    "QuicStreamReceiver.stop": "8c48d058420ac20785269ab4ecc71cd9b0bae966f4500ec0e7030e3f4a33e68c",
    "QuicStreamSender.get_frame": "c9d68a424b94b52bee7ffe111d96a203936f215eb661cfd9c876c16c08765a6d",
    "QuicStreamSender.on_data_delivery": "675e1c2812ea374420dcbb12db3845e88f3c3bda858a7687d1b7b421039ddcc8",
    "QuicStreamSender.on_reset_delivery": "34732145acec341dfaefad8f7e87ccfce92d788fc2460a7c94167c0f88576e70",
    "QuicStreamSender.reset": "76d86e366e8e0ef7d3692f9aa0cbf5e52c19c80477a5c0c141dba490aceb9b59",
    "QuicStreamSender.write": "77d188425093015b4f7fc40cb2a09c81344908a3526faf773dfcf989b0db4ce0",
}


def relied_on_digests() -> dict[str, str]:
    """The same of what is installed."""
    return {name: _digest(name) for name in RELIED_ON}


def _digest(name: str) -> str:
    kind, _, method = name.partition(".")
    return hashlib.sha256(inspect.getsource(getattr(_CLASSES[kind], method)).encode()).hexdigest()
