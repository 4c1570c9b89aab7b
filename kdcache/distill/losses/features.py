"""Losses of features and of relations between samples: pure functions, the student first, the teacher second.

float64 in gives float64 out; float16 and bfloat16 are computed in float32.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcache.distill.losses.dtypes import pair, precise, unit


def feature_mse(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """The mean of (student − teacher)² (FitNets, Romero et al., 2015, arXiv 1412.6550).

    Args:
        student_features: (batch, ...), projected to the teacher's width where that differs.
        teacher_features: of the same shape.

    Raises:
        ValueError: the shapes differ.
    """
    return F.mse_loss(*pair(student_features, teacher_features))


def cosine(student_embeddings_bd: Tensor, teacher_embeddings_bd: Tensor) -> Tensor:
    """1 − the cosine of the angle between the two embeddings of a sample; the mean over the batch, 0 to 2.

    Args:
        student_embeddings_bd: (batch, width), projected to the teacher's width where that differs.
        teacher_embeddings_bd: of the same shape.

    Raises:
        ValueError: the shapes differ, or are not (batch, width).
    """
    student, teacher = pair(student_embeddings_bd, teacher_embeddings_bd)
    if student.ndim != 2:
        raise ValueError(f"embeddings have shape {tuple(student.shape)}: needed is (batch, width)")
    return 1 - (unit(student, dim=1) * unit(teacher, dim=1)).sum(dim=1).mean()


def attention_transfer(student_maps_bchw: Tensor, teacher_maps_bchw: Tensor) -> Tensor:
    """Attention maps: the mean over channels of squares, one vector per sample, L2-normalised; the mean squared
    difference of these (Zagoruyko and Komodakis, 2017, arXiv 1612.03928).

    Args:
        student_maps_bchw: (batch, channels, height, width).
        teacher_maps_bchw: the same, with any number of channels.

    Raises:
        ValueError: batch, height or width differ, or the maps are none.
    """
    _check(student_maps_bchw, teacher_maps_bchw, dims=(0, 2, 3), rank=4)
    student, teacher = (
        unit(precise(maps).square().mean(dim=1).flatten(1)) for maps in (student_maps_bchw, teacher_maps_bchw)
    )
    return F.mse_loss(student, teacher.to(student.dtype))


def similarity_preserving(student_maps: Tensor, teacher_maps: Tensor) -> Tensor:
    """Similarity of the samples of a batch: Gram matrices (batch, batch) of the flattened features, their rows
    L2-normalised; the squared Frobenius norm of their difference, divided by batch² (Tung and Mori, 2019, arXiv
    1907.09682).

    Args:
        student_maps: (batch, ...).
        teacher_maps: (batch, ...), of any other width.

    Raises:
        ValueError: the batches differ.
    """
    _check(student_maps, teacher_maps, dims=(0,))
    student, teacher = (precise(maps).flatten(1) for maps in (student_maps, teacher_maps))
    student_gram, teacher_gram = (unit(flat @ flat.T) for flat in (student, teacher))
    return F.mse_loss(student_gram, teacher_gram.to(student_gram.dtype))


def relational_distance(student_embeddings: Tensor, teacher_embeddings: Tensor) -> Tensor:
    """RKD-D: smooth L1 of the distances between all pairs of samples, each divided by the mean of the positive ones;
    the mean over all batch² pairs (Park et al., 2019, arXiv 1904.05068).

    Args:
        student_embeddings: (batch, ...), flattened.
        teacher_embeddings: (batch, ...), of any other width.

    Raises:
        ValueError: the batches differ.
    """
    _check(student_embeddings, teacher_embeddings, dims=(0,))
    student, teacher = (_distances(precise(each).flatten(1)) for each in (student_embeddings, teacher_embeddings))
    return F.smooth_l1_loss(student, teacher.to(student.dtype))


def _distances(embeddings_bd: Tensor) -> Tensor:
    # Not by matrix products: they cancel, and the root of what is left has no finite derivative.
    distances = torch.cdist(embeddings_bd, embeddings_bd, compute_mode="donot_use_mm_for_euclid_dist")
    # A mean by sums, because a boolean index and a condition make the host wait for the device.
    mean = distances.sum() / (distances > 0).sum().clamp(min=1)
    return distances / torch.where(mean > 0, mean, 1.0)


def relational_angle(student_embeddings: Tensor, teacher_embeddings: Tensor) -> Tensor:
    """RKD-A: smooth L1 of the cosines of the angles that all triplets of samples form; the mean over batch³ (Park et
    al., 2019).

    Args and errors as for `relational_distance`. Takes memory of batch³ and batch² · width numbers.
    """
    _check(student_embeddings, teacher_embeddings, dims=(0,))
    student, teacher = (_angles(precise(each).flatten(1)) for each in (student_embeddings, teacher_embeddings))
    return F.smooth_l1_loss(student, teacher.to(student.dtype))


def _angles(embeddings_bd: Tensor) -> Tensor:
    directions_bbd = unit(embeddings_bd[None] - embeddings_bd[:, None], dim=2)
    return directions_bbd @ directions_bbd.transpose(1, 2)


def contrastive(
    student_embeddings_bd: Tensor, teacher_embeddings_bd: Tensor, negatives_kd: Tensor, *, temperature: float
) -> Tensor:
    """InfoNCE: cross entropy of picking the same sample's teacher embedding among those of other samples, by cosine
    divided by the temperature (van den Oord et al., 2018; after CRD, Tian et al., 2020, arXiv 1910.10699).

    Args:
        student_embeddings_bd: (batch, width), projected to the teacher's width where that differs.
        teacher_embeddings_bd: (batch, width), of the same samples.
        negatives_kd: (negatives, width) for all samples alike, or (batch, negatives, width): teacher embeddings of
            others, drawn from the cache.
        temperature: > 0; 0.07 to 0.1 is usual.

    Returns:
        A scalar: the mean over the batch.

    Raises:
        ValueError: the shapes do not fit, or the temperature is not positive.
    """
    student, teacher = pair(student_embeddings_bd, teacher_embeddings_bd)
    fits = negatives_kd.ndim in (2, 3) and negatives_kd.shape[-1] == student.shape[-1]
    if student.ndim != 2 or not fits or (negatives_kd.ndim == 3 and len(negatives_kd) != len(student)):
        raise ValueError(
            f"student has shape {tuple(student.shape)} and the negatives {tuple(negatives_kd.shape)}: needed are "
            "(batch, width) and (negatives, width) or (batch, negatives, width)"
        )
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}: it must be positive and finite")
    student, teacher, negatives = (unit(each, dim=-1) for each in (student, teacher, negatives_kd.to(student.dtype)))
    others_bk = student @ negatives.T if negatives.ndim == 2 else torch.einsum("bd,bkd->bk", student, negatives)
    logits = torch.cat([(student * teacher).sum(dim=1, keepdim=True), others_bk], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(student), dtype=torch.int64, device=student.device))


def _check(student: Tensor, teacher: Tensor, *, dims: tuple[int, ...], rank: int | None = None) -> None:
    right_rank = rank is None or student.ndim == teacher.ndim == rank
    if not right_rank or any(student.shape[dim] != teacher.shape[dim] for dim in dims):
        what = f"both must have {rank} dimensions, and agree in those" if rank else "they must agree in the"
        raise ValueError(
            f"student has shape {tuple(student.shape)} and teacher {tuple(teacher.shape)}: {what} numbered "
            f"{', '.join(map(str, dims))}"
        )
