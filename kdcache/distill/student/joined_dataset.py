"""A dataset joined with a cache, for other training loops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from kdcache.core.errors import DatasetError, KdcacheError, UsageError
from kdcache.core.json_records import brief
from kdcache.core.plugins import describe
from kdcache.core.system import physical_memory_bytes
from kdcache.data.augment import Transform
from kdcache.data.dataset import as_indexed
from kdcache.data.shared_memo import shared_memory
from kdcache.data.views import Views, name_of
from kdcache.distill.student.join_checks import check_join
from kdcache.store.cache import Cache
from kdcache.store.chunk_reader import check_indices
from kdcache.store.layout import row_bytes
from kdcache.store.manifest import NONE
from kdcache.store.sampler import Schedule
from kdcache.store.sampler import view_schedule as make_schedule


def join(
    dataset: Any,
    cache: Cache,
    *,
    transform: Callable[[Any], Any] | None = None,
    view_schedule: str = "cycle",
    augment: Transform | None = None,
    seed: int = 0,
) -> JoinedDataset:
    """Join each item of a dataset with the teacher's logits, by view and sample index.

    Args:
        dataset: Map-style dataset of (input, label) pairs that the teacher was dumped over.
        cache: A finished split.
        transform: Preprocessing of the student, applied to each input after it was compared with the cache.
        view_schedule: View of each epoch: `cycle`, `shuffle` or `fixed:K`; for `JoinedDataset.set_epoch`.
        augment: Transform of the views, where it was given to the dump as an object.
        seed: Seed of `shuffle`.

    Returns:
        A map-style dataset of (input, label, logits), the logits a tensor (classes,) in the stored dtype, for any
        DataLoader, with forked or spawned workers. Without augmentation, inputs and labels are the dataset's own
        items; else the input is the teacher's of the epoch's view, a tensor (C, H, W) before any scaling and
        normalisation. `transform` is applied to both.

    Raises:
        CacheMismatch: the cache holds other samples or views; the message shows both values.
        DatasetError: two reads of the dataset differ, or the transform fails on an item.
        UsageError: inputs are mixed, and have two labels each, or there is no such schedule.
    """
    record, recipe = cache.manifest.dataset, cache.manifest.recipe
    if recipe.mix != NONE:
        raise UsageError(
            f"{cache.place} is of mixed inputs ({recipe.mix}), which have two labels each",
            "a cache without --mix, for items of (input, label, logits)",
            "train with kdcache.train_student or train-student, or dump without --mix",
        )
    views = Views(as_indexed(dataset, name=record.name, split=record.split), recipe, transform=augment)
    schedule = make_schedule(view_schedule, (), available=cache.views, seed=seed)
    check_join(cache, views, used=[schedule(0)])
    return JoinedDataset(dataset, cache, views, schedule, transform)


class JoinedDataset(Dataset[tuple[Any, Any, torch.Tensor]]):
    """The dataset that `join` returns."""

    def __init__(
        self,
        dataset: Any,
        cache: Cache,
        views: Views,
        schedule: Schedule,
        transform: Callable[[Any], Any] | None = None,
    ) -> None:
        self._dataset, self._cache, self._views, self._schedule = dataset, cache, views, schedule
        self._logits = _SharedView(cache)
        # In shared memory, because persistent workers must see a new view too.
        self._transform = transform
        self._view = torch.tensor(schedule(0)).share_memory_()
        self._logits.load(schedule(0))

    def set_epoch(self, epoch: int) -> None:
        """Use the view of an epoch, counted from 0, in all workers. Epoch 0 is set at the start."""
        view = self._schedule(epoch)
        self._logits.load(view)
        self._view.fill_(view)

    def __len__(self) -> int:
        return len(self._cache)

    def __getitem__(self, index: int) -> tuple[Any, Any, torch.Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, Any, torch.Tensor]]:
        """Several items at once, as a DataLoader requests them: one lookup in the cache per batch."""
        view, wanted = int(self._view), np.asarray(indices, np.int64)
        rows = torch.from_numpy(self._logits.rows(view, wanted))
        if self._views.recipe.is_plain(1):
            items = [(*self._dataset[index], row) for index, row in zip(indices, rows, strict=True)]
        else:
            inputs, labels, *_ = self._views.fetch(view, wanted)
            items = list(zip(inputs, labels.tolist(), rows, strict=True))
        if self._transform is None:
            return items
        # The input is the third from the end: an item may begin with its index.
        return [
            (*item[:-3], self._transformed(item[-3], index), *item[-2:])
            for item, index in zip(items, indices, strict=True)
        ]

    def _transformed(self, value: Any, index: int) -> Any:
        assert self._transform is not None, "asked for where there is one"
        try:
            return self._transform(value)
        except KdcacheError:
            raise
        except Exception as problem:
            raise DatasetError(
                f"the transform of join fails on sample {index}, which is {brief(value)}: {name_of(self._transform)} "
                f"raises {describe(problem)}",
                "a transform of the dataset's own inputs, or of uint8 tensors (C, H, W) where the cache has views",
                "choose one that suits them",
            ) from problem

    def __getstate__(self) -> dict[str, Any]:
        # A schedule may be a local function, which pickle refuses, and workers do not choose the view.
        return self.__dict__ | {"_schedule": None}


class _SharedView:
    """The rows of one view in memory that forked workers share; a spawned worker loads its own copy."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        arrays = [cache.manifest.array(name) for name in cache.logit_arrays]
        needed = sum(row_bytes(array.dtype, array.row_shape) for array in arrays) * len(cache)
        if needed > physical_memory_bytes():
            raise UsageError(
                f"a view of {cache.place} takes {needed:,} bytes, more than this machine's memory",
                "room for one view: a DataLoader reads samples at random",
                "use kdcache.train_student, which streams, or Cache.epoch, whose order a stream can follow",
            )
        self._arrays = {
            array.name: shared_memory((len(cache), *array.row_shape), np.dtype(array.dtype)) for array in arrays
        }
        self._loaded = torch.tensor(-1).share_memory_()

    def load(self, view: int) -> None:
        """Read a view, unless it is the one in memory.

        Raises:
            CacheDamaged: a chunk fails its checksum.
        """
        if int(self._loaded) == view:
            return
        self._loaded.fill_(-1)
        for name, values in self._arrays.items():
            values[:] = self._cache.reader.span(name, view, range(len(self._cache)))
        self._loaded.fill_(view)

    def rows(self, view: int, indices: NDArray[np.int64]) -> NDArray[Any]:
        """Logits of some samples, (n, classes)."""
        self.load(view)
        check_indices(indices, len(self._cache))
        logits: NDArray[Any] = self._cache.encoding.decode(
            {name: values.take(indices, axis=0) for name, values in self._arrays.items()}
        )
        return logits

    def __reduce__(self) -> tuple[Any, ...]:
        return _SharedView, (self._cache,)
