"""Optimisers and learning-rate schedules, from a config."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from kdcache.core.config import TrainConfig


def build_optimizer(given: Iterable[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """The optimiser that a config names, over those of the given parameters that train."""
    parameters = [parameter for parameter in given if parameter.requires_grad]
    # One fused kernel a step instead of several for each parameter; not every device has it.
    options: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    options["fused"] = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=config.momentum, nesterov=config.momentum > 0, **options)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **options)
    return torch.optim.Adam(parameters, **options)


def learning_rate_factor(config: TrainConfig, step: int, steps_an_epoch: int) -> float:
    """What the learning rate is multiplied by at a step, counted from 0."""
    warmup = config.warmup_epochs * steps_an_epoch
    if step < warmup:
        return (step + 1) / (warmup + 1)
    total = config.epochs * steps_an_epoch
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min((step - warmup) / max(total - warmup, 1), 1.0)))
    if config.schedule == "step":
        return config.gamma ** sum(step >= milestone * total for milestone in config.milestones)
    return 1.0
