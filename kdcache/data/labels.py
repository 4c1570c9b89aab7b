"""Labels of samples that belong to several classes: a vector of 0 and 1 for each."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kdcache.core.errors import DatasetError
from kdcache.core.json_records import brief


def is_vector(label: Any) -> bool:
    """Whether a label names several classes: a list, tuple or set of class indices, or a vector of 0 and 1."""
    return isinstance(label, list | tuple | set | frozenset) or getattr(label, "ndim", 0) == 1


def label_vector(label: Any, classes: int, where: str) -> NDArray[np.uint8]:
    """A label as 0 and 1 for each class, (classes,).

    Args:
        label: A list, tuple or set of class indices, or an array or tensor (classes,) of 0 and 1.
        where: What it is the label of, for messages.

    Raises:
        DatasetError: it is neither.
    """
    needed = f"class indices from 0 to {classes - 1}, or an array of {classes} numbers 0 and 1"
    if isinstance(label, np.ndarray | Tensor):
        values = np.asarray(label)
        if values.shape != (classes,) or not np.isin(values, (0, 1)).all():
            raise DatasetError(f"the label of {where} is {brief(values.tolist())}", needed)
        return values.astype(np.uint8)
    vector = np.zeros(classes, np.uint8)
    if not is_vector(label) or not all(isinstance(at, int | np.integer) and 0 <= at < classes for at in label):
        raise DatasetError(f"the label of {where} is {brief(label)}", needed)
    vector[list(label)] = 1
    return vector


def known_vectors(found: Any, samples: int) -> NDArray[np.uint8] | None:
    """All labels, (samples, classes), of an array or tensor of 0 and 1; None of anything else."""
    if not isinstance(found, np.ndarray | Tensor):
        return None
    values = np.asarray(found)
    fits = values.ndim == 2 and len(values) == samples and values.dtype.kind in "iubf"
    return values.astype(np.uint8) if fits and np.isin(values, (0, 1)).all() else None
