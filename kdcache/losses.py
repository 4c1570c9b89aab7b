"""Losses of distillation: pure functions of tensors, the student first, the teacher second, means over the batch.

float64 in gives float64 out; float16 and bfloat16 are computed in float32.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)


def hard_cross_entropy(student_logits_bc: Tensor, labels_b: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Cross entropy of the student with the true labels, at temperature 1.

    Args:
        student_logits_bc: (batch, classes).
        labels_b: (batch,), int64.
        label_smoothing: part of the label's weight spread evenly over all classes (Szegedy et al., 2016).

    Returns:
        A scalar: the mean over the batch.
    """
    return F.cross_entropy(_precise(student_logits_bc), labels_b, label_smoothing=label_smoothing)


def mixed_cross_entropy(
    student_logits_bc: Tensor,
    labels_b: Tensor,
    partner_labels_b: Tensor,
    shares_b: Tensor,
    *,
    label_smoothing: float = 0.0,
) -> Tensor:
    """share · CE(label) + (1 − share) · CE(partner's label), for inputs that are mixed (Zhang et al., 2018).

    Args:
        student_logits_bc: (batch, classes).
        labels_b: (batch,), int64.
        partner_labels_b: (batch,), int64, of the samples that were mixed in.
        shares_b: (batch,), floating, 0 to 1: the part of an input that is the sample's own.

    Returns:
        A scalar: the mean over the batch.
    """
    student = _precise(student_logits_bc)
    own, partners = (
        F.cross_entropy(student, labels, label_smoothing=label_smoothing, reduction="none")
        for labels in (labels_b, partner_labels_b)
    )
    shares = shares_b.to(student.dtype)
    return (shares * own + (1 - shares) * partners).mean()


def kd(student_logits_bc: Tensor, teacher_logits_bc: Tensor, *, temperature: float) -> Tensor:
    """T² · KL(teacher_T ‖ student_T), summed over classes (Hinton, Vinyals and Dean, 2015, arXiv 1503.02531).

    The factor T² keeps the gradient's size as the temperature changes.

    Args:
        student_logits_bc: (batch, classes).
        teacher_logits_bc: (batch, classes).
        temperature: T > 0; softens both distributions.

    Returns:
        A scalar: the mean over the batch.

    Raises:
        ValueError: the shapes differ, or the temperature is not positive.
    """
    student, teacher = _pair(student_logits_bc, teacher_logits_bc)
    _check_temperature(temperature)
    student_log = F.log_softmax(student / temperature, dim=1)
    teacher_log = F.log_softmax(teacher / temperature, dim=1)
    return F.kl_div(student_log, teacher_log, reduction="batchmean", log_target=True) * temperature**2


def kd_with_labels(
    student_logits_bc: Tensor,
    teacher_logits_bc: Tensor,
    labels_b: Tensor,
    *,
    temperature: float,
    alpha: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """alpha · kd + (1 − alpha) · hard_cross_entropy; alpha weighs the teacher.

    Args and errors as for `kd` and `hard_cross_entropy`.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}: it must be from 0 to 1")
    soft = kd(student_logits_bc, teacher_logits_bc, temperature=temperature)
    hard = hard_cross_entropy(student_logits_bc, labels_b, label_smoothing=label_smoothing)
    return alpha * soft + (1 - alpha) * hard


def _precise(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in _HALF else tensor


def _pair(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one precision: the student's, or float32 where that is a half."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"student has shape {tuple(student.shape)} and teacher {tuple(teacher.shape)}: they must be equal"
        )
    student = _precise(student)
    return student, teacher.to(student.dtype)


def _check_temperature(temperature: float) -> None:
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}: it must be positive and finite")
