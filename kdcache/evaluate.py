"""Judging a network: its logits over a dataset, its accuracy, and which classes it takes for which."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kdcache.cache.manifest import Preprocess
from kdcache.config import Execution
from kdcache.datasets import IndexedDataset, batch_loader, consecutive_batches
from kdcache.devices import autocast, evaluation_mode, floating_dtype, memory_errors, resolve_device
from kdcache.errors import KdcacheError, ModelError
from kdcache.plugins import require_extra
from kdcache.preprocess import Preprocessor, as_preprocessor
from kdcache.progress import Progress

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
    module = module.to(device)
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


def answer(
    module: nn.Module,
    inputs: Tensor,
    *,
    preprocessor: Preprocessor,
    device: torch.device,
    amp: str,
    classes: int,
    error: type[KdcacheError] = ModelError,
) -> Tensor:
    """What a network says to a batch, (batch, classes), on the device; the caller sets its mode.

    Args:
        inputs: (batch, …), after `Preprocessor.per_sample`, on the host.

    Raises:
        ModelError: or the given `error`, for an answer of another shape.
    """
    prepared = preprocessor.per_batch(inputs.to(device, non_blocking=True), floating_dtype(module))
    with autocast(device, amp):
        logits = output_logits(module(prepared))
    if logits.shape != (len(inputs), classes):
        raise error(
            f"the network answers {tuple(logits.shape)} to a batch of {len(inputs)}",
            f"{(len(inputs), classes)}: one logit for each of the dataset's classes",
            "use a network made for this dataset's classes",
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


def plot_confusion(evaluation: Evaluation, classes: tuple[str, ...], path: Path) -> None:
    """Draw the confusion matrix as a PNG; counts stand in the cells where they fit.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    require_extra("matplotlib", "plots", "a confusion matrix as PNG")
    from matplotlib.figure import Figure

    confusion = evaluation.confusion
    share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    side = min(max(4.0, 0.45 * len(classes)), 20.0)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the true class")
    axes.set(xlabel="predicted", ylabel="true", title=f"accuracy {evaluation.accuracy:.2%}")
    if len(classes) <= 40:
        axes.set_xticks(range(len(classes)), classes, rotation=90 if max(map(len, classes)) > 2 else 0)
        axes.set_yticks(range(len(classes)), classes)
    if len(classes) <= 20:
        for (row, column), count in np.ndenumerate(confusion):
            if count:
                color = "white" if share[row, column] > 0.5 else "black"
                axes.text(column, row, str(count), ha="center", va="center", fontsize=8, color=color)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
