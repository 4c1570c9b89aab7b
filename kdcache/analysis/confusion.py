"""Which classes are taken for which. Memory grows with samples and classes; a matrix is made of few classes only."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# A matrix of more classes is neither drawn nor written: of 60,000 it would take 26.8 GiB.
MATRIX_CLASSES = 1000


def confusion_matrix(true_n: NDArray[np.int64], predicted_n: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """Counts, (classes, classes), int64: rows are true classes, columns are answers.

    Raises:
        ValueError: there are more than `MATRIX_CLASSES` classes.
    """
    if classes > MATRIX_CLASSES:
        raise ValueError(f"{classes} classes: a matrix is made of at most {MATRIX_CLASSES}")
    return np.bincount(true_n * classes + predicted_n, minlength=classes * classes).reshape(classes, classes)


def class_accuracy(
    true_n: NDArray[np.int64], predicted_n: NDArray[np.int64], classes: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Samples of each true class, (classes,), and the share of them that is right; NaN where there are none."""
    samples = np.bincount(true_n, minlength=classes)
    right = np.bincount(true_n[true_n == predicted_n], minlength=classes)
    with np.errstate(invalid="ignore"):
        return samples, np.asarray(right / samples)
