"""Optimisers, learning-rate schedules and weight averaging, from a config."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from kdcache.core.config import TrainConfig
from kdcache.models.feature_hooks import copy_module


class _Eager(torch.optim.Optimizer):
    """An optimiser without torch's wrappers for `torch.compile` around its methods.

    Their first call imports torch's compiler, sympy and much else: as long again as `import torch`, in every run, for
    a step that is never compiled here.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        inspect.unwrap(super().add_param_group)(self, param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        inspect.unwrap(super().zero_grad)(self, set_to_none)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = inspect.unwrap(super().state_dict)(self)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        inspect.unwrap(super().load_state_dict)(self, state_dict)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        return inspect.unwrap(super().step)(self, closure)


class _SGD(_Eager, torch.optim.SGD):
    pass


class _Adam(_Eager, torch.optim.Adam):
    pass


class _AdamW(_Eager, torch.optim.AdamW):
    pass


def build_optimizer(given: Iterable[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """The optimiser of a config, over the parameters that require gradients."""
    parameters = [parameter for parameter in given if parameter.requires_grad]
    # One fused kernel a step instead of several for each parameter; not every device has it.
    options: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    groups: list[dict[str, Any]] = [{"params": parameters}]
    if not config.decay_norm_bias and config.weight_decay:
        # Biases, and scales of normalisation, are vectors.
        groups = [
            {"params": [each for each in parameters if each.ndim > 1]},
            {"params": [each for each in parameters if each.ndim <= 1], "weight_decay": 0.0},
        ]
    options["fused"] = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
    if config.optimizer == "sgd":
        return _SGD(groups, momentum=config.momentum, nesterov=config.momentum > 0, **options)
    if config.optimizer == "adamw":
        return _AdamW(groups, **options)
    return _Adam(groups, **options)


def learning_rate_factor(config: TrainConfig, step: int, steps_an_epoch: int) -> float:
    """Factor of the learning rate at a step, counted from 0."""
    warmup = config.warmup_epochs * steps_an_epoch
    if step < warmup:
        return (step + 1) / (warmup + 1)
    total = config.epochs * steps_an_epoch
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min((step - warmup) / max(total - warmup, 1), 1.0)))
    if config.schedule == "step":
        return config.gamma ** sum(step >= milestone * total for milestone in config.milestones)
    return 1.0


class AveragedWeights(nn.Module):
    """Exponential moving average of a module's parameters and buffers.

    Computes and is saved as torch's `AveragedModel` with `use_buffers`, which however copies its counter to the device
    at each update, and so waits for it.

    Args:
        source: Module to average; the copy is on its device and has no feature hooks.
        decay: what is left of the average at each update.
    """

    n_averaged: Tensor

    def __init__(self, source: nn.Module, decay: float) -> None:
        super().__init__()
        self.module = copy_module(source)
        self._decay = decay
        self.register_buffer("n_averaged", torch.tensor(0))  # stays on the host

    @torch.no_grad()
    def update(self, source: nn.Module) -> None:
        """Update the average by one step; the first one copies the source."""
        pairs = zip(_tensors(self.module), _tensors(source), strict=True)
        if self.n_averaged == 0:
            for average, value in pairs:
                average.copy_(value)
        else:
            groups: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
            for average, value in pairs:
                groups.setdefault(average.dtype, []).append((average, value))
            for dtype, group in groups.items():
                if dtype.is_floating_point or dtype.is_complex:
                    averages, values = map(list, zip(*group, strict=True))
                    torch._foreach_lerp_(averages, values, 1 - self._decay)
                else:
                    for average, value in group:
                        average.copy_(average * self._decay + value * (1 - self._decay))
        self.n_averaged += 1


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
