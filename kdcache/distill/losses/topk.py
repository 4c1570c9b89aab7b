"""Distillation from the K largest logits of a teacher and the log-sum-exp of the others, without a dense row."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdcache.distill.losses.dtypes import precise

OTHER, UNIFORM = "other", "uniform"


def topk_kd(
    student_bc: Tensor,
    teacher_values_bk: Tensor,
    teacher_classes_bk: Tensor,
    teacher_tail_b: Tensor,
    *,
    temperature: float,
    tail: str = OTHER,
) -> Tensor:
    """T² · KL(teacher_T ‖ student_T) where only the K largest logits of the teacher are known; the mean over the batch.

    With p the teacher's probabilities at T, q the student's, S the K known classes, and P and Q the probability of all
    other classes together:

    - `other` treats these as one class: Σ_S p log(p / q) + P log(P / Q). By the log-sum inequality it is a lower bound
      of the full KL, with equality where the student is proportional to the teacher within the tail. Its gradient with
      respect to a logit of S is that of the full KL, q − p.
    - `uniform` spreads P evenly over the tail's C − K classes: Σ_S p log(p / q) + P log(P / (C − K)) − P · (mean of
      log q over the tail). It is the full KL from the row that `decode` gives.

    Args:
        student_bc: Logits (batch, classes).
        teacher_values_bk: The largest logits (batch, K).
        teacher_classes_bk: Their classes (batch, K), any integer dtype.
        teacher_tail_b: log Σ exp(z / T) over the other classes, (batch,), at this temperature.
        temperature: T, above 0.
        tail: `other` or `uniform`.

    Returns:
        A scalar in the student's dtype, or float32 where that is a half.
    """
    student_bc = precise(student_bc)
    dtype, classes = student_bc.dtype, teacher_classes_bk.long()
    values, tail_b = teacher_values_bk.to(dtype) / temperature, teacher_tail_b.to(dtype)
    total_b = torch.logaddexp(values.logsumexp(dim=1), tail_b)
    log_p_bk, log_p_tail_b = values - total_b.unsqueeze(1), tail_b - total_b
    log_q_bc = torch.log_softmax(student_bc / temperature, dim=1)
    log_q_bk = log_q_bc.gather(1, classes)
    known_b = (log_p_bk.exp() * (log_p_bk - log_q_bk)).sum(dim=1)
    p_tail_b, others = log_p_tail_b.exp(), student_bc.shape[1] - classes.shape[1]
    if tail == OTHER:
        # Summed from the tail itself, because 1 − Σ q is 0 where the student is sure.
        log_q_tail_b = log_q_bc.scatter(1, classes, -math.inf).logsumexp(dim=1)
        rest_b = log_p_tail_b - log_q_tail_b
    else:
        mean_log_q_b = (log_q_bc.sum(dim=1) - log_q_bk.sum(dim=1)) / others
        rest_b = log_p_tail_b - math.log(others) - mean_log_q_b
    return temperature**2 * (known_b + p_tail_b * rest_b).mean()
