"""Losses of distillation: pure functions of tensors, the student first, the teacher second, means over the batch.

float64 in gives float64 out; float16 and bfloat16 are computed in float32.
"""

from kdcache.distill.losses.features import (
    attention_transfer,
    contrastive,
    cosine,
    feature_mse,
    relational_angle,
    relational_distance,
    similarity_preserving,
)
from kdcache.distill.losses.logits import (
    binary_cross_entropy,
    binary_kd,
    decoupled_kd,
    dist,
    hard_cross_entropy,
    kd,
    kd_with_labels,
    labelled_cross_entropy,
    logit_mse,
    mixed_cross_entropy,
    soft_cross_entropy,
    standardized_kd,
)
from kdcache.distill.losses.topk import topk_kd

__all__ = [
    "attention_transfer",
    "binary_cross_entropy",
    "binary_kd",
    "contrastive",
    "cosine",
    "decoupled_kd",
    "dist",
    "feature_mse",
    "hard_cross_entropy",
    "kd",
    "kd_with_labels",
    "labelled_cross_entropy",
    "logit_mse",
    "mixed_cross_entropy",
    "relational_angle",
    "relational_distance",
    "similarity_preserving",
    "soft_cross_entropy",
    "standardized_kd",
    "topk_kd",
]
