"""Measurements of a run's network: logits, multiply-adds and latency."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kdcache.core.config import RuntimeConfig
from kdcache.core.rng import keyed_sample
from kdcache.data.batch import BatchRequest
from kdcache.data.dataset import IndexedDataset
from kdcache.data.loader import batch_loader
from kdcache.models.device import evaluation_mode, floating_dtype, move_to, resolve_device, synchronize
from kdcache.models.evaluate import predict_batches
from kdcache.models.forward import ForwardPass
from kdcache.models.from_run import TrainedNetwork

# Number of samples whose median-sized one is measured, because texts differ in length.
PROBED = 33

WARM_UP, REPEATS, REPEAT_SECONDS = 5, 50, 3.0


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Cost of one forward pass at batch size 1.

    Attributes:
        multiply_adds: Multiply-adds by torch's counter; None where it counts none.
        latency_ms: Time from one prepared input in host memory to logits, the median of repeats after warm-up.
        shape: Shape of the measured input without the batch dimension.
    """

    multiply_adds: int | None
    latency_ms: float
    shape: tuple[int, ...]


def logits_of(
    trained: TrainedNetwork, dataset: IndexedDataset, indices: NDArray[np.int64], config: RuntimeConfig, what: str
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Logits of a network for the given samples, (n, classes), and their labels, (n,).

    Args:
        what: Title of the progress bar.
    """
    logits, labels = [], []
    for batch, logits_bc in predict_batches(
        trained.module, dataset, preprocess=trained.preprocessor, config=config, indices=indices, title=what
    ):
        logits.append(logits_bc.float().cpu().numpy())
        labels.append(batch.labels.numpy())
    return np.concatenate(logits), np.concatenate(labels)


def measure_cost(trained: TrainedNetwork, dataset: IndexedDataset, config: RuntimeConfig) -> Cost:
    """Measure the cost of one sample of a dataset on this machine."""
    inputs = _middle_input(trained, dataset)
    module, preprocessor = trained.module.cpu(), trained.preprocessor
    with evaluation_mode(module):
        counted = multiply_adds(module, preprocessor.per_batch(inputs, floating_dtype(module)))
    device = resolve_device(config.device)
    network = ForwardPass(move_to(module, device), preprocessor, device, classes=len(dataset.classes), amp=config.amp)
    times: list[float] = []
    with evaluation_mode(module):
        began = time.perf_counter()
        while len(times) < WARM_UP + REPEATS and not (len(times) > WARM_UP and _late(began)):
            start = time.perf_counter()
            network(inputs)
            synchronize(device)
            times.append(time.perf_counter() - start)
    return Cost(
        multiply_adds=counted or None,
        latency_ms=1000 * statistics.median(times[WARM_UP:]),
        shape=tuple(inputs.shape[1:]),
    )


def multiply_adds(module: nn.Module, inputs: Tensor) -> int:
    """Multiply-adds of one forward pass in the operators that torch's `FlopCounterMode` has a formula for.

    Args:
        module: Network in eval mode, on the CPU.
        inputs: Prepared batch.
    """
    mha, mkldnn = torch.backends.mha, torch.backends.mkldnn
    fast_path, fused = mha.get_fastpath_enabled(), mkldnn.enabled
    # The counter has no formula for fused attention layers and LSTMs, and counts the products that they consist of.
    mha.set_fastpath_enabled(False)
    mkldnn.enabled = False  # type: ignore[assignment]  # typed as the descriptor that it is
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            module(inputs)
    finally:
        mha.set_fastpath_enabled(fast_path)
        mkldnn.enabled = fused
    return int(counter.get_total_flops()) // 2


def _late(began: float) -> bool:
    return time.perf_counter() - began > REPEAT_SECONDS


def _middle_input(trained: TrainedNetwork, dataset: IndexedDataset) -> Tensor:
    """The input of median size, (1, ...), among a few samples, before `Preprocessor.per_batch`."""
    requests = [BatchRequest(np.array([index])) for index in keyed_sample(len(dataset), PROBED, 0, "cost").tolist()]
    loader = batch_loader(dataset, requests, preprocessor=trained.preprocessor, device=torch.device("cpu"))
    inputs = sorted((batch.inputs for batch in loader), key=lambda each: each.numel())
    return inputs[len(inputs) // 2]
