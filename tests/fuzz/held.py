"""What a peer may cost us: the codes with which it may be closed upon, and the memory that it may take."""

import gc
import logging
import sys
import types
from typing import Final

#: RFC 9000, 20.1, TLS alerts included.
TRANSPORT_CODES: Final = frozenset({*range(0x11), *range(0x100, 0x200)})

#: What a connection may hold after some packets, in bytes: far under its windows.
HELD_BYTES_MAX: Final = 4 << 20


def held_bytes(root: object) -> int:
    """About how much memory hangs on an engine."""
    aside = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, logging.Logger)
    aside += (logging.LoggerAdapter, logging.Handler, logging.Manager)
    seen, total, waiting = {id(root)}, 0, [root]
    while waiting:
        thing = waiting.pop()
        total += sys.getsizeof(thing, 0)
        for other in gc.get_referents(thing):
            if id(other) not in seen and not isinstance(other, aside):
                seen.add(id(other))
                waiting.append(other)
    return total
