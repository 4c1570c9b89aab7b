"""Rows in a window's order: each chunk is read and checked once an epoch, ahead of its use, in bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.store.chunk_reader import ChunkReader
from kdcache.store.layout import row_bytes
from kdcache.store.mmap_source import ChunkMap, can_map
from kdcache.store.sampler import Schedule, Window, WindowOrder
from kdcache.store.shard_codec import stored_dtype

# One window is used, and two are read ahead.
WINDOWS_HELD = 3
READERS = 2
WINDOW_BYTES = 48 << 20


def window_rows(reader: ChunkReader, names: Sequence[str] = ("logits",)) -> int:
    """Rows of one window: as many as `WINDOW_BYTES` hold of some arrays together."""
    arrays = [reader.manifest.array(name) for name in names]
    return max(WINDOW_BYTES // sum(row_bytes(array.dtype, array.row_shape) for array in arrays), 1)


@dataclass(frozen=True, slots=True)
class _Held:
    """A window that is in use or being read: its chunks one behind the other, unless they are mapped."""

    window: Window
    rows: NDArray[Any] | None
    reads: list[Future[None]]


class StreamedFeed:
    """Rows of the epoch's view in the order of a `WindowOrder`, and in no other.

    Of an uncompressed cache the readers check the chunks of the coming windows where they lie in mapped memory, and a
    batch is gathered from there: one copy in all, which matters because shuffled rows are bound by memory. Of a
    compressed one the readers decode the chunks into memory of the feed's own, and a batch is gathered from that.

    Args:
        order: that also drives the dataset.
    """

    kind = "streamed"

    def __init__(self, reader: ChunkReader, schedule: Schedule, order: WindowOrder, name: str = "logits") -> None:
        self._reader, self._schedule, self._order = reader, schedule, order
        self._array = reader.manifest.array(name)
        # A window is made of the largest chunks of the arrays that are read together; of others, of several each.
        self._chunks_a_unit = order.chunk_rows // self._array.chunk_rows
        self._chunks = -(-reader.manifest.dataset.length // self._array.chunk_rows)
        self._mappable = can_map(self._array) and reader.manifest.complete
        self._map: ChunkMap | None = None
        self._view = -1
        self._held: deque[_Held] = deque()
        self._position = 0
        self._free: list[NDArray[Any]] = []
        self._coming: Iterator[Window] = iter(())
        self._pool: ThreadPoolExecutor | None = None

    def start_epoch(self, epoch: int) -> None:
        """Drop what is held and begin to read the first windows of an epoch.

        Raises:
            CacheDamaged: a chunk of the first window fails its checksum.
        """
        if self._pool is None:
            # Made at first use, because threads do not survive a fork.
            self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="kdcache-reader")
        while self._held:
            self._drop()
        view = self._schedule(epoch)
        if view != self._view:
            self._map = ChunkMap(self._reader, view, self._array.name) if self._mappable else None
            self._view = view
        self._coming = self._order.windows(epoch)
        for _ in range(WINDOWS_HELD):
            self._fetch(self._pool)
        self._wait()

    def rows(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        """The next rows of the epoch's order, (n, *row_shape).

        Raises:
            IndexError: the indices are not the next ones.
            CacheDamaged: a chunk fails its checksum.
        """
        parts: list[NDArray[Any]] = []
        done = 0
        while done < len(indices):
            if self._held and self._pool and self._position == len(self._held[0].window.samples):
                self._drop()
                self._fetch(self._pool)
                self._wait()
            part = self._next(indices[done:])
            self._position += len(part)
            done += len(part)
            parts.append(part)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _next(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        """The rows of as many of the indices as the window in use has."""
        if self._held:
            held, here = self._held[0], slice(self._position, self._position + len(indices))
            samples = held.window.samples[here]
            if len(samples) and np.array_equal(samples, indices[: len(samples)]):
                if self._map is not None:
                    return self._map.gather(samples)
                assert held.rows is not None, "what is not mapped is held"
                rows: NDArray[Any] = held.rows.take(held.window.places[here], axis=0)
                return rows
        raise IndexError(f"sample {indices[0]} is not next in the epoch's order, and a streamed cache knows no other")

    def _wait(self) -> None:
        """Wait for the first window held."""
        for read in self._held[0].reads if self._held else []:
            read.result()

    def _fetch(self, pool: ThreadPoolExecutor) -> None:
        """Begin to read the next window."""
        window = next(self._coming, None)
        if window is None:
            return
        if self._map is not None:
            checks = [pool.submit(self._map.check, chunk) for _, chunk in self._chunks_of(window)]
            self._held.append(_Held(window, None, checks))
            return
        length = len(window.chunks) * self._order.chunk_rows
        rows = self._free.pop() if self._free else np.empty((0, *self._array.row_shape), stored_dtype(self._array))
        if len(rows) < length:
            rows = np.empty((length, *self._array.row_shape), stored_dtype(self._array))
        reads = [
            pool.submit(self._reader.read_into, self._array, self._view, chunk, rows[at : at + self._array.chunk_rows])
            for at, chunk in self._chunks_of(window)
        ]
        self._held.append(_Held(window, rows, reads))

    def _chunks_of(self, window: Window) -> Iterator[tuple[int, int]]:
        """The chunks of a window, each with its first row when all lie one behind the other."""
        for number, unit in enumerate(window.chunks.tolist()):
            for part in range(self._chunks_a_unit):
                chunk = unit * self._chunks_a_unit + part
                if chunk < self._chunks:
                    yield number * self._order.chunk_rows + part * self._array.chunk_rows, chunk

    def _drop(self) -> None:
        """Give up the first window held, once nothing reads into it."""
        held = self._held.popleft()
        for read in held.reads:
            if not read.cancel():
                read.exception()
        if self._map is not None:
            for _, chunk in self._chunks_of(held.window):
                self._map.release(chunk)
        if held.rows is not None:
            self._free.append(held.rows)
        self._position = 0
