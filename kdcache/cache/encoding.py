"""Logits to stored arrays, and back. What cannot be stored without a silent change is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.errors import TeacherOutputError

# float64 exists for exact comparisons with a live teacher; float16 costs a KL of about 1e-6 and is the default.
ENCODINGS = {"float16": np.float16, "float32": np.float32, "float64": np.float64}


def encode_logits(logits: NDArray[Any], encoding: str, *, first_sample: int) -> NDArray[Any]:
    """Logits as they are stored.

    Args:
        logits: (rows, classes), floating point, of consecutive samples.
        encoding: a key of `ENCODINGS`.
        first_sample: index of the first row's sample, for messages.

    Returns:
        (rows, classes) in the encoding's dtype.

    Raises:
        TeacherOutputError: a value is not finite, or beyond what the encoding holds.
    """
    with np.errstate(over="ignore"):
        stored = logits.astype(ENCODINGS[encoding])
    if not np.isfinite(stored).all():
        row, column = (int(n) for n in np.argwhere(~np.isfinite(stored))[0])
        value = logits[row, column]
        where = f"sample {first_sample + row}, class {column}"
        if not np.isfinite(value):
            raise TeacherOutputError(
                f"the teacher's logit for {where} is {value}",
                "finite logits",
                "check the checkpoint and the preprocessing (--mean, --std); with --amp fp16, try bf16 or off",
            )
        raise TeacherOutputError(
            f"the teacher's logit for {where} is {value:g}",
            f"at most {np.finfo(stored.dtype).max:g} in size for {encoding}",
            f"dump with --encoding {'float32' if encoding == 'float16' else 'float64'}",
        )
    return stored
