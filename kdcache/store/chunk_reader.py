"""Reading chunks that the ledger names; each is checked before it is used."""

from __future__ import annotations

from typing import Any

import numpy as np
from numcodecs.blosc import decompress  # type: ignore[import-untyped]
from numpy.typing import NDArray

from kdcache.core.errors import CacheDamaged, CacheIncomplete
from kdcache.store.layout import shard_key
from kdcache.store.ledger import Ledger
from kdcache.store.manifest import ArrayRecord, Manifest
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

    Holds no open file and no state, so it may be used from several threads, and in forked and spawned processes.
    """

    def __init__(self, storage: Storage, manifest: Manifest, ledger: Ledger) -> None:
        self.storage, self.manifest, self.ledger = storage, manifest, ledger

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
        for chunk in range(rows.start // array.chunk_rows, -(-rows.stop // array.chunk_rows)):
            first = chunk * array.chunk_rows
            start, stop = max(rows.start, first), min(rows.stop, first + array.chunk_rows)
            into = result[start - rows.start : stop - rows.start]
            if len(into) == array.chunk_rows:
                self.read_into(array, view, chunk, into)
            else:
                into[:] = self.chunk(array, view, chunk)[start - first : stop - first]
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
        try:
            if array.compression == "none":
                payload, stored = out.reshape(-1).view(np.uint8), bytearray(CRC_BYTES)
                self.shard_range(place, position * chunk_stride(array), payload.data, memoryview(stored))
                check_crc(payload, bytes(stored), committed)
            else:
                offset, size = self._find(place, position)
                data = bytearray(size)
                self.shard_range(place, offset, memoryview(data))
                payload = np.frombuffer(data, np.uint8, max(size - CRC_BYTES, 0))
                check_crc(payload, bytes(data[-CRC_BYTES:]), committed)
                decompress(payload, out.reshape(-1).view(np.uint8))
        except BadChunk as problem:
            raise self.damage(array, view, shard, problem) from problem

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
