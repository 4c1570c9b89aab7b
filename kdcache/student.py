"""Stage two: a student learns from the cache. The join of inputs and soft targets, and what is minimised."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kdcache import losses
from kdcache.cache.feeds import Feed, FeedChoice, open_feed
from kdcache.cache.manifest import Preprocess
from kdcache.cache.order import EpochOrder, ExactOrder
from kdcache.cache.reader import Cache, open_cache
from kdcache.config import StudentConfig
from kdcache.datasets import (
    Batch,
    IndexedDataset,
    as_indexed,
    check_deterministic,
    fingerprint_labels,
    fingerprint_samples,
    input_crc32c,
)
from kdcache.devices import memory_errors, resolve_device
from kdcache.errors import CacheMismatch
from kdcache.progress import log
from kdcache.records import to_json
from kdcache.runs import RunFolder
from kdcache.sampling import split_validation
from kdcache.training import Objective, TrainResult, label_objective, train

# Content sources: their name is a place, and their identity is what is read there.
_NAMED_BY_PLACE = ("folder:", "py:")


class CachedTargets:
    """Soft targets of a batch, by sample index, from one view of a cache.

    Args:
        cache: that was checked to be of the dataset.
        feed: of the cache's rows.
        device: that holds all the rows, where they are to be held there; None leaves that to the feed.

    Raises:
        KdcacheError: the rows do not fit into the device's memory.
    """

    def __init__(self, cache: Cache, feed: Feed, *, device: torch.device | None = None) -> None:
        self._feed, self._where = feed, cache.path
        self._labels_n = torch.from_numpy(_all_labels(cache))
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
        if self._held_nc is not None:
            indices = batch.indices.to(self._held_nc.device, non_blocking=True)
            return batch._replace(soft_targets=self._held_nc.index_select(0, indices))
        return batch._replace(soft_targets=torch.from_numpy(self._feed.rows(batch.indices.numpy())))


def _all_labels(cache: Cache) -> NDArray[np.int64]:
    """(samples,); -1, which is no label, where a partial cache has none."""
    if cache.complete:
        return cache.column("labels")
    labels = np.full(len(cache), -1, np.int64)
    samples = cache.samples()
    labels[samples] = cache.reader.rows("labels", 0, samples)
    return labels


def distillation_objective(config: StudentConfig) -> Objective:
    """alpha · kd + (1 − alpha) · cross entropy, for batches with soft targets."""

    def objective(logits_bc: Tensor, batch: Batch) -> dict[str, Tensor]:
        assert batch.soft_targets is not None, "distillation needs joined batches"
        soft = losses.kd(logits_bc, batch.soft_targets, temperature=config.temperature)
        hard = losses.hard_cross_entropy(logits_bc, batch.labels, label_smoothing=config.label_smoothing)
        return {"loss": config.alpha * soft + (1 - config.alpha) * hard, "kd": soft, "cross_entropy": hard}

    return objective


def train_student(
    student: nn.Module,
    dataset: Any,
    cache: Cache | str | os.PathLike[str],
    *,
    preprocess: Preprocess | None = None,
    config: StudentConfig | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    run: RunFolder | None = None,
    description: dict[str, Any] | None = None,
    on_step: Callable[[int, dict[str, Tensor]], None] | None = None,
) -> TrainResult:
    """Train a student in place from a cache. No teacher is needed or looked for.

    Args:
        student: takes (batch, …) and returns logits (batch, classes).
        dataset: the samples that the cache is of: an indexed dataset, or any map-style dataset of (input, label) pairs.
        cache: a finished split, or the path of a cache whose `train` split is used.
        preprocess: from the dataset's inputs to what the student takes; None takes the teacher's.
        out: a folder for `config.json`, `metrics.jsonl`, `last.pt` and `best.pt`; None keeps nothing.
        resume: continue the run in `out`.
        run: an open run folder, instead of `out`.
        description: plain values put into every checkpoint.
        on_step: called after each step with its number, from 0, and the loss and its parts.

    Raises:
        CacheNotFound, CacheIncomplete, CacheDamaged: the cache cannot be read.
        CacheMismatch: the cache is of another dataset, split, length, order or class list.
        TrainingDiverged: a loss is not finite.
    """
    config = config or StudentConfig()
    if not isinstance(cache, Cache):
        cache = open_cache(cache, allow_partial=config.allow_partial)
    record = cache.manifest.dataset
    indexed = as_indexed(dataset, name=record.name, split=record.split)
    if out is not None:
        run = RunFolder(Path(out), {"cache": str(cache.path.parent), **to_json(config)}, resume=resume)
    check_join(cache, indexed)
    samples = cache.samples()
    if not cache.complete:
        log(f"the cache is partial: training on {len(samples):,} of {len(cache):,} samples")
    train_indices, validation_indices = split_validation(samples, config.val_fraction, config.seed)
    order: EpochOrder = ExactOrder(train_indices, config.seed)
    join: CachedTargets | None = None
    if config.distill:
        choice = FeedChoice(memory=config.cache_memory, feed=config.feed, shuffle=config.shuffle)
        feed, order, line = open_feed(cache.reader, indices=train_indices, seed=config.seed, choice=choice)
        log(line)
        join = CachedTargets(cache, feed, device=resolve_device(config.device) if config.cache_on_device else None)
    return train(
        student,
        indexed,
        objective=distillation_objective(config) if config.distill else label_objective(config.label_smoothing),
        preprocess=preprocess or cache.manifest.teacher.preprocess,
        config=config,
        order=order,
        validation_indices=validation_indices,
        join=join,
        run=run,
        description=description,
        on_step=on_step,
    )


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
    if fingerprint_samples(dataset) != record.sample_sha256:
        raise _input_mismatch(cache, dataset)


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


def _input_mismatch(cache: Cache, dataset: IndexedDataset) -> CacheMismatch:
    """Say which sample differs, and whether the cache knows its pixels at another index."""
    samples = cache.samples()
    crcs = cache.reader.rows("input_crc32c", 0, samples)
    for index, crc in zip(samples, crcs, strict=True):
        found = input_crc32c(dataset.shared_inputs([int(index)])[0])
        if found == crc:
            continue
        elsewhere = samples[crcs == found]
        if len(elsewhere):
            why = f"the samples are in another order: the pixels of sample {index} are those of sample {elsewhere[0]}"
        else:
            why = (
                f"the shared input of sample {index} is not what the teacher saw (another preprocessing, or other data)"
            )
        return CacheMismatch(
            f"{why}; crc32c {found:#010x} here, {crc:#010x} in {cache.path}",
            "the samples that the teacher answered for, in the same order and untouched",
            "give the dataset as the teacher saw it, or dump the teacher over this data",
        )
    return _mismatch(cache, f"sample fingerprint {cache.manifest.dataset.sample_sha256}", fingerprint_samples(dataset))


def _show(value: Any, other: Any) -> str:
    """A value for a message; of two long tuples, where they part."""
    if isinstance(value, tuple) and isinstance(other, tuple) and len(value) > 12:
        at = next(
            (i for i, (a, b) in enumerate(zip(value, other, strict=False)) if a != b), min(len(value), len(other))
        )
        return f"of {len(value)} with {value[at] if at < len(value) else 'nothing'!r} at position {at}"
    return repr(value)
