"""Finished runs read from their folders, and the cached teachers that they were trained from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.core.errors import CacheMismatch, UsageError
from kdcache.core.run_dir import read_config, read_metrics, read_result
from kdcache.data.dataset import IndexedDataset
from kdcache.data.soft_targets import mean_logits
from kdcache.data.taught import as_taught
from kdcache.data.views import Views
from kdcache.distill.student.join_checks import check_ensemble, check_join
from kdcache.models.from_run import TrainedNetwork, load_trained
from kdcache.store.cache import Cache, cache_splits, open_cache
from kdcache.store.records import TeacherRecord

TEACHER, ALONE, DISTILLED = "teacher", "student alone", "student distilled"


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run.

    Attributes:
        name: Name of the folder; its path where two folders have the same name.
        folder: Path of the run.
        config: Contents of config.json.
        result: Contents of result.json.
        metrics: Entries of metrics.jsonl, one per epoch.
        trained: Best checkpoint as a network.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    result: dict[str, Any]
    metrics: list[dict[str, Any]]
    trained: TrainedNetwork

    @property
    def role(self) -> str:
        return str(self.result["role"])

    @property
    def caches(self) -> tuple[str, ...]:
        """Paths of the caches that it was trained from, as in its settings; empty for a teacher."""
        return tuple(self.config.get("cache") or ())

    @property
    def epoch_seconds(self) -> float:
        """Mean seconds per epoch."""
        seconds = self.result["epoch_seconds"]
        return float(sum(seconds) / len(seconds))

    @property
    def checkpoint_bytes(self) -> int:
        return self.trained.checkpoint.stat().st_size


def open_runs(paths: Sequence[str]) -> list[Run]:
    """Open finished runs of one dataset.

    Raises:
        UsageError: a folder holds no finished run, or two runs are of different datasets.
        CheckpointError: a run's checkpoint cannot be read.
    """
    folders = [Path(path) for path in dict.fromkeys(os.path.normpath(path) for path in paths)]
    names = [folder.resolve().name for folder in folders]
    runs = [
        _open_run(folder, str(folder) if names.count(name) > 1 else name)
        for folder, name in zip(folders, names, strict=True)
    ]
    for run in runs[1:]:
        for what in ("dataset", "classes"):
            one, other = getattr(runs[0].trained, what), getattr(run.trained, what)
            if one != other:
                raise UsageError(
                    f"{runs[0].folder} is of the {what} {one!r}, {run.folder} of {other!r}",
                    "runs of one dataset, which can be evaluated on the same samples",
                    "make a report of each dataset's runs",
                )
    return runs


def _open_run(folder: Path, name: str) -> Run:
    result, metrics, trained = read_result(folder), read_metrics(folder), load_trained(folder)
    return Run(
        name=name,
        folder=folder,
        config=read_config(folder),
        result=result,
        metrics=metrics,
        trained=trained,
    )


class CachedTeacher:
    """Cached logits of a teacher, or of several teachers, averaged as in training.

    Args:
        paths: Paths of the caches.
        weights: Weight of each cache, of which only the proportions count; empty for equal ones.

    Attributes:
        paths: Paths of the caches.
        name: Name in tables.
        key: Identity among the teachers of a report.

    Raises:
        CacheNotFound: a cache does not exist.
        CacheIncomplete, CacheDamaged: a cache cannot be read.
        CacheMismatch: the caches hold different samples.
    """

    def __init__(self, paths: Sequence[str], weights: Sequence[float] = ()) -> None:
        self.paths = tuple(paths)
        self.name = f"cached teacher{'s' if len(paths) > 1 else ''}"
        weights = weights or [1.0] * len(paths)
        self._shares = [weight / sum(weights) for weight in weights]
        self.key = (self.paths, tuple(self._shares))
        self._splits: dict[str, list[Cache]] = {"train": [open_cache(path, "train") for path in paths]}
        if all("test" in cache_splits(path) for path in paths):
            self._splits["test"] = [open_cache(path, "test") for path in paths]
        for caches in self._splits.values():
            check_ensemble(caches, [0])

    @property
    def records(self) -> list[TeacherRecord]:
        """Records of the teachers, with their accuracy on the training split."""
        return [cache.manifest.teacher for cache in self._splits["train"]]

    @property
    def test_accuracies(self) -> list[float | None]:
        """Test accuracy of each teacher by itself; None where its logits for plain test samples are not cached."""
        if self.why_not("test") is not None:
            return [None] * len(self.paths)
        return [cache.manifest.teacher.accuracy for cache in self._splits["test"]]

    def why_not(self, split: str) -> str | None:
        """Reason why a split has no logits to compare with, as a sentence; None where it has."""
        where = " and ".join(self.paths)
        if split not in self._splits:
            return f"{where} holds no logits for the {split} split; dump-teacher with --split {split} adds them."
        recipe = self._splits[split][0].manifest.recipe
        if not recipe.is_plain(0):
            return (
                f"{where} holds logits for augmented samples of the {split} split (augment {recipe.augment}, "
                f"mix {recipe.mix}) and none for the plain ones, on which networks are evaluated; dump-teacher with "
                "--plain-view keeps those as view 0."
            )
        return None

    def answered(self, dataset: IndexedDataset) -> IndexedDataset:
        """A split without the samples that the teacher left out."""
        caches = self._splits.get(dataset.split)
        return dataset if caches is None else as_taught(dataset, caches[0].manifest)

    def logits(self, dataset: IndexedDataset, indices: NDArray[np.int64]) -> NDArray[np.float32]:
        """Mean logits for plain samples of a split, (n, classes); only where `why_not` returns None.

        Raises:
            CacheMismatch: the cache holds other samples.
        """
        caches = self._splits[dataset.split]
        check_join(caches[0], Views(dataset, caches[0].manifest.recipe))
        logits = [torch.from_numpy(cache.rows(indices)) for cache in caches]
        mean: NDArray[np.float32] = mean_logits(logits, self._shares).float().numpy()
        return mean

    def taught(self, run: Run) -> bool:
        """Whether a run was trained from exactly these logits; True for a run that does not record its views."""
        digests = [set(cache.manifest.view_sha256) for cache in self._splits["train"]]
        taught_by = run.trained.taught_by
        return not taught_by or (
            len(taught_by) == len(digests)
            and all(set(used) <= known for used, known in zip(taught_by, digests, strict=True))
        )


def teacher_of(run: Run, override: str | None) -> CachedTeacher | None:
    """Cached teacher of a student; None for a run without caches.

    Args:
        override: Present path of the cache, instead of the recorded one.

    Raises:
        UsageError: one path is given for several caches.
        CacheMismatch: the cache at the recorded path is not the one that the run was trained from.
        CacheNotFound, CacheIncomplete, CacheDamaged: as for `CachedTeacher`.
    """
    if not run.caches:
        return None
    if override is not None and len(run.caches) > 1:
        raise UsageError(
            f"--cache names one cache, and {run.folder} was trained from {len(run.caches)}: {', '.join(run.caches)}",
            "a run of one cache",
            "leave out --cache, with the caches at their recorded paths",
        )
    teacher = CachedTeacher([override] if override else run.caches, run.config.get("cache_weights") or ())
    if override is None and not teacher.taught(run):
        raise CacheMismatch(
            f"{' and '.join(run.caches)} holds other logits than {run.folder} was trained from",
            "the cache of that training",
            "give its path by --cache; a cache that is named there is always compared with",
        )
    return teacher
