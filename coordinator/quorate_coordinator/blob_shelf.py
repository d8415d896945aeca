"""The contents of large bodies, for as long as somebody needs them.

Cores and messages know a large body by its reference. Here is what it stands for, by digest, held by owners: the
question and the replies of a round in flight, an outcome until it is told, a truth until its feedback is on its way.
What no owner holds is let go of. Equal contents are one.
"""

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Container, Hashable, Iterator
from typing import Final

from quorate_protocol.blobs import Blob
from quorate_protocol.fields import BodyRef
from quorate_protocol.messages import AgentResult, Outcome

#: Seconds that the large bodies of an outcome are kept for who asks again under its key: as long as an operator's link
#: takes to come back, and some.
KEPT_S: Final = 60.0

#: Bytes that those hold together on disk and in memory, unless it is set otherwise: a quarter of what there is. They
#: count against the agents whose answers they are, too, who need the rest for those to come.
KEPT_BYTES_MAX: Final = 4 << 30
KEPT_MEMORY_BYTES_MAX: Final = 64 << 20


class BlobShelf:
    """Blobs by digest, with owners.

    Args:
        kept_s: Seconds that `keep` keeps.
        kept_bytes_max: Bytes on disk that it keeps, the oldest go first.
        kept_memory_bytes_max: The same in memory.
    """

    def __init__(
        self,
        *,
        kept_s: float = KEPT_S,
        kept_bytes_max: int = KEPT_BYTES_MAX,
        kept_memory_bytes_max: int = KEPT_MEMORY_BYTES_MAX,
    ) -> None:
        self._kept_s = kept_s
        #: By whether that is on disk.
        self._kept_bytes_max = {True: kept_bytes_max, False: kept_memory_bytes_max}
        #: Digest to the blob and how many owners hold it.
        self._blobs: dict[bytes, tuple[Blob, int]] = {}
        self._held_by: dict[Hashable, set[bytes]] = {}
        #: Key to the bytes kept for it, by whether they are on disk, and the end of that; the oldest first.
        self._kept: OrderedDict[str, tuple[Counter[bool], asyncio.TimerHandle]] = OrderedDict()
        self._kept_bytes: Counter[bool] = Counter()

    def __len__(self) -> int:
        return len(self._blobs)

    @property
    def held_bytes(self) -> int:
        """Bytes of all blobs."""
        return sum(len(blob) for blob, _ in self._blobs.values())

    def put(self, owner: Hashable, ref: BodyRef) -> BodyRef:
        """An owner holds the content that comes with a reference; returns the reference without it."""
        content = ref.content
        assert isinstance(content, Blob), "a body is handed on when it is there"
        known, owners = self._blobs.get(ref.digest, (content, 0))
        held = self._held_by.setdefault(owner, set())
        if ref.digest not in held:
            held.add(ref.digest)
            self._blobs[ref.digest] = (known, owners + 1)
        return BodyRef(size=ref.size, digest=ref.digest)

    def find(self, ref: BodyRef) -> Blob | None:
        """The content of a reference; None when nobody needed it any more."""
        known = self._blobs.get(ref.digest)
        return None if known is None else known[0]

    def drop(self, owner: Hashable) -> None:
        """An owner needs nothing more."""
        for digest in self._held_by.pop(owner, ()):
            blob, owners = self._blobs[digest]
            if owners > 1:
                self._blobs[digest] = (blob, owners - 1)
            else:
                del self._blobs[digest]

    # --- outcomes ---

    def fill(self, ref: BodyRef) -> BodyRef:
        """A reference with its content, or one that says that it is gone."""
        blob = self.find(ref)
        return ref.model_copy(update={"gone": True}) if blob is None else ref.with_content(blob)

    def fill_outcome(self, outcome: Outcome) -> Outcome:
        """An outcome whose references have their contents, or say that these are gone."""
        refs = set(_refs_of(outcome))
        if not refs:
            return outcome
        filled = {ref: self.fill(ref) for ref in refs}
        results = [
            result if result.bulk is None else result.model_copy(update={"bulk": filled[result.bulk]})
            for result in outcome.results
        ]
        bulk = None if outcome.bulk is None else filled[outcome.bulk]
        return outcome.model_copy(update={"results": results, "bulk": bulk})

    def fill_result(self, result: AgentResult) -> AgentResult:
        """Likewise."""
        return result if result.bulk is None else result.model_copy(update={"bulk": self.fill(result.bulk)})

    def keep(self, key: str, outcome: Outcome) -> None:
        """Holds the contents of an outcome for a while, for who asks again under its key."""
        self._let_go(key)
        refs = [filled for ref in set(_refs_of(outcome)) if (filled := self.fill(ref)).content is not None]
        if not refs:
            return
        for ref in refs:
            self.put(("key", key), ref)
        sizes: Counter[bool] = Counter()
        for ref in refs:
            sizes[ref.content is not None and ref.content.is_on_disk] += ref.size
        timer = asyncio.get_running_loop().call_later(self._kept_s, self._let_go, key)
        self._kept[key] = (sizes, timer)
        self._kept_bytes.update(sizes)
        for on_disk, most in self._kept_bytes_max.items():
            while self._kept_bytes[on_disk] > most:
                self._let_go(next(old for old, (held, _) in self._kept.items() if held[on_disk]))

    def close(self) -> None:
        """Lets go of everything."""
        for key in list(self._kept):
            self._let_go(key)
        self._held_by.clear()
        self._blobs.clear()

    def _let_go(self, key: str) -> None:
        kept = self._kept.pop(key, None)
        if kept is not None:
            sizes, timer = kept
            timer.cancel()
            self._kept_bytes.subtract(sizes)
            self.drop(("key", key))


def _refs_of(outcome: Outcome) -> Iterator[BodyRef]:
    if outcome.bulk is not None:
        yield outcome.bulk
    yield from (result.bulk for result in outcome.results if result.bulk is not None)


def contents_of(outcome: Outcome, known: Container[bytes] = ()) -> dict[BodyRef, Blob]:
    """What has to be sent with an outcome, each body once: the answer, then what the agents said; but known digests."""
    found: dict[BodyRef, Blob] = {}
    for ref in _refs_of(outcome):
        if ref.digest not in known and isinstance(ref.content, Blob):
            found[ref] = ref.content
    return found
