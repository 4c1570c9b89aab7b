"""A dataset joined with a cache, for training loops that are not ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from kdcache.core.errors import UsageError
from kdcache.data.augment import Transform
from kdcache.data.dataset import as_indexed
from kdcache.data.views import Views
from kdcache.distill.student.join_checks import check_join
from kdcache.store.cache import Cache
from kdcache.store.manifest import NONE
from kdcache.store.mmap_source import MappedFeed, can_map
from kdcache.store.row_source import Feed, MemoryFeed
from kdcache.store.sampler import Schedule, always
from kdcache.store.sampler import view_schedule as make_schedule


def join(
    dataset: Any, cache: Cache, *, view_schedule: str = "cycle", augment: Transform | None = None, seed: int = 0
) -> JoinedDataset:
    """Put the teacher's logits to each item of a dataset, by view and sample index.

    Args:
        dataset: the map-style dataset of (input, label) pairs that the teacher was dumped over.
        cache: a finished split.
        view_schedule: which view an epoch uses: `cycle`, `shuffle` or `fixed:K`; for `JoinedDataset.set_epoch`.
        augment: the transform that the views were made with, where it was given to the dump as an object.
        seed: of `shuffle`.

    Returns:
        A map-style dataset of (input, label, logits), the logits a tensor (classes,) in the stored dtype, for any
        DataLoader, with forked or spawned workers. Of a cache without augmentation, inputs and labels are the
        dataset's own items; else the input is what the teacher saw of the epoch's view, before any scaling and
        normalising, as a tensor (C, H, W).

    Raises:
        CacheMismatch: the cache is of other samples or views; the message shows both values.
        UsageError: inputs are mixed, which these triples cannot say, or there is no such schedule.
    """
    record, recipe = cache.manifest.dataset, cache.manifest.recipe
    if recipe.mix != NONE:
        raise UsageError(
            f"{cache.path} is of mixed inputs ({recipe.mix}), which have two labels each",
            "a cache without --mix, for items of (input, label, logits)",
            "train with kdcache.train_student or train-student, or dump without --mix",
        )
    views = Views(as_indexed(dataset, name=record.name, split=record.split), recipe, transform=augment)
    schedule = make_schedule(view_schedule, (), available=cache.views, seed=seed)
    check_join(cache, views, used=[schedule(0)])
    return JoinedDataset(dataset, cache, views, schedule)


class JoinedDataset(Dataset[tuple[Any, Any, torch.Tensor]]):
    """What `join` returns; it does not check again."""

    def __init__(self, dataset: Any, cache: Cache, views: Views, schedule: Schedule) -> None:
        self._dataset, self._cache, self._views, self._schedule = dataset, cache, views, schedule
        self._feeds: dict[int, Feed] = {}
        # Shared, because workers that live on from epoch to epoch must learn of it too.
        self._view = torch.tensor(schedule(0)).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Choose the view that the schedule gives to an epoch, counted from 0; for all workers. Epoch 0 at first."""
        self._view.fill_(self._schedule(epoch))

    def __len__(self) -> int:
        return len(self._cache)

    def __getitem__(self, index: int) -> tuple[Any, Any, torch.Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, Any, torch.Tensor]]:
        """Several items at once, which is how a DataLoader asks: one look into the cache for a batch."""
        view, wanted = int(self._view), np.asarray(indices, np.int64)
        rows = torch.from_numpy(self._feed(view).rows(wanted))
        if self._views.recipe.is_plain(1):
            return [(*self._dataset[index], row) for index, row in zip(indices, rows, strict=True)]
        inputs, labels, *_ = self._views.fetch(view, wanted)
        return list(zip(inputs, labels.tolist(), rows, strict=True))

    def _feed(self, view: int) -> Feed:
        if view not in self._feeds:
            # Mapped pages are shared by all workers; what is compressed each has to hold for itself, a view at a time.
            mappable = can_map(self._cache.manifest.array("logits"))
            feed: Feed = (MappedFeed if mappable else MemoryFeed)(self._cache.reader, always(view))
            feed.start_epoch(0)
            self._feeds = {**(self._feeds if mappable else {}), view: feed}
        return self._feeds[view]

    def __getstate__(self) -> dict[str, Any]:
        # Mapped memory does not go to a spawned worker, which opens its own; and the view is chosen here only.
        return self.__dict__ | {"_feeds": {}, "_schedule": None}
