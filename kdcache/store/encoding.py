"""Logits and features to stored arrays. What cannot be stored without a silent change is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.core.errors import TeacherOutputError

# float64 exists for exact comparisons with a live teacher; float16 costs a KL of about 1e-6 and is the default.
ENCODINGS = {"float16": np.float16, "float32": np.float32, "float64": np.float64}


def encode_answers(answers: NDArray[Any], encoding: str, *, first_sample: int, name: str = "logits") -> NDArray[Any]:
    """Logits, or features, as they are stored.

    Args:
        answers: (rows, ...), floating point, of consecutive samples.
        encoding: a key of `ENCODINGS`.
        first_sample: index of the first row's sample, for messages.
        name: of the array, for messages.

    Returns:
        (rows, ...) in the encoding's dtype.

    Raises:
        TeacherOutputError: a value is not finite, or beyond what the encoding holds.
    """
    with np.errstate(over="ignore"):
        stored = answers.astype(ENCODINGS[encoding])
    if not np.isfinite(stored).all():
        row, *place = (int(n) for n in np.argwhere(~np.isfinite(stored))[0])
        value = answers[(row, *place)]
        what = f"logit for sample {first_sample + row}, class {place[0]}" if name == "logits" else ""
        what = what or f"value {place} of {name} for sample {first_sample + row}"
        if not np.isfinite(value):
            raise TeacherOutputError(
                f"the teacher's {what} is {value}",
                "finite logits" if name == "logits" else "finite features",
                "check the checkpoint and the preprocessing (--mean, --std); with --amp fp16, try bf16 or off",
            )
        raise TeacherOutputError(
            f"the teacher's {what} is {value:g}",
            f"at most {np.finfo(stored.dtype).max:g} in size for {encoding}",
            f"dump with --encoding {'float32' if encoding == 'float16' else 'float64'}",
        )
    return stored
