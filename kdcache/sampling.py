"""Which samples are read, in which order and in which batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from kdcache import keys
from kdcache.cache.manifest import Manifest
from kdcache.cache.order import EpochOrder, batch_count, batches_of


class EpochBatches:
    """The batches of one epoch of an order; set `epoch` before each pass."""

    def __init__(self, order: EpochOrder, batch_size: int) -> None:
        self._order, self._batch_size = order, batch_size
        self.epoch = 0

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        return batches_of(self._order, self.epoch, self._batch_size)

    def __len__(self) -> int:
        return batch_count(len(self._order), self._batch_size)


def split_validation(
    indices: NDArray[np.int64], fraction: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices to train on and indices to validate on, ascending; the second is empty for a fraction of 0."""
    order = indices[keys.permutation(len(indices), seed, "validation split")]
    held_out = round(len(indices) * fraction)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


class ShardBatches:
    """Batches of consecutive indices that never straddle a shard.

    A shard is thus computed from the same batches whenever it is computed, so that a continued dump equals an
    uninterrupted one to the bit: a teacher's answers vary by about 1e-6 with the size of the batch.
    """

    def __init__(self, manifest: Manifest, shards: Sequence[int], batch_size: int) -> None:
        self._manifest, self._shards, self._batch_size = manifest, shards, batch_size

    def sizes(self, shard: int) -> Iterator[int]:
        rows = len(self._manifest.rows_of(shard))
        for start in range(0, rows, self._batch_size):
            yield min(self._batch_size, rows - start)

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        for shard in self._shards:
            start = self._manifest.rows_of(shard).start
            for size in self.sizes(shard):
                yield np.arange(start, start + size)
                start += size

    def __len__(self) -> int:
        return sum(-(-len(self._manifest.rows_of(shard)) // self._batch_size) for shard in self._shards)
