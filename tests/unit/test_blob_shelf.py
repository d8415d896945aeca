"""The contents of large bodies are held for as long as somebody needs them."""

import asyncio
import gc
import hashlib
import weakref
from pathlib import Path

from quorate_coordinator.blob_shelf import BlobShelf, contents_of
from quorate_protocol.blobs import Blob, BlobBudget, BlobStore, blob_of
from quorate_protocol.bulk import ref_to
from quorate_protocol.fields import BodyRef
from quorate_protocol.messages import AgentResult, Outcome


def carrying(text: bytes) -> BodyRef:
    blob = blob_of([text])
    return ref_to(blob).with_content(blob)


def outcome_of(*refs: BodyRef) -> Outcome:
    results = [AgentResult(agent=f"agent-{at}", status="replied", bulk=ref) for at, ref in enumerate(refs)]
    return Outcome(round=1, task="t", state="complete", quorum=1, bulk=refs[0], results=results, duration_s=1.0)


async def test_held_until_the_last_owner_lets_go() -> None:
    shelf = BlobShelf()
    ref = shelf.put("one", carrying(b"x"))
    assert ref.content is None
    shelf.put("other", carrying(b"x"))
    shelf.put("other", carrying(b"x"))
    assert (len(shelf), shelf.held_bytes) == (1, 1), "equal contents are one"
    blob = shelf.find(ref)
    assert blob is not None
    gone: weakref.ref[Blob] = weakref.ref(blob)
    del blob
    shelf.drop("one")
    shelf.drop("nobody")
    assert shelf.find(ref) is not None
    shelf.drop("other")
    assert (len(shelf), shelf.find(ref), gone()) == (0, None, None)


async def test_an_outcome_is_filled_with_what_is_there() -> None:
    shelf = BlobShelf()
    here, away = shelf.put("round", carrying(b"here")), ref_to(blob_of([b"away"]))
    filled = shelf.fill_outcome(outcome_of(here, away, here))
    assert [result.bulk and result.bulk.gone for result in filled.results] == [False, True, False]
    assert list(contents_of(filled)) == [here], "each once, and the answer among them"
    assert contents_of(filled, {here.digest}) == {}
    small = Outcome(round=1, task="t", state="complete", quorum=1, answer=b"x", results=[], duration_s=1.0)
    assert shelf.fill_outcome(small) is small


async def test_what_is_kept_on_disk_and_in_memory_has_a_ceiling_each(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, BlobBudget())
    size = 9 << 20

    async def spooled(text: bytes) -> BodyRef:
        data = text * size
        writer = store.writer(size, hashlib.sha256(data).digest())
        await writer.write(data)
        blob = await writer.finish()
        assert blob.is_on_disk
        return ref_to(blob).with_content(blob)

    shelf = BlobShelf(kept_bytes_max=size, kept_memory_bytes_max=4)
    for key, ref in (("a", await spooled(b"a")), ("b", carrying(b"bbbb")), ("c", await spooled(b"c"))):
        shelf.keep(key, outcome_of(shelf.put("round", ref)))
        shelf.drop("round")
    assert shelf.held_bytes == size + 4, "the older of those on disk has gone, and nothing in memory"
    shelf.keep("d", outcome_of(shelf.put("round", carrying(b"d"))))
    shelf.drop("round")
    assert shelf.held_bytes == size + 1
    shelf.close()


async def test_kept_for_a_key_for_a_while_and_so_many_bytes() -> None:
    shelf = BlobShelf(kept_s=0.05, kept_bytes_max=0, kept_memory_bytes_max=10)
    for key, text in (("a", b"aaaa"), ("b", b"bbbb"), ("c", b"cccc")):
        ref = shelf.put("round", carrying(text))
        shelf.keep(key, outcome_of(ref))
        shelf.drop("round")
    assert shelf.held_bytes == 8, "the oldest has gone"
    shelf.keep("c", outcome_of(ref_to(blob_of([b"another"]))))
    assert shelf.held_bytes == 4
    async with asyncio.timeout(5.0):
        while len(shelf):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    ref = shelf.put("round", carrying(b"last"))
    shelf.keep("d", outcome_of(ref))
    shelf.close()
    gc.collect()
    assert len(shelf) == 0
