"""The largest logits of a row, and the sum of the others."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.core.errors import UsageError
from kdcache.store.encodings.base import Encoding, StoredArray, chosen_temperature
from kdcache.store.encodings.floats import as_floats

VALUES, CLASSES, TAIL = "logits.values", "logits.classes", "logits.tail"


class TopKEncoding(Encoding):
    """The K largest logits in float16 with their classes, and log Σ exp(z / T) over the other classes, the tail.

    Of the tail nothing else is known: `decode` gives each of its classes the same logit, such that softmax(z / T) of
    the tail as a whole is exact at the temperature asked for. The largest logit stays larger than all that it was
    larger than, so the predicted class never changes.

    Args:
        count: K.
        classes: Number of classes, more than K.
        temperatures: Temperatures T of the stored sums.

    Raises:
        UsageError: K is not from 1 to one less than the number of classes, or a temperature is not positive.
    """

    dense = False

    def __init__(self, count: int, classes: int, temperatures: tuple[float, ...]) -> None:
        if not 1 <= count < classes:
            raise UsageError(
                f"--encoding is topk:{count}, and there are {classes} classes",
                "fewer than all classes, and at least one",
                "give a smaller number, or --encoding float16 or quantized:8, which keep every class",
            )
        self.temperatures = tuple(sorted(set(temperatures)))
        if not self.temperatures or not all(0 < each < math.inf for each in self.temperatures):
            raise UsageError(
                f"--temperatures is {','.join(f'{each:g}' for each in temperatures)!r}",
                "positive temperatures that students are trained at",
                "give --temperatures 1,2,4,8",
            )
        self.spec, self.classes, self._count = f"topk:{count}", classes, count

    def arrays(self) -> tuple[StoredArray, ...]:
        # No floats for class numbers: float16 has gaps above 2048.
        kind = "uint16" if self.classes <= 65536 else "uint32"
        return (
            StoredArray(name=VALUES, dtype="float16", row_shape=(self._count,), row_names=("rank",)),
            StoredArray(name=CLASSES, dtype=kind, row_shape=(self._count,), row_names=("rank",)),
            StoredArray(name=TAIL, dtype="float32", row_shape=(len(self.temperatures),), row_names=("temperature",)),
        )

    def encode(self, values_nx: NDArray[Any], *, first_sample: int) -> dict[str, NDArray[Any]]:
        logits = values_nx.astype(np.float64)
        # float16 bounds what can be stored; all classes are checked, because the tail is summed from them.
        as_floats(logits, "float32", first_sample=first_sample)
        classes = _largest(logits, self._count)
        values = np.take_along_axis(logits, classes, axis=1)
        stored = as_floats(values, "float16", first_sample=first_sample)
        others = logits.copy()
        np.put_along_axis(others, classes, -np.inf, axis=1)
        tail = np.stack([_log_sum_exp(others / each) for each in self.temperatures], axis=1)
        return {
            VALUES: _keep_top(stored, values, others.max(axis=1)),
            CLASSES: classes.astype(self.arrays()[1].dtype),
            TAIL: tail.astype(np.float32),
        }

    def decode(self, rows: Mapping[str, Any], *, temperature: float | None = None) -> Any:
        chosen = chosen_temperature(self, temperature)
        values, classes = rows[VALUES], rows[CLASSES]
        level = self.tail(rows, chosen) * chosen - chosen * math.log(self.classes - self._count)
        if isinstance(values, np.ndarray):
            values = values.astype(np.float32)
            # float32's rounding must not lift the tail onto the top.
            level = np.minimum(level, values[:, 0])
            dense = np.repeat(level[:, None], self.classes, axis=1)
            np.put_along_axis(dense, classes.astype(np.int64), values, axis=1)
            return dense
        values = values.float()
        level = level.minimum(values[:, 0])
        return level.unsqueeze(1).repeat(1, self.classes).scatter(1, classes.long(), values)

    def tail(self, rows: Mapping[str, Any], temperature: float) -> Any:
        """log Σ exp(z / T) over the classes that are not stored, (rows,), float32.

        Raises:
            UsageError: it is not stored for this temperature.
        """
        return rows[TAIL][:, self.temperatures.index(chosen_temperature(self, temperature))]


def _largest(logits: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Classes of the largest logits, (rows, count), largest first; of equal ones the lower class first."""
    bound = -np.partition(-logits, count - 1, axis=1)[:, count - 1 : count]
    above, equal = logits > bound, logits == bound
    # Of the classes that equal the smallest chosen logit, as many as there is room for, from the first.
    room = count - above.sum(axis=1, keepdims=True)
    chosen = above | (equal & (np.cumsum(equal, axis=1) <= room))
    classes = np.nonzero(chosen)[1].reshape(len(logits), count)
    order = np.argsort(-np.take_along_axis(logits, classes, axis=1), axis=1, kind="stable")
    return np.take_along_axis(classes, order, axis=1)


def _keep_top(
    stored: NDArray[np.float16], values: NDArray[np.float64], tail_top: NDArray[np.float64]
) -> NDArray[np.float16]:
    """Rounded values whose first is larger than the others, and than the tail, wherever it was before rounding.

    It is above the tail also where they were equal: all classes of the tail are decoded to one logit, and one that was
    lower would else come first.
    """
    second = np.maximum(values[:, 1], tail_top) if values.shape[1] > 1 else tail_top
    rounded = stored[:, 0].astype(np.float64)
    raised = ((values[:, 0] > second) & (rounded <= _just_above(second))) | (rounded <= _just_above(tail_top))
    with np.errstate(over="ignore"):
        higher = np.nextafter(stored[:, 0], np.float16(np.inf))
        lower = np.nextafter(stored[:, :1], np.float16(-np.inf))
    stored[:, 0] = np.where(raised & np.isfinite(higher), higher, stored[:, 0])
    tied = (stored >= stored[:, :1]) & (values < values[:, :1])
    return np.where(tied, lower, stored)


def _just_above(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values beyond what rounding to float32 can reach."""
    return values + 1e-6 * (1 + np.abs(values))


def _log_sum_exp(values: NDArray[np.float64]) -> NDArray[np.float64]:
    top = values.max(axis=1, keepdims=True)
    total: NDArray[np.float64] = top[:, 0] + np.log(np.exp(values - top).sum(axis=1))
    return total
