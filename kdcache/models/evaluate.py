"""Judging a network: its logits over a dataset, its accuracy, and which classes it takes for which."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from kdcache.core.config import Execution
from kdcache.core.progress import Progress
from kdcache.data.dataset import IndexedDataset
from kdcache.data.loader import batch_loader, consecutive_batches
from kdcache.data.preprocess import Preprocessor, as_preprocessor
from kdcache.models.device import evaluation_mode, memory_errors, move_to, resolve_device
from kdcache.models.forward import answer
from kdcache.store.manifest import Preprocess

FIRST_SAMPLES = 5


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A network's answers to some samples, against the true labels.

    Attributes:
        accuracy: top-1, 0 to 1.
        confusion: (classes, classes), int64; rows are true classes, columns are answers.
        first: (true, predicted) class of the first samples.
    """

    accuracy: float
    confusion: NDArray[np.int64]
    first: list[tuple[int, int]]


def evaluate_model(
    module: nn.Module,
    dataset: IndexedDataset,
    *,
    preprocess: Preprocess | Preprocessor,
    config: Execution,
    indices: NDArray[np.int64] | None = None,
) -> Evaluation:
    """Let a network answer for samples of a dataset and compare with their labels.

    Args:
        indices: of the samples, (n,); None takes all.
    """
    if indices is None:
        indices = np.arange(len(dataset))
    device = resolve_device(config.device)
    move_to(module, device)
    preprocessor = as_preprocessor(preprocess)
    classes = len(dataset.classes)
    batches = consecutive_batches(indices, config.batch_size)
    loader = batch_loader(dataset, batches, preprocessor=preprocessor, workers=config.workers, device=device)
    confusion = np.zeros((classes, classes), np.int64)
    first: list[tuple[int, int]] = []
    with (
        evaluation_mode(module),
        memory_errors(config.batch_size),
        Progress(f"evaluate {dataset.split}", len(indices), "samples") as progress,
    ):
        for batch in loader:
            logits = answer(
                module, batch.inputs, preprocessor=preprocessor, device=device, amp=config.amp, classes=classes
            )
            true, predicted = batch.labels.numpy(), logits.argmax(dim=1).cpu().numpy()
            np.add.at(confusion, (true, predicted), 1)
            if len(first) < FIRST_SAMPLES:
                first += [(int(t), int(p)) for t, p in zip(true, predicted, strict=True)]
            progress.advance(len(true))
    return Evaluation(
        accuracy=float(confusion.trace()) / len(indices), confusion=confusion, first=first[:FIRST_SAMPLES]
    )
