"""Bytes that are nearly right: good ones with bits flipped, pieces cut out, doubled or swapped for others."""

import random

from hypothesis import strategies as st

#: Numbers at the edges of what the wire can carry (RFC 9000, 16), and of common limits.
EDGES = sorted(
    {0, 1, 2, 3, 4, 63, 64, 255, 256, 16_383, 16_384, 65_535, 1 << 20, (1 << 20) + 1, 1 << 30, (1 << 32) - 1}
    | {1 << 60, (1 << 60) + 1, (1 << 62) - 1}
)

numbers = st.sampled_from(EDGES) | st.integers(0, 40) | st.integers(0, (1 << 62) - 1)


@st.composite
def mutated(draw: st.DrawFn, originals: st.SearchStrategy[bytes], changes_max: int = 6) -> bytes:
    """One of the originals after some changes; perhaps after none."""
    data = bytearray(draw(originals))
    for _ in range(draw(st.integers(0, changes_max))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.integers(0, 6)):
            case 0 if data:
                data[at] ^= 1 << draw(st.integers(0, 7))
            case 1 if data:
                data[at] = draw(st.integers(0, 255))
            case 2:
                del data[at : at + draw(st.integers(1, 8))]
            case 3:
                data[at:at] = draw(st.binary(min_size=1, max_size=8))
            case 4:
                data[at:at] = data[at : at + draw(st.integers(1, 32))]
            case 5:
                del data[at:]
            case 6:
                width = draw(st.sampled_from([1, 2, 4, 8]))
                value = draw(numbers) & ((1 << 8 * width) - 1)
                data[at : at + width] = value.to_bytes(width, "big")
            case _:
                pass
    return bytes(data)


def tampered(rng: random.Random, datagram: bytes, earlier: list[bytes]) -> bytes:
    """One datagram of a stranger's, made from those that he has seen."""
    if len(datagram) < 2:
        return rng.randbytes(30)
    match rng.randrange(8):
        case 0:
            return rng.randbytes(rng.choice([1, 8, 20, 21, 50, 1200, 1500]))
        case 1:
            return datagram[: rng.randrange(len(datagram) + 1)]
        case 2:
            return datagram + rng.randbytes(rng.randrange(1, 100))
        case 3:
            return rng.choice(earlier)
        case 4:
            # The plain part of the header, and garbage behind it.
            keep = rng.randrange(1, min(len(datagram), 60) + 1)
            return datagram[:keep] + rng.randbytes(len(datagram) - keep)
        case 5:
            # Two datagrams in one (RFC 9000, 12.2).
            return rng.choice(earlier) + datagram
        case _:
            changed = bytearray(datagram)
            for _ in range(rng.choice([1, 1, 1, 5, 50])):
                # Early bytes are headers, where there is most to find.
                at = rng.randrange(min(len(changed), rng.choice([8, 30, 100, len(changed)])))
                changed[at] ^= 1 << rng.randrange(8)
            return bytes(changed)
