"""A dataset joined with a cache, for training loops that are not ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from kdcache.cache.feeds import Feed, MemoryFeed
from kdcache.cache.mapping import MappedFeed, can_map
from kdcache.cache.reader import Cache
from kdcache.datasets import as_indexed
from kdcache.targets import check_join


def join(dataset: Any, cache: Cache) -> JoinedDataset:
    """Put the teacher's logits to each item of a dataset, by sample index.

    Args:
        dataset: the map-style dataset of (input, label) pairs that the teacher was dumped over.
        cache: a finished split.

    Returns:
        A map-style dataset of (input, label, logits), the logits a tensor (classes,) in the stored dtype, for any
        DataLoader, with forked or spawned workers.

    Raises:
        CacheMismatch: the cache is of other samples; the message shows both values.
    """
    record = cache.manifest.dataset
    check_join(cache, as_indexed(dataset, name=record.name, split=record.split))
    return JoinedDataset(dataset, cache)


class JoinedDataset(Dataset[tuple[Any, Any, torch.Tensor]]):
    """What `join` returns; it does not check again."""

    def __init__(self, dataset: Any, cache: Cache, view: int = 0) -> None:
        self._dataset, self._cache, self._view = dataset, cache, view
        self._feed: Feed | None = None

    def __len__(self) -> int:
        return len(self._cache)

    def __getitem__(self, index: int) -> tuple[Any, Any, torch.Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, Any, torch.Tensor]]:
        """Several items at once, which is how a DataLoader asks: one look into the cache for a batch."""
        if self._feed is None:
            # Mapped pages are shared by all workers; what is compressed each has to hold for itself.
            mappable = can_map(self._cache.manifest.array("logits"))
            self._feed = (MappedFeed if mappable else MemoryFeed)(self._cache.reader, self._view)
        rows = torch.from_numpy(self._feed.rows(np.asarray(indices, np.int64)))
        return [(*self._dataset[index], row) for index, row in zip(indices, rows, strict=True)]

    def __getstate__(self) -> dict[str, Any]:
        # Mapped memory does not go to a spawned worker, which opens its own.
        return self.__dict__ | {"_feed": None}
