"""The join of inputs and soft targets: by view and sample index, and refused where it would be wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.core.errors import UsageError
from kdcache.core.rng import key
from kdcache.data.batch import Batch
from kdcache.data.soft_targets import SoftTargets
from kdcache.distill.student.join_checks import check_crcs, known_column, label_mismatch
from kdcache.models.device import memory_errors
from kdcache.store.cache import Cache
from kdcache.store.chunk_reader import ChunkReader
from kdcache.store.encodings.base import EMBEDDINGS
from kdcache.store.records import UNLABELLED
from kdcache.store.row_source import Rows, RowSource
from kdcache.store.sampler import Schedule, always


class DeviceSource:
    """Holds the whole view of an epoch in the device's memory.

    Raises:
        KdcacheError: the rows do not fit into the device's memory.
    """

    def __init__(self, reader: ChunkReader, names: Sequence[str], schedule: Schedule, device: torch.device) -> None:
        self._reader, self._names, self._schedule, self._device = reader, names, schedule, device
        self._view = -1
        self._arrays: dict[str, Tensor] = {}

    def start_epoch(self, epoch: int) -> None:
        """Load the epoch's view.

        Raises:
            CacheDamaged: a chunk fails its checksum.
        """
        view, length = self._schedule(epoch), self._reader.manifest.dataset.length
        if view == self._view:
            return
        self._arrays = {}  # before the next view is loaded, because two may not fit
        with memory_errors(length, "leave out --cache-on-device"):
            for name in self._names:
                rows = torch.from_numpy(self._reader.span(name, view, range(length)))
                self._arrays[name] = rows.to(self._device)
        self._view = view

    def rows(self, indices: NDArray[np.int64]) -> Rows:
        wanted = torch.from_numpy(indices).to(self._device, non_blocking=True)
        return {name: values.index_select(0, wanted) for name, values in self._arrays.items()}


class CachedTargets:
    """Joins each batch with soft targets by view and sample index, from one cache or as the weighted mean of several.

    Args:
        caches: Caches that were checked to hold the views that batches come from, and one another's.
        sources: Row source of each cache's logits.
        weights: Weight of each cache, of which only the proportions count; empty for equal ones.
        features: Row source of the first cache's features.
        negatives: Number of rows of samples outside the batch that come with it, by array of features.
        seed: Seed of the negatives.
        schedule: View of each epoch.
        tail: How `kd` treats classes whose logits are not stored: `other` or `uniform`.
    """

    def __init__(
        self,
        caches: Sequence[Cache],
        sources: Sequence[RowSource],
        *,
        weights: Sequence[float] = (),
        features: RowSource | None = None,
        negatives: Mapping[str, int] | None = None,
        seed: int = 0,
        schedule: Schedule | None = None,
        tail: str = "other",
    ) -> None:
        self._tail = tail
        self._caches, self._sources, self._schedule = caches, sources, schedule or always(0)
        self._weights = weights
        self._labels_n = torch.from_numpy(known_column(caches[0], "labels"))
        self._all_labelled = caches[0].manifest.multi_label or not (self._labels_n == UNLABELLED).any()
        self._features, self._negatives, self._seed = features, negatives or {}, seed
        self._epoch = self._step = 0
        self._view = -1
        self._crcs_n: NDArray[np.int64] | None = None

    def start_epoch(self, epoch: int) -> None:
        view = self._schedule(epoch)
        self._epoch, self._step = epoch, 0
        for source in [*self._sources, *([self._features] if self._features else [])]:
            source.start_epoch(epoch)
        if view != self._view:
            self._view, self._crcs_n = view, None

    def __call__(self, batch: Batch) -> Batch:
        """A batch on the host, joined with the stored rows of the teachers' logits.

        Raises:
            CacheMismatch: a label or an input of the batch is not the one that the teacher had.
            CacheDamaged: a chunk fails its checksum.
        """
        where = self._caches[0].place
        cached = self._labels_n[batch.indices]
        if not torch.equal(cached, batch.labels.long()):
            raise label_mismatch(where, batch.indices.numpy(), cached.numpy(), batch.labels.numpy())
        wanted = batch.indices.numpy()
        if batch.input_crc32c is not None:
            if self._crcs_n is None:
                self._crcs_n = known_column(self._caches[0], "input_crc32c", self._view)
            check_crcs(self._caches[0], self._view, wanted, batch.input_crc32c.numpy(), self._crcs_n)
        # Every process reads the rows of the whole batch: a streamed source has no other order.
        whole = wanted if batch.share is None else batch.share.indices
        part = slice(None) if batch.share is None else slice(batch.share.start, batch.share.stop)
        if self._features is not None:
            batch = batch._replace(features=_tensors(self._features.rows(whole), part))
        if self._negatives:
            batch = batch._replace(negatives=self._draw_negatives(whole))
        parts = [
            (cache.encoding, _tensors(source.rows(whole), part))
            for cache, source in zip(self._caches, self._sources, strict=True)
        ]
        if not self._all_labelled:
            batch = batch._replace(labelled=int((self._labels_n[whole] != UNLABELLED).sum()))
        return batch._replace(soft_targets=SoftTargets(parts, self._weights, tail=self._tail))

    def _draw_negatives(self, wanted: NDArray[np.int64]) -> dict[str, Tensor]:
        """Features, or embeddings, of samples drawn from the whole cache, without those of the batch."""
        count, samples = max(self._negatives.values()), len(self._labels_n)
        raw = np.random.Philox(key=key(self._seed, "negatives", self._epoch, self._step)).random_raw(2 * count)
        self._step += 1
        drawn = (raw % np.uint64(samples)).astype(np.int64)
        others = drawn[~np.isin(drawn, wanted)][:count]
        if not len(others):
            raise UsageError(
                f"a batch of {len(wanted)} leaves no other sample among {samples} to be told from",
                "negatives that are not in the batch",
                "use a smaller --batch-size",
            )
        rows = {} if self._features is None else _tensors(self._features.rows(others))
        if EMBEDDINGS in self._negatives:
            rows[EMBEDDINGS] = self._caches[0].encoding.decode(_tensors(self._sources[0].rows(others)))
        return {name: rows[name][:wished] for name, wished in self._negatives.items()}


class SeveralViews:
    """Joins the views of a sample that one batch holds: the batches of each turn with the rows of its view.

    Args:
        turns: Join of each turn, in the order in which the loader brings the views.
    """

    def __init__(self, turns: Sequence[CachedTargets]) -> None:
        self._turns, self._next = turns, 0

    def start_epoch(self, epoch: int) -> None:
        self._next = 0
        for turn in self._turns:
            turn.start_epoch(epoch)

    def __call__(self, batch: Batch) -> Batch:
        turn = self._turns[self._next % len(self._turns)]
        self._next += 1
        return turn(batch)


def _tensors(rows: Rows, part: slice = slice(None)) -> dict[str, Tensor]:
    return {name: torch.as_tensor(values[part]) for name, values in rows.items()}
