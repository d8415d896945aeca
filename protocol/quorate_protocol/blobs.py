"""Bodies of any size: small ones in memory, large ones in files of a spool directory that no name leads to.

A `Blob` does not change. It is made by a `BlobWriter`, from bytes as they come, or by `make_blob`, from what is in
memory anyway. Its memory, its file and its share of the budget are let go of by `close`, or when nobody holds it any
more; a view of it, and an array that is part of one, keeps what it needs.

A file is unlinked before its first byte is written: whatever happens to the process, nothing stays behind. Writing and
hashing it is done in threads, so that a slow disk holds up nobody else; what the page cache has is read at once.
"""

import _thread
import asyncio
import contextlib
import errno
import hashlib
import mmap
import os
import tempfile
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeAlias

from quorate_protocol.errors import BodyDigestWrong, BodyTooLarge, BodyTruncated, SpoolFailed, SpoolFull
from quorate_protocol.limits import BULK_BYTES_MAX

Buffer: TypeAlias = bytes | bytearray | memoryview

#: Bodies that are larger go to disk: eight times what goes inline, so that most need no file, and little enough that a
#: hundred of them at once fit the memory of a small machine.
SPOOL_BYTES: Final = 8 << 20

#: Bytes that are read, and sent, at once: 30 µs from the page cache, 160 µs to hash.
CHUNK_BYTES: Final = 256 << 10

#: Bytes that a thread hashes and writes at once: 1 ms of work for 30 µs of handing over. A writer holds twice as many.
_BATCH_BYTES: Final = 1 << 20

#: Files of more bytes are closed in a thread: it takes 50 ms for each GiB that the page cache has of them.
_CLOSE_BYTES: Final = 16 << 20

#: Bytes of bodies in memory and on disk in one process, unless it is set otherwise: thirty-two of the largest that stay
#: in memory, four of the largest that there are.
MEMORY_BYTES_MAX: Final = 32 * SPOOL_BYTES
DISK_BYTES_MAX: Final = 4 * BULK_BYTES_MAX


#: What one peer may hold of a process's budget, or one body of the largest size where that is more: so that no peer, by
#: error or on purpose, has everybody else turned away. Half, because a fleet may well have one operator that asks for
#: everything, or one agent that answers it.
PEER_SHARE: Final = 0.5


class BlobBudget:
    """How many bytes the bodies of one process, or of one of its peers, may hold, in memory and on disk.

    A body's bytes count as they come. One for which there is no room is refused when it is announced, before a byte of
    it was taken; announced bytes hold nothing, since whoever announces them need not send them. So of bodies that fit
    one by one and not together, one may run out of budget in the middle. A file counts as the least that it will have
    (`BlobStore.spool_bytes`), so that the bytes are a ceiling of how many are open, too.

    Args:
        memory_bytes_max: Bytes of bodies in memory.
        disk_bytes_max: Bytes of bodies on disk.
        part_of: Another budget in which the same bytes count as well.
    """

    def __init__(
        self,
        *,
        memory_bytes_max: int = MEMORY_BYTES_MAX,
        disk_bytes_max: int = DISK_BYTES_MAX,
        part_of: "BlobBudget | None" = None,
    ) -> None:
        self.memory_bytes_max = memory_bytes_max
        self.disk_bytes_max = disk_bytes_max
        self._memory = _Account()
        self._disk = _Account()
        self._part_of = part_of

    @property
    def memory_bytes(self) -> int:
        """Bytes that bodies in memory take now."""
        return self._memory.held_bytes

    @property
    def disk_bytes(self) -> int:
        """Bytes that bodies on disk take now."""
        return self._disk.held_bytes

    def for_peer(self, size_bytes_max: int) -> "BlobBudget":
        """The part that one peer may hold (`PEER_SHARE`), where its bodies may be of so many bytes."""
        return BlobBudget(
            memory_bytes_max=min(self.memory_bytes_max, max(int(self.memory_bytes_max * PEER_SHARE), SPOOL_BYTES)),
            disk_bytes_max=min(self.disk_bytes_max, max(int(self.disk_bytes_max * PEER_SHARE), size_bytes_max)),
            part_of=self,
        )

    def begin(self, size_bytes: int, *, on_disk: bool) -> "BudgetShare":
        """The share of a body that will have so many bytes; it holds none yet.

        Raises:
            SpoolFull: there is no room for them now.
        """
        share = BudgetShare(self, size_bytes, on_disk)
        share.check(size_bytes)
        return share

    def take(self, size_bytes: int, *, on_disk: bool) -> "BudgetShare":
        """A share that holds so many bytes at once.

        Raises:
            SpoolFull: over the budget.
        """
        share = self.begin(size_bytes, on_disk=on_disk)
        share.grow(size_bytes)
        return share

    def _accounts(self, on_disk: bool) -> "Iterator[tuple[_Account, int, str]]":
        """Where bytes count: the accounts, their ceilings, and what they are called."""
        account, bytes_max = (self._disk, self.disk_bytes_max) if on_disk else (self._memory, self.memory_bytes_max)
        where = "on disk" if on_disk else "in memory"
        yield account, bytes_max, where if self._part_of is None else f"{where} for one peer"
        if self._part_of is not None:
            yield from self._part_of._accounts(on_disk)


