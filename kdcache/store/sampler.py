"""Schedules of views, and samplers: the order of an epoch, shuffled exactly or within windows of chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from kdcache.core import rng
from kdcache.core.errors import UsageError
from kdcache.core.specs import split_spec

# The view of an epoch, counted from 0.
Schedule = Callable[[int], int]


def always(view: int) -> Schedule:
    """A schedule that uses one view."""
    return lambda epoch: view


def view_schedule(kind: str, views: Sequence[int], *, available: int, seed: int) -> Schedule:
    """A schedule by name.

    Args:
        kind: `cycle` uses the views in turn; `shuffle` uses each once, in a new order, before any comes again;
            `fixed:K` always uses view K.
        views: The views to use; empty for all.
        available: Number of views in the cache.

    Raises:
        UsageError: there is no such schedule or view.
    """
    used = list(views) or list(range(available))
    _check_views(used, available)
    name, value = split_spec(kind)
    if name == "fixed" and value is not None and value.isdecimal():
        used = [int(value)]
        _check_views(used, available)
    elif kind not in ("cycle", "shuffle"):
        raise UsageError(f"--view-schedule is {kind!r}", "cycle, shuffle or fixed:K, with K the number of a view")
    if kind == "shuffle":
        return lambda epoch: used[rng.permutation(len(used), seed, "view order", epoch // len(used))[epoch % len(used)]]
    return lambda epoch: used[epoch % len(used)]


def _check_views(used: Sequence[int], available: int) -> None:
    if wrong := [view for view in used if not 0 <= view < available]:
        raise UsageError(f"view {wrong[0]} is asked for", f"0 to {available - 1}: the cache has {available} views")
    if len(set(used)) < len(used):
        raise UsageError(f"the views {used} name one twice", "each view once")


class Sampler(Protocol):
    """Orders the samples of an epoch; the same order on every machine for the same seed."""

    def __len__(self) -> int:
        """Number of samples per epoch."""
        ...

    def runs(self, epoch: int) -> Iterator[NDArray[np.int64]]:
        """Sample indices in the order of the epoch, each exactly once, in runs of any length."""
        ...


class ExactSampler:
    """Shuffles all samples: every order is equally likely. The default wherever rows can be read at random.

    Args:
        indices: The samples of each epoch, (n,), ascending.
    """

    def __init__(self, indices: NDArray[np.int64], seed: int) -> None:
        self._indices, self._seed = indices, seed

    def __len__(self) -> int:
        return len(self._indices)

    def runs(self, epoch: int) -> Iterator[NDArray[np.int64]]:
        yield self._indices[rng.permutation(len(self._indices), self._seed, "epoch order", epoch)]


class Window(NamedTuple):
    """Chunks whose rows are visited together, shuffled.

    Attributes:
        chunks: Chunk numbers, (chunks,).
        samples: Sample indices in the order of their visit, (rows,).
        places: Position of each sample in the concatenated chunks, (rows,).
    """

    chunks: NDArray[np.int64]
    samples: NDArray[np.int64]
    places: NDArray[np.int64]


class WindowSampler:
    """Shuffles chunks, and the rows within windows of `window_chunks` chunks.

    Each chunk is needed in one window of each epoch only, so that a view can be streamed.

    Args:
        indices: The samples of each epoch, (n,), ascending.
        chunk_rows: Rows per chunk.
    """

    def __init__(self, indices: NDArray[np.int64], seed: int, *, chunk_rows: int, window_chunks: int) -> None:
        self._indices, self._seed = indices, seed
        self._window_chunks, self.chunk_rows = window_chunks, chunk_rows
        self._chunks, self._starts = np.unique(indices // chunk_rows, return_index=True)
        self._stops = np.append(self._starts[1:], len(indices))
        # Used by the loader, and again by the row sources, which read a few windows ahead.
        self._window = lru_cache(maxsize=8)(self._draw)
        self._chunk_order = lru_cache(maxsize=2)(self._draw_chunk_order)

    def __len__(self) -> int:
        return len(self._indices)

    def windows(self, epoch: int) -> Iterator[Window]:
        """The windows of an epoch, in order."""
        for number in range(-(-len(self._chunks) // self._window_chunks)):
            yield self._window(epoch, number)

    def runs(self, epoch: int) -> Iterator[NDArray[np.int64]]:
        for window in self.windows(epoch):
            yield window.samples

    def _draw(self, epoch: int, number: int) -> Window:
        members = self._chunk_order(epoch)[number * self._window_chunks : (number + 1) * self._window_chunks]
        rows = np.concatenate([self._indices[self._starts[chunk] : self._stops[chunk]] for chunk in members])
        first_places = np.repeat(np.arange(len(members)), (self._stops - self._starts)[members]) * self.chunk_rows
        order = rng.permutation(len(rows), self._seed, "window order", epoch, number)
        places = (first_places + rows % self.chunk_rows)[order]
        return Window(chunks=self._chunks[members], samples=rows[order], places=places)

    def _draw_chunk_order(self, epoch: int) -> NDArray[np.int64]:
        return rng.permutation(len(self._chunks), self._seed, "chunk order", epoch)


def batches_of(sampler: Sampler, epoch: int, batch_size: int) -> Iterator[NDArray[np.int64]]:
    """An epoch cut into batches; the last may be smaller, and a single last sample joins the batch before it."""
    # Batch normalisation cannot train on one sample, and with batches of one there is no other way.
    stragglers = 1 if batch_size > 1 else 0
    left = np.empty(0, np.int64)
    for run in sampler.runs(epoch):
        left = np.concatenate([left, run]) if len(left) else run
        # Keep enough samples for the rule of the last batch.
        whole = max((len(left) - 1 - stragglers) // batch_size, 0)
        for start in range(0, whole * batch_size, batch_size):
            yield left[start : start + batch_size]
        left = left[whole * batch_size :]
    while len(left) > batch_size + stragglers:
        yield left[:batch_size]
        left = left[batch_size:]
    if len(left):
        yield left


def batch_count(samples: int, batch_size: int) -> int:
    """Number of batches that `batches_of` makes of an epoch."""
    whole, left = divmod(samples, batch_size)
    return whole + (left > 1 or (left == 1 and whole == 0))
