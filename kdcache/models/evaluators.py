"""The evaluation that suits a dataset."""

from __future__ import annotations

from collections.abc import Callable

from kdcache.core.errors import UsageError
from kdcache.data.dataset import IndexedDataset
from kdcache.models.evaluate import Evaluation, evaluate_model
from kdcache.models.evaluate_embedding import EmbeddingEvaluation, evaluate_embedding
from kdcache.models.evaluate_multi_label import MultiLabelEvaluation, evaluate_multi_label

AnyEvaluation = Evaluation | MultiLabelEvaluation | EmbeddingEvaluation


def evaluator_of(dataset: IndexedDataset) -> Callable[..., AnyEvaluation]:
    """`evaluate_model`, or its counterpart for several classes per sample or for embeddings."""
    if dataset.is_embedding:
        return evaluate_embedding
    return evaluate_multi_label if dataset.multi_label else evaluate_model


def chosen_metric(dataset: IndexedDataset, asked: str, *, taught: bool) -> str:
    """The score that epochs are compared by.

    Args:
        asked: What the settings say; `accuracy`, the default, stands for the first one that suits the dataset.
        taught: Whether there is a teacher to compare with.

    Raises:
        UsageError: there is no such score for this dataset, or not without a teacher.
    """
    if dataset.is_embedding:
        known = ["cosine", "retrieval"]
    else:
        known = ["map" if dataset.multi_label else "accuracy", "nll", *(["agreement"] if taught else [])]
    metric = known[0] if asked == "accuracy" else asked
    if metric not in known:
        raise UsageError(
            f"--metric is {asked}, which the samples of {dataset.name} do not have"
            + ("" if taught or asked != "agreement" else " without a teacher"),
            f"one of {', '.join(known)}",
            f"leave it out for {known[0]}",
        )
    return metric