class BudgetShare:
    """The bytes that one body holds of a budget. They are free when nobody holds the share any more."""

    __slots__ = ("__weakref__", "_budget", "_held", "_on_disk", "_size_bytes")

    def __init__(self, budget: BlobBudget, size_bytes: int, on_disk: bool) -> None:
        self._budget = budget
        self._size_bytes = size_bytes
        self._on_disk = on_disk
        self._held = _Held()
        accounts = [account for account, _, _ in budget._accounts(on_disk)]
        weakref.finalize(self, _end_share, self._held, accounts).atexit = False

    def check(self, more_bytes: int) -> None:
        """Whether there is room for so many bytes more.

        Raises:
            SpoolFull: there is not.
        """
        for account, bytes_max, where in self._budget._accounts(self._on_disk):
            if account.held_bytes + more_bytes > bytes_max:
                raise SpoolFull(where, self._size_bytes, account.held_bytes, bytes_max)

    def grow(self, more_bytes: int) -> None:
        """Takes so many bytes more.

        Raises:
            SpoolFull: there is no room for them.
        """
        self.check(more_bytes)
        self._held.size_bytes += more_bytes
        for account, _, _ in self._budget._accounts(self._on_disk):
            account.add(more_bytes)


@dataclass(slots=True)
class _Held:
    """What a share holds; outlives it, so that it can be given back."""

    size_bytes: int = 0


def _end_share(held: _Held, accounts: "list[_Account]") -> None:
    for account in accounts:
        account.ended.append(held)


class _Account:
    """Bytes that are held. Shares may end in any thread, and in the middle of anything: they only leave a note."""

    def __init__(self) -> None:
        self._taken_bytes = 0
        self.ended: deque[_Held] = deque()

    @property
    def held_bytes(self) -> int:
        while self.ended:
            self._taken_bytes -= self.ended.popleft().size_bytes
        return self._taken_bytes

    def add(self, more_bytes: int) -> None:
        self._taken_bytes += more_bytes


class _SpoolFile:
    """A file without a name. It is closed when nobody holds it any more: a thread that reads or writes does."""

    __slots__ = ("__weakref__", "fd", "share")

    def __init__(self, directory: Path, share: object) -> None:
        self.fd = _open_unnamed(directory)
        self.share = share
        weakref.finalize(self, _close, self.fd).atexit = False

    def append(self, data: memoryview) -> None:
        written = 0
        while written < len(data):
            with data[written:] as rest:
                written += os.write(self.fd, rest)

    def read(self, offset: int, count: int) -> bytes:
        return os.pread(self.fd, count, offset)

    def read_cached(self, offset: int, count: int) -> Buffer:
        """What the page cache has of it, perhaps less than asked for; nothing where the disk has to be waited for."""
        data = bytearray(count)
        try:
            read = os.preadv(self.fd, [data], offset, os.RWF_NOWAIT)
        except (OSError, AttributeError):
            # Not cached, or the file system or the kernel cannot tell.
            return b""
        return data if read == count else memoryview(data)[:read]


