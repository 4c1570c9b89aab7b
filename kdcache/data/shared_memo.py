"""Augmented inputs in shared memory, where all of them fit, so that each is computed only once."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


class RememberedRows:
    """Rows of some views as bytes, stored when they are first computed.

    Forked workers share the memory, and so each other's rows; spawned workers start with an empty one.

    Args:
        views: Views whose rows are kept.
        samples: Number of samples per view.
        row_bytes: Bytes per row.
    """

    def __init__(self, views: Sequence[int], samples: int, row_bytes: int) -> None:
        self._slots = {view: slot for slot, view in enumerate(views)}
        self._rows = shared_memory((len(views), samples, row_bytes), np.dtype(np.uint8))
        self._known = shared_memory((len(views), samples), np.dtype(np.uint8))

    @staticmethod
    def bytes_needed(views: int, samples: int, row_bytes: int) -> int:
        return views * samples * (row_bytes + 1)

    def missing(self, view: int, indices: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of some samples are not stored yet, (n,)."""
        known: NDArray[np.bool_] = self._known[self._slots[view]][indices] == 0
        return known

    def put(self, view: int, indices: NDArray[np.int64], rows: NDArray[np.uint8]) -> None:
        """Store some rows, (n, row_bytes)."""
        slot = self._slots[view]
        self._rows[slot, indices] = rows
        self._known[slot, indices] = 1

    def take(self, view: int, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Some stored rows, (n, row_bytes)."""
        rows: NDArray[np.uint8] = self._rows[self._slots[view]].take(indices, axis=0)
        return rows

    def __contains__(self, view: int) -> bool:
        return view in self._slots

    def __reduce__(self) -> tuple[Any, ...]:
        # Shared memory does not go to a spawned worker, which fills its own as far as it gets.
        _, samples, row_bytes = self._rows.shape
        return RememberedRows, (list(self._slots), samples, row_bytes)


def shared_memory(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """An array of zeros in memory that forked processes share."""
    # Anonymous, because the place for named shared memory is often small, and writing beyond it kills the process.
    # An array of no bytes still needs a map of one.
    size = math.prod(shape) * dtype.itemsize
    return np.frombuffer(mmap.mmap(-1, max(size, 1)), dtype, math.prod(shape)).reshape(shape)
