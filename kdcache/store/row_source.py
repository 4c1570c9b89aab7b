"""The rows of each epoch's view, fed from memory, from mapped files or as a stream; which one is chosen here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kdcache.core.config import CACHE_MEMORY, FEEDS, SHUFFLES
from kdcache.core.errors import UsageError
from kdcache.store import stream_source
from kdcache.store.chunk_reader import ChunkReader, check_indices
from kdcache.store.layout import row_bytes
from kdcache.store.mmap_source import MappedFeed, can_map
from kdcache.store.sampler import EpochOrder, ExactOrder, Schedule, WindowOrder, always
from kdcache.store.stream_source import StreamedFeed

# A view larger than so many times the memory allowed will not stay in the system's memory, and random reads of a disk
# are slow. Not the machine's own memory: the order of an epoch must be the same on every machine.
MAPPED_LIMIT = 16

_UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


class Feed(Protocol):
    """Gives rows of the epoch's view by sample index."""

    kind: str

    def start_epoch(self, epoch: int) -> None:
        """Prepare for the rows of an epoch; before its first rows."""
        ...

    def rows(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        """Some rows, (n, *row_shape), in the order asked."""
        ...


class MemoryFeed:
    """The epoch's view whole in memory, checked as it was read, and the next epoch's, which is read meanwhile."""

    kind = "memory"

    def __init__(self, reader: ChunkReader, schedule: Schedule, name: str = "logits") -> None:
        self._reader, self._schedule, self._name = reader, schedule, name
        self._view: int | None = None
        self._values: NDArray[Any] = np.empty(0)
        self._coming: tuple[int, Future[NDArray[Any]]] | None = None
        self._pool: ThreadPoolExecutor | None = None

    def start_epoch(self, epoch: int) -> None:
        """Take the epoch's view into memory, and begin to read the next one's.

        Raises:
            CacheDamaged: a chunk fails its checksum.
        """
        view, following = self._schedule(epoch), self._schedule(epoch + 1)
        if view != self._view:
            if self._coming is not None and self._coming[0] == view:
                self._values = self._coming[1].result()
            else:
                self._values = self._read(view)
            self._view, self._coming = view, None
        if following != view and self._coming is None:
            # Made at first use, because threads do not survive a fork.
            self._pool = self._pool or ThreadPoolExecutor(1, thread_name_prefix="kdcache-reader")
            self._coming = following, self._pool.submit(self._read, following)

    def rows(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        check_indices(indices, len(self._values))
        result: NDArray[Any] = np.take(self._values, indices, axis=0)
        return result

    def _read(self, view: int) -> NDArray[Any]:
        return self._reader.span(self._name, view, range(self._reader.manifest.dataset.length))


@dataclass(frozen=True, kw_only=True)
class FeedChoice:
    """How a cache is read.

    Attributes:
        memory: what may be held, as `4GiB`; a view that fits is read into memory whole.
        feed: `auto`, or one of the others to insist.
        shuffle: `exact`, `window`, or `auto`: exact wherever rows can be read at random.

    Raises:
        UsageError: a memory, feed or shuffle that there is not.
    """

    memory: str = CACHE_MEMORY
    feed: str = "auto"
    shuffle: str = "auto"

    def __post_init__(self) -> None:
        parse_bytes(self.memory)
        for name, value, known in (("feed", self.feed, FEEDS), ("shuffle", self.shuffle, SHUFFLES)):
            if value not in known:
                raise UsageError(f"{name} is {value!r}", f"one of {', '.join(known)}")


def parse_bytes(text: str) -> int:
    """Bytes in `4GiB`, `500MB` or `1048576`.

    Raises:
        UsageError: none of these.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B|)", text.strip())
    if match is None:
        raise UsageError(f"the size is {text!r}", f"a number with one of {', '.join(filter(None, _UNITS))}, as 4GiB")
    return int(float(match[1]) * _UNITS[match[2]])


def open_feeds(reader: ChunkReader, names: Sequence[str], **options: Any) -> tuple[dict[str, Feed], EpochOrder, str]:
    """As `open_feed`, for several arrays that are read together: of logits and features, say."""
    feeds = {name: open_feed(reader, name=name, together=names, **options) for name in names}
    _, order, line = feeds[names[0]]
    return {name: feed for name, (feed, _, _) in feeds.items()}, order, line


def open_feed(
    reader: ChunkReader,
    *,
    indices: NDArray[np.int64],
    seed: int,
    schedule: Schedule | None = None,
    choice: FeedChoice | None = None,
    window_rows: int | None = None,
    name: str = "logits",
    together: Sequence[str] = ("logits",),
) -> tuple[Feed, EpochOrder, str]:
    """Choose how views are fed and in which order their samples are visited.

    Args:
        indices: the samples that epochs visit, (n,), ascending.
        seed: of the order.
        schedule: the view of each epoch; None always takes view 0.
        window_rows: that are shuffled together in a window; None takes as many as the memory of a stream holds.
        name: of the array.
        together: of all arrays that will be read at the same time, and share memory and order.

    Returns:
        The feed, the order that must drive the dataset, and a line that says what was chosen and why.

    Raises:
        UsageError: what is insisted on cannot be had together.
        CacheDamaged: a chunk fails its checksum.
    """
    choice, schedule = choice or FeedChoice(), schedule or always(0)
    array = reader.manifest.array(name)
    arrays = [reader.manifest.array(each) for each in together]
    view_bytes = sum(row_bytes(each.dtype, each.row_shape) for each in arrays) * reader.manifest.dataset.length
    held_bytes = view_bytes * min(reader.manifest.readable_views, 2)  # with several, the next one is read ahead
    allowed = parse_bytes(choice.memory)
    kind, why = choice.feed, "as asked"
    if not reader.manifest.complete and kind in ("auto", "streamed"):
        kind, why = "streamed", "the cache is partial"
    elif kind == "auto":
        if held_bytes <= allowed:
            kind, why = "memory", f"a view is {view_bytes:,} bytes, and {choice.memory} may be held"
        elif can_map(array) and choice.shuffle != "window" and view_bytes <= MAPPED_LIMIT * allowed:
            kind, why = "mapped", f"a view is {view_bytes:,} bytes, more than {choice.memory}, and not compressed"
        elif can_map(array) and choice.shuffle == "exact":
            kind, why = "mapped", "exact shuffling reads at random"
        else:
            kind, why = "streamed", f"a view is {view_bytes:,} bytes, more than {choice.memory}"
    if kind != "streamed" and not reader.manifest.complete:
        raise UsageError(f"the cache is partial, and --feed is {kind}", "a finished cache", "use --feed streamed")
    if kind == "mapped" and not can_map(array):
        raise UsageError(
            f"the cache is compressed ({array.compression}) and cannot be mapped",
            "an uncompressed cache",
            "let --feed be memory or streamed",
        )
    if kind == "streamed" and choice.shuffle == "exact":
        raise UsageError(
            f"exact shuffling reads at random, and a view of {view_bytes:,} bytes is to be streamed",
            "a view in memory or mapped",
            "use --shuffle window, or raise --cache-memory",
        )
    order: EpochOrder = ExactOrder(indices, seed)
    if kind == "streamed" or choice.shuffle == "window":
        chunk_rows = max(each.chunk_rows for each in arrays)
        rows = window_rows or stream_source.window_rows(reader, together)
        windowed = WindowOrder(indices, seed, chunk_rows=chunk_rows, window_chunks=max(rows // chunk_rows, 4))
        order = windowed
    feed: Feed
    if kind == "streamed":
        feed = StreamedFeed(reader, schedule, windowed, name)
    else:
        feed = (MemoryFeed if kind == "memory" else MappedFeed)(reader, schedule, name)
    shuffle = "window" if isinstance(order, WindowOrder) else "exact"
    return feed, order, f"cache {kind} ({why}), shuffle {shuffle}"
