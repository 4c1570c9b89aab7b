"""Stage two: a student learns from the cache. The join of inputs and soft targets, and what is minimised."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kdcache.cache.feeds import FeedChoice, open_feed
from kdcache.cache.manifest import Preprocess
from kdcache.cache.order import EpochOrder, ExactOrder
from kdcache.cache.reader import Cache, open_cache
from kdcache.config import StudentConfig
from kdcache.datasets import (
    ArrayDataset,
    as_indexed,
)
from kdcache.devices import resolve_device
from kdcache.objectives import distillation_objective, label_objective
from kdcache.progress import log
from kdcache.records import to_json
from kdcache.runs import RunFolder
from kdcache.sampling import split_validation
from kdcache.targets import CachedTargets, check_join
from kdcache.training import TrainResult, train


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
        join = CachedTargets(
            cache,
            feed,
            wants_checksums=not isinstance(indexed, ArrayDataset),
            device=resolve_device(config.device) if config.cache_on_device else None,
        )
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
