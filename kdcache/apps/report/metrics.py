"""What runs and cached teachers answered, and what follows from it: the numbers of a report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.analysis.calibration import Calibration, calibrate
from kdcache.analysis.confusion import MATRIX_CLASSES, class_accuracy, confusion_matrix
from kdcache.analysis.distributions import kl_divergence
from kdcache.apps.report.cost import Cost
from kdcache.apps.report.runs import ALONE, DISTILLED, CachedTeacher, Run


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Predictions of one network for all test samples, with their metrics.

    Attributes:
        logits_nc: (samples, classes).
        labels_n: true classes, (samples,), int64.
        predicted_n: top classes, (samples,), int64.
        calibration: None where there are too few samples for two halves.
    """

    name: str
    logits_nc: NDArray[Any]
    labels_n: NDArray[np.int64]
    predicted_n: NDArray[np.int64]
    calibration: Calibration | None

    @property
    def samples(self) -> int:
        return len(self.labels_n)

    @property
    def accuracy(self) -> float:
        return float((self.labels_n == self.predicted_n).mean())

    @property
    def standard_error(self) -> float:
        """Of the accuracy, as a share of this many samples that were drawn at random."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.samples)

    @property
    def class_accuracy_c(self) -> NDArray[np.float64]:
        """Accuracy of each true class, (classes,); NaN where it has no samples."""
        return class_accuracy(self.labels_n, self.predicted_n, self.logits_nc.shape[1])[1]

    @property
    def confusion_cc(self) -> NDArray[np.int64] | None:
        """Counts, (classes, classes); rows are true classes, columns are answers. None of more than `MATRIX_CLASSES`
        classes.
        """
        classes = self.logits_nc.shape[1]
        if classes > MATRIX_CLASSES:
            return None
        return confusion_matrix(self.labels_n, self.predicted_n, classes)


def evaluate_logits(name: str, logits_nc: NDArray[Any], labels_n: NDArray[np.int64], seed: int) -> Predictions:
    """Predictions against the true labels.

    Args:
        labels_n: true classes, (n,).
        seed: that draws the samples which the temperature is fitted on.
    """
    calibration = calibrate(logits_nc, labels_n, seed) if len(labels_n) > 1 else None
    predicted_n = logits_nc.argmax(axis=1)
    return Predictions(
        name=name, logits_nc=logits_nc, labels_n=labels_n, predicted_n=predicted_n, calibration=calibration
    )


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How a run agrees with a cached teacher on some samples of a split.

    Attributes:
        same: share of samples with the same top class.
        kl: mean KL(teacher ‖ student) at temperature 1, in nats.
    """

    split: str
    samples: int
    same: float
    kl: float


def agree(split: str, student_nc: NDArray[Any], teacher_nc: NDArray[Any]) -> Agreement:
    """Compare logits of the same samples, (n, classes) each."""
    return Agreement(
        split=split,
        samples=len(student_nc),
        same=float((student_nc.argmax(axis=1) == teacher_nc.argmax(axis=1)).mean()),
        kl=float(kl_divergence(teacher_nc, student_nc).mean()),
    )


@dataclass(frozen=True, kw_only=True)
class MeasuredRun:
    """A run with all that was measured of it.

    Attributes:
        teacher: the cached teacher that it is compared with; None where there is none.
        cost: None where there is no sample to measure it with.
        answers: to the test samples; None where there are none.
    """

    run: Run
    teacher: CachedTeacher | None
    cost: Cost | None
    answers: Predictions | None
    agreements: Sequence[Agreement]

    @property
    def accuracy(self) -> float | None:
        """On the test split: measured now, or else as the run recorded it."""
        if self.answers is not None:
            return self.answers.accuracy
        recorded: float | None = self.run.result["test_accuracy"]
        return recorded


def shown_run(runs: Sequence[MeasuredRun]) -> MeasuredRun:
    """The run whose samples are shown: the last distilled student, else the last student, else the last run."""
    for role in (DISTILLED, ALONE):
        if found := [each for each in runs if each.run.role == role]:
            return found[-1]
    return runs[-1]
