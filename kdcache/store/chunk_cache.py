"""Verified chunks of remote caches on the local disk: kept across epochs and runs, bounded, oldest use out first."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from kdcache.core.atomic_files import TEMPORARY, make_folder, storage_errors
from kdcache.core.errors import UsageError

SUFFIX, LOCK = ".chunk", ".lock"
# When the limit is reached, chunks are removed until this fraction of it is left.
KEPT_FRACTION = 0.9
# A file that a killed process had begun to write is removed after this time.
STALE_S = 3600


class ChunkCache:
    """Chunks in the files of a folder, which several processes may share; goes to other processes by its folder.

    A name holds the chunk's place and its committed crc32c, so a chunk that a repair replaced is another entry. The
    size of all files is at most the limit, and is kept under a lock in the folder.

    Args:
        folder: Where the files are; made at once.
        limit_bytes: Size of all files together.

    Raises:
        UsageError: the limit is not positive.
        StorageError: the folder cannot be made.
    """

    def __init__(self, folder: str | os.PathLike[str], limit_bytes: int) -> None:
        if limit_bytes < 1:
            raise UsageError(f"--cache-disk is {limit_bytes} bytes", "at least 1 byte", "leave out --cache-dir")
        self.folder, self.limit_bytes = Path(folder), limit_bytes
        with storage_errors("write", self.folder):
            make_folder(self.folder)
            with self._locked() as lock:
                self._evict(lock, 0)

    def __reduce__(self) -> tuple[type[ChunkCache], tuple[Path, int]]:
        return type(self), (self.folder, self.limit_bytes)

    def path_of(self, *identity: object) -> Path:
        """File of a chunk of this identity."""
        digest = hashlib.sha256("\0".join(map(str, identity)).encode()).hexdigest()[:40]
        return self.folder / f"{digest}{SUFFIX}"

    def read(self, path: Path) -> bytes | None:
        """A chunk, marked as just used; None where it is not held."""
        with storage_errors("read", path):
            try:
                data = path.read_bytes()
                os.utime(path)
            except FileNotFoundError:
                return None
        return data

    def write(self, path: Path, *parts: memoryview | bytes) -> None:
        """Keep a chunk that was verified, and remove others where the limit asks for it."""
        size = sum(memoryview(part).nbytes for part in parts)
        if size > self.limit_bytes:
            return
        with storage_errors("write", path):
            descriptor, temporary = tempfile.mkstemp(suffix=TEMPORARY, dir=self.folder)
            try:
                with open(descriptor, "wb") as file:
                    for part in parts:
                        file.write(part)
                with self._locked() as lock:
                    if path.exists():
                        return
                    held = int(os.pread(lock, 32, 0) or 0) + size
                    if held > self.limit_bytes:
                        held = self._evict(lock, size) + size
                    os.replace(temporary, path)
                    self._record(lock, held)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary)

    def discard(self, path: Path) -> None:
        """Remove a chunk that is damaged."""
        with storage_errors("delete", path):
            path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        lock = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield lock
        finally:
            os.close(lock)

    def _record(self, lock: int, held: int) -> None:
        os.pwrite(lock, f"{held:<31}\n".encode(), 0)

    def _evict(self, lock: int, coming: int) -> int:
        """Remove the chunks whose last use is oldest until `coming` bytes fit; the bytes that are left."""
        chunks = []
        for entry in os.scandir(self.folder):
            with contextlib.suppress(FileNotFoundError):
                status = entry.stat()
                if entry.name.endswith(TEMPORARY) and time.time() - status.st_mtime > STALE_S:
                    os.unlink(entry.path)
                elif entry.name.endswith(SUFFIX):
                    chunks.append((status.st_mtime_ns, status.st_size, entry.path))
        held = sum(size for _, size, _ in chunks)
        if held + coming > self.limit_bytes:
            target = max(min(int(self.limit_bytes * KEPT_FRACTION), self.limit_bytes - coming), 0)
            for _, size, path in sorted(chunks):
                if held <= target:
                    break
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                held -= size
        self._record(lock, held)
        return held
