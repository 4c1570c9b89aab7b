"""Stage two: training of a student from a cache."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from kdcache.core.config import StudentConfig
from kdcache.core.errors import CacheIncomplete, UsageError
from kdcache.core.json_records import canonical_json, to_json
from kdcache.core.options import default_values
from kdcache.core.progress import log
from kdcache.core.run_dir import RunFolder
from kdcache.data.augment import Transform
from kdcache.data.batch import BatchRequest
from kdcache.data.batch_sampler import samples_record, split_validation
from kdcache.data.kept_inputs import KeptInputs
from kdcache.data.loader import batch_loader
from kdcache.data.map_dataset import as_indexed
from kdcache.data.preprocess import Preprocessor, as_preprocessor
from kdcache.data.taught import as_taught, known_classes
from kdcache.data.views import Views
from kdcache.distill.objective import Join, distillation_objective, label_objective, parse_objectives
from kdcache.distill.objective_checks import (
    check_accumulation,
    check_encoding,
    check_kind_of_labels,
    check_unlabelled,
    check_views_per_sample,
    with_default_objective,
)
from kdcache.distill.student.composite_objective import CompositeObjective
from kdcache.distill.student.join_checks import check_ensemble, check_join, inputs_all_checked, known_column
from kdcache.distill.student.soft_targets import CachedTargets, DeviceSource, SeveralViews
from kdcache.distill.trainer import TEACHER_METRICS, OnStep, TrainResult, train
from kdcache.distill.training_data import TrainingData
from kdcache.models.device import floating_dtype, memory_errors, move_to, resolve_device
from kdcache.models.distributed import Processes
from kdcache.store.cache import Cache, open_cache
from kdcache.store.records import UNLABELLED, Preprocess
from kdcache.store.row_source import ReadOptions, plan_reading
from kdcache.store.sampler import ExactSampler, Sampler, Schedule, view_schedule

CachePath = Cache | str | os.PathLike[str]


def train_student(
    student: nn.Module,
    dataset: Any,
    cache: CachePath | Sequence[CachePath],
    *,
    preprocess: Preprocess | Preprocessor | None = None,
    config: StudentConfig | None = None,
    augment: Transform | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    run: RunFolder | None = None,
    description: dict[str, Any] | None = None,
    on_step: OnStep | None = None,
    processes: Processes | None = None,
    kept: KeptInputs | None = None,
) -> TrainResult:
    """Train a student in place from a cache. No teacher is needed or looked for.

    Args:
        student: Network from inputs (batch, …) to logits (batch, classes).
        dataset: The dataset of the cache: an indexed dataset, or any map-style dataset of (input, label) pairs.
        cache: A finished split, or the path of a cache whose `train` split is used; or several of these, whose logits
            are averaged.
        preprocess: Preprocessing from the shared inputs to those of the student; None takes the teacher's.
        augment: Transform of the views, where it was given to the dump as an object.
        out: Folder for `config.json`, `metrics.jsonl`, `last.pt` and `best.pt`; None keeps nothing.
        resume: Whether to continue the run in `out`.
        run: An open run folder, instead of `out`.
        description: Plain values put into every checkpoint.
        on_step: Called after each step with its number, from 0, and the loss and its parts.
        processes: Processes of `torch.distributed` that train the student together, each with its part of every batch;
            None for this one alone. Only the first one writes to `out`.
        kept: Memory for inputs that is shared with other runs on the same samples and views, with a slot more than the
            cache has views; None for one of this run's own. `config.input_memory` must not be 0.

    Raises:
        CacheNotFound, CacheIncomplete, CacheDamaged: the cache cannot be read.
        CacheMismatch: the cache holds another dataset, split, length, order, class list or augmentation.
        TrainingDiverged: a loss is not finite.
    """
    config, processes = config or StudentConfig(), processes or Processes()
    caches = _open_caches(cache, config)
    manifest = caches[0].manifest
    record = manifest.dataset
    config = with_default_objective(config, manifest)
    indexed = as_indexed(dataset, name=record.name, split=record.split, default_classes=known_classes(manifest))
    indexed = as_taught(indexed, manifest)
    if out is not None and processes.first:
        paths = [each.url for each in caches]
        settings = {"cache": paths, **to_json(config)}
        run = RunFolder(Path(out), settings, resume=resume, defaults=default_values(type(config)))
    available = min(each.views for each in caches)
    named = view_schedule(config.view_schedule, config.views, available=available, seed=config.seed)
    turns = config.views_per_sample
    last = config.epochs * turns - 1

    def schedule(turn: int) -> int:
        return named(min(turn, last))  # no view is read ahead for an epoch that does not come

    def used_in(epochs: int) -> list[int]:
        return list(dict.fromkeys(map(named, range(epochs * turns))))

    used = used_in(config.epochs)
    check_ensemble(caches, used)
    specs = parse_objectives(config.objective, config)
    check_accumulation(specs, config)
    check_views_per_sample(config, len({named(turn) for turn in range(turns)}), processes)
    if config.distill:
        for each in caches:
            check_encoding(each.encoding, specs, config)
    views = Views(indexed, manifest.recipe, transform=augment)
    check_join(caches[0], views, used=used, verify_inputs=config.verify_inputs)
    if not views.recipe.is_plain(1):
        log(f"{config.epochs} epochs over {len(used)} of {available} views: {', '.join(map(str, used[:12]))}")
    samples = _samples(caches, used)
    labelled = samples
    if not manifest.multi_label:
        labelled = samples[known_column(caches[0], "labels")[samples] != UNLABELLED]
    check_kind_of_labels(specs, indexed, manifest.recipe)
    if manifest.is_embedding:
        if not config.distill:
            raise UsageError(
                "--no-distill is given, and the cache holds embeddings", "the teacher's vectors", "leave it out"
            )
    elif len(labelled) < len(samples):
        check_unlabelled(len(labelled), len(samples), specs, config, manifest.recipe)
        if not config.distill:
            samples = labelled
    without_labels = manifest.is_embedding or config.metric in TEACHER_METRICS
    if config.metric in TEACHER_METRICS and not config.distill:
        raise UsageError(
            f"--metric {config.metric} is given with --no-distill", "a teacher", "give --metric accuracy or nll"
        )
    train_indices, validation_indices = split_validation(samples, config.val_fraction, config.seed)
    if not without_labels and len(validation_indices):
        validation_indices = np.intersect1d(validation_indices, labelled)
        if not len(validation_indices):
            raise UsageError(
                f"--val-fraction {config.val_fraction:g} holds out no labelled sample",
                "labels to compare with, or the teacher",
                "give --metric agreement",
            )
    join: Join | None = None
    preprocessor = as_preprocessor(preprocess or manifest.teacher.preprocess)
    objective = distillation_objective(config) if config.distill else label_objective(config.label_smoothing)
    with contextlib.ExitStack() as stack:
        composed: CompositeObjective | None = None
        if config.distill and config.objective:
            objective = composed = _compose(student, views, caches, preprocessor, schedule(0), config, processes)
            stack.callback(composed.close)
        if not config.distill:
            sampler: Sampler = ExactSampler(train_indices, config.seed)
        else:
            sampler, join = _open_targets(caches, train_indices, schedule, config, composed)
        data = TrainingData(
            views=views,
            preprocessor=preprocessor,
            sampler=sampler,
            validation_indices=validation_indices,
            schedule=schedule,
            views_per_sample=turns,
            join=join,
            verify_inputs="off" if join is None or inputs_all_checked(views) else config.verify_inputs,
            record=samples_record(samples),
            teacher=caches[0].rows,
            kept=kept,
        )
        return train(
            student,
            data,
            objective=objective,
            config=config,
            run=run,
            description=lambda epochs: {**(description or {}), **_taught_by(caches, used_in(epochs))},
            on_step=on_step,
            processes=processes,
        )


def _turn(schedule: Schedule, turn: int, turns: int) -> Schedule:
    """View of each epoch in one of its turns."""
    return lambda epoch: schedule(epoch * turns + turn)


def _compose(
    student: nn.Module,
    views: Views,
    caches: Sequence[Cache],
    preprocessor: Preprocessor,
    view: int,
    config: StudentConfig,
    processes: Processes,
) -> CompositeObjective:
    """The objective of `config.objective`, with hooks on the student.

    Raises:
        CacheMismatch: the cache does not hold what an objective needs.
    """
    device = resolve_device(config.device)
    move_to(student, device)
    request = BatchRequest(np.arange(min(2, len(views))), view)
    (batch,) = batch_loader(views, [request], preprocessor=preprocessor, device=device)
    inputs = preprocessor.per_batch(batch.inputs.to(device), floating_dtype(student))
    specs = parse_objectives(config.objective, config)
    if len(caches) > 1 and any(spec.loss.features for spec in specs):
        raise UsageError(
            f"{len(caches)} caches are given, and features are compared", "one cache: features of two have no mean"
        )
    with memory_errors(len(inputs), "take a smaller student"):
        return CompositeObjective(specs, student, inputs, caches[0].manifest, seed=config.seed, processes=processes)


def _taught_by(caches: Sequence[Cache], used: Sequence[int]) -> dict[str, Any]:
    """Identity of the soft targets, compared when a run is continued: views in their order, caches and their rows.

    Views that are added to a cache meanwhile change nothing, unless the run uses them.
    """
    digests = [
        hashlib.sha256(canonical_json(to_json(replace(cache.manifest, views=1, view_sha256=())))).hexdigest()
        for cache in caches
    ]
    rows = [[cache.manifest.view_sha256[view] for view in used] if cache.complete else [] for cache in caches]
    return {"cache": digests, "rows": rows, "views": list(used)}


def _open_caches(given: CachePath | Sequence[CachePath], config: StudentConfig) -> list[Cache]:
    several = [given] if isinstance(given, Cache | str | os.PathLike) else given
    if not len(several):
        raise UsageError("there is no cache", "at least one", "name the folder that dump-teacher wrote")
    caches = [
        each
        if isinstance(each, Cache)
        else open_cache(
            each, allow_partial=config.allow_partial, cache_dir=config.cache_dir, cache_disk=config.cache_disk
        )
        for each in several
    ]
    if config.cache_weights and len(config.cache_weights) != len(caches):
        raise UsageError(
            f"there are {len(config.cache_weights)} --cache-weights for {len(caches)} caches", "one a cache"
        )
    if not math.isfinite(sum(config.cache_weights)):
        raise UsageError(f"--cache-weights is {config.cache_weights}", "finite numbers with a finite sum")
    return caches


def _open_targets(
    caches: Sequence[Cache],
    indices: NDArray[np.int64],
    schedule: Schedule,
    config: StudentConfig,
    composed: CompositeObjective | None,
) -> tuple[Sampler, Join]:
    """The order of the samples, and the join of their soft targets and features."""
    features = composed.arrays if composed else []
    negatives = composed.negatives if composed else {}
    parts = [(cache.reader, cache.logit_arrays) for cache in caches]
    beside = [(caches[0].reader, features)] if features else []
    options = ReadOptions(memory=config.cache_memory, row_source=config.row_source, shuffle=config.shuffle)
    turns = config.views_per_sample
    # Each turn of a batch holds rows of its own view.
    plan = plan_reading([*parts, *beside] * turns, options)
    log(str(plan))
    if negatives and plan.row_source == "streamed":
        raise UsageError(
            f"contrastive draws negatives from the whole cache, which is streamed ({plan.reason})",
            "features in memory",
            "raise --cache-memory",
        )
    sampler = plan.sampler(indices, config.seed)
    device = resolve_device(config.device) if config.cache_on_device else None
    joins = []
    for turn in range(turns):
        own = _turn(schedule, turn, turns)
        targets = CachedTargets(
            caches,
            [plan.source(part, own, sampler) if device is None else DeviceSource(*part, own, device) for part in parts],
            weights=config.cache_weights,
            features=plan.source(beside[0], own, sampler) if beside else None,
            negatives=negatives,
            seed=config.seed,
            schedule=own,
            tail=config.tail,
        )
        joins.append(targets)
    return sampler, joins[0] if turns == 1 else SeveralViews(joins)


def _samples(caches: Sequence[Cache], used: Sequence[int]) -> NDArray[np.int64]:
    """The samples that every cache has in every view that is used; all of them, unless one is partial.

    Raises:
        CacheIncomplete: there are none.
    """
    # View 0 too, because what all views share, such as labels, is written with it.
    samples = reduce(np.intersect1d, [cache.samples(view) for cache in caches for view in (0, *used)])
    if not len(samples):
        raise CacheIncomplete(
            f"of {caches[0].place} no sample is committed in all of the views {', '.join(map(str, used))}",
            "at least one",
            "choose views that are there, --views 0 for example, or let the dump go on",
        )
    if len(samples) < len(caches[0]):
        log(f"the cache is partial: training on {len(samples):,} of {len(caches[0]):,} samples")
    return samples
