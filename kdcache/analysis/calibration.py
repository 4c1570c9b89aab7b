"""Expected calibration error and temperature scaling (Guo et al., 2017, arXiv 1706.04599)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.analysis.distributions import negative_log_likelihood, softmax
from kdcache.core.rng import keyed_sample

BINS = 15

# Range of fitted temperatures. For a network that is always right the likelihood has no maximum: the lower, the better.
LOWEST, HIGHEST = 0.01, 100.0

# Number of bisection steps on log T: from four decades to a relative error of 1e-8.
HALVINGS = 30


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """Predictions binned by top probability, in bins of equal width: bin b is (b / B, (b + 1) / B].

    Attributes:
        counts_b: Number of predictions per bin, (B,).
        confidence_b: Mean top probability per bin, (B,); NaN for an empty bin.
        accuracy_b: Accuracy per bin, (B,); NaN for an empty bin.
    """

    counts_b: NDArray[np.int64]
    confidence_b: NDArray[np.float64]
    accuracy_b: NDArray[np.float64]

    @property
    def ece(self) -> float:
        """Expected calibration error: |accuracy − confidence| averaged over predictions, 0 to 1."""
        full = self.counts_b > 0
        gaps = np.abs(self.accuracy_b[full] - self.confidence_b[full])
        return float((gaps * self.counts_b[full]).sum() / self.counts_b.sum())


def reliability(probabilities_nc: NDArray[Any], labels_n: NDArray[np.int64], bins: int = BINS) -> Reliability:
    """How often answers are right, by their probability.

    Args:
        probabilities_nc: (n, classes), rows that sum to 1; the largest of a row is the answer.
        labels_n: true classes, (n,).

    Raises:
        ValueError: there are no samples, or not one label each.
    """
    if not len(labels_n) or len(labels_n) != len(probabilities_nc):
        raise ValueError(f"{len(probabilities_nc)} answers and {len(labels_n)} labels: as many, and at least one")
    return reliability_of(probabilities_nc.max(axis=1), probabilities_nc.argmax(axis=1) == labels_n, bins)


def reliability_of(top_n: NDArray[Any], right_n: NDArray[np.bool_], bins: int = BINS) -> Reliability:
    """How often answers are right, by their probability.

    Args:
        top_n: probability of each answer, (n,).
        right_n: whether it is right, (n,).
    """
    top = np.asarray(top_n, np.float64)
    bin_n = np.clip(np.ceil(top * bins).astype(np.int64) - 1, 0, bins - 1)
    counts = np.bincount(bin_n, minlength=bins)
    with np.errstate(invalid="ignore"):  # 0 / 0 of an empty bin is the NaN that is promised
        return Reliability(
            counts_b=counts,
            confidence_b=np.bincount(bin_n, top, bins) / counts,
            accuracy_b=np.bincount(bin_n, right_n, bins) / counts,
        )


def fit_temperature(logits_nc: NDArray[Any], labels_n: NDArray[np.int64]) -> float:
    """Fit the temperature, between `LOWEST` and `HIGHEST`, that minimises the negative log-likelihood of the labels.

    The likelihood is convex in 1 / T, so its slope, Σ p · z − z_label averaged over samples, changes sign once.

    Args:
        logits_nc: Logits, (n, classes), n ≥ 1.
        labels_n: True classes, (n,).
    """
    logits = np.asarray(logits_nc, np.float64)
    of_labels = np.take_along_axis(logits, labels_n[:, None], axis=1)[:, 0]

    def too_low(temperature: float) -> bool:
        expected = (softmax(logits, temperature) * logits).sum(axis=1)
        return bool((expected - of_labels).mean() > 0)

    low, high = math.log(LOWEST), math.log(HIGHEST)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if too_low(math.exp(middle)) else (low, middle)
    return math.exp((low + high) / 2)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Calibration before and after temperature scaling, both on samples that the temperature was not fitted on.

    Attributes:
        temperature: Fitted temperature.
        fitted: Number of samples that the temperature was fitted on.
        evaluated: Number of the other samples, on which everything here is measured.
        before: Reliability at temperature 1.
        after: Reliability at the fitted temperature.
        nll_before: Mean negative log-likelihood of the labels at temperature 1, in nats.
        nll_after: Mean negative log-likelihood at the fitted temperature, in nats.
    """

    temperature: float
    fitted: int
    evaluated: int
    before: Reliability
    after: Reliability
    nll_before: float
    nll_after: float


def calibrate(logits_nc: NDArray[Any], labels_n: NDArray[np.int64], seed: int = 0) -> Calibration:
    """Fit one temperature on half of the samples, drawn by key, and evaluate it on the other half.

    Args:
        logits_nc: Logits, (n, classes).
        labels_n: True classes, (n,).
        seed: Seed of the draw.

    Raises:
        ValueError: there are fewer than two samples.
    """
    count = len(labels_n)
    if count < 2:
        raise ValueError(f"{count} samples: two halves need at least two")
    half = keyed_sample(count, count // 2, seed, "temperature scaling")
    others = np.setdiff1d(np.arange(count), half)
    temperature = fit_temperature(logits_nc[half], labels_n[half])
    logits, labels = logits_nc[others], labels_n[others]
    return Calibration(
        temperature=temperature,
        fitted=len(half),
        evaluated=len(others),
        before=reliability(softmax(logits), labels),
        after=reliability(softmax(logits, temperature), labels),
        nll_before=float(negative_log_likelihood(logits, labels).mean()),
        nll_after=float(negative_log_likelihood(logits, labels, temperature).mean()),
    )
