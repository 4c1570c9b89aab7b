"""Rows in a window's order: each chunk is read and checked once an epoch, ahead of its use, in bounded memory."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.cache.chunks import ChunkReader
from kdcache.cache.layout import row_bytes
from kdcache.cache.order import WindowOrder
from kdcache.cache.shards import stored_dtype

# One window is used, and two are read ahead.
WINDOWS_HELD = 3
READERS = 2
WINDOW_BYTES = 48 << 20


def window_chunks(reader: ChunkReader, name: str = "logits") -> int:
    """Chunks of one window: as many as `WINDOW_BYTES` hold, and at least 4, so that rows of several chunks mix."""
    array = reader.manifest.array(name)
    return max(WINDOW_BYTES // (array.chunk_rows * row_bytes(array.dtype, array.row_shape)), 4)


class StreamedFeed:
    """Rows of one view in the order of a `WindowOrder`, and in no other.

    Readers put the rows of each chunk straight to their places in the epoch's order, so that a batch is one copy of
    consecutive memory and the loop that trains has nothing to gather.

    Args:
        order: that also drives the dataset.
    """

    kind = "streamed"

    def __init__(self, reader: ChunkReader, view: int, order: WindowOrder, name: str = "logits") -> None:
        self._reader, self._view, self._order = reader, view, order
        self._array = reader.manifest.array(name)
        # Windows that are in use or being read: the samples in their order, their rows, and the pending reads.
        self._held: deque[tuple[NDArray[np.int64], NDArray[Any], list[Future[None]]]] = deque()
        self._position = 0
        self._free: list[NDArray[Any]] = []
        self._coming: Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]] = iter(())
        self._pool: ThreadPoolExecutor | None = None
        self._scratch = threading.local()

    def start_epoch(self, epoch: int) -> None:
        """Drop what is held and begin to read the first windows of an epoch."""
        if self._pool is None:
            # Made at first use, because threads do not survive a fork.
            self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="kdcache-reader")
        while self._held:
            self._drop()
        self._coming = self._order.windows(epoch)
        for _ in range(WINDOWS_HELD):
            self._fetch()
        self._wait()

    def rows(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        """The next rows of the epoch's order, (n, *row_shape).

        Raises:
            IndexError: the indices are not the next ones.
            CacheDamaged: a chunk fails its checksum.
        """
        result = np.empty((len(indices), *self._array.row_shape), stored_dtype(self._array))
        done = 0
        while done < len(indices):
            if self._held and self._position == len(self._held[0][0]):
                self._drop()
                self._fetch()
                self._wait()
            samples, rows, _ = self._held[0] if self._held else (indices[:0], result, [])
            here = slice(self._position, self._position + len(indices) - done)
            count = len(samples[here])
            if not count or not np.array_equal(samples[here], indices[done : done + count]):
                raise IndexError(
                    f"sample {indices[done]} is not next in the epoch's order, and a streamed cache knows no other"
                )
            result[done : done + count] = rows[self._position : self._position + count]
            self._position += count
            done += count
        return result

    def _wait(self) -> None:
        """Wait for the first window held."""
        self._position = 0
        for future in self._held[0][2] if self._held else []:
            future.result()

    def _fetch(self) -> None:
        """Begin to read the next window."""
        window = next(self._coming, None)
        if window is None or self._pool is None:
            return
        chunks, samples = window
        rows = self._free.pop() if self._free else np.empty((0, *self._array.row_shape), stored_dtype(self._array))
        if len(rows) < len(samples):
            rows = np.empty((len(samples), *self._array.row_shape), stored_dtype(self._array))
        # Places in the window by sample, so that each chunk's reader has its own, in the order of the chunk's rows.
        order = np.argsort(samples)
        ascending = samples[order]
        chunks = np.sort(chunks)
        parts = np.split(np.arange(len(samples)), np.searchsorted(ascending, chunks[1:] * self._array.chunk_rows))
        futures = [
            self._pool.submit(
                self._read, int(chunk), rows, order[part], ascending[part] - int(chunk) * self._array.chunk_rows
            )
            for chunk, part in zip(chunks, parts, strict=True)
        ]
        self._held.append((samples, rows, futures))

    def _read(self, chunk: int, rows: NDArray[Any], places: NDArray[np.int64], within: NDArray[np.int64]) -> None:
        """Read one chunk and put the rows that the window wants of it to their places."""
        if not hasattr(self._scratch, "chunk"):
            shape = (self._array.chunk_rows, *self._array.row_shape)
            self._scratch.chunk = np.empty(shape, stored_dtype(self._array))
        self._reader.read_into(self._array, self._view, chunk, self._scratch.chunk)
        whole = len(within) == self._array.chunk_rows
        rows[places] = self._scratch.chunk if whole else self._scratch.chunk[within]

    def _drop(self) -> None:
        """Give up the first window held, once nothing writes to its rows."""
        _, rows, futures = self._held.popleft()
        for future in futures:
            if not future.cancel():
                future.exception()
        self._free.append(rows)
        self._position = 0
