"""Rows in a window's order: each chunk is read and checked once an epoch, ahead of its use, in bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.cache.chunks import ChunkReader
from kdcache.cache.order import WindowOrder
from kdcache.cache.shards import stored_dtype

# One window is used, and two are read ahead.
WINDOWS_HELD = 3
READERS = 2
WINDOW_BYTES = 48 << 20


def window_chunks(reader: ChunkReader, name: str = "logits") -> int:
    """Chunks of one window: as many as `WINDOW_BYTES` hold, and at least 4, so that rows of several chunks mix."""
    array = reader.manifest.array(name)
    chunk = array.chunk_rows * stored_dtype(array).itemsize * int(np.prod(array.row_shape, dtype=np.int64))
    return max(WINDOW_BYTES // chunk, 4)


class StreamedFeed:
    """Rows of one view in the order of a `WindowOrder`, and in no other.

    Args:
        order: that also drives the dataset.
    """

    kind = "streamed"

    def __init__(self, reader: ChunkReader, view: int, order: WindowOrder, name: str = "logits") -> None:
        self._reader, self._view, self._order = reader, view, order
        self._array = reader.manifest.array(name)
        chunks = -(-reader.manifest.dataset.length // self._array.chunk_rows)
        # Where each chunk's rows begin in the buffer; -1 while it is not there.
        self._place = np.full(chunks, -1, np.int64)
        self._buffer: NDArray[Any] | None = None
        self._free: list[int] = []
        # Windows that are held or being read, the one in use first: their chunks, slots and pending reads.
        self._held: deque[tuple[NDArray[np.int64], list[int], list[Future[None]]]] = deque()
        self._in_use = False
        self._coming: Iterator[NDArray[np.int64]] = iter(())
        self._pool: ThreadPoolExecutor | None = None

    def start_epoch(self, epoch: int) -> None:
        """Drop what is held and begin to read the first windows of an epoch."""
        if self._pool is None:
            # Made at first use, because threads do not survive a fork.
            self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="kdcache-reader")
        while self._held:
            self._drop()
        windows = self._order.windows(epoch)
        if self._buffer is None:
            slots = WINDOWS_HELD * max(map(len, windows), default=0)
            shape = (slots * self._array.chunk_rows, *self._array.row_shape)
            self._buffer = np.empty(shape, stored_dtype(self._array))
            self._free = list(range(slots))
        self._coming = iter(windows)
        for _ in range(WINDOWS_HELD):
            self._fetch()

    def rows(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        """Some rows, (n, *row_shape), in the order asked; the next ones of the epoch's order.

        Raises:
            IndexError: they are not the next ones.
            CacheDamaged: a chunk fails its checksum.
        """
        chunks, within = np.divmod(indices, self._array.chunk_rows)
        parts: list[NDArray[Any]] = []
        done = 0
        while True:
            places = self._place[chunks[done:]]
            absent = places < 0
            here = int(absent.argmax()) if absent.any() else len(places)
            assert self._buffer is not None, "start_epoch comes first"
            parts.append(np.take(self._buffer, places[:here] + within[done : done + here], axis=0))
            done += here
            if done == len(indices):
                return parts[0] if len(parts) == 1 else np.concatenate(parts)
            self._next_window(int(indices[done]))

    def _next_window(self, sample: int) -> None:
        """Give up the window in use, whose rows have all been asked for, and wait for the next."""
        if self._in_use:
            self._drop()
            self._fetch()
        if not self._held:
            raise IndexError(f"sample {sample} is not next in the epoch's order, and a streamed cache knows no other")
        chunks, slots, futures = self._held[0]
        for future in futures:
            future.result()
        self._place[chunks] = np.array(slots) * self._array.chunk_rows
        self._in_use = True

    def _fetch(self) -> None:
        chunks = next(self._coming, None)
        if chunks is None or self._pool is None or self._buffer is None:
            return
        slots = [self._free.pop() for _ in chunks]
        rows = self._array.chunk_rows
        futures = [
            self._pool.submit(
                self._reader.read_into,
                self._array,
                self._view,
                int(chunk),
                self._buffer[slot * rows : (slot + 1) * rows],
            )
            for chunk, slot in zip(chunks, slots, strict=True)
        ]
        self._held.append((chunks, slots, futures))

    def _drop(self) -> None:
        """Free the slots of the first window held, once nothing writes to them."""
        chunks, slots, futures = self._held.popleft()
        for future in futures:
            if not future.cancel():
                future.exception()
        self._place[chunks] = -1
        self._free += slots
        self._in_use = False
