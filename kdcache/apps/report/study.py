"""Measurements of a report: everything that can fail early comes before the slow parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.apps.report.cost import logits_of, measure_cost
from kdcache.apps.report.metrics import Agreement, MeasuredRun, Predictions, agree, evaluate_logits
from kdcache.apps.report.runs import CachedTeacher, Run, open_runs, teacher_of
from kdcache.core.commands import ReportArgs
from kdcache.core.errors import CacheNotFound, DatasetError, UsageError
from kdcache.core.progress import log
from kdcache.core.rng import keyed_sample
from kdcache.data.dataset import IndexedDataset, labelled_samples
from kdcache.models.build import check_classes
from kdcache.models.device import resolve_device
from kdcache.models.from_run import open_split
from kdcache.models.registry import weights_sha256

# Tolerated difference of recorded and measured accuracy, for the arithmetic of another device.
ACCURACY_TOLERANCE = 0.002

TEST, TRAIN = "test", "train"


class Study:
    """Runs, evaluated on one dataset and compared with their cached teachers.

    Attributes:
        runs: Measured runs in the given order.
        caches: Paths of all caches found.
        unseen: Cached teachers without a run among `runs`.
        cached_answers: Test predictions of the unseen teachers by the key of the teacher.
        answers: Test predictions of the runs, then of the unseen teachers; empty without a test split.
        labels_n: Labels of the test samples, (n,).
        test: Test split; None where there is none.
        missing: Sentences on what could not be measured, and why.

    Raises:
        UsageError: a run is not finished, runs are of several datasets, or one cache is given for a run of several.
        CacheMismatch, CacheIncomplete, CacheDamaged: an existing cache cannot be compared with.
        CacheNotFound: the cache in the settings does not exist.
        ModelError: the classes of a run's network are not those of the dataset.
    """

    def __init__(self, settings: ReportArgs) -> None:
        self._settings = settings
        self.missing: list[str] = []
        opened = open_runs(settings.runs)
        resolve_device(settings.device)
        self._teachers = self._open_teachers(opened)
        self._data = self._open_data(opened)
        self._indices = {split: self._chosen(dataset) for split, dataset in self._data.items()}
        self.test = self._data.get(TEST)
        self._cached = {
            (teacher.key, split): teacher.logits(dataset, self._indices[split])
            for teacher in self._distinct
            for split, dataset in self._data.items()
            if self._comparable(teacher, split)
        }
        self.labels_n = np.empty(0, np.int64)
        self.runs = [self._measure(run, f"{at} of {len(opened)}, {run.name}") for at, run in enumerate(opened, 1)]
        self.caches = list(dict.fromkeys(path for teacher in self._distinct for path in teacher.paths))
        self.unseen = self._without_run()
        self.cached_answers = self._evaluate_cached()
        of_runs = [each.answers for each in self.runs if each.answers is not None]
        self.answers = [*of_runs, *self.cached_answers.values()]

    def cached_logits(self, teacher: CachedTeacher | None, split: str = TEST) -> NDArray[np.float32] | None:
        """Logits of a cached teacher for the chosen samples of a split; None where there are none."""
        return None if teacher is None else self._cached.get((teacher.key, split))

    @property
    def _distinct(self) -> list[CachedTeacher]:
        teachers = (teacher for teacher in self._teachers.values() if teacher is not None)
        return list({teacher.key: teacher for teacher in teachers}.values())

    def _miss(self, sentence: str) -> None:
        if sentence not in self.missing:
            self.missing.append(sentence)
            log(f"not in the report: {sentence}")

    def _open_teachers(self, opened: Sequence[Run]) -> dict[str, CachedTeacher | None]:
        """Cached teacher of each run by its name; the run of a teacher is compared with the first one."""
        teachers: dict[str, CachedTeacher | None] = {}
        override = self._settings.cache
        for run in opened:
            try:
                teachers[run.name] = teacher = teacher_of(run, override)
            except CacheNotFound as problem:
                if override is not None:  # a cache that is named must exist
                    raise
                teachers[run.name] = None
                self._miss(
                    f"{run.name} is not compared with its teacher, and its cache is not shown: {problem.found}. "
                    "Give the path of the cache by --cache."
                )
                continue
            if teacher is not None and not teacher.taught(run):
                self._miss(
                    f"{run.name} was trained from other logits than those of {override}: it is compared with these."
                )
        first = next((teacher for teacher in teachers.values() if teacher is not None), None)
        return {run.name: teachers[run.name] if run.caches else first for run in opened}

    def _open_data(self, opened: Sequence[Run]) -> dict[str, IndexedDataset]:
        """Datasets of the splits that can be opened."""
        trained, data = opened[0].trained, {}
        for split in (TEST, TRAIN):
            if trained.embedding:
                raise UsageError(
                    f"the run at {opened[0].folder} answers with a vector",
                    "runs on classes, which the report's figures are of",
                    "see kdcache evaluate and kdcache compare",
                )
            try:
                found = open_split(trained, self._settings, split)
            except DatasetError as problem:
                self._miss(f"Nothing is measured on the {split} split: {problem.found}.")
                continue
            for teacher in self._distinct:
                found = teacher.answered(found)
            if found.multi_label:
                raise UsageError(
                    f"the samples of {found.name} have any number of classes each",
                    "one class per sample, which the report's figures are of",
                    "see kdcache evaluate and kdcache compare",
                )
            if not len(labelled_samples(found)):
                self._miss(f"Nothing is measured on the {split} split: it is unlabelled.")
                continue
            data[split] = found
            for run in opened:
                check_classes(str(run.trained.checkpoint), run.trained.classes, data[split])
        return data

    def _chosen(self, dataset: IndexedDataset) -> NDArray[np.int64]:
        """Indices of the measured samples: all of the test split, some of the training split."""
        if dataset.split == TEST:
            return labelled_samples(dataset)
        labelled = labelled_samples(dataset)
        return labelled[keyed_sample(len(labelled), self._settings.train_samples, self._settings.seed, "report")]

    def _comparable(self, teacher: CachedTeacher, split: str) -> bool:
        if (reason := teacher.why_not(split)) is None:
            return True
        self._miss(f"There is no comparison with the teacher on the {split} split: {reason}")
        return False

    def _measure(self, run: Run, what: str) -> MeasuredRun:
        log(f"measuring run {what}")
        settings, trained, teacher = self._settings, run.trained, self._teachers[run.name]
        answers: Predictions | None = None
        agreements: list[Agreement] = []
        for split, dataset in self._data.items():
            cached = self.cached_logits(teacher, split)
            if split != TEST and cached is None:
                continue
            logits, labels = logits_of(trained, dataset, self._indices[split], settings, f"{run.name} {split}")
            if split == TEST:
                self.labels_n = labels
                answers = evaluate_logits(run.name, logits, labels, settings.seed)
                self._check_recorded(run, answers.accuracy)
            if cached is not None:
                agreements.append(agree(split, logits, cached))
        measured_with = next(iter(self._data.values()), None)
        cost = None if measured_with is None else measure_cost(trained, measured_with, settings)
        return MeasuredRun(run=run, teacher=teacher, cost=cost, answers=answers, agreements=agreements)

    def _check_recorded(self, run: Run, accuracy: float) -> None:
        recorded = run.result["test_accuracy"]
        if recorded is not None and abs(recorded - accuracy) > ACCURACY_TOLERANCE:
            self._miss(
                f"{run.name} recorded a test accuracy of {recorded:.2%} and has {accuracy:.2%} now: data, versions or "
                "precision have changed. The page shows the value measured now."
            )

    def _without_run(self) -> list[CachedTeacher]:
        hashes = {weights_sha256(each.run.trained.module) for each in self.runs}
        return [
            teacher for teacher in self._distinct if not {record.weights_sha256 for record in teacher.records} <= hashes
        ]

    def _evaluate_cached(self) -> dict[Any, Predictions]:
        several = len(self.unseen) > 1
        found = {}
        for teacher in self.unseen:
            if (logits := self.cached_logits(teacher)) is not None:
                name = f"{teacher.name}, {' and '.join(teacher.paths)}" if several else teacher.name
                found[teacher.key] = evaluate_logits(name, logits, self.labels_n, self._settings.seed)
        return found
