"""Stage two: a student learns from the cache. The join of inputs and soft targets, and what is minimised."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from kdcache.augment import Transform
from kdcache.cache.feeds import FeedChoice, open_feed, parse_bytes
from kdcache.cache.manifest import Preprocess
from kdcache.cache.order import EpochOrder, ExactOrder, Schedule, view_schedule
from kdcache.cache.reader import Cache, open_cache
from kdcache.config import StudentConfig
from kdcache.datasets import as_indexed
from kdcache.devices import resolve_device
from kdcache.errors import CacheIncomplete, UsageError
from kdcache.objectives import distillation_objective, label_objective
from kdcache.progress import log
from kdcache.records import to_json
from kdcache.runs import RunFolder
from kdcache.sampling import split_validation
from kdcache.targets import CachedTargets, check_ensemble, check_join, inputs_all_checked
from kdcache.training import TrainResult, train
from kdcache.views import Views

CachePath = Cache | str | os.PathLike[str]


def train_student(
    student: nn.Module,
    dataset: Any,
    cache: CachePath | Sequence[CachePath],
    *,
    preprocess: Preprocess | None = None,
    config: StudentConfig | None = None,
    augment: Transform | None = None,
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
        cache: a finished split, or the path of a cache whose `train` split is used; or several of these, whose logits
            are averaged.
        preprocess: from the shared inputs to what the student takes; None takes the teacher's.
        augment: the transform that the views were made with, where it was given to the dump as an object.
        out: a folder for `config.json`, `metrics.jsonl`, `last.pt` and `best.pt`; None keeps nothing.
        resume: continue the run in `out`.
        run: an open run folder, instead of `out`.
        description: plain values put into every checkpoint.
        on_step: called after each step with its number, from 0, and the loss and its parts.

    Raises:
        CacheNotFound, CacheIncomplete, CacheDamaged: the cache cannot be read.
        CacheMismatch: the cache is of another dataset, split, length, order, class list or augmentation.
        TrainingDiverged: a loss is not finite.
    """
    config = config or StudentConfig()
    input_memory = parse_bytes(config.input_memory)
    caches = _open_caches(cache, config)
    manifest = caches[0].manifest
    indexed = as_indexed(dataset, name=manifest.dataset.name, split=manifest.dataset.split)
    if out is not None:
        paths = [str(each.path.parent) for each in caches]
        run = RunFolder(Path(out), {"cache": paths, **to_json(config)}, resume=resume)
    available = min(each.views for each in caches)
    schedule = view_schedule(config.view_schedule, config.views, available=available, seed=config.seed)
    used = list(dict.fromkeys(map(schedule, range(config.epochs))))
    check_ensemble(caches, used)
    views = Views(indexed, manifest.recipe, transform=augment)
    check_join(caches[0], views, used=used, verify_inputs=config.verify_inputs)
    if not views.recipe.is_plain(1):
        log(f"{config.epochs} epochs over {len(used)} of {available} views: {', '.join(map(str, used[:12]))}")
        log(views.remember(used, input_memory))
    train_indices, validation_indices = split_validation(_samples(caches, used), config.val_fraction, config.seed)
    order: EpochOrder = ExactOrder(train_indices, config.seed)
    join: CachedTargets | None = None
    if config.distill:
        order, join = _open_targets(caches, train_indices, schedule, config)
    return train(
        student,
        views,
        objective=distillation_objective(config) if config.distill else label_objective(config.label_smoothing),
        preprocess=preprocess or manifest.teacher.preprocess,
        config=config,
        order=order,
        validation_indices=validation_indices,
        schedule=schedule,
        join=join,
        verify_inputs="off" if join is None or inputs_all_checked(views) else config.verify_inputs,
        run=run,
        description=description,
        on_step=on_step,
    )


def _open_caches(given: CachePath | Sequence[CachePath], config: StudentConfig) -> list[Cache]:
    several = [given] if isinstance(given, Cache | str | os.PathLike) else given
    caches = [
        each if isinstance(each, Cache) else open_cache(each, allow_partial=config.allow_partial) for each in several
    ]
    if config.cache_weights and len(config.cache_weights) != len(caches):
        raise UsageError(
            f"there are {len(config.cache_weights)} --cache-weights for {len(caches)} caches", "one a cache"
        )
    return caches


def _open_targets(
    caches: Sequence[Cache], indices: NDArray[np.int64], schedule: Schedule, config: StudentConfig
) -> tuple[EpochOrder, CachedTargets]:
    """The order of the samples, and the join of their soft targets."""
    choice = FeedChoice(memory=config.cache_memory, feed=config.feed, shuffle=config.shuffle)
    feeds, orders = [], []
    for cache in caches:
        feed, order, line = open_feed(cache.reader, indices=indices, seed=config.seed, schedule=schedule, choice=choice)
        log(line)
        feeds.append(feed)
        orders.append(order)
    if any(order.layout != orders[0].layout for order in orders):
        raise UsageError(
            "the caches would be read in different orders: they are streamed, in chunks of different sizes",
            "caches that are held in memory, or have chunks of one size",
            "raise --cache-memory, or use --feed mapped",
        )
    device = resolve_device(config.device) if config.cache_on_device else None
    targets = CachedTargets(caches, feeds, weights=config.cache_weights, schedule=schedule, device=device)
    return orders[0], targets


def _samples(caches: Sequence[Cache], used: Sequence[int]) -> NDArray[np.int64]:
    """The samples that every cache has in every view that is used; all of them, unless one is partial.

    Raises:
        CacheIncomplete: there are none.
    """
    samples = reduce(np.intersect1d, [cache.samples(view) for cache in caches for view in used])
    if not len(samples):
        raise CacheIncomplete(
            f"of {caches[0].path} no sample is committed in all of the views {', '.join(map(str, used))}",
            "at least one",
            "choose views that are there, --views 0 for example, or let the dump go on",
        )
    if len(samples) < len(caches[0]):
        log(f"the cache is partial: training on {len(samples):,} of {len(caches[0]):,} samples")
    return samples
