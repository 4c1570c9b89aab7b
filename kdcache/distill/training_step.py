"""The network and its objective in one step of training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kdcache.core.config import TrainConfig
from kdcache.core.plugins import describe
from kdcache.core.progress import log
from kdcache.data.loader import Batch
from kdcache.distill.objective import Objective
from kdcache.models.device import autocast
from kdcache.models.forward import output_logits


class TrainingStep(nn.Module):
    """The network and its objective, as one module whose gradients several processes average."""

    def __init__(self, module: nn.Module, objective: Objective, device: torch.device, config: TrainConfig) -> None:
        super().__init__()
        self.module = module
        self._network = _Compiled(module) if config.compile else module.__call__
        self._device, self._amp = device, config.amp
        self.objective = objective

    def forward(self, inputs: Tensor, batch: Batch, epochs_done: float) -> tuple[Tensor, dict[str, Tensor]]:
        with autocast(self._device, self._amp):
            logits = output_logits(self._network(inputs))
        parts = self.objective(logits, batch, epochs_done)
        # Several processes wait for the gradient of all that comes out of here, and only the loss has one.
        return logits.detach(), {name: part if name == "loss" else part.detach() for name, part in parts.items()}


class _Compiled:
    """A network through torch.compile; where that fails, the network as it is."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._compiled: Callable[[Tensor], Any] | None = torch.compile(module)
        self._worked = False

    def __call__(self, inputs: Tensor) -> Any:
        if self._compiled is None:
            return self._module(inputs)
        try:
            result = self._compiled(inputs)
        except Exception as problem:  # of a compiler, which may raise anything, or of the network
            if self._worked:
                raise
            result = self._module(inputs)  # raises what is the network's own
            log(f"torch.compile fails on {type(self._module).__name__}, which runs as it is: {describe(problem)}")
            self._compiled = None
        self._worked = True
        return result


def count_hits(logits_bc: Tensor, batch: Batch) -> Tensor:
    """How many samples of a batch are right, (); of samples with several classes, the share of those that are."""
    if batch.labels.ndim == 1:
        return (logits_bc.argmax(dim=1) == batch.main_labels)[: batch.counted].sum()
    right: Tensor = ((logits_bc > 0) == batch.labels.bool()).float().mean(dim=1)
    return right[: batch.counted].sum()
