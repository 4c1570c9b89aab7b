"""Precision of losses."""

from __future__ import annotations

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)


def precise(tensor: Tensor) -> Tensor:
    """float16 and bfloat16 as float32; everything else as it is."""
    return tensor.float() if tensor.dtype in _HALF else tensor


def pair(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Student and teacher in one dtype: the student's, or float32 where that is a half.

    Raises:
        ValueError: the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"student has shape {tuple(student.shape)} and teacher {tuple(teacher.shape)}: they must be equal"
        )
    student = precise(student)
    return student, teacher.to(student.dtype)


def check_per_sample(logits_bc: Tensor, **values: Tensor) -> None:
    """Refuse values that are not one per sample, which torch would broadcast.

    Raises:
        ValueError: a shape is not (batch,).
    """
    for name, value in values.items():
        if value.shape != logits_bc.shape[:1]:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)} and the logits {tuple(logits_bc.shape)}: needed is "
                f"{tuple(logits_bc.shape[:1])}, one a sample"
            )


def unit(vectors: Tensor, dim: int = -1) -> Tensor:
    """Vectors divided by their Euclidean length; those of length 0 as they are, with the derivative 0.

    Not torch's normalize, whose floor under the length makes derivatives of 1e12 there.
    """
    squares = vectors.square().sum(dim=dim, keepdim=True)
    any_length = squares > 0
    return torch.where(any_length, vectors / torch.where(any_length, squares, 1.0).sqrt(), 0.0)
