"""A packed cache: one zip file in Zarr's ZipStore layout, entries uncompressed, read by ranges wherever it is."""

from __future__ import annotations

import io
import struct
import threading
import zipfile
from collections.abc import Iterator
from typing import Any, NoReturn

from kdcache.core.errors import CacheDamaged, CacheNotFound, StorageError
from kdcache.store.storage.base import Bytes, MissingKey, Storage, WrongSize

# A local file header: 30 bytes, then a name and an extra field, whose lengths are its last two numbers.
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_SIGNATURE = b"PK\x03\x04"
# The end of a zip file is read at once: it holds the central directory of caches of some hundred objects.
TAIL_BYTES = 64 << 10


class ZipStorage(Storage):
    """The objects in a zip file. Read-only.

    Args:
        parent: Storage that holds the file.
        name: Key of the file.
    """

    def __init__(self, parent: Storage, name: str) -> None:
        self._parent, self._name = parent, name
        self.url, self.in_flight = parent.place(name), parent.in_flight
        self._lock = threading.Lock()
        self._entries: dict[str, zipfile.ZipInfo] | None = None
        self._starts: dict[str, int] = {}
        self._bytes = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._parent, self._name)

    def _directory(self) -> dict[str, zipfile.ZipInfo]:
        """Entries by key, read at first use.

        Raises:
            CacheDamaged: this is no whole zip file.
            StorageError: an entry is compressed.
        """
        with self._lock:
            if self._entries is not None:
                return self._entries
            try:
                self._bytes = self._parent.size(self._name)
            except MissingKey as problem:
                raise CacheNotFound(
                    f"no cache at {self.url}: nothing is there", "a file written by kdcache pack", "check the path"
                ) from problem
            try:
                with zipfile.ZipFile(_RangeFile(self._parent, self._name, self._bytes)) as archive:
                    entries = {each.filename: each for each in archive.infolist() if not each.is_dir()}
            except (zipfile.BadZipFile, NotImplementedError, struct.error) as problem:
                raise CacheDamaged(
                    f"{self.url} is no whole zip file: {problem}",
                    "a file written by kdcache pack",
                    "obtain it again: a download may have been cut short",
                ) from problem
            for key, entry in entries.items():
                if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
                    raise StorageError(
                        f"{self.url}: the entry {key} is compressed or encrypted",
                        "entries stored uncompressed, which can be read by ranges",
                        "unzip it, and pack the folder with kdcache pack",
                    )
                if key.startswith("/") or "\\" in key or ".." in key.split("/"):
                    raise CacheDamaged(
                        f"{self.url} has an entry {key!r}", "names below the cache", "obtain it from its author again"
                    )
            self._entries = entries
            return entries

    def _entry(self, key: str) -> zipfile.ZipInfo:
        try:
            return self._directory()[key]
        except KeyError as problem:
            raise MissingKey(key) from problem

    def _start(self, key: str, entry: zipfile.ZipInfo) -> int:
        """Position of an entry's first byte, from its local header, which is read once."""
        if key not in self._starts:
            header = bytearray(_LOCAL_HEADER.size)
            self._fill(key, entry.header_offset, memoryview(header))
            signature, *_, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
            if signature != _SIGNATURE:
                raise WrongSize("has no header where the zip file's directory says")
            self._starts[key] = entry.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
        return self._starts[key]

    def _fill(self, key: str, start: int, *outs: memoryview) -> None:
        try:
            self._parent.read_range(self._name, start, *outs, size=self._bytes)
        except (MissingKey, WrongSize) as problem:
            raise WrongSize(f"cannot be read: {self.url} changed while it was open, or is cut short") from problem

    def read(self, key: str) -> bytes:
        entry = self._entry(key)
        data = bytearray(entry.file_size)
        try:
            if data:
                self._fill(key, self._start(key, entry), memoryview(data))
        except WrongSize as problem:
            raise CacheDamaged(f"{self.place(key)} {problem}", "the packed cache", "obtain it again") from problem
        return bytes(data)

    def read_range(self, key: str, start: int, *outs: memoryview, size: int) -> None:
        entry = self._entry(key)
        if entry.file_size != size or start + sum(out.nbytes for out in outs) > size:
            raise WrongSize(f"has {entry.file_size} bytes, the ledger says {size}")
        self._fill(key, self._start(key, entry) + start, *outs)

    def size(self, key: str) -> int:
        return self._entry(key).file_size

    def objects(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        for key, entry in sorted(self._directory().items()):
            if key.startswith(f"{prefix}/" if prefix else ""):
                yield key, entry.file_size

    def folders(self) -> list[str]:
        return sorted({key.split("/", 1)[0] for key in self._directory() if "/" in key})

    def is_empty(self) -> bool:
        return False

    def _refuse(self) -> NoReturn:
        raise StorageError(
            f"{self.url} is a packed cache, which is only read",
            "a folder or a URL of a cache",
            "write to a folder and pack it with kdcache pack, or unpack this one with kdcache unpack",
        )

    def write(self, key: str, data: Bytes) -> None:
        self._refuse()

    def create(self, key: str, data: Bytes) -> None:
        self._refuse()

    def delete(self, key: str) -> None:
        self._refuse()

    def check_root(self) -> None:
        self._refuse()


class _RangeFile(io.RawIOBase):
    """A file for `zipfile` to find the directory in; its last part is read at once, the rest as asked."""

    def __init__(self, storage: Storage, name: str, size: int) -> None:
        self._storage, self._name, self._size, self._at = storage, name, size, 0
        self._tail_at = max(size - TAIL_BYTES, 0)
        self._tail = self._read_range(self._tail_at, size - self._tail_at)

    def _read_range(self, start: int, count: int) -> bytes:
        data = bytearray(count)
        if count:
            try:
                self._storage.read_range(self._name, start, memoryview(data), size=self._size)
            except (MissingKey, WrongSize) as problem:
                raise zipfile.BadZipFile(f"it changed while it was read: {problem}") from problem
        return bytes(data)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise OSError("before the file's first byte")
        self._at = base + offset
        return self._at

    def read(self, count: int | None = -1) -> bytes:
        left = max(self._size - self._at, 0)
        count = left if count is None or count < 0 else min(count, left)
        if self._at >= self._tail_at:
            data = self._tail[self._at - self._tail_at :][:count]
        else:
            data = self._read_range(self._at, count)
        self._at += count
        return data
