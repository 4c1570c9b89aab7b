"""The join of inputs and soft targets: by view and sample index, and refused where it would be wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.core.errors import UsageError
from kdcache.core.rng import key
from kdcache.data.loader import Batch
from kdcache.distill.student.join_checks import check_crcs, known_column, label_mismatch
from kdcache.models.device import memory_errors
from kdcache.store.cache import Cache
from kdcache.store.row_source import Feed
from kdcache.store.sampler import Schedule, always


class CachedTargets:
    """Soft targets of a batch, by view and sample index, from one cache or as the weighted mean of several.

    The mean is one of logits: the teachers' distributions are averaged geometrically (Hinton et al., 2015, section 1).

    Args:
        caches: that were checked to be of the views that batches come from, and of one another's.
        feeds: one of each cache's rows.
        weights: one a cache; only their proportions count. Empty for equal ones.
        features: feeds of the first cache's features, by array.
        negatives: how many rows of samples that are not in the batch come with it, by array of features.
        seed: that negatives are drawn from.
        schedule: the view of each epoch.
        device: that holds all rows of the epoch's view, where they are to be held there; None leaves that to the feeds.

    Raises:
        KdcacheError: the rows do not fit into the device's memory.
    """

    def __init__(
        self,
        caches: Sequence[Cache],
        feeds: Sequence[Feed],
        *,
        weights: Sequence[float] = (),
        features: Mapping[str, Feed] | None = None,
        negatives: Mapping[str, int] | None = None,
        seed: int = 0,
        schedule: Schedule | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._caches, self._feeds, self._schedule, self._device = caches, feeds, schedule or always(0), device
        weights = weights or [1.0] * len(caches)
        self._shares = [weight / sum(weights) for weight in weights]
        self._labels_n = torch.from_numpy(known_column(caches[0], "labels"))
        self._features, self._negatives, self._seed = features or {}, negatives or {}, seed
        self._epoch = self._step = 0
        self._view = -1
        self._crcs_n: NDArray[np.int64] | None = None
        self._held_nc: Tensor | None = None

    def start_epoch(self, epoch: int) -> None:
        view = self._schedule(epoch)
        self._epoch, self._step = epoch, 0
        for feed in [*(self._feeds if self._device is None else ()), *self._features.values()]:
            feed.start_epoch(epoch)
        if self._device is not None and view != self._view:
            self._held_nc = None  # before the next one comes, because two may not fit
            with memory_errors(len(self._labels_n), "leave out --cache-on-device"):
                rows = self._mean([cache.column("logits", view) for cache in self._caches])
                self._held_nc = torch.from_numpy(rows).to(self._device)
        if view != self._view:
            self._view, self._crcs_n = view, None

    def __call__(self, batch: Batch) -> Batch:
        """A batch on the host, joined with the teachers' logits, (batch, classes); of one teacher in the stored dtype.

        Raises:
            CacheMismatch: a label or an input of the batch is not the one that the teacher had.
            CacheDamaged: a chunk fails its checksum.
        """
        where = self._caches[0].path
        cached = self._labels_n[batch.indices]
        if not torch.equal(cached, batch.labels):
            raise label_mismatch(where, batch.indices.numpy(), cached.numpy(), batch.labels.numpy())
        if batch.input_crc32c is not None:
            if self._crcs_n is None:
                self._crcs_n = known_column(self._caches[0], "input_crc32c", self._view)
            check_crcs(self._caches[0], self._view, batch.indices.numpy(), batch.input_crc32c.numpy(), self._crcs_n)
        wanted = batch.indices.numpy()
        if self._features:
            features = {name: torch.from_numpy(feed.rows(wanted)) for name, feed in self._features.items()}
            batch = batch._replace(features=features, negatives=self._draw_negatives(wanted))
        if self._held_nc is not None:
            indices = batch.indices.to(self._held_nc.device, non_blocking=True)
            return batch._replace(soft_targets=self._held_nc.index_select(0, indices))
        rows = self._mean([feed.rows(wanted) for feed in self._feeds])
        return batch._replace(soft_targets=torch.from_numpy(rows))

    def _draw_negatives(self, wanted: NDArray[np.int64]) -> dict[str, Tensor] | None:
        """Features of samples drawn from the whole cache, without those of the batch."""
        if not self._negatives:
            return None
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
        return {
            name: torch.from_numpy(self._features[name].rows(others[:wished]))
            for name, wished in self._negatives.items()
        }

    def _mean(self, rows: list[NDArray[Any]]) -> NDArray[Any]:
        if len(rows) == 1:
            return rows[0]
        precise = np.result_type(np.float32, *(each.dtype for each in rows))
        mean = np.zeros(rows[0].shape, precise)
        for share, each in zip(self._shares, rows, strict=True):
            mean += share * each.astype(precise)
        return mean
