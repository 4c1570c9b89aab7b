"""Reading chunks that the ledger names: each is checked before any of it is used."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs.blosc import decompress  # type: ignore[import-untyped]
from numpy.typing import NDArray

from kdcache.core.atomic_files import storage_errors
from kdcache.core.errors import CacheDamaged, CacheIncomplete
from kdcache.store.layout import shard_path
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

REPAIR = "run the dump-teacher command that made it with --repair, or restore the cache from a copy"


class ChunkReader:
    """Reads the chunks of one split.

    Holds no open file and no state, so it may be used from several threads, and in forked and spawned processes.
    """

    def __init__(self, split_path: Path, manifest: Manifest, ledger: Ledger) -> None:
        self.path, self.manifest, self.ledger = split_path, manifest, ledger

    def rows(self, name: str, view: int, indices: NDArray[np.int64]) -> NDArray[Any]:
        """Some rows of an array, (n, *row_shape), in the order asked.

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
        path = shard_path(self.path, array, view if array.per_view else 0, shard)
        length, crcs = self.ledger.lookup(array, view, shard)
        if not length:
            rows = self.manifest.rows_of(shard)
            raise CacheIncomplete(
                f"{array.name}, view {view}, shard {shard} (samples {rows.start} to {rows.stop - 1}) of {self.path} "
                "is not committed",
                "rows that the dump has written",
                "run the same dump-teacher command again; it continues",
            )
        committed = int(crcs[position])
        try:
            with open_shard(path, length) as descriptor:
                if array.compression == "none":
                    _read_raw(descriptor, position * chunk_stride(array), out, committed)
                else:
                    self._read_compressed(descriptor, array, length, position, out, committed)
        except BadChunk as problem:
            raise self.damage(array, view, shard, problem) from problem

    def damage(self, array: ArrayRecord, view: int, shard: int, problem: BadChunk) -> CacheDamaged:
        """The error for a shard whose bytes are not the committed ones."""
        rows = self.manifest.rows_of(shard)
        return CacheDamaged(
            f"{array.name}, view {view}, shard {shard} (samples {rows.start} to {rows.stop - 1}) of {self.path} "
            f"is damaged: {problem}",
            "the bytes that the dump committed",
            REPAIR,
        )

    def _read_compressed(
        self, descriptor: int, array: ArrayRecord, length: int, position: int, out: NDArray[Any], committed: int
    ) -> None:
        offset, size = 0, length
        if index := index_bytes(self.manifest, array):
            table = decode_index(os.pread(descriptor, index, length - index))
            offset, size = (int(number) for number in table[position])
            if offset + size > length - index:
                raise BadChunk(f"its index places chunk {position} outside the file")
        data = os.pread(descriptor, size, offset)
        payload = data[:-CRC_BYTES]
        check_crc(payload, data[-CRC_BYTES:], committed)
        decompress(payload, out.reshape(-1).view(np.uint8))


@contextmanager
def open_shard(path: Path, length: int) -> Iterator[int]:
    """The descriptor of a shard's file that has the length the ledger says.

    Raises:
        BadChunk: it is missing or has another length.
        StorageError: the disk refuses.
    """
    if not path.exists():
        raise BadChunk("its file is missing")
    with storage_errors("read", path), open(path, "rb", buffering=0) as file:
        found = os.fstat(file.fileno()).st_size
        if found != length:
            raise BadChunk(f"its file has {found} bytes, the ledger says {length}")
        yield file.fileno()


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
    # Seen as unsigned, a negative index is larger than any length: one pass instead of two.
    if indices.size and indices.view(np.uint64).max() >= length:
        raise IndexError(f"sample indices run from {indices.min()} to {indices.max()}; the cache has {length} samples")


def _read_raw(descriptor: int, offset: int, out: NDArray[Any], committed: int) -> None:
    """Straight into the caller's memory: for large chunks a copy more is a third of the time."""
    stored = bytearray(CRC_BYTES)
    payload = out.reshape(-1).view(np.uint8)
    if os.preadv(descriptor, [payload.data, stored], offset) != payload.nbytes + CRC_BYTES:
        raise BadChunk("its file ends early")
    check_crc(payload, bytes(stored), committed)