class _Map(mmap.mmap):
    """A file's bytes as memory; keeps the file's share of the budget."""

    share: object = None


class Blob:
    """A body. `size_bytes` and `digest` (SHA-256) are what a reference to it says; `len` is its size, too."""

    __slots__ = ("__weakref__", "_file", "_map", "_parts", "_share", "digest", "size_bytes")

    def __init__(
        self, size_bytes: int, digest: bytes, *, parts: Iterable[Buffer] = (), file: Any = None, share: object = None
    ) -> None:
        self.size_bytes: Final = size_bytes
        self.digest: Final = digest
        self._parts: tuple[memoryview, ...] | None = tuple(memoryview(part).toreadonly() for part in parts)
        self._file: _SpoolFile | None = file
        self._share = share
        self._map: _Map | None = None

    def __len__(self) -> int:
        return self.size_bytes

    def __repr__(self) -> str:
        where = "closed" if self._parts is None else "in memory" if self._file is None else "on disk"
        return f"<Blob of {self.size_bytes} bytes, {where}, {self.digest[:4].hex()}…>"

    @property
    def is_on_disk(self) -> bool:
        """Whether it was spooled."""
        return self._file is not None

    def read(self, offset: int, count: int) -> bytes:
        """Up to `count` bytes from there on; fewer at the end only. Waits for the disk.

        Raises:
            RuntimeError: it is closed.
            OSError: the disk is broken.
        """
        file, parts = self._open()
        pieces: list[Buffer] = []
        while count > 0 and offset < self.size_bytes:
            piece = file.read(offset, count) if file is not None else _read_parts(parts, offset, count)
            if not piece:
                raise OSError(errno.EIO, f"a spooled body of {self.size_bytes} bytes ends at {offset}")
            pieces.append(piece)
            offset += len(piece)
            count -= len(piece)
        return b"".join(pieces)

    async def chunks(self, chunk_bytes: int = CHUNK_BYTES) -> AsyncGenerator[Buffer, None]:
        """All of it, piece by piece, each of at most `chunk_bytes` bytes. The loop does not wait for the disk.

        A blob that is closed meanwhile is read to its end.

        Raises: as `read`.
        """
        file, parts = self._open()
        if file is None:
            for part in parts:
                for at in range(0, len(part), chunk_bytes):
                    yield part[at : at + chunk_bytes]
            return
        offset = 0
        while offset < self.size_bytes:
            count = min(chunk_bytes, self.size_bytes - offset)
            chunk = file.read_cached(offset, count) or await asyncio.to_thread(file.read, offset, count)
            if not chunk:
                raise OSError(errno.EIO, f"a spooled body of {self.size_bytes} bytes ends at {offset}")
            yield chunk
            offset += len(chunk)

    def view(self) -> memoryview:
        """All of it as memory that can only be read: without a copy, unless it was made of several parts.

        Views outlive the blob; a file's bytes stay on disk, and in the budget, until the last one is gone.

        Raises:
            RuntimeError: it is closed.
            OSError: the file cannot be mapped.
        """
        file, parts = self._open()
        if file is not None:
            if self._map is None:
                self._map = _Map(file.fd, self.size_bytes, access=mmap.ACCESS_READ)
                self._map.share = file.share
            return memoryview(self._map)
        if len(parts) != 1:
            self._parts = parts = (memoryview(b"".join(parts)),)
        return parts[0]

    def close(self) -> None:
        """Lets go of its bytes. More calls do nothing."""
        self._parts = self._file = self._share = self._map = None

    def _open(self) -> tuple[_SpoolFile | None, tuple[memoryview, ...]]:
        if self._parts is None:
            raise RuntimeError("the blob is closed")
        return self._file, self._parts


