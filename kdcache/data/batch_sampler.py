"""Which samples are read, in which order and in which batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.core import rng
from kdcache.data.batch import BatchRequest, Share
from kdcache.store.manifest import Manifest
from kdcache.store.sampler import Sampler, Schedule, always, batch_count, batches_of

# Of the batches after an epoch's first one, how many have their inputs compared when a sample of them is asked for.
ONE_CHECKED_OF = 16


class EpochBatches:
    """The batches of one epoch of an order; set `epoch`, counted from 0, before each pass.

    Args:
        schedule: View of each epoch; of several per sample, of each turn: epoch e has turns e · n to e · n + n − 1.
        verify_inputs: Batches with checksums: `all`, `off`, or `sample` (the first and every sixteenth).
        views_per_sample: Number n of views of each sample in a batch; the batch has `batch_size` / n samples.
    """

    def __init__(
        self,
        sampler: Sampler,
        batch_size: int,
        *,
        schedule: Schedule | None = None,
        verify_inputs: str = "off",
        views_per_sample: int = 1,
    ) -> None:
        self._sampler, self._schedule = sampler, schedule or always(0)
        self._samples, self._views = batch_size // views_per_sample, views_per_sample
        self._every = {"all": 1, "sample": ONE_CHECKED_OF, "off": 0}[verify_inputs]
        self.epoch = -1

    @property
    def view(self) -> int:
        """First view of the current epoch."""
        return self._schedule(self.epoch * self._views)

    def __iter__(self) -> Iterator[BatchRequest]:
        view, *more = (self._schedule(self.epoch * self._views + turn) for turn in range(self._views))
        for number, indices in enumerate(batches_of(self._sampler, self.epoch, self._samples)):
            checksums = self._every > 0 and number % self._every == 0
            yield BatchRequest(indices, view, checksums=checksums, more_views=tuple(more))

    def __len__(self) -> int:
        return batch_count(len(self._sampler), self._samples)


class RankBatches:
    """One process's parts of the batches that several train on: contiguous, without padding or repeats.

    A process for which a small last batch leaves nothing gets its first sample, which does not count: it has to take
    part in each step.

    Args:
        minimum: Samples that each process which has any gets at least, where the batch has so many: batch normalisation
            cannot train on one.
    """

    def __init__(self, batches: EpochBatches, rank: int, size: int, *, minimum: int) -> None:
        self._batches, self._rank, self._size, self._minimum = batches, rank, size, minimum

    def __iter__(self) -> Iterator[BatchRequest]:
        for request in self._batches:
            count = len(request.indices)
            start, stop = cut_batch(count, self._rank, self._size, minimum=self._minimum)
            counted = stop - start
            if not counted:
                start, stop = 0, 1
            share = Share(request.indices, start, stop, counted)
            yield request._replace(indices=request.indices[start:stop], share=share)

    def __len__(self) -> int:
        return len(self._batches)


def cut_batch(count: int, rank: int, size: int, *, minimum: int = 1) -> tuple[int, int]:
    """Start and stop of one process's part of a batch of `count` samples; the parts of all processes partition it."""
    used = max(min(size, count // minimum), 1)
    if rank >= used:
        return count, count
    return count * rank // used, count * (rank + 1) // used


def split_validation(
    indices: NDArray[np.int64], fraction: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices to train on and indices to validate on, ascending; the second is empty for a fraction of 0."""
    order = indices[rng.permutation(len(indices), seed, "validation split")]
    held_out = round(len(indices) * fraction)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def samples_record(indices: NDArray[np.int64]) -> dict[str, Any]:
    """Number and digest of sample indices, as plain values that two runs can be compared by."""
    return {"count": len(indices), "sha256": hashlib.sha256(indices.astype("<i8").tobytes()).hexdigest()}


class ShardBatches:
    """Batches of consecutive samples, in one or several views; a batch never spans two shards.

    A shard is thus computed from the same batches whenever it is computed, so that a continued dump equals an
    uninterrupted one to the bit: a teacher's logits vary by about 1e-6 with the size of the batch.

    Attributes:
        places: The shards of the next pass with the views that are wanted of them, taken one by one as their batches
            are asked for. Each group of samples is read once for all of these views, whose batches follow each other.
    """

    def __init__(self, manifest: Manifest, batch_size: int) -> None:
        self._manifest, self._batch_size = manifest, batch_size
        self.places: Iterable[tuple[Sequence[int], int]] = ()

    def __iter__(self) -> Iterator[BatchRequest]:
        for (view, *more), shard in self.places:
            samples = self._manifest.rows_of(shard)
            for start in range(samples.start, samples.stop, self._batch_size):
                stop = min(start + self._batch_size, samples.stop)
                yield BatchRequest(np.arange(start, stop), view, checksums=True, more_views=tuple(more))

    def __len__(self) -> int:
        """Number of batches of one view."""
        return sum(-(-len(self._manifest.rows_of(shard)) // self._batch_size) for shard in range(self._manifest.shards))
