"""What the engine takes for granted of aioquic's inside: an upgrade that touches it fails a test.

`RELIED_ON` names the methods that this folder replaces, and those on whose inner workings it relies
(what they count, when they move a timer, what they leave in a buffer).
"""

import hashlib
import inspect
from types import FunctionType
from typing import Any, Final, cast

from aioquic._crypto import AEAD, HeaderProtection
from aioquic.quic.connection import QuicConnection
from aioquic.quic.crypto import CryptoContext, CryptoPair
from aioquic.quic.packet_builder import QuicPacketBuilder
from aioquic.quic.rangeset import RangeSet
from aioquic.quic.recovery import QuicPacketNumberWindow, QuicPacketRecovery
from aioquic.quic.stream import QuicStreamReceiver, QuicStreamSender

_CLASSES: Final = {
    kind.__name__: kind
    for kind in (
        AEAD,
        CryptoContext,
        CryptoPair,
        HeaderProtection,
        QuicConnection,
        QuicPacketBuilder,
        QuicPacketNumberWindow,
        QuicPacketRecovery,
        QuicStreamReceiver,
        QuicStreamSender,
        RangeSet,
    )
}

#: Method to the SHA-256 of its source in the pinned release.
RELIED_ON: Final = {
    "AEAD._nonce": "cdb45a754af0032d0a3f504aab55118c35c989ee266e9b18bac3c1735357a42b",
    "AEAD.decrypt": "3cb5f698b2ee2dc40911b9e48fd9aefda6c88fecceed3f15033b17170cd97139",
    "AEAD.encrypt": "dcd48e4cec215a2053ceeca2be50d1578e5396f98811f9b61537c7bdfb192c14",
    "CryptoContext.decrypt_packet": "fe94c52f762d3f3d15d04f4595ec0bcaac23807f2a0fc96d9348d4cabf47dd56",
    "CryptoContext.encrypt_packet": "fe4c0f9b61d15b018c59ce931aeb4ae29c551f9927fb4fbec05610410f1c4aa9",
    "CryptoContext.is_valid": "5b25c324fc66c6675b428a26b0dfe779581c1b66dcafab69bfd1c62794e2fe64",
    "CryptoPair._update_key": "4dddcfabc63559ee6e3065c3480e86c58d7b1b85e0bf1779d68c5d9b5504b422",
    "CryptoPair.decrypt_packet": "2d2c3a3bf1295a278dae0a603dde7f5cabbe1c1b54f76652d516860b765891eb",
    "CryptoPair.encrypt_packet": "f244294823e4923568baaa6a35bc8ec496422f40c25939f00cba36a0154a5c93",
    "HeaderProtection._mask": "3f222c11466194ac9a8f721cfb90ea2a917adb191a274a122ab054dc94de7cd9",
    "HeaderProtection.apply": "dfbedf5f0cb7f981e3d6af52a5ff917817e3baf5c9a903699abf8f9947717f86",
    "HeaderProtection.remove": "86c5aacd3c9c1024726c796fa072b524e8bd3cfcc7302ac95349ff5a4a0563c7",
    "QuicConnection.__init__": "81aea715e34447e17b8884054bf636c15aaef6a84d8e934c81c199d3d29a34aa",
    "QuicConnection._abandon_path_validation": "bd71c1680e70373899d2bc461a28114b993b695b3a319ad45c68c0f53f467bfb",
    "QuicConnection._add_network_path": "4135b581b4d5a56ba8c5ed6ca5f55f616c42778b290cea9d48d27ee6c10088b9",
    "QuicConnection._amplification_blocked_timers": "8af7f6b256630c734ddb96e7083fe0f1ac3ae268a5f941c314746e82ec4ff5b0",
    "QuicConnection._close_begin": "d8cdcfd4513906bf0e5649264b7fa66266c1dc81793811a4e2dbc2c307098895",
    "QuicConnection._close_end": "7e32d95840a68634873c105dd061c9f09eb1f25a0011c6afd737a723ed7cb8dc",
    "QuicConnection._confirm_handshake": "ffec907008d182734c9510aad054529123d0eecad3144558c668f386b1278121",
    "QuicConnection._discard_epoch": "124889133f0c2ef0d71a74cc1345db699ff426be6e0b062fa7131cacf5ad690e",
    "QuicConnection._find_network_path": "202fbdfdd5ed046b3fd0230a1a1c58a18c2702e58e0aeadaa72f52d8ea49b03c",
    "QuicConnection._flush_builder": "ac4bd66d7c3892dfcbf50705c53660390e1c6d5e0cadf24ffc375dee3dc14d05",
    "QuicConnection._get_or_create_stream": "aee09c84cd0da1143626d2c4a19efc004219ca996476cad0973316d9617ef2f3",
    "QuicConnection._handle_ack_frame": "a9cf2707aa0f99a5631349d8a749d4939cf857114b06c6af4c402c28f1aaded7",
    "QuicConnection._handle_crypto_frame": "e77f8695d9acaf8eed9c922563b39ab1e2e30c60ab4de835b121f5d014a095d3",
    "QuicConnection._handle_datagram_frame": "38fb0c3c9f00a28e18cc34366e49c50628094ff7c495ba676d6036785c26dc46",
    "QuicConnection._handle_max_data_frame": "e5c49776cb2c9b0b8acb081affde8722ae4eada438225d35115c43c80dc459cf",
    "QuicConnection._handle_max_stream_data_frame": "c94e4873026aaa6835adad6d443c8d5962e33c2192816f1c75f389813164f4ae",
    "QuicConnection._handle_path_response_frame": "7fbf9c34446cbc95edbdf0a71522084134f852887a3dd069fd49356826ce6645",
    "QuicConnection._handle_reset_stream_frame": "0a1801842064e9dd87bd6360444007d154e4470ad5ed68a94caedf355b423e53",
    "QuicConnection._handle_stop_sending_frame": "57b0b54a8467ecb5d63f922bb2100484a6a83f569273cb684a3b91c2ae1d2faf",
    "QuicConnection._handle_stream_frame": "8c79348a854e307d437866c7cd10d6015303a166a9fc3b94b568c33ce4f60d6d",
    "QuicConnection._handshake_data_stranded": "691675aa1708ccaf38ca24f630e42868f1759ed6c77b4b5ed432d9b40331c357",
    "QuicConnection._idle_timeout": "8549f45b09415b1a231afdd0fbc3013fcae96ec038d8117a9b33968ea9b176e2",
    "QuicConnection._initialize": "6a41681e541c05d75d641f80cf0b01117e8f3d597ad8f468897dfc44a65d52f3",
    "QuicConnection._on_ack_delivery": "14648d79ecc50a3dadfcc746e2e83fc4550be89c280638ea2623328856daa784",
    "QuicConnection._on_connection_limit_delivery": "ffc582d72ac9685a26b2d6bcd54e16a810ef59fcddbcdfc598de90a28eb1bdd1",
    "QuicConnection._on_max_stream_data_delivery": "76e906ea95ee03fea7710173a27356c23fad3ffeff342880f9043b6fbb83af9a",
    "QuicConnection._on_new_connection_id_delivery": "3a61c4ffd0ff4fbc38b4c297e8dfa462519447cbf7494cb5f633692a1c994ca7",
    "QuicConnection._parse_transport_parameters": "0da95a03bd5bf00b07d34ff2e9d628f300fc9c33fa06b60f225ff08b7a43dfb9",
    "QuicConnection._payload_received": "612b67759a96c70166a2066859a40300f53dbfc42bbd89c7a9dcef716c8cab1a",
    "QuicConnection._probe_preferred_address": "8fd78647a17c307e77440582508698f220eabdf6e26306b55d96fa0080a884ce",
    "QuicConnection._replenish_connection_ids": "73b127efb89c53a325891a8727d147c1a8fe7476f9c27e68996dedc6fb636a10",
    "QuicConnection._send_probing_frames": "7968d5d37ef81a1148a7d558c07586724ae66134615530f4c9aa9b8bed8dc94f",
    "QuicConnection._serialize_transport_parameters": "be651f3ddfcd3f39af5fdb5cc82b21f2ae7290c0f26424a65f6d756410723754",
    "QuicConnection._stream_is_discarded": "d4812b6968024ae7f0b5a68f239231091da1e724d6cff56523a6b7d0d59a446a",
    "QuicConnection._stream_limit": "32d840c7ec072814917316069218c2df34d5d629d5cec39916892492c9fa906b",
    "QuicConnection._unblock_streams": "cfde0b0287e2a38d7b763257535b9b535eb3e294a6fd3c29b8d9bfa012dbea5d",
    "QuicConnection._write_ack_frame": "dc0bde63adda7ae410b18806e21938cf8824377da3a6c5bc042edb8811fc92a0",
    "QuicConnection._write_connection_close_frame": "d3c969978b01bb30453dcb8ae521e4d632c94709c5a97630a36c7820dbdd8525",
    "QuicConnection._write_crypto_frame": "54828990b464ca948a183ecc049a1ce25480ff38705b467fef7b83751d422c8f",
    "QuicConnection._write_datagram_frame": "ec62fd6f1ce24a1023de80af2b0944df17409de75ff756a19d1b1cb23d744f62",
    "QuicConnection._write_handshake": "0e6a413ccb165864b328aa0e7141faf7f1c12f5beeafbfbc3bb739f590f749c4",
    "QuicConnection._write_handshake_done_frame": "026757fd99458b35d109b3a2992730bbefe6563e7e1e331f65b3b1b04d7e8f0a",
    "QuicConnection._write_new_connection_id_frame": "8e58e506ea36e1d156987e6cc9ceb5150685511ee36c8ce9f183b110514bb874",
    "QuicConnection._write_path_challenge_frame": "71e5ebefcc602a53df6edb785dc4ff89503b853f71aa52ef98cccc21434ef05f",
    "QuicConnection._write_path_response_frame": "0b4f3afdee925b1ebe952956471774453070be412d04d03332df0a228c55254e",
    "QuicConnection._write_ping_frame": "cfcbc98ac33c49b26d35709e84c6581df9857075539541e0eb5c6f1bc4497a1e",
    "QuicConnection._write_retire_connection_id_frame": "3511ff8073b25f8602d12d8497aa6ef7349a64073c66c6cf4b1f4afc9ca3fd58",
    "QuicConnection.close": "f24ea1b2912e68d7a2fa48bc9aa28edcbb7076f0dc10ae764c964a4c08432eef",
    "QuicConnection.connect": "dff4f9cef8a474c173a0e353f3c1362afc4d2fd8977a53845ec0914e6bf17d4e",
    "QuicConnection.datagrams_to_send": "f4eb22c8add260fe863a12c5ccc3b77887a1c93da3c7e0236722e2d5263560f5",
    "QuicConnection.get_timer": "07184a05f894e968501fe9d2ce7d2b71a35f870ba0aa7e6babd91be241c49b0b",
    "QuicConnection.handle_timer": "8ebd76a179bf5e25b91698bcae4327b1b45bfa6d75c9f2db192287b1bb272611",
    "QuicConnection.receive_datagram": "3c7f29826050cbfe326c3a05400792ce8757bd0be07a2f41b6b1562f22588278",
    "QuicConnection.reset_stream": "f5a5e1ff5935b8a1e46f3d5ba2ccd4692b4ff0bc0be4c2e241a5cb90feb1f328",
    "QuicConnection.send_datagram_frame": "4626750e09d541ba2b9b84fd442d24fcaba7f4941909f5bbc1ff66f63c433d08",
    "QuicConnection.send_ping": "db37741af3f6bd5d035cbbdc33794d2d699d278f5da52353bdf6380be9179fb5",
    "QuicPacketBuilder.__init__": "b321fb4eb8ac7b330b13476c3e4a094200a8f9ab662e8ff89b9c7cd96ce6d5e1",
    "QuicPacketBuilder._end_packet": "585948d0382505b32a82180a9b3a42dcb18d6773ef181264af6c99f09a58cd2f",
    "QuicPacketBuilder._flush_current_datagram": "e310004f68f56c55536920ae183639ab2e88ddeba6ab9fa19f9ae3bfea0d7558",
    "QuicPacketBuilder.flush": "b09066e03f9342d6f8cd46daf94a075211122927a6dc676053a0d809ec8390fa",
    "QuicPacketBuilder.packet_is_empty": "edea423aa07d83bfbd95138cb1d352f5a044abbc0103cfe42dfa6acb1f963b58",
    "QuicPacketBuilder.remaining_flight_space": "7a29e65594a53fb7f3e662a1db0798def559716a0a4725b553c2773818a208ad",
    "QuicPacketBuilder.start_frame": "53af20167bc2f0e0efb99b3d61c1bc03054a6a5484a9ea1135a68085f5d6a61f",
    "QuicPacketBuilder.start_packet": "63a59deba3617ddcca6a1f302fc51b93ec44f782a164b994a7b8a00407c34572",
    "QuicPacketNumberWindow.__contains__": "f090921fc0437712714f381b9a8a84dff7332d857de59c1cb04fbe9525768edd",
    "QuicPacketNumberWindow.add": "214572547bed64df2259bba7f5dbee7fe96c8732c6e5c8bb7c62145feb402616",
    "QuicPacketRecovery.__init__": "11dd9eddeac78a3a3698b4f31ed8d4b5678004c0380efb16432488e5d79d4db0",
    "QuicPacketRecovery._detect_loss": "56e5a246bb22cb691b706a288bbfebe50b2b0eb09710c3d382233f16108c77fa",
    "QuicPacketRecovery._in_persistent_congestion": "6c04346ace9ecfb613bfadaa385853a7f295e89ad1bc60259d820d5e62fa2fd4",
    "QuicPacketRecovery._on_packets_lost": "77a0ba759513745568c94526c73eaad17a25701c187e9ba2f742d86f96ad1cd4",
    "QuicPacketRecovery.discard_space": "764ad1d17869fe8cc60d42068b44f8fdf2b030ec1c0d58eae7e0c32cd90179de",
    "QuicPacketRecovery.get_loss_detection_time": "de155cb9bef95f8ebc17c4a95049067a9165433e478c0af8324f0296ffc53358",
    "QuicPacketRecovery.get_probe_timeout": "782ca5036a10bc2f35b7a33596cc16b4f667d31a5625302229ff98645292e6e1",
    "QuicPacketRecovery.on_ack_received": "1a7c6934790843330fe5235642d5a36ddc4e72108f168b005eca87a63f5f8ab3",
    "QuicPacketRecovery.on_loss_detection_timeout": "50d7fd652fe671d4e0521e9a336f59836f25b8df60400f3dd2ffcb02b791b155",
    "QuicPacketRecovery.on_packet_sent": "a83baa6e05702f89c45d32aa3915e6e7d27ac2a426c9a2166d3b1c484d2b71a1",
    "QuicPacketRecovery.reschedule_data": "a012ca1263fb6af0df25a4baf797ca3cf2264d178aba225ea4731a10e85b1a25",
    "QuicStreamReceiver.__init__": "d7dd149186a614baea736ba5725d07a53cb2aed7ee47668925fb29694a4dd1cf",
    "QuicStreamReceiver._pull_data": "0b249a0b2d9357b4d022f307ea2f2ad8336b8f08e7d8a8d03a5882778ed4ba61",
    "QuicStreamReceiver.get_stop_frame": "affcdd65f5e9d857169198d329e12a92cefe0d84b299b8624db0aa968a7429f7",
    "QuicStreamReceiver.handle_frame": "c54bce9f11e6f2deea60a890cf9e3217e1bded28dbc53649bbb5646810b0fa44",
    "QuicStreamReceiver.handle_reset": "3a2b7a53512a95cc8037a6c897f69160f20e23cb5ffce68d96942cc4a13d05d7",
    "QuicStreamReceiver.on_stop_sending_delivery": "25979d1ce34ab75ce06fbeda8412388378dc56f5f6f8bf29103f0d091602d50a",
    "QuicStreamReceiver.starting_offset": "5499cbac72736571568fad8774568332ec3f6dcf8817d67c87e2501fbe0e965a",
    "QuicStreamReceiver.stop": "8c48d058420ac20785269ab4ecc71cd9b0bae966f4500ec0e7030e3f4a33e68c",
    "QuicStreamSender.__init__": "a049a2be2f28f69def7c49e6f4975128b17c34b5de65dfad746a7d26d2a5ba03",
    "QuicStreamSender.get_frame": "c9d68a424b94b52bee7ffe111d96a203936f215eb661cfd9c876c16c08765a6d",
    "QuicStreamSender.get_reset_frame": "895346a5d96e575bf3585311d73e2a6e239a7b910dce4cf3ff34563dc1a343c9",
    "QuicStreamSender.next_offset": "234a09ac8562a406f037b6ffc4c2b6703eb54c763ef81f44d5ddc1d9182daf69",
    "QuicStreamSender.on_data_delivery": "675e1c2812ea374420dcbb12db3845e88f3c3bda858a7687d1b7b421039ddcc8",
    "QuicStreamSender.on_reset_delivery": "34732145acec341dfaefad8f7e87ccfce92d788fc2460a7c94167c0f88576e70",
    "QuicStreamSender.reset": "76d86e366e8e0ef7d3692f9aa0cbf5e52c19c80477a5c0c141dba490aceb9b59",
    "QuicStreamSender.write": "77d188425093015b4f7fc40cb2a09c81344908a3526faf773dfcf989b0db4ce0",
    "RangeSet.add": "409fdd202a29b2cd9c9285947fe1bfe10c51da98f4bb8c14bcb789bf7a184391",
    "RangeSet.shift": "113c519c72ff5841118eea5678bf5dce648bd544462a91f16365230628cf9bcb",
    "RangeSet.subtract": "790c2afeb0cba510025f63dbd974717c36155a8fe4f98e10d87ffa5efea640c8",
}


def relied_on_digests() -> dict[str, str]:
    """The same of what is installed."""
    return {name: _digest(name) for name in RELIED_ON}


def _digest(name: str) -> str:
    kind, _, method = name.partition(".")
    found: Any = inspect.getattr_static(_CLASSES[kind], method)
    source = inspect.getsource(cast(FunctionType, getattr(found, "fget", found)))
    return hashlib.sha256(source.encode()).hexdigest()