def blob_of(parts: Iterable[Buffer]) -> Blob:
    """A blob of what is in memory anyway, such as an answer's arrays: nothing is copied, nothing counts in a budget.

    The parts must not change any more. Hashing takes the caller 0.7 s for a GiB; see `make_blob`.
    """
    views = [memoryview(part).cast("B") for part in parts]
    hasher = hashlib.sha256()
    for view in views:
        hasher.update(view)
    return Blob(sum(map(len, views)), hasher.digest(), parts=views)


async def make_blob(parts: Iterable[Buffer]) -> Blob:
    """As `blob_of`; large ones are hashed in a thread."""
    parts = tuple(parts)
    if sum(memoryview(part).nbytes for part in parts) <= CHUNK_BYTES:
        return blob_of(parts)
    return await asyncio.to_thread(blob_of, parts)


@dataclass(frozen=True, slots=True)
class BlobStore:
    """Where the bodies go that come to a process."""

    #: Directory for files; it must be there.
    spool_dir: Path
    budget: BlobBudget
    #: Largest body that is taken, in bytes.
    size_bytes_max: int = BULK_BYTES_MAX
    #: Bodies of more bytes go to disk.
    spool_bytes: int = SPOOL_BYTES

    def writer(self, size_bytes: int, digest: bytes) -> "BlobWriter":
        """For a body that is announced to be so.

        Raises:
            BodyTooLarge: over the ceiling.
            SpoolFull: there is no room for it now.
        """
        return BlobWriter(self, size_bytes, digest)

    def for_peer(self) -> "BlobStore":
        """The same for one peer, who may hold a part of the budget."""
        return replace(self, budget=self.budget.for_peer(self.size_bytes_max))


def make_private_store() -> BlobStore:
    """A store with a budget of its own, in the temporary directory.

    There is no directory for it to be left behind by a process that is killed: its files have no names, are for this
    user alone, and are made so that nobody's link can stand in their place (`O_TMPFILE`, or else `mkstemp`).
    """
    return BlobStore(Path(tempfile.gettempdir()), BlobBudget())


