"""How a network answers fastest on this machine: batch size and memory format, measured before a long pass."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from kdcache.core.errors import KdcacheError
from kdcache.core.progress import log
from kdcache.data.batch import BatchRequest
from kdcache.data.loader import batch_loader
from kdcache.data.views import Views
from kdcache.models.device import evaluation_mode, synchronize
from kdcache.models.forward import CHANNELS_LAST, CONTIGUOUS, ForwardPass

# What is measured by default, and what is taken unmeasured where all samples need less time than measuring saves.
AUTO, DEFAULT_BATCH = "auto", 256
SHORT_PASS_S = 2.0
# Sizes that are tried, on the CPU and on accelerators. On the CPU large activations are mapped and unmapped at every
# layer, which costs more than the layer itself.
_SIZES = {"cpu": (8, 16, 32, 64, 128, 256)}
_ACCELERATOR_SIZES = (16, 32, 64, 128, 256, 512, 1024)
# Time for all measurements, as a share of the pass and at most, and for one of them.
_SHARE, _BUDGET_S, _REPEAT_S = 0.05, 8.0, 0.3
# A larger batch is taken for so much more speed, and one that is so much slower than the best ends the search.
_GAIN, _SLOWER = 1.03, 0.85


class Execution(NamedTuple):
    """How batches are computed.

    Attributes:
        batch_size: Samples per batch.
        memory_format: Memory format of images and weights: `contiguous` or `channels-last`.
    """

    batch_size: int
    memory_format: str = CONTIGUOUS


def choose_execution(
    network: ForwardPass,
    views: Views,
    rows: int,
    *,
    batch_size: int | None = None,
    memory_format: str = AUTO,
) -> Execution:
    """The fastest way found to compute `rows` samples; what is given is kept, and what is not is measured.

    A pass of less than two seconds is not measured: it takes batches of 256, contiguous.

    Args:
        network: The network; its memory format is that of the result afterwards.
        views: Views of the dataset, of whose first samples batches are made.
        rows: Samples to compute.
        batch_size: Samples per batch; None measures.
        memory_format: `contiguous`, `channels-last`, or `auto`, which measures.
    """
    formats = _formats(network.module) if memory_format == AUTO else [memory_format]
    if batch_size is not None and len(formats) == 1:
        return _use(network, Execution(batch_size, formats[0]))
    network.use_memory_format(formats[0])
    sizes = _SIZES.get(network.device.type, _ACCELERATOR_SIZES)
    with evaluation_mode(network.module):
        first = min(sizes[0], batch_size or sizes[0], rows, len(views))
        request = BatchRequest(np.arange(first), views.typical_view)
        (batch,) = batch_loader(views, [request], preprocessor=network.preprocessor, device=network.device)
        inputs = batch.inputs.to(network.device)
        try:
            seconds = _seconds(network, inputs, limit=0.0) / first
        except (KdcacheError, torch.OutOfMemoryError):
            # The pass itself says which samples the network fails on.
            return _use(network, Execution(batch_size or DEFAULT_BATCH, formats[0]))
        if rows * seconds < SHORT_PASS_S:
            return _use(network, Execution(batch_size or DEFAULT_BATCH, formats[0]))
        began, budget = time.perf_counter(), min(_SHARE * rows * seconds, _BUDGET_S)
        limit = min(_REPEAT_S, budget / 8)
        speeds = {}
        for each in formats:
            network.use_memory_format(each)
            speeds[each] = first / _seconds(network, inputs, limit=limit)
        best_format = max(speeds, key=lambda each: speeds[each])
        network.use_memory_format(best_format)
        measured = {first: speeds[best_format]}
        if batch_size is None:
            for size in (each for each in sizes if first < each <= rows):
                enough = max(measured.values()) * _SLOWER
                late = time.perf_counter() - began + 2 * size / measured[max(measured)] > budget
                if late or measured[max(measured)] < enough:
                    break
                try:
                    measured[size] = size / _seconds(network, _tiled(inputs, size), limit=limit)
                except (KdcacheError, torch.OutOfMemoryError):
                    if network.device.type != "cpu":
                        torch.accelerator.empty_cache()
                    break
    best = max(measured.values())
    chosen = Execution(
        batch_size or min(size for size, speed in measured.items() if speed * _GAIN >= best), best_format
    )
    log(
        f"measured in {time.perf_counter() - began:.1f} s: {', '.join(_spoken(speeds, measured, first))}; "
        f"batches of {chosen.batch_size}, {chosen.memory_format}"
    )
    return _use(network, chosen)


def _use(network: ForwardPass, execution: Execution) -> Execution:
    network.use_memory_format(execution.memory_format)
    return execution


def _formats(module: nn.Module) -> list[str]:
    """Memory formats that may be faster: that of channels last for networks of two-dimensional convolutions."""
    convolves = any(isinstance(part, nn.Conv2d) for part in module.modules())
    return [CONTIGUOUS, CHANNELS_LAST] if convolves else [CONTIGUOUS]


def _seconds(network: ForwardPass, inputs: Tensor, *, limit: float) -> float:
    """Shortest time of a forward pass, after one that does not count; repeated for about `limit` seconds."""
    network.raw(inputs)
    synchronize(network.device)
    shortest, spent = math.inf, 0.0
    while shortest == math.inf or spent < limit:
        began = time.perf_counter()
        network.raw(inputs)
        synchronize(network.device)
        took = time.perf_counter() - began
        shortest, spent = min(shortest, took), spent + took
    return max(shortest, 1e-9)


def _tiled(inputs: Tensor, size: int) -> Tensor:
    """A larger batch of the same samples."""
    return inputs.repeat(-(-size // len(inputs)), *[1] * (inputs.ndim - 1))[:size]


def _spoken(speeds: dict[str, float], measured: dict[int, float], first: int) -> Iterator[str]:
    if len(speeds) > 1:
        yield ", ".join(f"{each} {speed:,.0f} samples/s" for each, speed in speeds.items())
    yield "batches of " + ", ".join(f"{size} {speed:,.0f}" for size, speed in measured.items()) + " samples/s"
