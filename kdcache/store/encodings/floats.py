"""Logits and features as plain floating-point arrays. What cannot be stored without a silent change is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.core.errors import TeacherOutputError
from kdcache.store.encodings.base import LOGITS, Encoding, StoredArray


class FloatEncoding(Encoding):
    """Every logit as one floating-point number.

    Args:
        dtype: `float16`, `float32` or `float64`.
        array: Name of the array: `logits` or `embeddings`.
    """

    def __init__(self, dtype: str, classes: int, array: str = LOGITS) -> None:
        self.spec = self.feature_dtype = dtype
        self.classes, self._array = classes, array

    def arrays(self) -> tuple[StoredArray, ...]:
        axis = "class" if self._array == LOGITS else "dimension"
        return (StoredArray(name=self._array, dtype=self.spec, row_shape=(self.classes,), row_names=(axis,)),)

    def encode(self, values_nx: NDArray[Any], *, first_sample: int) -> dict[str, NDArray[Any]]:
        return {self._array: as_floats(values_nx, self.spec, first_sample=first_sample, name=self._array)}

    def decode(self, rows: Mapping[str, Any], *, temperature: float | None = None) -> Any:
        return rows[self._array]


def as_bounded(values: NDArray[Any], largest: float, *, spec: str, first_sample: int, name: str) -> NDArray[np.float32]:
    """Logits or features in float32.

    Args:
        values: (rows, width), floating point, of consecutive samples.
        largest: Largest absolute value that can be stored.
        spec: Name of the encoding, for messages.

    Raises:
        TeacherOutputError: a value is not finite, or larger.
    """
    floats = as_floats(values, "float32", first_sample=first_sample, name=name)
    if len(floats) and (found := np.abs(floats).max()) > largest:
        row, column = (int(n) for n in np.argwhere(np.abs(floats) == found)[0])
        what = f"logit for sample {first_sample + row}, class {column}"
        if name != LOGITS:
            what = f"value {column} of {name} for sample {first_sample + row}"
        raise TeacherOutputError(
            f"the teacher's {what} is {floats[row, column]:g}",
            f"at most {largest:g} in size for {spec}",
            "dump with --encoding float32",
        )
    return floats


def as_floats(values: NDArray[Any], dtype: str, *, first_sample: int, name: str = LOGITS) -> NDArray[Any]:
    """Logits or features in a floating-point dtype.

    Args:
        values: (rows, ...), floating point, of consecutive samples.
        dtype: `float16`, `float32` or `float64`.
        first_sample: Sample index of the first row, for messages.
        name: Name of the array, for messages.

    Raises:
        TeacherOutputError: a value is not finite, or out of the dtype's range.
    """
    with np.errstate(over="ignore"):
        stored = values.astype(dtype)
    if not np.isfinite(stored).all():
        row, *place = (int(n) for n in np.argwhere(~np.isfinite(stored))[0])
        value = values[(row, *place)]
        what = f"logit for sample {first_sample + row}, class {place[0]}" if name == LOGITS else ""
        what = what or f"value {place} of {name} for sample {first_sample + row}"
        if not np.isfinite(value):
            raise TeacherOutputError(
                f"the teacher's {what} is {value}",
                "finite logits" if name == LOGITS else "finite features",
                "check the checkpoint and the preprocessing (--mean, --std); with --amp fp16, try bf16 or off",
            )
        raise TeacherOutputError(
            f"the teacher's {what} is {value:g}",
            f"at most {np.finfo(stored.dtype).max:g} in size for {dtype}",
            f"dump with --encoding {'float32' if dtype == 'float16' else 'float64'}",
        )
    return stored
