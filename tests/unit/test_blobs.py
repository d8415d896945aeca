"""Blobs: what is written comes out, in memory and on disk; what is wrong is said; nothing is left behind."""

import asyncio
import gc
import hashlib
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest

from links import noise, open_files, until
from quorate_protocol import blobs
from quorate_protocol.blobs import SPOOL_BYTES, Blob, BlobBudget, BlobStore, BlobWriter, blob_of, make_blob
from quorate_protocol.bodies import decode_body, encode_body, encode_body_parts
from quorate_protocol.errors import (
    BodyDigestWrong,
    BodyTooLarge,
    BodyTruncated,
    Code,
    SpoolFailed,
    SpoolFull,
)

#: Bodies of more bytes are spooled here, so that the tests need no large ones.
SPOOL_OVER = 1000


@pytest.fixture
def store(tmp_path: Path) -> Iterator[BlobStore]:
    """A store; at the end nothing of it may be left: no name, no open file, no share of the budget."""
    spool_dir = tmp_path / "spool"
    spool_dir.mkdir()
    store = BlobStore(spool_dir, BlobBudget(), size_bytes_max=1 << 30, spool_bytes=SPOOL_OVER)
    yield store
    gc.collect()
    assert list(spool_dir.iterdir()) == []
    assert [path for path in open_files() if path.startswith(str(spool_dir))] == []
    assert (store.budget.memory_bytes, store.budget.disk_bytes) == (0, 0)


@pytest.fixture
def small_file_system(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(tmp_path)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"only who may mount can fill a disk: {done.stderr.strip()}")
    try:
        yield tmp_path
    finally:
        gc.collect()
        subprocess.run(["umount", tmp_path], check=True)


