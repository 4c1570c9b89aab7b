"""Logits and features as plain floating-point arrays. What cannot be stored without a silent change is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.core.errors import TeacherOutputError
from kdcache.store.encodings.base import Encoding, StoredArray

LOGITS = "logits"


class FloatEncoding(Encoding):
    """Every logit as one floating-point number, in the array `logits`.

    Args:
        dtype: `float16`, `float32` or `float64`.
    """

    def __init__(self, dtype: str) -> None:
        self.spec = self.feature_dtype = dtype

    def arrays(self, classes: int) -> tuple[StoredArray, ...]:
        return (StoredArray(name=LOGITS, dtype=self.spec, row_shape=(classes,), row_names=("class",)),)

    def encode(self, logits_nc: NDArray[Any], *, first_sample: int) -> dict[str, NDArray[Any]]:
        return {LOGITS: as_floats(logits_nc, self.spec, first_sample=first_sample)}

    def decode(self, rows: Mapping[str, Any]) -> Any:
        return rows[LOGITS]


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
