"""A dataset joined with a cache, for other training loops."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, Subset

from kdcache.core import rng
from kdcache.core.errors import CacheMismatch, DatasetError, KdcacheError, UsageError
from kdcache.core.json_records import brief
from kdcache.core.plugins import describe
from kdcache.core.system import physical_memory_bytes
from kdcache.data.augment import Transform
from kdcache.data.dataset import IndexedDataset, Renumbered
from kdcache.data.map_dataset import as_indexed
from kdcache.data.taught import as_taught, known_classes
from kdcache.data.views import Views, name_of
from kdcache.distill.student.join_checks import SAMPLED_INPUTS, check_join
from kdcache.distill.student.joined_items import ItemKeys, Key, Pairs, checked_numbers, sample_numbers
from kdcache.store.cache import Cache
from kdcache.store.chunk_reader import check_indices
from kdcache.store.encodings.base import chosen_temperature
from kdcache.store.layout import row_bytes
from kdcache.store.records import NONE
from kdcache.store.sampler import Schedule
from kdcache.store.sampler import view_schedule as make_schedule

# What `join` compares with the cache.
VERIFIED = ("sample", "labels", "off")


def join(
    dataset: Any,
    cache: Cache,
    *,
    transform: Callable[[Any], Any] | None = None,
    input_key: Key | None = None,
    label_key: Key | None = None,
    index_key: Key | None = None,
    indices: Sequence[int] | NDArray[np.int64] | None = None,
    verify_inputs: str = "sample",
    view_schedule: str = "cycle",
    augment: Transform | None = None,
    temperature: float | None = None,
    seed: int = 0,
) -> JoinedDataset:
    """Join each item of a dataset with the teacher's logits, by view and sample index.

    Args:
        dataset: Map-style dataset that the teacher was dumped over, or some of its samples: a `Subset` of it, a
            `ConcatDataset` of such subsets, or any other one with `indices` or `index_key`. Its items are (input,
            label) pairs, or tuples or dicts with `input_key` and `label_key`.
        cache: A finished split.
        transform: Preprocessing of the student, applied to each input after it was compared with the cache.
        input_key: Key of the input in a dict, or its position in a tuple.
        label_key: Key or position of the label, likewise.
        index_key: Key or position of the sample's number in the cache, where items hold it; not for a cache with views.
        indices: Number in the cache of each item of the dataset, (n,); None takes the items' own positions, and for a
            `Subset` its indices. Samples that the dump left out have no number, and are left out here too.
        verify_inputs: `sample` compares labels, and the inputs of a sample of items, with those that the teacher saw.
            `labels` compares labels alone, for a dataset that decodes, resizes or augments by itself: then nothing
            guarantees that the student sees what the teacher saw. `off` compares nothing.
        view_schedule: View of each epoch: `cycle`, `shuffle` or `fixed:K`; for `JoinedDataset.set_epoch`.
        augment: Transform of the views, where it was given to the dump as an object.
        temperature: Temperature that a top-k cache's logits are to be exact for; None takes 1, or the lowest.
        seed: Seed of `shuffle`.

    Returns:
        A map-style dataset for any DataLoader, with forked or spawned workers. A tuple item has the logits appended,
        such as (input, label, logits); a dict has them as `teacher_logits`. They are a tensor (classes,) in the stored
        dtype. Without augmentation, items are otherwise the dataset's own; else they have an input and a label only,
        and the input is the teacher's of the epoch's view, a tensor (C, H, W) before any scaling and normalisation.
        `transform` is applied to both; where it makes a mapping of a dict's input, as tokenizers do, that takes the
        input's place.

    Raises:
        CacheMismatch: the cache holds other samples or views; the message shows both values.
        DatasetError: two reads of the dataset differ, an item has no such key, or the transform fails on one.
        UsageError: inputs are mixed, and have two labels each, or an argument has no meaning here.
    """
    recipe = cache.manifest.recipe
    if recipe.mix != NONE:
        raise UsageError(
            f"{cache.place} is of mixed inputs ({recipe.mix}), which have two labels each",
            "a cache without --mix, for items of (input, label, logits)",
            "train with kdcache.train_student or train-student, or dump without --mix",
        )
    excluded = cache.manifest.dataset.excluded
    if excluded and indices is None and index_key is None and len(dataset) == len(cache) + len(excluded):
        dataset = Subset(dataset, np.setdiff1d(np.arange(len(dataset)), excluded).tolist())
    keys = ItemKeys(input=input_key, label=label_key, index=index_key)
    _check_arguments(cache, keys, indices, verify_inputs)
    schedule = make_schedule(view_schedule, (), available=cache.views, seed=seed)
    numbers: NDArray[np.int64] | None = None
    if indices is not None:
        numbers = checked_numbers(indices, len(dataset), len(cache))
    elif index_key is None:
        numbers = sample_numbers(dataset, len(cache))
    views: Views | None = None
    if verify_inputs == "sample":
        compared, present = _comparable(dataset, cache, keys, numbers)
        views = Views(compared, recipe, transform=augment)
        check_join(cache, views, used=[schedule(0)], samples=present)
    return JoinedDataset(
        dataset,
        cache,
        views,
        schedule,
        transform,
        temperature,
        keys=keys,
        numbers=numbers,
        check_labels=verify_inputs != "off" and not cache.manifest.is_embedding,
    )


def _comparable(
    dataset: Any, cache: Cache, keys: ItemKeys, numbers: NDArray[np.int64] | None
) -> tuple[IndexedDataset, NDArray[np.int64] | None]:
    """A dataset as `check_join` compares it, under the cache's numbers, and which samples there are; None for all."""
    record = cache.manifest.dataset
    pairs: Any = Pairs(dataset, keys, record.classes) if keys != ItemKeys() else dataset
    if keys.index is not None:
        # Which samples these are only the items themselves tell.
        probed = rng.keyed_sample(len(dataset), SAMPLED_INPUTS, 0, "join").tolist()
        numbers = np.array([keys.index_of(dataset[at], f"item {at}") for at in probed], np.int64)
        checked_numbers(numbers, len(probed), len(cache))
        pairs = Subset(pairs, probed)
    classes = known_classes(cache.manifest)
    indexed = as_taught(
        as_indexed(pairs, name=record.name, split=record.split, default_classes=classes), cache.manifest
    )
    return (indexed if numbers is None else Renumbered(indexed, numbers, len(cache))), numbers


