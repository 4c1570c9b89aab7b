"""Judging a network: its logits over a dataset, its accuracy, and which classes it takes for which."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kdcache.core.config import InferenceConfig
from kdcache.core.progress import Progress
from kdcache.data.dataset import IndexedDataset
from kdcache.data.loader import Batch, batch_loader, consecutive_batches
from kdcache.data.preprocess import Preprocessor, as_preprocessor
from kdcache.models.device import evaluation_mode, memory_errors, move_to, resolve_device
from kdcache.models.distributed import Processes
from kdcache.models.forward import ForwardPass
from kdcache.store.manifest import Preprocess

SHOWN_SAMPLES = 5


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A network's answers to some samples, against the true labels.

    Attributes:
        true_n: True classes, (n,) int64.
        predicted_n: Top classes, (n,) int64.
        top_n: Probability of the top class, (n,) float32.
        nll_n: Negative log-likelihood of the true class in nats, (n,) float32.
    """

    true_n: NDArray[np.int64]
    predicted_n: NDArray[np.int64]
    top_n: NDArray[np.float32]
    nll_n: NDArray[np.float32]

    @property
    def accuracy(self) -> float:
        """Top-1, 0 to 1."""
        return float((self.true_n == self.predicted_n).mean())

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood of the true classes, in nats."""
        return float(self.nll_n.mean(dtype=np.float64))

    @property
    def shown(self) -> list[int]:
        """Positions of a few samples spread evenly over all: a sorted dataset has its classes one after another."""
        count = len(self.true_n)
        return [(2 * at + 1) * count // (2 * min(SHOWN_SAMPLES, count)) for at in range(min(SHOWN_SAMPLES, count))]


def predict_batches(
    module: nn.Module,
    dataset: IndexedDataset,
    *,
    preprocess: Preprocess | Preprocessor,
    config: InferenceConfig,
    indices: NDArray[np.int64] | None = None,
    title: str,
    unit: str = "samples",
    processes: Processes | None = None,
) -> Iterator[tuple[Batch, Tensor]]:
    """Batches of plain samples with a network's logits, (batch, classes), on the device.

    Args:
        module: Moved to the device, and put in eval mode while the batches are computed.
        indices: Indices of the samples, (n,); None for all.
        title: Title of the progress bar.
        unit: What the progress bar counts.
        processes: Processes that compute the batches together, dealt out in turn; None for this one alone.
    """
    if indices is None:
        indices = np.arange(len(dataset))
    device, preprocessor = resolve_device(config.device), as_preprocessor(preprocess)
    network = ForwardPass(move_to(module, device), preprocessor, device, classes=len(dataset.classes), amp=config.amp)
    processes = processes or Processes()
    batches = consecutive_batches(indices, config.batch_size)[processes.rank :: processes.size]
    loader = batch_loader(dataset, batches, preprocessor=preprocessor, workers=config.workers, device=device)
    with (
        evaluation_mode(module),
        memory_errors(config.batch_size),
        Progress(title, sum(len(each.indices) for each in batches), unit) as progress,
    ):
        for batch in loader:
            yield batch, network(batch.inputs, batch.indices)
            progress.advance(len(batch.labels))


def evaluate_model(
    module: nn.Module,
    dataset: IndexedDataset,
    *,
    preprocess: Preprocess | Preprocessor,
    config: InferenceConfig,
    indices: NDArray[np.int64] | None = None,
    processes: Processes | None = None,
) -> Evaluation:
    """Compare a network's predictions for samples of a dataset with their labels.

    Args:
        indices: Indices of the samples, (n,); None for all.
        processes: Processes that compute the predictions together, and have all of them; None for this one alone.
    """
    processes = processes or Processes()
    parts: list[tuple[Tensor, ...]] = []
    for batch, logits_bc in predict_batches(
        module,
        dataset,
        preprocess=preprocess,
        config=config,
        indices=indices,
        title=f"evaluate {dataset.split}",
        processes=processes,
    ):
        log_p = logits_bc.float().log_softmax(dim=1)
        top, predicted = log_p.max(dim=1)
        nll = -log_p.gather(1, batch.labels.to(logits_bc.device)[:, None])[:, 0]
        parts.append((batch.labels, predicted.cpu(), top.exp().cpu(), nll.cpu()))
    # Process `rank` takes batches rank, rank + size, rank + 2 size, …
    dealt = zip_longest(*processes.gather_objects(parts))
    parts = [part for turn in dealt for part in turn if part is not None]
    true_n, predicted_n, top_n, nll_n = (torch.cat(each).numpy() for each in zip(*parts, strict=True))
    return Evaluation(true_n=true_n, predicted_n=predicted_n, top_n=top_n, nll_n=nll_n)
