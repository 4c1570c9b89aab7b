"""Rows in a window's order: each chunk is read and checked once per epoch, ahead of its use, in bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.store.chunk_reader import ChunkReader
from kdcache.store.records import ArrayRecord
from kdcache.store.sampler import Schedule, Window, WindowSampler
from kdcache.store.shard_codec import stored_dtype

# One window is in use, and two are read ahead.
WINDOWS_HELD = 3
READERS = 2

Buffers = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class _Held:
    """A window in use or being read: its chunks, concatenated, for each array."""

    window: Window
    buffers: Buffers
    reads: list[Future[None]]


class StreamedSource:
    """Rows of the epoch's view in the order of a `WindowSampler`, and in no other.

    Args:
        names: The arrays to read; each one's chunk size divides the sampler's.
        sampler: The order that also drives the data.
    """

    def __init__(self, reader: ChunkReader, names: Sequence[str], schedule: Schedule, sampler: WindowSampler) -> None:
        self._reader, self._schedule, self._sampler = reader, schedule, sampler
        self._arrays = [reader.manifest.array(name) for name in names]
        self._view = -1
        self._held: deque[_Held] = deque()
        self._position = 0
        self._free: list[Buffers] = []
        self._coming: Iterator[Window] = iter(())
        self._pool: ThreadPoolExecutor | None = None

    def start_epoch(self, epoch: int) -> None:
        """Drop what is held and begin to read the first windows of an epoch.

        Raises:
            CacheDamaged: a chunk of the first window fails its checksum.
        """
        readers = max(READERS, self._reader.storage.in_flight)
        # Made at first use, because threads do not survive a fork.
        self._pool = self._pool or ThreadPoolExecutor(readers, thread_name_prefix="kdcache-reader")
        while self._held:
            self._drop()
        self._view = self._schedule(epoch)
        self._coming = self._sampler.windows(epoch)
        for _ in range(WINDOWS_HELD):
            self._read_ahead(self._pool)
        self._wait()

    def rows(self, indices: NDArray[np.int64]) -> Buffers:
        """The next rows of the epoch's order: for each array (n, *row_shape).

        Raises:
            IndexError: the indices are not the next ones.
            CacheDamaged: a chunk fails its checksum.
        """
        parts: list[Buffers] = []
        done = 0
        while done < len(indices):
            if self._held and self._pool and self._position == len(self._held[0].window.samples):
                self._drop()
                self._read_ahead(self._pool)
                self._wait()
            count, part = self._next(indices[done:])
            self._position += count
            done += count
            parts.append(part)
        if len(parts) == 1:
            return parts[0]
        return {array.name: np.concatenate([part[array.name] for part in parts]) for array in self._arrays}

    def _next(self, indices: NDArray[np.int64]) -> tuple[int, Buffers]:
        """The rows of as many of the indices as the window in use holds, and their number."""
        if self._held:
            held, here = self._held[0], slice(self._position, self._position + len(indices))
            samples = held.window.samples[here]
            if len(samples) and np.array_equal(samples, indices[: len(samples)]):
                places = held.window.places[here]
                return len(samples), {name: buffer.take(places, axis=0) for name, buffer in held.buffers.items()}
        raise IndexError(f"sample {indices[0]} is not next in the epoch's order, and a streamed cache has no other")

    def _wait(self) -> None:
        """Wait until the first window held is read."""
        for read in self._held[0].reads if self._held else []:
            read.result()

    def _read_ahead(self, pool: ThreadPoolExecutor) -> None:
        """Begin to read the next window."""
        window = next(self._coming, None)
        if window is None:
            return
        length = len(window.chunks) * self._sampler.chunk_rows
        buffers = self._free.pop() if self._free else {}
        for array in self._arrays:
            if len(buffers.get(array.name, ())) < length:
                buffers[array.name] = np.empty((length, *array.row_shape), stored_dtype(array))
        reads = [
            pool.submit(
                self._reader.read_into,
                array,
                self._view,
                chunk,
                buffers[array.name][start : start + array.chunk_rows],
            )
            for array in self._arrays
            for start, chunk in self._chunks_of(window, array)
        ]
        self._held.append(_Held(window, buffers, reads))

    def _chunks_of(self, window: Window, array: ArrayRecord) -> Iterator[tuple[int, int]]:
        """The chunks of a window, each with the position of its first row in the window's buffer."""
        per_unit = self._sampler.chunk_rows // array.chunk_rows
        chunks = -(-self._reader.manifest.dataset.length // array.chunk_rows)
        for number, unit in enumerate(window.chunks.tolist()):
            for part in range(per_unit):
                chunk = unit * per_unit + part
                if chunk < chunks:
                    yield number * self._sampler.chunk_rows + part * array.chunk_rows, chunk

    def _drop(self) -> None:
        """Release the buffers of the first window held, once nothing reads into them."""
        held = self._held.popleft()
        for read in held.reads:
            if not read.cancel():
                read.exception()
        self._free.append(held.buffers)
        self._position = 0
