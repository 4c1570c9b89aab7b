"""Row sources: the stored rows of each epoch's view by sample index, held in memory or streamed from chunks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kdcache.core.config import CACHE_MEMORY, ROW_SOURCES, SHUFFLES
from kdcache.core.errors import UsageError
from kdcache.core.specs import parse_bytes
from kdcache.store.chunk_reader import ChunkReader, check_indices
from kdcache.store.layout import row_bytes
from kdcache.store.sampler import ExactSampler, Sampler, Schedule, WindowSampler
from kdcache.store.stream_source import StreamedSource

# Bytes of the rows that are shuffled together where a view is streamed.
WINDOW_BYTES = 48 << 20

# Stored rows by the name of their array, each (n, *row_shape).
Rows = Mapping[str, Any]


class RowSource(Protocol):
    """Stored rows of the epoch's view."""

    def start_epoch(self, epoch: int) -> None:
        """Prepare the view of an epoch; called before its first rows."""
        ...

    def rows(self, indices: NDArray[np.int64]) -> Rows:
        """Rows of some samples in the order given."""
        ...


class MemorySource:
    """Holds the whole view of an epoch in memory, checked as it was read, and reads the next epoch's view meanwhile."""

    def __init__(self, reader: ChunkReader, names: Sequence[str], schedule: Schedule) -> None:
        self._reader, self._names, self._schedule = reader, names, schedule
        self._view: int | None = None
        self._arrays: dict[str, NDArray[Any]] = {}
        self._coming: tuple[int, Future[dict[str, NDArray[Any]]]] | None = None
        self._pool: ThreadPoolExecutor | None = None

    def start_epoch(self, epoch: int) -> None:
        """Load the epoch's view, and begin to read the next one's.

        Raises:
            CacheDamaged: a chunk fails its checksum.
        """
        view, following = self._schedule(epoch), self._schedule(epoch + 1)
        if view != self._view:
            if self._coming is not None and self._coming[0] == view:
                self._arrays = self._coming[1].result()
            else:
                self._arrays = self._read(view)
            self._view, self._coming = view, None
        if following != view and self._coming is None:
            # Made at first use, because threads do not survive a fork.
            self._pool = self._pool or ThreadPoolExecutor(1, thread_name_prefix="kdcache-reader")
            self._coming = following, self._pool.submit(self._read, following)

    def rows(self, indices: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        check_indices(indices, self._reader.manifest.dataset.length)
        return {name: np.take(values, indices, axis=0) for name, values in self._arrays.items()}

    def _read(self, view: int) -> dict[str, NDArray[Any]]:
        everything = range(self._reader.manifest.dataset.length)
        return {name: self._reader.span(name, view, everything) for name in self._names}


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How a cache is read.

    Attributes:
        memory: Host-memory budget, such as `4GiB`; a view that fits is loaded whole.
        row_source: `memory` or `streamed`; `auto` chooses by the budget.
        shuffle: `exact` or `window`; `auto` is exact unless the view is streamed.

    Raises:
        UsageError: an unknown size, row source or shuffle.
    """

    memory: str = CACHE_MEMORY
    row_source: str = "auto"
    shuffle: str = "auto"

    def __post_init__(self) -> None:
        parse_bytes(self.memory)
        for name, value, known in (("row_source", self.row_source, ROW_SOURCES), ("shuffle", self.shuffle, SHUFFLES)):
            if value not in known:
                raise UsageError(f"{name} is {value!r}", f"one of {', '.join(known)}")


# Arrays of one cache that are read together.
Part = tuple[ChunkReader, Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class ReadPlan:
    """The row source and the order of samples for one or several caches that are read side by side.

    Attributes:
        row_source: `memory` or `streamed`.
        shuffle: `exact` or `window`.
        chunk_rows: Rows of the largest chunk; windows are made of these.
        window_chunks: Chunks per window.
        reason: Why this row source was chosen.
    """

    row_source: str
    shuffle: str
    chunk_rows: int
    window_chunks: int
    reason: str

    def __str__(self) -> str:
        return f"row source {self.row_source} ({self.reason}), shuffle {self.shuffle}"

    def sampler(self, indices: NDArray[np.int64], seed: int) -> Sampler:
        """The order of samples, which must drive the data.

        Args:
            indices: The samples of each epoch, (n,), ascending.
        """
        if self.shuffle == "exact":
            return ExactSampler(indices, seed)
        return WindowSampler(indices, seed, chunk_rows=self.chunk_rows, window_chunks=self.window_chunks)

    def source(self, part: Part, schedule: Schedule, sampler: Sampler) -> RowSource:
        """The row source of one cache, for samples in the order of `sampler`."""
        reader, names = part
        if self.row_source == "memory":
            return MemorySource(reader, names, schedule)
        assert isinstance(sampler, WindowSampler), "a view is streamed in windows"
        return StreamedSource(reader, names, schedule, sampler)


def plan_reading(parts: Sequence[Part], options: ReadOptions) -> ReadPlan:
    """Choose the row source: memory where the views of all caches fit the budget, else streamed.

    Raises:
        UsageError: the options exclude each other, or a partial cache.
    """
    view_bytes = held_bytes = 0
    rows_per_window, chunk_rows, partial = [], 1, False
    for reader, names in parts:
        arrays = [reader.manifest.array(name) for name in names]
        bytes_per_row = sum(row_bytes(array.dtype, array.row_shape) for array in arrays)
        view_bytes += bytes_per_row * reader.manifest.dataset.length
        # With several views the next one is read ahead.
        held_bytes += bytes_per_row * reader.manifest.dataset.length * min(reader.manifest.readable_views, 2)
        rows_per_window.append(max(WINDOW_BYTES // bytes_per_row, 1))
        chunk_rows = max(chunk_rows, *(array.chunk_rows for array in arrays))
        partial = partial or not reader.manifest.complete
    row_source, reason = options.row_source, "as asked"
    if row_source == "memory" and partial:
        raise UsageError("the cache is partial, and --row-source is memory", "a finished cache", "leave it out")
    if row_source == "auto":
        fits = held_bytes <= parse_bytes(options.memory) and not partial
        row_source = "memory" if fits else "streamed"
        size = f"a view is {view_bytes:,} bytes, the budget {options.memory}"
        reason = "the cache is partial" if partial else size
    if row_source == "streamed" and options.shuffle == "exact":
        raise UsageError(
            f"exact shuffling reads rows at random, and a view of {view_bytes:,} bytes is streamed ({reason})",
            "a view in memory",
            "use --shuffle window, or raise --cache-memory",
        )
    exact = row_source == "memory" and options.shuffle != "window"
    return ReadPlan(
        row_source=row_source,
        shuffle="exact" if exact else "window",
        chunk_rows=chunk_rows,
        window_chunks=max(min(rows_per_window) // chunk_rows, 4),
        reason=reason,
    )