def sha(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


async def write(store: BlobStore, data: bytes, chunk_bytes: int = 300_000) -> Blob:
    writer = store.writer(len(data), sha(data))
    for at in range(0, len(data), chunk_bytes):
        await writer.write(data[at : at + chunk_bytes])
    return await writer.finish()


async def read(blob: Blob, *args: int) -> bytes:
    return b"".join([bytes(chunk) async for chunk in blob.chunks(*args)])


SIZES = pytest.mark.parametrize("size", [0, 1, SPOOL_OVER, SPOOL_OVER + 1, 1 << 20, (5 << 20) + 17])


class TestWriting:
    @SIZES
    async def test_what_goes_in_comes_out(self, store: BlobStore, size: int) -> None:
        data = noise(size)
        blob = await write(store, data)
        assert blob.is_on_disk == (size > SPOOL_OVER)
        assert (len(blob), blob.size_bytes, blob.digest) == (size, size, sha(data))
        assert bytes(blob.view()) == data
        assert await read(blob) == data
        assert await read(blob, 70_001) == data
        assert blob.read(0, size) == data
        assert blob.read(size // 3, 1000) == data[size // 3 :][:1000]
        assert blob.read(size, 10) == b""

    @pytest.mark.parametrize("chunk_bytes", [1, 4096, 1 << 20, 3 << 20])
    async def test_in_pieces_of_any_size(self, store: BlobStore, chunk_bytes: int) -> None:
        data = noise(20_000 if chunk_bytes == 1 else 6 << 20)
        assert bytes((await write(store, data, chunk_bytes)).view()) == data

    async def test_a_chunk_may_change_once_it_was_taken(self, store: BlobStore) -> None:
        for size in (SPOOL_OVER, 3 << 20):
            writer = store.writer(size, sha(b"a" * size))
            chunk = bytearray(b"a" * (size // 10))
            for _ in range(10):
                await writer.write(chunk)
                chunk[:] = b"b" * len(chunk)
                chunk[:] = b"a" * len(chunk)
            await writer.write(b"a" * (size - 10 * len(chunk)))
            assert (await writer.finish()).read(0, 1) == b"a"

    async def test_the_file_has_no_name_and_is_for_its_user_alone(self, store: BlobStore) -> None:
        blob = await write(store, bytes(5000))
        assert list(store.spool_dir.iterdir()) == []
        assert blob._file is not None
        status = os.fstat(blob._file.fd)
        assert (status.st_mode & 0o777, status.st_nlink, status.st_size) == (0o600, 0, 5000)
        assert not os.get_inheritable(blob._file.fd)

    async def test_where_files_cannot_be_made_without_a_name(
        self, store: BlobStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delattr(os, "O_TMPFILE")
        blob = await write(store, bytes(5000))
        assert list(store.spool_dir.iterdir()) == []
        assert blob._file is not None
        assert os.fstat(blob._file.fd).st_mode & 0o777 == 0o600

    async def test_where_the_page_cache_cannot_be_asked(
        self, store: BlobStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delattr(os, "RWF_NOWAIT")
        data = noise(1 << 20)
        assert await read(await write(store, data)) == data


class TestWrong:
    @pytest.mark.parametrize("size", [100, 3 << 20])
    async def test_another_digest(self, store: BlobStore, size: int) -> None:
        writer = store.writer(size, sha(b"something else"))
        await writer.write(bytes(size))
        with pytest.raises(BodyDigestWrong) as caught:
            await writer.finish()
        assert (caught.value.digest, caught.value.expected) == (sha(bytes(size)), sha(b"something else"))
        assert sha(b"something else").hex() in str(caught.value)
        assert caught.value.code == Code.BODY_INVALID

    @pytest.mark.parametrize("size", [100, 3 << 20])
    async def test_bytes_are_missing(self, store: BlobStore, size: int) -> None:
        writer = store.writer(size, sha(bytes(size)))
        await writer.write(bytes(size - 1))
        with pytest.raises(BodyTruncated, match=f"ended after {size - 1} bytes of {size}"):
            await writer.finish()

    @pytest.mark.parametrize("size", [100, 3 << 20])
    async def test_bytes_too_many(self, store: BlobStore, size: int) -> None:
        writer = store.writer(size, sha(bytes(size)))
        await writer.write(bytes(size))
        with pytest.raises(BodyTooLarge, match=f"body of {size + 1} bytes is over the {size} that were announced"):
            await writer.write(b"x")
        with pytest.raises(RuntimeError, match="closed"):
            await writer.finish()

    def test_over_the_ceiling(self, store: BlobStore) -> None:
        with pytest.raises(BodyTooLarge, match="body of 1073741825 bytes is over the 1073741824 of the ceiling"):
            store.writer((1 << 30) + 1, bytes(32))

    async def test_a_writer_that_is_given_up_in_the_middle(self, store: BlobStore) -> None:
        for size in (SPOOL_OVER, 4 << 20):
            writer = store.writer(size, bytes(32))
            await writer.write(bytes(size // 2))
            writer.close()
            writer.close()
            with pytest.raises(RuntimeError, match="closed"):
                await writer.write(b"x")

    async def test_a_writer_that_is_dropped(self, store: BlobStore) -> None:
        writer = store.writer(4 << 20, bytes(32))
        await writer.write(bytes(3 << 20))
        assert store.budget.disk_bytes == 3 << 20


class TestBudget:
    async def test_what_has_come_counts_until_it_is_dropped(self, store: BlobStore) -> None:
        """What is only announced does not."""
        writers = [store.writer(SPOOL_OVER, bytes(32)), store.writer(SPOOL_OVER + 1, bytes(32))]
        assert (store.budget.memory_bytes, store.budget.disk_bytes) == (0, 0)
        await writers[0].write(bytes(300))
        await writers[1].write(bytes(400))
        assert (store.budget.memory_bytes, store.budget.disk_bytes) == (300, 400)
        writers[0].close()
        assert (store.budget.memory_bytes, store.budget.disk_bytes) == (0, 400)
        await writers[1].write(bytes(400))
        assert store.budget.disk_bytes == 800
        del writers[1:]

    @pytest.mark.parametrize(("spool_bytes", "where"), [(1 << 20, "in memory"), (0, "on disk")])
    async def test_in_the_middle(self, tmp_path: Path, spool_bytes: int, where: str) -> None:
        """Each of two would fit alone: one goes on, the other ends and holds nothing more."""
        budget = BlobBudget(memory_bytes_max=1000, disk_bytes_max=1000)
        store = BlobStore(tmp_path, budget, spool_bytes=spool_bytes)
        first, second = (store.writer(900, sha(bytes(900))) for _ in range(2))
        await first.write(bytes(600))
        await second.write(bytes(400))
        with pytest.raises(SpoolFull, match=f"a body of 900 bytes {where}: 1000 of 1000 are taken"):
            await first.write(bytes(1))
        await second.write(bytes(500))
        assert (await second.finish()).size_bytes == 900
        assert budget.memory_bytes + budget.disk_bytes == 0

    @pytest.mark.parametrize(("spool_bytes", "where"), [(SPOOL_BYTES, "in memory"), (0, "on disk")])
    async def test_one_peer_may_hold_half(self, tmp_path: Path, spool_bytes: int, where: str) -> None:
        budget = BlobBudget(memory_bytes_max=2 * SPOOL_BYTES, disk_bytes_max=2 * SPOOL_BYTES)
        store = BlobStore(tmp_path, budget, size_bytes_max=SPOOL_BYTES, spool_bytes=spool_bytes)
        greedy, other = store.for_peer(), store.for_peer()
        held = await write(greedy, bytes(SPOOL_BYTES - 1000))
        with pytest.raises(SpoolFull, match=f"a body of 1001 bytes {where} for one peer: 8387608 of 8388608 are taken"):
            greedy.writer(1001, bytes(32))
        also_held = await write(other, bytes(SPOOL_BYTES))
        assert budget.memory_bytes + budget.disk_bytes == 2 * SPOOL_BYTES - 1000
        with pytest.raises(SpoolFull, match=f"a body of 1001 bytes {where}: 16776216 of 16777216 are taken"):
            store.for_peer().writer(1001, bytes(32))
        del held, also_held
        assert budget.memory_bytes + budget.disk_bytes == 0
        assert (await write(greedy, bytes(SPOOL_BYTES))).size_bytes == SPOOL_BYTES

    @pytest.mark.parametrize(
        ("disk_bytes_max", "size_bytes_max", "expected"), [(100, 10, 50), (100, 80, 80), (100, 200, 100)]
    )
    def test_one_peer_may_hold_one_of_the_largest(
        self, disk_bytes_max: int, size_bytes_max: int, expected: int
    ) -> None:
        budget = BlobBudget(memory_bytes_max=1000, disk_bytes_max=disk_bytes_max).for_peer(size_bytes_max)
        assert (budget.memory_bytes_max, budget.disk_bytes_max) == (1000, expected)

    @pytest.mark.parametrize(("spool_bytes", "where"), [(1 << 20, "in memory"), (0, "on disk")])
    async def test_over_it(self, tmp_path: Path, spool_bytes: int, where: str) -> None:
        budget = BlobBudget(memory_bytes_max=1000, disk_bytes_max=1000)
        store = BlobStore(tmp_path, budget, spool_bytes=spool_bytes)
        blob = await write(store, bytes(600))
        with pytest.raises(SpoolFull, match=f"a body of 401 bytes {where}: 600 of 1000 are taken") as caught:
            store.writer(401, bytes(32))
        assert caught.value.code == Code.BUSY
        other = store.writer(400, bytes(32))
        await other.write(bytes(400))
        blob.close()
        assert (await write(store, bytes(600))).size_bytes == 600
        other.close()

    async def test_a_blob_counts_until_nobody_holds_it(self, store: BlobStore) -> None:
        blob = await write(store, bytes(2000))
        same = blob
        del blob
        assert store.budget.disk_bytes == 2000
        del same
        assert store.budget.disk_bytes == 0

    async def test_shares_that_end_in_many_threads(self) -> None:
        budget = BlobBudget()

        def take_and_drop(shares: list[Any]) -> None:
            while shares:
                shares.pop()

        stacks = [[budget.take(3, on_disk=True) for _ in range(2000)] for _ in range(4)]
        threads = [threading.Thread(target=take_and_drop, args=(shares,)) for shares in stacks]
        for thread in threads:
            thread.start()
        kept = [budget.take(5, on_disk=True) for _ in range(100)]
        for thread in threads:
            thread.join()
        assert budget.disk_bytes == 5 * len(kept)


class TestDisk:
    async def test_no_space(self, store: BlobStore) -> None:
        """A limit on the size of files stands for a full disk: the kernel fails the write, with another number."""
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
        try:
            with pytest.raises(SpoolFailed, match=r"a body of 8388608 bytes in .*: File too") as caught:
                await write(store, bytes(8 << 20))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert caught.value.code == Code.BUSY
        assert bytes((await write(store, b"there is space again" * 100)).view()) == b"there is space again" * 100

    async def test_a_full_file_system(self, small_file_system: Path) -> None:
        def free_bytes() -> int:
            status = os.statvfs(small_file_system)
            return status.f_bfree * status.f_bsize

        before = free_bytes()
        store = BlobStore(small_file_system, BlobBudget(), spool_bytes=0)
        with pytest.raises(SpoolFailed, match="No space left on device") as caught:
            await write(store, bytes(8 << 20))
        assert free_bytes() == before
        assert caught.value.size_bytes == 8 << 20
        assert await read(await write(store, bytes(1 << 20))) == bytes(1 << 20)

    async def test_no_directory(self, tmp_path: Path) -> None:
        store = BlobStore(tmp_path / "gone", BlobBudget(), spool_bytes=0)
        with pytest.raises(SpoolFailed, match="gone: No such file or directory"):
            await write(store, bytes(100))
        assert store.budget.disk_bytes == 0

    async def test_a_slow_disk_holds_up_the_writer_and_not_the_loop(
        self, store: BlobStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        goes_on = threading.Event()
        append = blobs._SpoolFile.append

        def append_slowly(file: Any, data: memoryview) -> None:
            assert goes_on.wait(20)
            append(file, data)

        monkeypatch.setattr(blobs._SpoolFile, "append", append_slowly)
        data = noise(8 << 20)
        writer = store.writer(len(data), sha(data))

        async def write_all() -> Blob:
            for at in range(0, len(data), 1 << 18):
                await writer.write(data[at : at + (1 << 18)])
            return await writer.finish()

        writing = asyncio.create_task(write_all())
        await until(lambda: writer.received_bytes >= 2 << 20)
        for _ in range(100):
            await asyncio.sleep(0)
        # Two batches: one that is being written, and one that waits for it.
        assert writer.received_bytes == 2 << 20
        goes_on.set()
        assert bytes((await writing).view()) == data

    async def test_given_up_while_the_disk_is_slow(self, store: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
        entered, goes_on, ended = threading.Event(), threading.Event(), threading.Event()
        append = blobs._SpoolFile.append

        def append_slowly(file: Any, data: memoryview) -> None:
            entered.set()
            assert goes_on.wait(20)
            append(file, data)
            ended.set()

        monkeypatch.setattr(blobs._SpoolFile, "append", append_slowly)
        writer: BlobWriter | None = store.writer(8 << 20, bytes(32))
        assert writer is not None
        await writer.write(bytes(1 << 20))
        writing = asyncio.create_task(writer.write(bytes(1 << 20)))
        await until(lambda writer=writer: entered.is_set() and writer.received_bytes == 2 << 20)
        writing.cancel()
        await asyncio.wait((writing,))
        assert writing.cancelled()
        assert writer._is_closed
        # Its file is open as long as the thread is in it: its number must not become another file's.
        assert any(path.startswith(str(store.spool_dir)) for path in open_files())
        goes_on.set()
        await until(ended.is_set)
        del writer, writing
        await until(lambda: store.budget.disk_bytes == 0)


class TestReading:
    async def test_a_view_is_the_file_and_outlives_the_blob(self, store: BlobStore) -> None:
        data = noise(1 << 20)
        blob = await write(store, data)
        view = blob.view()
        assert view.readonly
        assert numpy.shares_memory(numpy.frombuffer(view, "u1"), numpy.frombuffer(blob.view(), "u1"))
        blob.close()
        del blob
        assert store.budget.disk_bytes == 1 << 20
        assert view == data
        del view
        gc.collect()
        assert store.budget.disk_bytes == 0

    async def test_an_array_keeps_the_file(self, store: BlobStore) -> None:
        array = numpy.arange(1 << 18, dtype="<f4").reshape(512, -1)
        body = encode_body({"x": [array], "y": "text"})
        blob = await write(store, body)
        value = decode_body(blob.view())
        blob.close()
        del blob
        gc.collect()
        row = value["x"][0][300]
        del value
        gc.collect()
        assert store.budget.disk_bytes == len(body)
        assert (row == array[300]).all()
        assert not row.flags.writeable
        del row
        gc.collect()
        assert store.budget.disk_bytes == 0

    async def test_closed(self, store: BlobStore) -> None:
        for size in (10, 5000):
            blob = await write(store, bytes(size))
            blob.close()
            blob.close()
            assert (store.budget.memory_bytes, store.budget.disk_bytes) == (0, 0)
            for use in (blob.view, lambda blob=blob: blob.read(0, 1)):
                with pytest.raises(RuntimeError, match="the blob is closed"):
                    use()
            with pytest.raises(RuntimeError, match="the blob is closed"):
                await read(blob)
            assert "closed" in repr(blob)

    async def test_a_large_file_is_closed_in_a_thread_and_a_small_one_at_once(
        self, store: BlobStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(blobs, "_CLOSE_BYTES", 1 << 20)
        close, closed_by = os.close, dict[int, int]()

        def noted(fd: int) -> None:
            close(fd)
            closed_by[fd] = threading.get_ident()

        monkeypatch.setattr(os, "close", noted)
        for size, in_place in ((1 << 20, True), ((1 << 20) + 1, False)):
            blob = await write(store, bytes(size))
            assert blob._file is not None
            fd = blob._file.fd
            blob.close()
            assert not in_place or fd in closed_by
            await until(lambda fd=fd: fd in closed_by)
            assert (closed_by.pop(fd) == threading.get_ident()) == in_place

    async def test_closed_while_it_is_read(self, store: BlobStore) -> None:
        data = noise(1 << 20)
        blob = await write(store, data)
        pieces = []
        async for chunk in blob.chunks(100_000):
            blob.close()
            pieces.append(bytes(chunk))
        assert b"".join(pieces) == data

    async def test_by_many_at_once(self, store: BlobStore) -> None:
        data = noise(3 << 20)
        blob = await write(store, data)
        assert set(await asyncio.gather(*(read(blob, 50_000 + n) for n in range(10)))) == {data}

    async def test_a_file_that_was_cut_short(self, store: BlobStore) -> None:
        blob = await write(store, bytes(5000))
        assert blob._file is not None
        os.truncate(blob._file.fd, 100)
        with pytest.raises(OSError, match="a spooled body of 5000 bytes ends at 100"):
            await read(blob)
        with pytest.raises(OSError, match="a spooled body of 5000 bytes ends at 100"):
            blob.read(0, 5000)


class TestOfWhatIsInMemory:
    async def test_parts_are_not_copied(self) -> None:
        array = numpy.arange(1 << 20, dtype="u1")
        parts = encode_body_parts({"x": array})
        blob = await make_blob(parts)
        assert blob.digest == sha(b"".join(parts))
        assert not blob.is_on_disk
        chunks = [chunk async for chunk in blob.chunks()]
        assert b"".join(chunks) == b"".join(parts)
        assert max(map(len, chunks)) == blobs.CHUNK_BYTES
        assert numpy.shares_memory(numpy.frombuffer(chunks[1], "u1"), array)
        assert blob.read(10, 100_000) == b"".join(parts)[10 : 10 + 100_000]
        assert decode_body(blob.view())["x"].tolist() == array.tolist()

    def test_no_parts_and_empty_parts(self) -> None:
        assert bytes(blob_of([]).view()) == b""
        assert bytes(blob_of([b"", b"a", b"", bytearray(b"b")]).view()) == b"ab"

    def test_a_single_part_is_its_own_view(self) -> None:
        data = bytes(100)
        assert blob_of([data]).view().obj is data

    def test_items_of_several_bytes_are_taken_as_bytes(self) -> None:
        array = numpy.arange(10, dtype="<i4")
        assert blob_of([array.data]).view() == array.tobytes()


def test_files_are_gone_when_the_process_is_killed(tmp_path: Path) -> None:
    script = (
        "import asyncio, hashlib, os, sys, signal\n"
        "from pathlib import Path\n"
        "from quorate_protocol.blobs import *\n"
        "async def main():\n"
        "    writer = BlobStore(Path(sys.argv[1]), BlobBudget(), spool_bytes=0).writer(1 << 30, bytes(32))\n"
        "    for _ in range(8):\n"
        "        await writer.write(bytes(1 << 20))\n"
        "    assert os.fstat(writer._file.fd).st_size >= 1 << 20\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, timeout=60)
    assert done.returncode == -9, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_private_store_leaves_nothing_where_the_process_is_killed(tmp_path: Path) -> None:
    """And has no directory that could be left, or that another could have made before."""
    script = (
        "import asyncio, os, signal\n"
        "from quorate_protocol.blobs import *\n"
        "async def main():\n"
        "    store = make_private_store()\n"
        "    writer = store.writer(64 << 20, bytes(32))\n"
        "    for _ in range(8):\n"
        "        await writer.write(bytes(1 << 20))\n"
        "    status = os.fstat(writer._file.fd)\n"
        "    assert (status.st_mode & 0o777, status.st_nlink) == (0o600, 0)\n"
        "    assert os.readlink(f'/proc/self/fd/{writer._file.fd}').startswith(os.environ['TMPDIR'])\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert done.returncode == -9, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_real_threshold(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, BlobBudget())
    assert not store.writer(SPOOL_BYTES, bytes(32))._on_disk
    assert store.writer(SPOOL_BYTES + 1, bytes(32))._on_disk
