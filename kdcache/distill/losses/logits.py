"""Losses of distillation: pure functions of tensors, the student first, the teacher second, means over the batch.

float64 in gives float64 out; float16 and bfloat16 are computed in float32. Losses of logits are here, those of features
and of relations between samples in `feature_losses`; all can be had from here.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcache.distill.losses.dtypes import check_per_sample, pair, precise
from kdcache.distill.losses.features import (
    attention_transfer,
    contrastive,
    feature_mse,
    relational_angle,
    relational_distance,
    similarity_preserving,
)

__all__ = [
    "attention_transfer",
    "contrastive",
    "decoupled_kd",
    "dist",
    "feature_mse",
    "hard_cross_entropy",
    "kd",
    "kd_with_labels",
    "logit_mse",
    "mixed_cross_entropy",
    "relational_angle",
    "relational_distance",
    "similarity_preserving",
    "soft_cross_entropy",
    "standardized_kd",
]


def hard_cross_entropy(student_logits_bc: Tensor, labels_b: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Cross entropy of the student with the true labels, at temperature 1.

    Args:
        student_logits_bc: (batch, classes).
        labels_b: (batch,), int64.
        label_smoothing: part of the label's weight spread evenly over all classes (Szegedy et al., 2016).

    Returns:
        A scalar: the mean over the batch.

    Raises:
        ValueError: there is not one label a sample.
    """
    check_per_sample(student_logits_bc, labels=labels_b)
    return F.cross_entropy(precise(student_logits_bc), labels_b, label_smoothing=label_smoothing)


