"""Distributions over classes from logits, in numpy and float64."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def log_softmax(logits_nc: NDArray[Any], temperature: float = 1.0) -> NDArray[np.float64]:
    """Log-probabilities at a temperature.

    Args:
        logits_nc: Finite logits, (..., classes), any real dtype.
        temperature: Divisor of the logits, T > 0.

    Returns:
        (..., classes).

    Raises:
        ValueError: the temperature is not positive and finite.
    """
    if not 0 < temperature < np.inf:
        raise ValueError(f"temperature is {temperature}: it must be positive and finite")
    scaled = np.asarray(logits_nc, np.float64) / temperature
    scaled = scaled - scaled.max(axis=-1, keepdims=True)
    return np.asarray(scaled - np.log(np.exp(scaled).sum(axis=-1, keepdims=True)))


def softmax(logits_nc: NDArray[Any], temperature: float = 1.0) -> NDArray[np.float64]:
    """Probabilities at a temperature. Arguments and errors as for `log_softmax`."""
    return np.asarray(np.exp(log_softmax(logits_nc, temperature)))


def entropy(logits_nc: NDArray[Any], temperature: float = 1.0) -> NDArray[np.float64]:
    """Entropy −Σ p · log p in nats, (...): 0 for a one-hot distribution, log(classes) for the uniform one.

    Arguments and errors as for `log_softmax`.
    """
    logs = log_softmax(logits_nc, temperature)
    return np.asarray(-(np.exp(logs) * logs).sum(axis=-1))


def kl_divergence(teacher_logits_nc: NDArray[Any], student_logits_nc: NDArray[Any]) -> NDArray[np.float64]:
    """KL(teacher ‖ student) = Σ p_T · (log p_T − log p_S) at temperature 1, in nats: (n,).

    Args:
        teacher_logits_nc: Logits of the teacher, (n, classes).
        student_logits_nc: Logits of the student, (n, classes).

    Raises:
        ValueError: the shapes differ.
    """
    if np.shape(teacher_logits_nc) != np.shape(student_logits_nc):
        raise ValueError(
            f"{np.shape(teacher_logits_nc)} logits of a teacher, {np.shape(student_logits_nc)} of a student"
        )
    teacher, student = log_softmax(teacher_logits_nc), log_softmax(student_logits_nc)
    return np.asarray((np.exp(teacher) * (teacher - student)).sum(axis=-1))


def negative_log_likelihood(
    logits_nc: NDArray[Any], labels_n: NDArray[np.int64], temperature: float = 1.0
) -> NDArray[np.float64]:
    """−log p of the true class at a temperature, in nats: (n,)."""
    return np.asarray(-np.take_along_axis(log_softmax(logits_nc, temperature), labels_n[:, None], axis=1)[:, 0])
