"""The forward pass of a network: logits for a batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kdcache.core.errors import KdcacheError, ModelError
from kdcache.data.preprocess import Preprocessor
from kdcache.models.device import autocast, floating_dtype
from kdcache.models.teacher_outputs import to_logits
from kdcache.store.manifest import OutputRecord


def forward(module: nn.Module, inputs: Tensor, *, preprocessor: Preprocessor, device: torch.device, amp: str) -> Tensor:
    """What a network returns for a batch, (batch, outputs), on the device; the caller sets its mode."""
    prepared = preprocessor.per_batch(inputs.to(device, non_blocking=True), floating_dtype(module))
    with autocast(device, amp):
        return output_logits(module(prepared))


def answer(
    module: nn.Module,
    inputs: Tensor,
    *,
    preprocessor: Preprocessor,
    device: torch.device,
    amp: str,
    classes: int,
    error: type[KdcacheError] = ModelError,
    outputs: OutputRecord | None = None,
) -> Tensor:
    """What a network says to a batch, (batch, classes), on the device; the caller sets its mode.

    Args:
        inputs: (batch, …), after `Preprocessor.per_sample`.
        outputs: of a teacher: how logits are made of what it returns; None takes these for logits.

    Raises:
        ModelError: or the given `error`, for an answer of another shape.
    """
    logits = forward(module, inputs, preprocessor=preprocessor, device=device, amp=amp)
    if outputs is not None:
        logits = to_logits(logits, outputs)
    if logits.shape != (len(inputs), classes):
        raise error(
            f"the network answers {tuple(logits.shape)} to a batch of {len(inputs)}",
            f"{(len(inputs), classes)}: one logit for each of the dataset's classes",
            "use a network made for this dataset's classes; --class-map chooses among a teacher's outputs",
        )
    return logits


def output_logits(output: Any) -> Tensor:
    """The logits in what a network returns: the tensor itself or its `logits` attribute.

    Raises:
        ModelError: neither.
    """
    logits = getattr(output, "logits", output)
    if isinstance(logits, Tensor):
        return logits
    raise ModelError(
        f"the network returns a {type(output).__name__}",
        "a tensor of logits (batch, classes), or an object with a logits attribute",
        "wrap it in a module that returns the logits",
    )
