"""The evaluation that suits a dataset."""

from __future__ import annotations

from collections.abc import Callable

from kdcache.data.dataset import IndexedDataset
from kdcache.data.taught import EmbeddingDataset
from kdcache.models.evaluate import Evaluation, evaluate_model
from kdcache.models.evaluate_embedding import EmbeddingEvaluation, evaluate_embedding
from kdcache.models.evaluate_multi_label import MultiLabelEvaluation, evaluate_multi_label

AnyEvaluation = Evaluation | MultiLabelEvaluation | EmbeddingEvaluation


def evaluator_of(dataset: IndexedDataset) -> Callable[..., AnyEvaluation]:
    """`evaluate_model`, or its counterpart for several classes per sample or for embeddings."""
    if isinstance(dataset, EmbeddingDataset):
        return evaluate_embedding
    return evaluate_multi_label if dataset.multi_label else evaluate_model


def default_metric(dataset: IndexedDataset) -> str:
    """The score that a network is judged by, where none is chosen."""
    if isinstance(dataset, EmbeddingDataset):
        return "cosine"
    return "map" if dataset.multi_label else "accuracy"