def _check_arguments(cache: Cache, keys: ItemKeys, indices: Any, verify_inputs: str) -> None:
    if verify_inputs not in VERIFIED:
        raise UsageError(f"verify_inputs is {verify_inputs!r}", f"one of {', '.join(VERIFIED)}")
    plain = cache.manifest.recipe.is_plain(1)
    if not plain and (keys.index is not None or verify_inputs != "sample"):
        what = "index_key" if keys.index is not None else f"verify_inputs={verify_inputs!r}"
        raise UsageError(
            f"{what} is given, and {cache.place} has augmented views",
            "a cache of plain inputs: the student's inputs are otherwise made as the teacher's were",
            "leave it out; indices=[…] gives the number in the cache of each item",
        )
    if indices is not None and keys.index is not None:
        raise UsageError("both indices and index_key are given", "one of them")


class JoinedDataset(Dataset[Any]):
    """The dataset that `join` returns."""

    def __init__(
        self,
        dataset: Any,
        cache: Cache,
        views: Views | None,
        schedule: Schedule,
        transform: Callable[[Any], Any] | None = None,
        temperature: float | None = None,
        *,
        keys: ItemKeys,
        numbers: NDArray[np.int64] | None,
        check_labels: bool,
    ) -> None:
        if cache.encoding.temperatures:
            chosen_temperature(cache.encoding, temperature)
        self._dataset, self._cache, self._views, self._schedule = dataset, cache, views, schedule
        self._keys, self._numbers, self._check_labels = keys, numbers, check_labels
        self._logits = _SharedView(cache, temperature if cache.encoding.temperatures else None)
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
        return len(self._dataset)

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Several items at once, as a DataLoader requests them: one lookup in the cache per batch."""
        view, positions = int(self._view), np.asarray(indices, np.int64)
        check_indices(positions, len(self))
        samples = positions if self._numbers is None else self._numbers[positions]
        keys, remade = self._keys, self._views is not None and not self._views.recipe.is_plain(1)
        if remade:
            assert self._views is not None, "views are made from the dataset"
            inputs, labels, *_ = self._views.fetch(view, samples)
            items = [keys.made(value, label) for value, label in zip(inputs, labels.tolist(), strict=True)]
        else:
            items = [self._dataset[index] for index in indices]
            if keys.index is not None:
                found = [keys.index_of(item, f"item {at}") for item, at in zip(items, indices, strict=True)]
                samples = np.array(found, np.int64)
        rows = torch.from_numpy(self._logits.rows(view, samples))
        if self._check_labels and not remade:
            self._compare_labels(items, indices, samples)
        if self._transform is not None:
            items = [self._transformed(item, at) for item, at in zip(items, indices, strict=True)]
        return [keys.joined(item, row) for item, row in zip(items, rows, strict=True)]

    def _compare_labels(self, items: Sequence[Any], indices: Sequence[int], samples: NDArray[np.int64]) -> None:
        classes = len(self._cache.classes) if self._cache.manifest.multi_label else None
        numbered = zip(items, indices, strict=True)
        given = np.array([self._keys.number_of(item, f"item {index}", classes) for item, index in numbered], np.int64)
        apart = (given != self._logits.labels[samples]).reshape(len(samples), -1).any(axis=1)
        if len(wrong := np.flatnonzero(apart)):
            at = int(wrong[0])
            raise CacheMismatch(
                f"item {indices[at]} has label {given[at]}, and in {self._cache.place} sample {samples[at]} has "
                f"{self._logits.labels[samples[at]]}",
                "the samples that the teacher answered for",
                "give the dataset in the teacher's order, or with indices=[…] or index_key=…; verify_inputs='off' "
                "compares nothing",
            )

    def _transformed(self, item: Any, index: int) -> Any:
        assert self._transform is not None, "asked for where there is one"
        value = self._keys.input_of(item, f"item {index}")
        try:
            made = self._transform(value)
        except KdcacheError:
            raise
        except Exception as problem:
            raise DatasetError(
                f"the transform of join fails on sample {index}, which is {brief(value)}: {name_of(self._transform)} "
                f"raises {describe(problem)}",
                "a transform of the dataset's own inputs, or of uint8 tensors (C, H, W) where the cache has views",
                "choose one that suits them",
            ) from problem
        return self._keys.replaced(item, made)

    def __getstate__(self) -> dict[str, Any]:
        # A schedule may be a local function, which pickle refuses, and workers do not choose the view.
        return self.__dict__ | {"_schedule": None}


class _SharedView:
    """The rows of one view in memory that forked workers share; a spawned worker loads its own copy.

    Attributes:
        labels: Labels of all samples, (samples,).
    """

    def __init__(self, cache: Cache, temperature: float | None = None) -> None:
        self._cache, self._temperature = cache, temperature
        arrays = [cache.manifest.array(name) for name in cache.logit_arrays]
        needed = sum(row_bytes(array.dtype, array.row_shape) for array in arrays) * len(cache)
        if needed > physical_memory_bytes():
            raise UsageError(
                f"a view of {cache.place} takes {needed:,} bytes, more than this machine's memory",
                "room for one view: a DataLoader reads samples at random",
                "use kdcache.train_student, which streams, or Cache.epoch, whose order a stream can follow",
            )
        self._arrays = {
            array.name: _shared_memory((len(cache), *array.row_shape), np.dtype(array.dtype)) for array in arrays
        }
        self._loaded = torch.tensor(-1).share_memory_()
        self.labels = cache.column("labels")

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
            {name: values.take(indices, axis=0) for name, values in self._arrays.items()},
            temperature=self._temperature,
        )
        return logits

    def __reduce__(self) -> tuple[Any, ...]:
        return _SharedView, (self._cache, self._temperature)


def _shared_memory(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """An array of zeros in memory that forked processes share."""
    # Anonymous, because the place for named shared memory is often small, and writing beyond it kills the process.
    # An array of no bytes still needs a map of one.
    size = math.prod(shape) * dtype.itemsize
    return np.frombuffer(mmap.mmap(-1, max(size, 1)), dtype, math.prod(shape)).reshape(shape)
