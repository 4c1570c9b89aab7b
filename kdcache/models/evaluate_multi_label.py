"""Judging a network whose samples belong to any number of classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kdcache.core.config import InferenceConfig
from kdcache.core.plugins import require_extra
from kdcache.data.batch import Batch
from kdcache.data.dataset import IndexedDataset
from kdcache.data.preprocess import Preprocessor
from kdcache.models.distributed import Processes
from kdcache.models.evaluate import evaluated_columns
from kdcache.store.records import Preprocess


@dataclass(frozen=True, kw_only=True)
class MultiLabelEvaluation:
    """A network's logits for samples that belong to any number of classes, against their labels.

    Attributes:
        true_nc: 0 and 1 for each class, (n, classes) uint8.
        logits_nc: Logits, (n, classes) float32; a class is predicted where σ(logit) is at least 0.5.
        teacher_nc: The teacher's logits, likewise; None where they were not asked for.
    """

    true_nc: NDArray[np.uint8]
    logits_nc: NDArray[np.float32]
    teacher_nc: NDArray[np.float32] | None = None

    @property
    def predicted_nc(self) -> NDArray[np.bool_]:
        """Predicted classes, (n, classes)."""
        return self.logits_nc >= 0

    @cached_property
    def average_precision_c(self) -> NDArray[np.float64]:
        """Average precision of each class, (classes,), by scikit-learn; nan for a class without a sample.

        Raises:
            MissingExtra: scikit-learn is not installed.
        """
        metrics = require_extra("sklearn.metrics", "multilabel", "the scores of several classes")
        found = np.full(self.true_nc.shape[1], np.nan)
        for at in np.flatnonzero(self.true_nc.any(axis=0)):
            found[at] = metrics.average_precision_score(self.true_nc[:, at], self.logits_nc[:, at])
        return found

    @cached_property
    def scores(self) -> dict[str, float]:
        """Scores by name.

        `map` is the mean average precision over the classes that have samples, `micro_f1` and `macro_f1` are at 0.5,
        `nll` is the binary cross entropy per class in nats, and `agreement`, with a teacher, the share of equal
        decisions.
        """
        metrics = require_extra("sklearn.metrics", "multilabel", "the scores of several classes")
        logits, labels = torch.from_numpy(self.logits_nc), torch.from_numpy(self.true_nc).float()
        scores = {
            "map": float(np.nanmean(self.average_precision_c)) if self.true_nc.any() else 0.0,
            "micro_f1": float(metrics.f1_score(self.true_nc, self.predicted_nc, average="micro", zero_division=0)),
            "macro_f1": float(metrics.f1_score(self.true_nc, self.predicted_nc, average="macro", zero_division=0)),
            "nll": float(nn.functional.binary_cross_entropy_with_logits(logits, labels)),
        }
        if self.teacher_nc is not None:
            scores["agreement"] = float(((self.teacher_nc >= 0) == self.predicted_nc).mean())
        return scores


def evaluate_multi_label(
    module: nn.Module,
    dataset: IndexedDataset,
    *,
    preprocess: Preprocess | Preprocessor,
    config: InferenceConfig,
    indices: NDArray[np.int64] | None = None,
    teacher: Callable[[NDArray[np.int64]], NDArray[Any]] | None = None,
    processes: Processes | None = None,
) -> MultiLabelEvaluation:
    """Compare a network's logits with the labels of samples that belong to any number of classes.

    Arguments as for `evaluate_model`.
    """

    def columns(batch: Batch, logits_bc: Tensor) -> tuple[Tensor, ...]:
        own = (batch.labels, logits_bc.float().cpu())
        return own if teacher is None else (*own, torch.from_numpy(teacher(batch.indices.numpy())).float())

    found = evaluated_columns(
        module, dataset, columns, preprocess=preprocess, config=config, indices=indices, processes=processes
    )
    return MultiLabelEvaluation(**dict(zip(("true_nc", "logits_nc", "teacher_nc"), found, strict=False)))
