"""The network and its objective in one step of training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdcache.core.config import TrainConfig
from kdcache.data.batch import Batch
from kdcache.distill.objective import Objective
from kdcache.models.compiled import Compiled
from kdcache.models.device import autocast
from kdcache.models.forward import output_logits


class TrainingStep(nn.Module):
    """The network and its objective, as one module whose gradients several processes average."""

    def __init__(self, module: nn.Module, objective: Objective, device: torch.device, config: TrainConfig) -> None:
        super().__init__()
        self.module = module
        self._network = Compiled(module) if config.compile else module.__call__
        self._device, self._amp = device, config.amp
        self.objective = objective

    def forward(self, inputs: Tensor, batch: Batch, epochs_done: float) -> tuple[Tensor, dict[str, Tensor]]:
        with autocast(self._device, self._amp):
            logits = output_logits(self._network(inputs))
        parts = self.objective(logits, batch, epochs_done)
        # Several processes wait for the gradient of all that comes out of here, and only the loss has one.
        return logits.detach(), {name: part if name == "loss" else part.detach() for name, part in parts.items()}


def count_hits(logits_bc: Tensor, batch: Batch) -> Tensor:
    """How many samples of a batch are right, (); of samples with several classes, the share of those that are."""
    if batch.labels.ndim == 1:
        return (logits_bc.argmax(dim=1) == batch.main_labels)[: batch.counted].sum()
    right: Tensor = ((logits_bc > 0) == batch.labels.bool()).float().mean(dim=1)
    return right[: batch.counted].sum()