def labelled_cross_entropy(student_logits_bc: Tensor, labels_b: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Sum of the cross entropy over the samples that have a label; those of others are -1.

    Args and errors as for `hard_cross_entropy`.

    Returns:
        A scalar: the sum; 0 where no sample has a label.
    """
    check_per_sample(student_logits_bc, labels=labels_b)
    return F.cross_entropy(
        precise(student_logits_bc), labels_b, label_smoothing=label_smoothing, ignore_index=-1, reduction="sum"
    )


def binary_cross_entropy(student_logits_bc: Tensor, labels_bc: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Cross entropy of σ(logit) with 0 and 1 for each class, where a sample belongs to any number of classes.

    Args:
        student_logits_bc: (batch, classes).
        labels_bc: 0 and 1, (batch, classes), of any dtype.
        label_smoothing: part of each label's weight spread evenly over 0 and 1.

    Returns:
        A scalar: the mean over batch and classes.

    Raises:
        ValueError: the shapes differ.
    """
    student, labels = pair(student_logits_bc, labels_bc.to(student_logits_bc.dtype))
    targets = labels * (1 - label_smoothing) + label_smoothing / 2
    return F.binary_cross_entropy_with_logits(student, targets)


def binary_kd(student_logits_bc: Tensor, teacher_logits_bc: Tensor, *, temperature: float) -> Tensor:
    """T² · KL between the Bernoulli distributions σ(teacher / T) and σ(student / T) of each class.

    What `kd` (Hinton et al., 2015) is for one class per sample; used for several in Yang et al., 2023 (L2D).

    Args:
        student_logits_bc: (batch, classes).
        teacher_logits_bc: (batch, classes), not probabilities.
        temperature: T, above 0.

    Returns:
        A scalar: the mean over batch and classes; times the number of classes it is their sum.

    Raises:
        ValueError: the shapes differ, or T is not above 0.
    """
    student, teacher = pair(student_logits_bc, teacher_logits_bc)
    _check_temperature(temperature)
    scaled = teacher / temperature
    targets = scaled.sigmoid()
    cross = F.binary_cross_entropy_with_logits(student / temperature, targets)
    entropy = F.binary_cross_entropy_with_logits(scaled, targets)
    return temperature**2 * (cross - entropy)


def mixed_cross_entropy(
    student_logits_bc: Tensor,
    labels_b: Tensor,
    partner_labels_b: Tensor,
    mix_lambda_b: Tensor,
    *,
    label_smoothing: float = 0.0,
) -> Tensor:
    """λ · CE(label) + (1 − λ) · CE(partner's label), for mixed inputs (Zhang et al., 2018).

    Args:
        student_logits_bc: (batch, classes).
        labels_b: (batch,), int64.
        partner_labels_b: (batch,), int64, of the samples that were mixed in.
        mix_lambda_b: (batch,), floating, from 0 to 1, weight of the sample in its mixed input.

    Returns:
        A scalar: the mean over the batch.

    Raises:
        ValueError: there is not one label, partner's label and lambda per sample.
    """
    check_per_sample(student_logits_bc, labels=labels_b, partner_labels=partner_labels_b, mix_lambda=mix_lambda_b)
    student = precise(student_logits_bc)
    own, partners = (
        F.cross_entropy(student, labels, label_smoothing=label_smoothing, reduction="none")
        for labels in (labels_b, partner_labels_b)
    )
    weights = mix_lambda_b.to(student.dtype)
    return (weights * own + (1 - weights) * partners).mean()


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
    student, teacher = pair(student_logits_bc, teacher_logits_bc)
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


def soft_cross_entropy(student_logits_bc: Tensor, teacher_logits_bc: Tensor, *, temperature: float = 1.0) -> Tensor:
    """−Σ p_T · log p_S over classes, both at temperature T, without the factor T² (Hinton et al., 2015).

    Args and errors as for `kd`, from which it differs by T² and by the teacher's entropy, a constant.

    Returns:
        A scalar: the mean over the batch.
    """
    student, teacher = pair(student_logits_bc, teacher_logits_bc)
    _check_temperature(temperature)
    return F.cross_entropy(student / temperature, F.softmax(teacher / temperature, dim=1))


def logit_mse(student_logits_bc: Tensor, teacher_logits_bc: Tensor) -> Tensor:
    """(student − teacher)², the mean over batch and classes (Ba and Caruana, 2014, arXiv 1312.6184).

    Raises:
        ValueError: the shapes differ.
    """
    return F.mse_loss(*pair(student_logits_bc, teacher_logits_bc))


def decoupled_kd(
    student_logits_bc: Tensor,
    teacher_logits_bc: Tensor,
    labels_b: Tensor,
    *,
    temperature: float,
    target_weight: float = 1.0,
    nontarget_weight: float = 8.0,
) -> Tensor:
    """DKD: target_weight · T² · TCKD + nontarget_weight · T² · NCKD (Zhao et al., 2022, arXiv 2203.08679).

    TCKD is the KL divergence of (target, all others) as two classes; NCKD that among the others, with 1000 subtracted
    from the target's logit after division by T, as the authors do.

    Args:
        student_logits_bc: (batch, classes), at least two classes.
        teacher_logits_bc: (batch, classes).
        labels_b: (batch,), int64.

    Returns:
        A scalar: the mean over the batch.

    Raises:
        ValueError: the shapes differ, there is one class only, or the temperature is not positive.
    """
    student, teacher = pair(student_logits_bc, teacher_logits_bc)
    _check_temperature(temperature)
    check_per_sample(student, labels=labels_b)
    if student.shape[1] < 2:
        raise ValueError(f"the logits have shape {tuple(student.shape)}: the target needs another class beside it")
    # Compared and gathered, because one_hot and a boolean index make the host wait for the device.
    is_target = labels_b[:, None] == torch.arange(student.shape[1], device=labels_b.device)
    student, teacher = student / temperature, teacher / temperature
    target = _kl(*(_target_and_rest(logits, labels_b, is_target) for logits in (student, teacher)))
    masked = (F.log_softmax(logits - 1000.0 * is_target, dim=1) for logits in (student, teacher))
    return temperature**2 * (target_weight * target + nontarget_weight * _kl(*masked))


def _target_and_rest(logits_bc: Tensor, labels_b: Tensor, is_target_bc: Tensor) -> Tensor:
    """Log-probabilities of the target and of all others together, (batch, 2)."""
    # In logarithms, because 1 − p(target) is 0 for a confident teacher, and its logarithm is not finite.
    log_bc = F.log_softmax(logits_bc, dim=1)
    target = log_bc.gather(1, labels_b[:, None]).squeeze(1)
    rest = log_bc.masked_fill(is_target_bc, -math.inf).logsumexp(dim=1)
    return torch.stack([target, rest], dim=1)


def _kl(student_log_bc: Tensor, teacher_log_bc: Tensor) -> Tensor:
    return F.kl_div(student_log_bc, teacher_log_bc, reduction="batchmean", log_target=True)


def dist(
    student_logits_bc: Tensor,
    teacher_logits_bc: Tensor,
    *,
    temperature: float = 1.0,
    inter_weight: float = 1.0,
    intra_weight: float = 1.0,
) -> Tensor:
    """DIST: T² · (inter_weight · (1 − ρ over classes) + intra_weight · (1 − ρ over the batch)), ρ Pearson's correlation
    of the probabilities at temperature T (Huang et al., 2022, arXiv 2205.10536).

    ρ over classes is averaged over the batch, ρ over the batch over classes. 1e-8 is added to the product of norms.

    Returns:
        A scalar.

    Raises:
        ValueError: the shapes differ, or the temperature is not positive.
    """
    student, teacher = pair(student_logits_bc, teacher_logits_bc)
    _check_temperature(temperature)
    student, teacher = F.softmax(student / temperature, dim=1), F.softmax(teacher / temperature, dim=1)
    inter = 1 - _pearson(student, teacher).mean()
    intra = 1 - _pearson(student.T, teacher.T).mean()
    return temperature**2 * (inter_weight * inter + intra_weight * intra)


def _pearson(first: Tensor, second: Tensor) -> Tensor:
    """Correlation of each row of one matrix with that of another, (rows,)."""
    first, second = first - first.mean(dim=1, keepdim=True), second - second.mean(dim=1, keepdim=True)
    correlation: Tensor = (first * second).sum(dim=1) / (first.norm(dim=1) * second.norm(dim=1) + 1e-8)
    return correlation


def standardized_kd(student_logits_bc: Tensor, teacher_logits_bc: Tensor, *, temperature: float = 2.0) -> Tensor:
    """`kd` of logits that are standardised per sample: mean 0, divided by the unbiased deviation + 1e-7 (Sun et al.,
    2024, arXiv 2403.01427).

    Args, result and errors as for `kd`.
    """
    student, teacher = pair(student_logits_bc, teacher_logits_bc)
    return kd(_standardized(student), _standardized(teacher), temperature=temperature)


def _standardized(logits_bc: Tensor) -> Tensor:
    centred = logits_bc - logits_bc.mean(dim=1, keepdim=True)
    variance = centred.square().sum(dim=1, keepdim=True) / max(logits_bc.shape[1] - 1, 1)
    # The root of 0 has no finite derivative; equal logits are to have the derivative 0.
    varies = variance > 0
    deviation = torch.where(varies, variance, 1.0).sqrt() * varies
    return centred / (deviation + 1e-7)


def _check_temperature(temperature: float) -> None:
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}: it must be positive and finite")
