"""Finished runs as they lie in their folders, and the cached teachers that they learnt from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.core.errors import CacheMismatch, UsageError
from kdcache.core.run_dir import read_config, read_metrics, read_result
from kdcache.data.dataset import IndexedDataset
from kdcache.data.views import Views
from kdcache.distill.student.join_checks import check_ensemble, check_join
from kdcache.models.from_run import TrainedNetwork, load_trained
from kdcache.store.cache import Cache, cache_splits, open_cache
from kdcache.store.manifest import TeacherRecord

TEACHER, ALONE, DISTILLED = "teacher", "student alone", "student distilled"


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run.

    Attributes:
        name: of its folder; the whole path where two runs have folders of one name.
        metrics: an entry an epoch.
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
        """The caches that it was trained from, as its settings name them; none for a teacher."""
        return tuple(self.config.get("cache") or ())

    @property
    def epoch_seconds(self) -> float:
        seconds = self.result["epoch_seconds"]
        return float(sum(seconds) / len(seconds))

    @property
    def checkpoint_bytes(self) -> int:
        return self.trained.checkpoint.stat().st_size


def open_runs(paths: Sequence[str]) -> list[Run]:
    """Runs of one dataset.

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
                    "runs of one dataset, which can be judged on the same samples",
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
    """What a teacher said, from its cache; or several teachers, whose logits are averaged as in training.

    Args:
        paths: of the caches.
        weights: one a cache, of which only the proportions count; empty for equal ones.

    Attributes:
        name: for a table.
        key: what tells it from other teachers.

    Raises:
        CacheNotFound: a cache is not there.
        CacheIncomplete, CacheDamaged: it cannot be read.
        CacheMismatch: the caches are not of the same samples.
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
        """Of the teachers; their accuracy here is that on the training split."""
        return [cache.manifest.teacher for cache in self._splits["train"]]

    @property
    def test_accuracies(self) -> list[float | None]:
        """Of each teacher by itself; None where its answers to plain test samples are not cached."""
        if self.why_not("test") is not None:
            return [None] * len(self.paths)
        return [cache.manifest.teacher.accuracy for cache in self._splits["test"]]

    def why_not(self, split: str) -> str | None:
        """Why there is nothing to compare with on a split, as a sentence; None where there is."""
        where = " and ".join(self.paths)
        if split not in self._splits:
            return f"{where} holds no answers to the {split} split; dump-teacher with --split {split} adds them."
        recipe = self._splits[split][0].manifest.recipe
        if not recipe.is_plain(0):
            return (
                f"{where} holds answers to varied samples of the {split} split (augment {recipe.augment}, "
                f"mix {recipe.mix}) and none to the plain ones that networks are judged on; dump-teacher with "
                "--plain-view keeps those as view 0."
            )
        return None

    def answers(self, dataset: IndexedDataset, indices: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits for some plain samples of a split, (n, classes), where `why_not` says nothing against it.

        Raises:
            CacheMismatch: the cache is of other samples.
        """
        caches = self._splits[dataset.split]
        check_join(caches[0], Views(dataset, caches[0].manifest.recipe))
        mean = np.zeros((len(indices), len(dataset.classes)), np.float32)
        for share, cache in zip(self._shares, caches, strict=True):
            mean += np.float32(share) * cache.rows(indices).astype(np.float32)
        return mean

    def taught(self, run: Run) -> bool:
        """Whether a run learnt from these very answers; also where the run does not record its views."""
        digests = [set(cache.manifest.view_sha256) for cache in self._splits["train"]]
        taught_by = run.trained.taught_by
        return not taught_by or (
            len(taught_by) == len(digests)
            and all(set(used) <= known for used, known in zip(taught_by, digests, strict=True))
        )


def teacher_of(run: Run, override: str | None) -> CachedTeacher | None:
    """The cached teacher of a student; None for a run that has none.

    Args:
        override: where its cache is now.

    Raises:
        UsageError: one path is given for several caches.
        CacheMismatch: what lies at the path that the run names is not what it learnt from.
        CacheNotFound, CacheIncomplete, CacheDamaged: as for `CachedTeacher`.
    """
    if not run.caches:
        return None
    if override is not None and len(run.caches) > 1:
        raise UsageError(
            f"--cache names one cache, and {run.folder} learnt from {len(run.caches)}: {', '.join(run.caches)}",
            "a run of one cache",
            "leave out --cache, with the caches where they were",
        )
    teacher = CachedTeacher([override] if override else run.caches, run.config.get("cache_weights") or ())
    if override is None and not teacher.taught(run):
        raise CacheMismatch(
            f"{' and '.join(run.caches)} holds other answers than {run.folder} learnt from",
            "the cache of that training",
            "give it by --cache; a cache that is named there is compared with, whatever it is of",
        )
    return teacher
