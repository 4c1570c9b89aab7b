"""Judging a network: its logits over a dataset, its accuracy, and which classes it takes for which."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kdcache.core.config import InferenceConfig
from kdcache.core.errors import DatasetError
from kdcache.core.progress import Progress
from kdcache.data.batch import Batch, consecutive_batches
from kdcache.data.dataset import IndexedDataset, labelled_samples
from kdcache.data.loader import batch_loader
from kdcache.data.preprocess import Preprocessor, as_preprocessor
from kdcache.data.views import as_views
from kdcache.models.device import evaluation_mode, memory_errors, move_to, resolve_device
from kdcache.models.distributed import Processes
from kdcache.models.execution import DEFAULT_BATCH, choose_execution
from kdcache.models.forward import ForwardPass
from kdcache.models.loading import auto_workers
from kdcache.store.records import UNLABELLED, Preprocess

SHOWN_SAMPLES = 5


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A network's predictions for some samples, against their labels and, where asked for, a teacher's logits.

    Attributes:
        true_n: True classes, (n,) int64; -1 of samples without a label.
        predicted_n: Top classes, (n,) int64.
        top_n: Probability of the top class, (n,) float32.
        nll_n: Negative log-likelihood of the true class in nats, (n,) float32; nan without a label.
        teacher_n: Top classes of the teacher, (n,) int64; None where it was not asked for.
        kl_n: KL(teacher ‖ network) at temperature 1 in nats, (n,) float32, likewise.
    """

    true_n: NDArray[np.int64]
    predicted_n: NDArray[np.int64]
    top_n: NDArray[np.float32]
    nll_n: NDArray[np.float32]
    teacher_n: NDArray[np.int64] | None = None
    kl_n: NDArray[np.float32] | None = None

    @property
    def accuracy(self) -> float:
        """Top-1 on the labelled samples, 0 to 1; nan where there are none."""
        known = self.true_n != UNLABELLED
        return float((self.true_n == self.predicted_n)[known].mean()) if known.any() else math.nan

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood of the true classes of the labelled samples, in nats; nan without any."""
        known = self.true_n != UNLABELLED
        return float(self.nll_n[known].mean(dtype=np.float64)) if known.any() else math.nan

    @property
    def agreement(self) -> float | None:
        """Share of the samples whose top class is the teacher's, 0 to 1."""
        return None if self.teacher_n is None else float((self.teacher_n == self.predicted_n).mean())

    @property
    def teacher_kl(self) -> float | None:
        """Mean KL(teacher ‖ network) at temperature 1, in nats."""
        return None if self.kl_n is None else float(self.kl_n.mean(dtype=np.float64))

    @property
    def scores(self) -> dict[str, float]:
        """`accuracy`, `nll` and, with a teacher, `agreement`; without those that are not known."""
        found = {"accuracy": self.accuracy, "nll": self.nll, "agreement": self.agreement}
        return {name: score for name, score in found.items() if score is not None and not math.isnan(score)}

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
    batch_size, workers = config.batch_size, config.workers
    if batch_size is None and not processes.alone:
        batch_size = DEFAULT_BATCH  # which of all processes must be the same, because they deal out the batches
    if batch_size is None:
        batch_size, _ = choose_execution(network, as_views(dataset), len(indices))
    if workers is None:
        workers = auto_workers(network, as_views(dataset), len(indices))
    batches = consecutive_batches(indices, batch_size)[processes.rank :: processes.size]
    loader = batch_loader(dataset, batches, preprocessor=preprocessor, workers=workers, device=device)
    with (
        evaluation_mode(module),
        memory_errors(batch_size),
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
    teacher: Callable[[NDArray[np.int64]], NDArray[Any]] | None = None,
    processes: Processes | None = None,
) -> Evaluation:
    """Compare a network's predictions for samples of a dataset with their labels.

    Args:
        indices: Indices of the samples, (n,); None for all that have labels.
        teacher: Gives the teacher's logits, (n, classes), of the samples with given indices, (n,).
        processes: Processes that compute the predictions together, and have all of them; None for this one alone.

    Raises:
        DatasetError: there are none.
    """
    if indices is None:
        indices = labelled_samples(dataset)
    if not len(indices):
        raise DatasetError(f"the split {dataset.split} of {dataset.name} is unlabelled", "labels to compare with")

    def columns(batch: Batch, logits_bc: Tensor) -> tuple[Tensor, ...]:
        log_p = logits_bc.float().log_softmax(dim=1)
        top, predicted = log_p.max(dim=1)
        labels = batch.labels.to(logits_bc.device)[:, None]
        nll = -log_p.gather(1, labels.clamp(min=0))[:, 0].where(labels[:, 0] >= 0, math.nan)
        own = (batch.labels, predicted.cpu(), top.exp().cpu(), nll.cpu())
        if teacher is None:
            return own
        other = torch.from_numpy(teacher(batch.indices.numpy())).to(logits_bc.device).float().log_softmax(dim=1)
        kl = (other.exp() * (other - log_p)).nan_to_num().sum(dim=1)
        return *own, other.argmax(dim=1).cpu(), kl.cpu()

    found = evaluated_columns(
        module, dataset, columns, preprocess=preprocess, config=config, indices=indices, processes=processes
    )
    names = ("true_n", "predicted_n", "top_n", "nll_n", "teacher_n", "kl_n")
    return Evaluation(**dict(zip(names, found, strict=False)))


def evaluated_columns(
    module: nn.Module,
    dataset: IndexedDataset,
    columns: Callable[[Batch, Tensor], tuple[Tensor, ...]],
    *,
    preprocess: Preprocess | Preprocessor,
    config: InferenceConfig,
    indices: NDArray[np.int64] | None,
    processes: Processes | None,
) -> list[NDArray[Any]]:
    """What is wanted of each batch of `predict_batches`, put together in the order of the samples, in every process.

    Args:
        columns: Takes a batch and the network's logits, and returns tensors (batch, …) on the host.
    """
    processes = processes or Processes()
    parts = [
        columns(batch, logits)
        for batch, logits in predict_batches(
            module,
            dataset,
            preprocess=preprocess,
            config=config,
            indices=indices,
            title=f"evaluate {dataset.split}",
            processes=processes,
        )
    ]
    # Process `rank` takes batches rank, rank + size, rank + 2 size, …
    dealt = zip_longest(*processes.gather_objects(parts))
    ordered = [part for turn in dealt for part in turn if part is not None]
    return [torch.cat(each).numpy() for each in zip(*ordered, strict=True)]
