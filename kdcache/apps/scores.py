"""What the commands print of an evaluation, and keep in a run's result."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from kdcache.analysis.calibration import reliability_of
from kdcache.analysis.confusion import MATRIX_CLASSES, class_accuracy, confusion_matrix
from kdcache.analysis.matrix_plots import plot_confusion
from kdcache.core.progress import log
from kdcache.data.dataset import IndexedDataset
from kdcache.models.evaluate import Evaluation
from kdcache.models.evaluate_embedding import NEIGHBOURS, EmbeddingEvaluation
from kdcache.models.evaluate_multi_label import MultiLabelEvaluation
from kdcache.models.evaluators import AnyEvaluation
from kdcache.store.records import UNLABELLED

# Of the classes with the lowest accuracy, so many are printed; --json has all.
WORST_CLASSES = 5


def plot_matrix(evaluation: Evaluation, dataset: IndexedDataset, folder: Path) -> dict[str, str]:
    classes = len(dataset.classes)
    if classes > MATRIX_CLASSES:
        log(f"no confusion matrix is drawn: {classes:,} classes are more than {MATRIX_CLASSES:,}")
        return {}
    labelled = evaluation.true_n != UNLABELLED
    if not labelled.any():
        log("no confusion matrix is drawn: the samples are unlabelled")
        return {}
    path = folder / f"confusion-{dataset.split}.png"
    matrix = confusion_matrix(evaluation.true_n[labelled], evaluation.predicted_n[labelled], classes)
    plot_confusion(matrix, dataset.classes, path)
    return {"confusion": str(path)}


def samples_of(evaluation: AnyEvaluation) -> int:
    """Number of samples."""
    if isinstance(evaluation, EmbeddingEvaluation):
        return len(evaluation.student_nd)
    return len(evaluation.true_n if isinstance(evaluation, Evaluation) else evaluation.true_nc)


def measured(evaluation: AnyEvaluation, dataset: IndexedDataset) -> dict[str, Any]:
    """The numbers of a split, and a few of its samples."""
    if not isinstance(evaluation, Evaluation):
        return {f"{dataset.split}_{name}": score for name, score in evaluation.scores.items()}
    found: dict[str, Any] = {}
    if not math.isnan(evaluation.accuracy):
        labelled = evaluation.true_n != UNLABELLED
        right = (evaluation.predicted_n == evaluation.true_n)[labelled]
        found = {
            "accuracy": evaluation.accuracy,
            "nll": evaluation.nll,
            "ece": reliability_of(evaluation.top_n[labelled], right).ece,
        }
    if evaluation.agreement is not None:
        found |= {"agreement": evaluation.agreement, "teacher_kl": evaluation.teacher_kl}
    return {
        **{f"{dataset.split}_{name}": value for name, value in found.items()},
        "examples": [
            {"sample": at, "true": int(evaluation.true_n[at]), "predicted": int(evaluation.predicted_n[at])}
            for at in evaluation.shown
        ],
    }


def per_class(evaluation: AnyEvaluation, dataset: IndexedDataset) -> list[dict[str, Any]]:
    """Samples and accuracy, or average precision, of each class; None where it has no samples. Empty for embeddings."""
    if isinstance(evaluation, EmbeddingEvaluation):
        return []
    if isinstance(evaluation, MultiLabelEvaluation):
        found = zip(dataset.classes, evaluation.true_nc.sum(axis=0), evaluation.average_precision_c, strict=True)
        return [
            {"class": name, "samples": int(count), "average_precision": float(score) if count else None}
            for name, count, score in found
        ]
    labelled = evaluation.true_n != UNLABELLED
    counts, shares = class_accuracy(evaluation.true_n[labelled], evaluation.predicted_n[labelled], len(dataset.classes))
    return [
        {"class": name, "samples": int(count), "accuracy": float(share) if count else None}
        for name, count, share in zip(dataset.classes, counts, shares, strict=True)
    ]


def worst(classes: list[dict[str, Any]]) -> str:
    """The classes with the lowest accuracy, or average precision, where not all are right."""
    if not classes:
        return ""
    score = "accuracy" if "accuracy" in classes[0] else "average_precision"
    wrong = sorted((each for each in classes if each["samples"] and each[score] < 1), key=lambda each: each[score])
    listed = [f"{each['class']} {each[score]:.1%} of {each['samples']:,}" for each in wrong[:WORST_CLASSES]]
    return f"lowest {score.replace('_', ' ')} by class: {', '.join(listed)}" if listed else ""


def evaluation_text(evaluation: AnyEvaluation, dataset: IndexedDataset) -> str:
    if isinstance(evaluation, MultiLabelEvaluation):
        scores = evaluation.scores
        return (
            f"{dataset.split} mAP {scores['map']:.2%}, micro F1 {scores['micro_f1']:.2%}, macro F1 "
            f"{scores['macro_f1']:.2%}, NLL {scores['nll']:.4f} per class on {samples_of(evaluation):,} samples"
        )
    if isinstance(evaluation, EmbeddingEvaluation):
        scores = evaluation.scores
        return (
            f"{dataset.split} cosine similarity to the teacher {scores['cosine']:.4f}, retrieval agreement "
            f"{scores['retrieval']:.2%} of the {NEIGHBOURS} nearest on {samples_of(evaluation):,} samples"
        )
    data, split, names = measured(evaluation, dataset), dataset.split, dataset.classes
    parts = []
    if f"{split}_accuracy" in data:
        parts.append(f"accuracy {evaluation.accuracy:.2%}, NLL {evaluation.nll:.4f}, ECE {data[f'{split}_ece']:.2%}")
    if evaluation.agreement is not None:
        parts.append(f"agreement with the teacher {evaluation.agreement:.2%}, KL {evaluation.teacher_kl:.4f} nats")
    shown = [
        f"{names[each['true']] if each['true'] >= 0 else 'unlabelled'} → {names[each['predicted']]}"
        for each in data["examples"]
    ]
    return (
        f"{split} {', '.join(parts)} on {samples_of(evaluation):,} samples\n"
        f"{len(shown)} samples spread over the split, true → predicted: {', '.join(shown)}"
    )
