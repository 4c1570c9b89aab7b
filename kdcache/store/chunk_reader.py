"""Reading chunks that the ledger names; each is checked before it is used."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numcodecs.blosc import decompress  # type: ignore[import-untyped]
from numpy.typing import NDArray

from kdcache.core.errors import CacheDamaged, CacheIncomplete
from kdcache.store.chunk_cache import ChunkCache
from kdcache.store.layout import shard_key
from kdcache.store.ledger import Ledger
from kdcache.store.manifest import Manifest
from kdcache.store.records import ArrayRecord
from kdcache.store.shard_codec import (
    CRC_BYTES,
    BadChunk,
    check_crc,
    chunk_stride,
    decode_index,
    index_bytes,
    stored_dtype,
)
from kdcache.store.storage.base import MissingKey, Storage, WrongSize

# An array, a view and a shard.
Place = tuple[ArrayRecord, int, int]

REPAIR = "run the dump-teacher command that made it with --repair, or restore the cache from a copy"


class ChunkReader:
    """Reads the chunks of one split.

    Args:
        storage: The split's part of the storage.
        chunk_cache: Where verified chunks are kept on the local disk; None for nowhere.

    Holds no open file and no state, so it may be used from several threads, and in forked and spawned processes.
    """

    def __init__(
        self, storage: Storage, manifest: Manifest, ledger: Ledger, chunk_cache: ChunkCache | None = None
    ) -> None:
        self.storage, self.manifest, self.ledger, self.chunk_cache = storage, manifest, ledger, chunk_cache

    def rows(self, name: str, view: int, indices: NDArray[np.int64]) -> NDArray[Any]:
        """Some rows of an array, (n, *row_shape), in the order of `indices`.

        Raises:
            IndexError: an index or the view is out of range.
            CacheDamaged: a chunk fails its checksum.
        """
        array = self.manifest.array(name)
        check_indices(indices, self.manifest.dataset.length)
        result = np.empty((len(indices), *array.row_shape), array.dtype)
        chunks = indices // array.chunk_rows
        for chunk in np.unique(chunks):
            here = np.flatnonzero(chunks == chunk)
            result[here] = self.chunk(array, view, int(chunk))[indices[here] % array.chunk_rows]
        return result

    def span(self, name: str, view: int, rows: range) -> NDArray[Any]:
        """Consecutive rows of an array, (n, *row_shape).

        Raises:
            CacheDamaged: a chunk fails its checksum.
        """
        array = self.manifest.array(name)
        result = np.empty((len(rows), *array.row_shape), stored_dtype(array))

        def read(chunk: int) -> None:
            first = chunk * array.chunk_rows
            start, stop = max(rows.start, first), min(rows.stop, first + array.chunk_rows)
            into = result[start - rows.start : stop - rows.start]
            if len(into) == array.chunk_rows:
                self.read_into(array, view, chunk, into)
            else:
                into[:] = self.chunk(array, view, chunk)[start - first : stop - first]

        chunks = range(rows.start // array.chunk_rows, -(-rows.stop // array.chunk_rows))
        if self.storage.in_flight == 1 or len(chunks) < 2:
            for chunk in chunks:
                read(chunk)
        else:
            with ThreadPoolExecutor(self.storage.in_flight, thread_name_prefix="kdcache-reader") as pool:
                for _ in pool.map(read, chunks):
                    pass
        return result

    def chunk(self, array: ArrayRecord, view: int, chunk: int) -> NDArray[Any]:
        """One chunk, (chunk_rows, *row_shape); rows past the last sample are padding.

        Raises:
            CacheDamaged: its bytes are not the committed ones.
        """
        result = np.empty((array.chunk_rows, *array.row_shape), stored_dtype(array))
        self.read_into(array, view, chunk, result)
        return result

    def read_into(self, array: ArrayRecord, view: int, chunk: int, out: NDArray[Any]) -> None:
        """Read one chunk into `out`, (chunk_rows, *row_shape), contiguous, in the stored dtype.

        Raises:
            CacheDamaged: its bytes are not the committed ones; `out` then holds nothing of use.
        """
        if not 0 <= view < self.manifest.readable_views:
            raise IndexError(f"view is {view}; the cache has {self.manifest.readable_views}")
        shard, position = divmod(chunk, self.manifest.shard_rows // array.chunk_rows)
        length, crcs = self.ledger.lookup(array, view, shard)
        if not length:
            rows = self.manifest.rows_of(shard)
            raise CacheIncomplete(
                f"{array.name}, view {view}, shard {shard} (samples {rows.start} to {rows.stop - 1}) of "
                f"{self.storage.url} is not committed",
                "rows that the dump has written",
                "run the same dump-teacher command again; it continues",
            )
        place, committed = (array, view, shard), int(crcs[position])
        target = out.reshape(-1).view(np.uint8)
        kept = None
        if self.chunk_cache is not None:
            kept = self.chunk_cache.path_of(self.storage.url, array, view, chunk, length, committed)
            if (data := self.chunk_cache.read(kept)) is not None:
                try:
                    self._decode(array, data, committed, target)
                except BadChunk:
                    self.chunk_cache.discard(kept)  # damaged on the local disk: fetched again
                else:
                    return
        try:
            if array.compression == "none":
                stored = bytearray(CRC_BYTES)
                self.shard_range(place, position * chunk_stride(array), target.data, memoryview(stored))
                check_crc(target, bytes(stored), committed)
                parts: tuple[memoryview | bytes, ...] = (target.data, bytes(stored))
            else:
                offset, size = self._find(place, position)
                whole = bytearray(size)
                self.shard_range(place, offset, memoryview(whole))
                self._decode(array, whole, committed, target)
                parts = (memoryview(whole),)
        except BadChunk as problem:
            raise self.damage(array, view, shard, problem) from problem
        if self.chunk_cache is not None and kept is not None:
            self.chunk_cache.write(kept, *parts)

    def _decode(self, array: ArrayRecord, data: bytes | bytearray, committed: int, target: NDArray[np.uint8]) -> None:
        """Check a stored chunk, which ends with its crc32c, and decode it into `target`, (bytes,).

        Raises:
            BadChunk: its bytes are not the committed ones.
        """
        payload = np.frombuffer(data, np.uint8, max(len(data) - CRC_BYTES, 0))
        check_crc(payload, bytes(data[-CRC_BYTES:]), committed)
        if array.compression == "none":
            if payload.size != target.size:
                raise BadChunk(f"it has {payload.size} bytes")
            target[:] = payload
        else:
            decompress(payload, target)

    def shard_range(self, place: Place, start: int, *outs: memoryview) -> None:
        """Fill buffers from a position in a shard that has the length that the ledger says.

        Raises:
            BadChunk: the shard is missing or has another length.
            StorageError: the storage refuses.
        """
        array, view, shard = place
        key = shard_key(array, view if array.per_view else 0, shard)
        try:
            self.storage.read_range(key, start, *outs, size=self.ledger.lookup(*place)[0])
        except MissingKey as problem:
            raise BadChunk("its file is missing") from problem
        except WrongSize as problem:
            raise BadChunk(f"its file {problem}") from problem

    def shard_index(self, place: Place) -> NDArray[np.uint64]:
        """Offset and length of each chunk of a shard, (chunks, 2).

        Raises:
            BadChunk: the shard is missing, has another length, or its index fails its checksum.
        """
        length = self.ledger.lookup(*place)[0]
        index = index_bytes(self.manifest, place[0])
        if not index:
            return np.array([[0, length]], np.uint64)
        if length < index:
            raise BadChunk(f"its file has {length} bytes, fewer than its index")
        data = bytearray(index)
        self.shard_range(place, length - index, memoryview(data))
        return decode_index(bytes(data))

    def _find(self, place: Place, position: int) -> tuple[int, int]:
        """Offset and length of a compressed chunk."""
        offset, size = (int(number) for number in self.shard_index(place)[position])
        if offset + size > self.ledger.lookup(*place)[0] - index_bytes(self.manifest, place[0]):
            raise BadChunk(f"its index places chunk {position} outside the file")
        return offset, size

    def damage(self, array: ArrayRecord, view: int, shard: int, problem: BadChunk) -> CacheDamaged:
        """The error for a shard whose bytes are not the committed ones."""
        rows = self.manifest.rows_of(shard)
        return CacheDamaged(
            f"{array.name}, view {view}, shard {shard} (samples {rows.start} to {rows.stop - 1}) of {self.storage.url} "
            f"is damaged: {problem}",
            "the bytes that the dump committed",
            REPAIR,
        )


def sample_indices(indices: Any) -> NDArray[np.int64]:
    """Indices as an array (n,), int64.

    Raises:
        TypeError: they are not integers in one dimension; numpy would round, or take a mask for zeros and ones.
    """
    array = np.asarray(indices)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise TypeError(
            f"sample indices have shape {array.shape} and dtype {array.dtype}: give integers in one dimension"
        )
    return array.astype(np.int64, copy=False)


def check_indices(indices: NDArray[np.int64], length: int) -> None:
    """Refuse indices that are not samples; numpy would take negative ones from the end.

    Raises:
        IndexError: with the range that was asked for.
    """
    # As an unsigned integer, a negative index is larger than any length: one pass instead of two.
    if indices.size and indices.view(np.uint64).max() >= length:
        raise IndexError(f"sample indices run from {indices.min()} to {indices.max()}; the cache has {length} samples")
