"""The uncompressed shards of one view as one array in virtual memory.

A batch of shuffled rows meets almost every shard, so looking into one map for each shard costs a Python loop a batch,
at 80 shards four times the copying itself. Here the shards lie in one range of addresses, and a batch is one gather.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.core.errors import StorageError
from kdcache.store.chunk_reader import ChunkReader, check_indices, open_shard
from kdcache.store.layout import chunks_per_shard, row_bytes, shard_path
from kdcache.store.manifest import ArrayRecord
from kdcache.store.sampler import Schedule
from kdcache.store.shard_codec import CRC_BYTES, BadChunk, check_crc, chunk_stride, stored_dtype

_MAP_FIXED = 0x10  # on Linux and macOS alike; Python's mmap module does not name it


def can_map(array: ArrayRecord) -> bool:
    """Whether the stored bytes are the values."""
    return array.compression == "none" and sys.byteorder == "little" and hasattr(mmap, "MAP_SHARED")


class ChunkMap:
    """The chunks of one view in mapped memory, of which the system keeps as much as it has room for.

    Raises:
        CacheDamaged: a shard is missing or has another length than the ledger says.
        StorageError: the system refuses to map it.
    """

    def __init__(self, reader: ChunkReader, view: int, name: str = "logits") -> None:
        manifest, array = reader.manifest, reader.manifest.array(name)
        self._reader, self._array, self._view = reader, array, view
        self._chunks_a_shard = chunks_per_shard(manifest, array)
        files = [
            (shard_path(reader.path, array, view, shard), reader.ledger.lookup(array, view, shard)[0])
            for shard in range(manifest.shards)
        ]
        page = mmap.ALLOCATIONGRANULARITY
        self._stride = -(-max(length for _, length in files) // page) * page
        # Python's own map of nothing reserves the addresses, and gives them back with everything laid over them.
        self._range = mmap.mmap(-1, self._stride * len(files), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ)
        self._bytes = np.frombuffer(self._range, np.uint8)
        base = self._bytes.ctypes.data
        for shard, (path, length) in enumerate(files):
            try:
                with open_shard(path, length) as descriptor:
                    _map_over(base + shard * self._stride, length, descriptor)
            except BadChunk as problem:
                raise reader.damage(array, view, shard, problem) from problem
        dtype, row = stored_dtype(array), row_bytes(array.dtype, array.row_shape)
        # A row may begin at every element, the checksums between chunks being one or two elements long (or half of a
        # float64): numpy then gathers by one number a row, which is faster than by shard, chunk and row.
        self._step = math.gcd(dtype.itemsize, CRC_BYTES)
        count = (len(self._bytes) - row) // self._step + 1
        # A row is one opaque item, because numpy copies such a one at once and a row of numbers one by one.
        self._rows = np.ndarray((count,), f"V{row}", self._bytes, strides=(self._step,))
        self._dtype = dtype
        chunks = np.arange(-(-manifest.dataset.length // array.chunk_rows))
        shards, positions = np.divmod(chunks, self._chunks_a_shard)
        # A row begins at its index times its length, plus what lies between its chunk and those before. Few operations
        # on few numbers, because each costs a hundredth of the gather itself.
        self._row_steps = row // self._step
        starts = (shards * self._stride + positions * chunk_stride(array)) // self._step
        self._between = starts - chunks * array.chunk_rows * self._row_steps
        self.chunks = len(chunks)

    def gather(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        """Some rows, (n, *row_shape), in the order asked; of chunks that were checked.

        Raises:
            IndexError: an index is out of range.
        """
        check_indices(indices, self._reader.manifest.dataset.length)
        starts = self._between[indices // self._array.chunk_rows]
        starts += indices * self._row_steps
        values: NDArray[Any] = self._rows[starts].view(self._dtype)
        return values.reshape(len(indices), *self._array.row_shape)

    def check(self, chunk: int) -> None:
        """Compare a chunk with the ledger, which also brings it into memory.

        Raises:
            CacheDamaged: its bytes are not the committed ones.
        """
        shard, position = divmod(chunk, self._chunks_a_shard)
        start, stop = self._extent(chunk)
        committed = int(self._reader.ledger.lookup(self._array, self._view, shard)[1][position])
        try:
            check_crc(self._bytes[start : stop - CRC_BYTES], self._bytes[stop - CRC_BYTES : stop].tobytes(), committed)
        except BadChunk as problem:
            raise self._reader.damage(self._array, self._view, shard, problem) from problem

    def release(self, chunk: int) -> None:
        """Give a chunk's memory back; it is read again from its file when it is next looked at."""
        start, stop = self._extent(chunk)
        start -= start % mmap.PAGESIZE
        self._range.madvise(mmap.MADV_DONTNEED, start, stop - start)

    def _extent(self, chunk: int) -> tuple[int, int]:
        shard, position = divmod(chunk, self._chunks_a_shard)
        start = shard * self._stride + position * chunk_stride(self._array)
        return start, start + chunk_stride(self._array)


class MappedFeed:
    """Rows of the epoch's view from mapped memory; a chunk is checked when a row of it is first asked for."""

    kind = "mapped"

    def __init__(self, reader: ChunkReader, schedule: Schedule, name: str = "logits") -> None:
        self._reader, self._schedule, self._name = reader, schedule, name
        self._length, self._chunk_rows = reader.manifest.dataset.length, reader.manifest.array(name).chunk_rows
        # Maps of all views that were used: they take addresses, and the system decides what of them is in memory.
        self._views: dict[int, _CheckedMap] = {}

    def start_epoch(self, epoch: int) -> None:
        """Map the epoch's view, if it is not.

        Raises:
            CacheDamaged, StorageError: as for `ChunkMap`.
        """
        view = self._schedule(epoch)
        if view not in self._views:
            chunk_map = ChunkMap(self._reader, view, self._name)
            self._views[view] = _CheckedMap(chunk_map, np.zeros(chunk_map.chunks, np.bool_))
        self._current = self._views[view]

    def rows(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        """Some rows, (n, *row_shape), in the order asked.

        Raises:
            IndexError: an index is out of range.
            CacheDamaged: a chunk fails its checksum.
        """
        current = self._current
        if not current.all_checked:
            check_indices(indices, self._length)
            chunks = indices // self._chunk_rows
            for chunk in np.unique(chunks[~current.checked[chunks]]):
                current.map.check(int(chunk))
                current.checked[chunk] = True
            current.all_checked = bool(current.checked.all())
        return current.map.gather(indices)


@dataclass(slots=True)
class _CheckedMap:
    """A map and which of its chunks were checked, (chunks,)."""

    map: ChunkMap
    checked: NDArray[np.bool_]
    all_checked: bool = False


def _map_over(address: int, length: int, descriptor: int) -> None:
    """Lay a file over a part of a range of addresses that is ours."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
    if libc.mmap(address, length, mmap.PROT_READ, mmap.MAP_SHARED | _MAP_FIXED, descriptor, 0) != address:
        problem = os.strerror(ctypes.get_errno())
        raise StorageError(f"could not map {length} bytes: {problem}", "address space", "use --feed streamed")
