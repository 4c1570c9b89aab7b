"""What a network is trained for, and how soft targets come to a batch."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from kdcache import losses
from kdcache.config import StudentConfig
from kdcache.datasets import Batch


class Objective(Protocol):
    """What a network is trained for."""

    def __call__(self, logits_bc: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Scalars by name; `loss` is minimised, the others are shown.

        Args:
            logits_bc: the network's, (batch, classes), on the device.
            batch: labels and soft targets on the device, indices on the host.
        """
        ...


class Join(Protocol):
    """Puts soft targets to the inputs of a batch."""

    def start_epoch(self, epoch: int) -> None:
        """Prepare for the batches of an epoch, counted from 0."""
        ...

    def __call__(self, batch: Batch) -> Batch:
        """Given each batch on the host before its step; returns it with soft targets."""
        ...


def label_objective(label_smoothing: float) -> Objective:
    """Cross entropy with the labels and nothing else."""

    def objective(logits_bc: Tensor, batch: Batch) -> dict[str, Tensor]:
        return {"loss": _cross_entropy(logits_bc, batch, label_smoothing)}

    return objective


def distillation_objective(config: StudentConfig) -> Objective:
    """alpha · kd + (1 − alpha) · cross entropy, for batches with soft targets."""

    def objective(logits_bc: Tensor, batch: Batch) -> dict[str, Tensor]:
        assert batch.soft_targets is not None, "distillation needs joined batches"
        soft = losses.kd(logits_bc, batch.soft_targets, temperature=config.temperature)
        hard = _cross_entropy(logits_bc, batch, config.label_smoothing)
        return {"loss": config.alpha * soft + (1 - config.alpha) * hard, "kd": soft, "cross_entropy": hard}

    return objective


def _cross_entropy(logits_bc: Tensor, batch: Batch, label_smoothing: float) -> Tensor:
    """With the labels, or where inputs are mixed with both labels of each, in their shares."""
    if batch.partner_labels is None or batch.shares is None:
        return losses.hard_cross_entropy(logits_bc, batch.labels, label_smoothing=label_smoothing)
    return losses.mixed_cross_entropy(
        logits_bc, batch.labels, batch.partner_labels, batch.shares, label_smoothing=label_smoothing
    )
