"""What is measured of a run's network: its answers, its size and its speed."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.apps.report.multiply_adds import multiply_adds
from kdcache.core.config import Execution
from kdcache.core.progress import Progress
from kdcache.core.rng import keyed_sample
from kdcache.data.dataset import IndexedDataset
from kdcache.data.loader import BatchRequest, batch_loader, consecutive_batches
from kdcache.models.device import evaluation_mode, floating_dtype, memory_errors, move_to, resolve_device, synchronize
from kdcache.models.forward import answer
from kdcache.models.from_run import TrainedNetwork

# The sample that cost is measured on is the middle one of so many, because texts differ in length.
PROBED = 33

WARM_UP, REPEATS, REPEAT_SECONDS = 5, 50, 3.0


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one sample costs.

    Attributes:
        multiply_adds: of one sample; None where they cannot be counted.
        latency_ms: from one prepared input in host memory to logits: the median of repeats after warm-up.
        shape: of the prepared input that was measured, without the batch.
    """

    multiply_adds: int | None
    latency_ms: float
    shape: tuple[int, ...]


def logits_of(
    trained: TrainedNetwork, dataset: IndexedDataset, indices: NDArray[np.int64], config: Execution, what: str
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """A network's logits for some samples, (n, classes), and their labels, (n,).

    Args:
        what: names the work where progress is shown.
    """
    device = resolve_device(config.device)
    module, preprocessor, classes = move_to(trained.module, device), trained.preprocessor, len(dataset.classes)
    loader = batch_loader(
        dataset,
        consecutive_batches(indices, config.batch_size),
        preprocessor=preprocessor,
        workers=config.workers,
        device=device,
    )
    logits, labels = [], []
    with (
        evaluation_mode(module),
        memory_errors(config.batch_size),
        Progress(what, len(indices), "samples") as progress,
    ):
        for batch in loader:
            answers = answer(
                module, batch.inputs, preprocessor=preprocessor, device=device, amp=config.amp, classes=classes
            )
            logits.append(answers.float().cpu().numpy())
            labels.append(batch.labels.numpy())
            progress.advance(len(answers))
    return np.concatenate(logits), np.concatenate(labels)


def measure_cost(trained: TrainedNetwork, dataset: IndexedDataset, config: Execution) -> Cost:
    """What one sample of a dataset costs a network on this machine."""
    inputs = _middle_input(trained, dataset)
    module, preprocessor = trained.module.cpu(), trained.preprocessor
    counted = multiply_adds(module, preprocessor.per_batch(inputs, floating_dtype(module)))
    device = resolve_device(config.device)
    module, classes = move_to(module, device), len(dataset.classes)
    times: list[float] = []
    with evaluation_mode(module):
        began = time.perf_counter()
        while len(times) < WARM_UP + REPEATS and not (len(times) > WARM_UP and _late(began)):
            start = time.perf_counter()
            answer(module, inputs, preprocessor=preprocessor, device=device, amp=config.amp, classes=classes)
            synchronize(device)
            times.append(time.perf_counter() - start)
    return Cost(
        multiply_adds=counted,
        latency_ms=1000 * statistics.median(times[WARM_UP:]),
        shape=tuple(inputs.shape[1:]),
    )


def _late(began: float) -> bool:
    return time.perf_counter() - began > REPEAT_SECONDS


def _middle_input(trained: TrainedNetwork, dataset: IndexedDataset) -> Tensor:
    """Of a few keyed samples the prepared input of middle size, (1, ...), before `Preprocessor.per_batch`."""
    requests = [BatchRequest(np.array([index])) for index in keyed_sample(len(dataset), PROBED, 0, "cost").tolist()]
    loader = batch_loader(dataset, requests, preprocessor=trained.preprocessor, device=torch.device("cpu"))
    inputs = sorted((batch.inputs for batch in loader), key=lambda each: each.numel())
    return inputs[len(inputs) // 2]
