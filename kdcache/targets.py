"""The join of a student's inputs and the cache's soft targets: by sample index, and refused where it would be wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.cache.feeds import Feed
from kdcache.cache.reader import Cache
from kdcache.consistency import check_deterministic
from kdcache.datasets import (
    ArrayDataset,
    Batch,
    IndexedDataset,
    batch_crc32c,
    fingerprint_labels,
)
from kdcache.devices import memory_errors
from kdcache.errors import CacheMismatch
from kdcache.keys import keyed_sample

# Content sources: their name is a place, and their identity is what is read there.
_NAMED_BY_PLACE = ("folder:", "py:")

# Of a dataset that is not in memory, how many inputs are read before the first step.
SAMPLED_INPUTS = 64
INPUTS_AT_ONCE = 4096


class CachedTargets:
    """Soft targets of a batch, by sample index, from one view of a cache.

    Args:
        cache: that was checked to be of the dataset.
        feed: of the cache's rows.
        wants_checksums: compare the inputs of every batch with those that the teacher saw; not needed for samples in
            memory, which were all compared before.
        device: that holds all the rows, where they are to be held there; None leaves that to the feed.

    Raises:
        KdcacheError: the rows do not fit into the device's memory.
    """

    def __init__(
        self, cache: Cache, feed: Feed, *, wants_checksums: bool = True, device: torch.device | None = None
    ) -> None:
        self._feed, self._where, self.wants_checksums = feed, cache.path, wants_checksums
        self._labels_n = torch.from_numpy(_known(cache, "labels"))
        self._crcs_n = torch.from_numpy(_known(cache, "input_crc32c"))
        self._held_nc: Tensor | None = None
        if device is not None:
            with memory_errors(len(cache), "leave out --cache-on-device"):
                self._held_nc = torch.from_numpy(cache.column("logits")).to(device)

    def start_epoch(self, epoch: int) -> None:
        self._feed.start_epoch(epoch)

    def __call__(self, batch: Batch) -> Batch:
        """A batch on the host, joined with the teacher's logits, (batch, classes), in the stored dtype.

        Raises:
            CacheMismatch: a label of the batch is not the one that the teacher's dataset had.
            CacheDamaged: a chunk fails its checksum.
        """
        cached = self._labels_n[batch.indices]
        if not torch.equal(cached, batch.labels):
            raise _label_mismatch(self._where, batch.indices.numpy(), cached.numpy(), batch.labels.numpy())
        if batch.input_crc32c is not None:
            self._check_inputs(batch.indices, batch.input_crc32c)
        if self._held_nc is not None:
            indices = batch.indices.to(self._held_nc.device, non_blocking=True)
            return batch._replace(soft_targets=self._held_nc.index_select(0, indices))
        return batch._replace(soft_targets=torch.from_numpy(self._feed.rows(batch.indices.numpy())))

    def _check_inputs(self, indices: Tensor, found: Tensor) -> None:
        cached = self._crcs_n[indices]
        if not torch.equal(cached, found):
            at = int((cached != found).nonzero()[0])
            raise input_mismatch(int(indices[at]), int(found[at]), self._crcs_n.numpy(), self._where)


def _known(cache: Cache, name: str) -> NDArray[np.int64]:
    """A column of integers, (samples,), as int64; -1, which no row holds, where a partial cache has none."""
    values = np.full(len(cache), -1, np.int64)
    samples = cache.samples()
    values[samples] = cache.reader.rows(name, 0, samples)
    return values


def check_join(cache: Cache, dataset: IndexedDataset) -> None:
    """Refuse a cache whose rows are not the teacher's answers to this dataset's samples.

    Raises:
        CacheMismatch: they differ in name, split, length, classes, labels, order or the bytes of the inputs; the
            message shows both values.
    """
    record = cache.manifest.dataset
    by_place = record.name.startswith(_NAMED_BY_PLACE) and dataset.name.startswith(_NAMED_BY_PLACE)
    facts: list[tuple[str, Any, Any]] = [
        ("dataset", record.name, record.name if by_place else dataset.name),
        ("split", record.split, dataset.split),
        ("length", record.length, len(dataset)),
        ("class list", record.classes, dataset.classes),
        ("dtype of the shared input", record.input_dtype, dataset.input_dtype),
        ("shape of the shared input", record.input_shape, dataset.input_shape),
    ]
    for what, cached, given in facts:
        if cached != given:
            raise _mismatch(cache, f"{what} {_show(cached, given)}", f"{what} {_show(given, cached)}")
    labels = dataset.labels() if cache.complete else None
    if labels is not None and fingerprint_labels(labels) != record.labels_sha256:
        raise _label_mismatch(cache.path, np.arange(len(cache)), cache.column("labels"), labels)
    check_deterministic(dataset)
    _check_inputs(cache, dataset)


def _check_inputs(cache: Cache, dataset: IndexedDataset) -> None:
    """Compare inputs with what the teacher saw: all that are in memory, else a keyed sample; the rest in training."""
    samples = cache.samples()
    if not isinstance(dataset, ArrayDataset):
        samples = np.intersect1d(samples, keyed_sample(len(dataset), SAMPLED_INPUTS, 0, "join"))
    crcs = _known(cache, "input_crc32c")
    for at in range(0, len(samples), INPUTS_AT_ONCE):
        indices = samples[at : at + INPUTS_AT_ONCE]
        found = np.array(batch_crc32c(dataset.shared_inputs(indices)), np.int64)
        if len(wrong := np.flatnonzero(found != crcs[indices])):
            raise input_mismatch(int(indices[wrong[0]]), int(found[wrong[0]]), crcs, cache.path)


def _mismatch(cache: Cache, cached: str, given: str) -> CacheMismatch:
    return CacheMismatch(
        f"{cache.path} is a cache of {cached}; the student's data has {given}",
        "the samples that the teacher answered for, in the same order",
        "point --data-root or --dataset at the teacher's data, or dump the teacher over this data",
    )


def _label_mismatch(
    where: Path, indices: NDArray[np.int64], cached: NDArray[np.int64], given: NDArray[np.int64]
) -> CacheMismatch:
    at = int(np.flatnonzero(cached != given)[0])
    reordered = len(cached) > 1 and np.array_equal(np.sort(cached), np.sort(given))
    kind = "the same labels in another order" if reordered else "other labels"
    return CacheMismatch(
        f"the student's data has {kind}: sample {indices[at]} has label {given[at]}, in {where} it has {cached[at]} "
        f"({int((cached != given).sum())} of {len(cached)} differ)",
        "the samples that the teacher answered for, in the same order",
        "give the dataset in the teacher's order and with its labels, or dump the teacher over this data",
    )


def input_mismatch(sample: int, found: int, crcs: NDArray[np.int64], where: Path) -> CacheMismatch:
    """The error for a sample whose pixels are not the teacher's; tells where the cache knows them, if it does."""
    elsewhere = np.flatnonzero(crcs == found)
    if len(elsewhere):
        why = f"the samples are in another order: the pixels of sample {sample} are those of sample {elsewhere[0]}"
    else:
        why = f"the shared input of sample {sample} is not what the teacher saw (another preprocessing, or other data)"
    return CacheMismatch(
        f"{why}; crc32c {found:#010x} here, {crcs[sample]:#010x} in {where}",
        "the samples that the teacher answered for, in the same order and untouched",
        "give the dataset as the teacher saw it, or dump the teacher over this data",
    )


def _show(value: Any, other: Any) -> str:
    """A value for a message; of two long tuples, where they part."""
    if isinstance(value, tuple) and isinstance(other, tuple) and len(value) > 12:
        at = next(
            (i for i, (a, b) in enumerate(zip(value, other, strict=False)) if a != b), min(len(value), len(other))
        )
        return f"of {len(value)} with {value[at] if at < len(value) else 'nothing'!r} at position {at}"
    return repr(value)
