"""Judging a network whose answer is a vector: how near it comes to the teacher's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from kdcache.core.config import InferenceConfig
from kdcache.core.errors import UsageError
from kdcache.data.batch import Batch
from kdcache.data.dataset import IndexedDataset
from kdcache.data.preprocess import Preprocessor
from kdcache.models.distributed import Processes
from kdcache.models.evaluate import evaluated_columns
from kdcache.store.records import Preprocess

# Neighbours that are compared, and samples among which they are looked for: all pairs are, so that more would cost the
# square of their number.
NEIGHBOURS, RETRIEVED_AMONG = 10, 10_000
_QUERIES_AT_ONCE = 1024


@dataclass(frozen=True, kw_only=True)
class EmbeddingEvaluation:
    """A network's vectors for some samples, and the teacher's.

    Attributes:
        student_nd: The network's, (n, width) float32.
        teacher_nd: The teacher's, likewise.
    """

    student_nd: NDArray[np.float32]
    teacher_nd: NDArray[np.float32]

    @cached_property
    def scores(self) -> dict[str, float]:
        """`cosine`, the mean cosine similarity to the teacher's vectors, and `retrieval`, the share of the teacher's
        ten nearest samples that are among the network's ten nearest.
        """
        student, teacher = torch.from_numpy(self.student_nd), torch.from_numpy(self.teacher_nd)
        cosine = F.cosine_similarity(student, teacher, dim=1).mean(dtype=torch.float64)
        return {"cosine": float(cosine), "retrieval": retrieval_agreement(student, teacher)}


def retrieval_agreement(student_nd: Tensor, teacher_nd: Tensor, neighbours: int = NEIGHBOURS) -> float:
    """Share of each sample's nearest samples by one embedding that are among the nearest by another, 0 to 1.

    Nearest by cosine similarity, the sample itself aside. Of more than 10,000 samples, 10,000 spread evenly over them
    are compared with each other; of fewer than `neighbours` others, all but one.

    Args:
        student_nd: (n, any width).
        teacher_nd: (n, any width).

    Returns:
        nan for fewer than three samples, whose neighbours are always the same.
    """
    count = len(student_nd)
    if count < 3:
        return float("nan")
    chosen = torch.arange(min(count, RETRIEVED_AMONG)) * count // min(count, RETRIEVED_AMONG)
    units = [F.normalize(each[chosen].double(), dim=1) for each in (student_nd, teacher_nd)]
    nearest = min(neighbours, len(chosen) - 2)
    shared = 0
    for start in range(0, len(chosen), _QUERIES_AT_ONCE):
        queries = torch.arange(start, min(start + _QUERIES_AT_ONCE, len(chosen)))
        found = []
        for unit in units:
            similarity = unit[queries] @ unit.T
            similarity[torch.arange(len(queries)), queries] = -torch.inf
            found.append(similarity.topk(nearest, dim=1).indices)
        shared += int((found[0][:, :, None] == found[1][:, None, :]).sum())
    return shared / (nearest * len(chosen))


def evaluate_embedding(
    module: nn.Module,
    dataset: IndexedDataset,
    *,
    preprocess: Preprocess | Preprocessor,
    config: InferenceConfig,
    indices: NDArray[np.int64] | None = None,
    teacher: Callable[[NDArray[np.int64]], NDArray[Any]] | None = None,
    processes: Processes | None = None,
) -> EmbeddingEvaluation:
    """Compare a network's vectors with the teacher's.

    Arguments as for `evaluate_model`.

    Raises:
        UsageError: there is no teacher to compare with.
    """
    if teacher is None:
        raise UsageError(
            f"there are no vectors of a teacher for the split {dataset.split} of {dataset.name}",
            "a cache that holds this split",
            f"dump it too: dump-teacher --split {dataset.split}",
        )

    def columns(batch: Batch, vectors_bd: Tensor) -> tuple[Tensor, ...]:
        return vectors_bd.float().cpu(), torch.from_numpy(teacher(batch.indices.numpy())).float()

    student, other = evaluated_columns(
        module, dataset, columns, preprocess=preprocess, config=config, indices=indices, processes=processes
    )
    return EmbeddingEvaluation(student_nd=student, teacher_nd=other)