class BlobWriter:
    """Makes a blob of bytes as they come: `write` all of them, then `finish`; `close` whatever happened.

    After an error it is closed. One task at a time may use it.
    """

    def __init__(self, store: BlobStore, size_bytes: int, digest: bytes) -> None:
        if size_bytes > store.size_bytes_max:
            raise BodyTooLarge(size_bytes, store.size_bytes_max)
        self._store = store
        self._size_bytes = size_bytes
        self._digest = digest
        self._on_disk = size_bytes > store.spool_bytes
        self._share: BudgetShare | None = store.budget.begin(size_bytes, on_disk=self._on_disk)
        self._hasher = hashlib.sha256()
        #: All of it in memory; on disk, what comes after what is being written, and `_filled` bytes of it only.
        self._bytes = bytearray()
        self._filled = 0
        #: What was written last. The two take turns: new memory for each batch would cost as much as the writing.
        self._spare = bytearray()
        self._file: _SpoolFile | None = None
        self._writing: asyncio.Future[None] | None = None
        self._is_closed = False
        self._counted_bytes = 0
        #: Bytes that have come.
        self.received_bytes = 0

    async def write(self, chunk: Buffer) -> None:
        """Takes the next bytes. Waits while a slow disk is behind by a megabyte.

        Raises:
            BodyTooLarge: they are more than was announced.
            SpoolFull: there is no room for them any more.
            SpoolFailed: the disk does not take them.
        """
        if self._is_closed:
            raise RuntimeError("the writer is closed")
        try:
            self.received_bytes += len(chunk)
            if self.received_bytes > self._size_bytes:
                raise BodyTooLarge(self.received_bytes, self._size_bytes, announced=True)
            self._count(self.received_bytes)
            if not self._on_disk:
                self._bytes += chunk
                self._hasher.update(chunk)
                return
            self._bytes[self._filled : self._filled + len(chunk)] = chunk
            self._filled += len(chunk)
            if self._filled >= _BATCH_BYTES:
                self._count(self._store.spool_bytes)
                await self._flush()
        except BaseException:
            self.close()
            raise

    async def finish(self) -> Blob:
        """The blob.

        Raises:
            BodyTruncated: bytes are missing.
            BodyDigestWrong: they are not the ones that were announced.
            SpoolFailed: the disk does not take them.
        """
        if self._is_closed:
            raise RuntimeError("the writer is closed")
        try:
            if self.received_bytes < self._size_bytes:
                raise BodyTruncated(self.received_bytes, self._size_bytes)
            if self._on_disk:
                await self._flush()
                await self._wait_written()
            digest = self._hasher.digest()
            if digest != self._digest:
                raise BodyDigestWrong(digest, self._digest)
            parts = () if self._on_disk else (self._bytes,)
            return Blob(self._size_bytes, digest, parts=parts, file=self._file, share=self._share)
        finally:
            self.close()

    def close(self) -> None:
        """Lets go of everything that has not become a blob. More calls do nothing."""
        self._is_closed = True
        # A thread that is writing has its hands on the file: it is closed when both have let go.
        self._bytes, self._spare = bytearray(), bytearray()
        self._file = self._share = None
        if self._writing is not None:
            if self._writing.done() and not self._writing.cancelled():
                self._writing.exception()  # looked at, so that asyncio does not complain
            self._writing.cancel()

    def _count(self, held_bytes: int) -> None:
        """So many bytes count, if it is not more already."""
        assert self._share is not None, "it goes when the writer is closed"
        if held_bytes > self._counted_bytes:
            self._share.grow(held_bytes - self._counted_bytes)
            self._counted_bytes = held_bytes

    async def _flush(self) -> None:
        """Hands over what has come to a thread, when what was handed over before is written."""
        await self._wait_written()
        batch, self._bytes, self._spare = memoryview(self._bytes)[: self._filled], self._spare, self._bytes
        self._filled = 0
        self._writing = asyncio.get_running_loop().run_in_executor(None, self._spool, batch)

    async def _wait_written(self) -> None:
        if self._writing is not None:
            await self._writing
            self._writing = None

    def _spool(self, batch: memoryview) -> None:
        """In a thread, one call at a time."""
        file = self._file
        try:
            if self._is_closed:
                return
            if file is None:
                file = _SpoolFile(self._store.spool_dir, self._share)
                if not self._is_closed:
                    self._file = file
            self._hasher.update(batch)
            file.append(batch)
        except OSError as error:
            problem = error.strerror or str(error)
            # Without its frames: they hold the file, which must not live as long as what is raised.
            cause = error.with_traceback(None)
            raise SpoolFailed(self._store.spool_dir, self._size_bytes, problem) from cause
        finally:
            batch.release()
            del file  # likewise


def _read_parts(parts: tuple[memoryview, ...], offset: int, count: int) -> memoryview:
    """Bytes of the part that `offset` is in."""
    for part in parts:
        if offset < len(part):
            return part[offset : offset + count]
        offset -= len(part)
    return memoryview(b"")


def _close(fd: int) -> None:
    """Closes a file; a large one in a thread, because whoever closes it last empties the page cache of it.

    For finalizers, which come in the middle of anything: it takes no lock.
    """
    if os.fstat(fd).st_size > _CLOSE_BYTES:
        with contextlib.suppress(RuntimeError):  # no more threads
            _thread.start_new_thread(os.close, (fd,))
            return
    os.close(fd)


def _open_unnamed(directory: Path) -> int:
    """A new file that only its descriptor leads to, for this user alone."""
    if hasattr(os, "O_TMPFILE"):
        try:
            return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            # Where the file system has no such files, the open fails as one of a directory.
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
                raise
    fd, path = tempfile.mkstemp(prefix="quorate-body-", dir=directory)
    Path(path).unlink()
    return fd
