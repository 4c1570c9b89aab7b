"""In which precision losses are computed."""

from __future__ import annotations

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)


def precise(tensor: Tensor) -> Tensor:
    """float16 and bfloat16 as float32; everything else as it is."""
    return tensor.float() if tensor.dtype in _HALF else tensor


def pair(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one precision: the student's, or float32 where that is a half.

    Raises:
        ValueError: the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"student has shape {tuple(student.shape)} and teacher {tuple(teacher.shape)}: they must be equal"
        )
    student = precise(student)
    return student, teacher.to(student.dtype)
