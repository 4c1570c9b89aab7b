"""Sections on predictions and caches: tables, figures and their captions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kdcache.analysis import figures
from kdcache.analysis.calibration import BINS, HIGHEST, LOWEST
from kdcache.analysis.confusion import MATRIX_CLASSES
from kdcache.apps.report.html import UNKNOWN, Card, Figure, Section, Table, percent
from kdcache.apps.report.metrics import MeasuredRun, Predictions

# Largest number of classes for which accuracy is listed by class.
LISTED_CLASSES = 100


def errors(answers: Sequence[Predictions], classes: Sequence[str]) -> Section:
    """Where the answers are wrong."""
    accuracies = {each.name: each.class_accuracy_c for each in answers}
    matrices = [each.confusion_cc for each in answers if each.confusion_cc is not None]
    shares = [matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1) for matrix in matrices]
    wrong = [float((share * (1 - np.eye(len(classes)))).max()) for share in shares]
    largest = max([*wrong, 1e-9])  # all may be right, and colours are divided by it
    pictures = [
        figures.confusion(f"confusion-{at}", each.name, matrix, classes, largest)
        for at, (each, matrix) in enumerate(zip(answers, matrices, strict=False), 1)
    ]
    per_class = (
        "Accuracy by true class: each mark is one run, and marks far apart show what one network has learnt and "
        "another has not."
    )
    if len(classes) > figures.HARDEST_CLASSES:
        per_class += f" Of {len(classes)} classes these are the {figures.HARDEST_CLASSES} with the lowest mean."
    how_to_read = (
        "In a confusion matrix a row is a true class, a column an answer. Blue is the share that is right; orange is a "
        f"share that is wrong, and is full at {largest:.1%}, the largest of all matrices here, so that their colours "
        "can be compared."
        if matrices
        else f"No confusion matrix is drawn of {len(classes):,} classes: more than {MATRIX_CLASSES:,}."
    )
    tables = []
    if len(classes) <= LISTED_CLASSES:
        samples = np.bincount(answers[0].labels_n, minlength=len(classes))
        rows = [
            [name, f"{samples[at]:,}", *(_known(accuracy[at]) for accuracy in accuracies.values())]
            for at, name in enumerate(classes)
        ]
        caption = "Accuracy on the test samples of each class."
        header = ["class", "samples", *accuracies]
        tables = [Table(header=header, rows=rows, caption=caption, folded="Accuracy of each class in numbers")]
    pictures.insert(0, figures.class_accuracy(accuracies, classes))
    return Section(
        anchor="errors",
        title="Confusion",
        tables=tables,
        figures=[Figure(pictures=pictures, caption=f"{per_class} {how_to_read}")],
    )


def _known(value: float) -> str:
    return UNKNOWN if np.isnan(value) else f"{value:.1%}"


def calibration(answers: Sequence[Predictions]) -> Section:
    """Calibration of each network, before and after temperature scaling."""
    known = [(each, each.calibration) for each in answers if each.calibration is not None]
    first = known[0][1]
    pictures = [
        figures.reliability_diagram(f"reliability-{at}", each.name, found) for at, (each, found) in enumerate(known, 1)
    ]
    rows = [
        [
            each.name,
            f"{found.before.ece:.2%}",
            f"{found.after.ece:.2%}",
            f"{found.nll_before:.4f}",
            f"{found.nll_after:.4f}",
            _fitted(found.temperature),
        ]
        for each, found in known
    ]
    header = ["network", "ECE at T = 1", "ECE at fitted T", "NLL at T = 1", "NLL at fitted T", "fitted T"]
    caption = (
        f"ECE is the expected calibration error: the gap between top probability and accuracy, averaged over {BINS} "
        "bins of equal width (Guo et al., 2017). NLL is the mean negative log-likelihood of the labels in nats. A "
        "fitted T above 1 means that the network is overconfident, below 1 underconfident. This T is for calibration; "
        "it is not the temperature of distillation."
    )
    lead = (
        f"For each network one temperature is fitted on {first.fitted:,} test samples, a half drawn by key, by "
        f"minimising the negative log-likelihood. All values are measured on the other {first.evaluated:,}."
    )
    reading = (
        "Predictions are binned by top probability; a point is the accuracy of a bin. On the dotted line confidence "
        "equals accuracy; below it the network is overconfident. Larger points and taller bars stand for more "
        "predictions: the accuracy of a small bin is uncertain."
    )
    return Section(
        anchor="calibration",
        title="Calibration",
        lead=[lead],
        tables=[Table(header=header, rows=rows, caption=caption)],
        figures=[Figure(pictures=pictures, caption=reading)],
    )


def _fitted(temperature: float) -> str:
    """Format a fitted temperature; one at the end of the range is a bound."""
    if temperature > 0.999 * HIGHEST:
        return f"> {HIGHEST:g}"
    return f"< {LOWEST:g}" if temperature < 1.001 * LOWEST else f"{temperature:.3f}"


def agreement(runs: Sequence[MeasuredRun]) -> Section:
    """Agreement of students with their teacher."""
    rows = [
        [each.run.name, each.run.role, found.split, f"{found.samples:,}", f"{found.same:.2%}", f"{found.kl:.4g}"]
        for each in runs
        for found in each.agreements
    ]
    header = ["run", "role", "split", "samples", "same top class", "KL(teacher ‖ student), nats"]
    caption = (
        "Compared with the cached logits, on plain samples. KL is averaged over samples at temperature 1; it is 0 for "
        "equal distributions. Samples of the training split are drawn by key. A student can agree more with its "
        "teacher than with the labels, also where the teacher is wrong. The row of the teacher itself shows the error "
        "of encoding and arithmetic."
    )
    table = Table(header=header, rows=rows, caption=caption, words=(0, 1, 2))
    return Section(anchor="agreement", title="Agreement with the teacher", tables=[table])


def samples(cards: Sequence[Card], name: str, *, has_teacher: bool) -> Section:
    """Single samples, in descending order of their score."""
    order = (
        f"Test samples on which {name} differs most from its teacher: the largest KL(teacher ‖ student) first."
        if has_teacher
        else f"Test samples with the largest loss of {name}; no teacher's logits are cached for them."
    )
    lead = (
        "Listed are the true class (✓) and the top classes, with probabilities at temperature 1. These are the worst "
        "cases and not a random sample: look for wrong labels and ambiguous samples."
    )
    return Section(
        anchor="samples",
        title="Largest disagreements" if has_teacher else "Largest losses",
        lead=[order, lead],
        cards=cards,
    )


def cached(caches: dict[str, dict[str, Any]]) -> Section:
    """Manifests of the caches.

    Args:
        caches: Output of `inspect_cache` by path and split.
    """
    tables = [
        Table(
            header=[f"{split} split", ""],
            rows=[[name, value] for name, value in _facts(found).items()],
            caption=f"Manifest of the {split} split of {path}.",
            words=(0, 1),
        )
        for path, splits in caches.items()
        for split, found in splits.items()
    ]
    lead = (
        "The sha256 of a split's manifest covers every byte of the split: the manifest holds the digest of the ledger, "
        "and the ledger the checksum of each chunk."
    )
    return Section(anchor="cache", title="Caches", lead=[lead], tables=tables)


def _facts(split: dict[str, Any]) -> dict[str, str]:
    manifest = split["manifest"]
    dataset, teacher, recipe, logits = (
        manifest["dataset"],
        manifest["teacher"],
        manifest["recipe"],
        manifest["arrays"][0],
    )
    shape = "of varying size" if dataset["input_shape"] is None else "×".join(map(str, dataset["input_shape"]))
    views = "the plain sample"
    if recipe["augment"] != "none" or recipe["mix"] != "none":
        plain = ", view 0 plain" if recipe["plain_view"] else ""
        views = f"augment {recipe['augment']}, mix {recipe['mix']}, seed {recipe['seed']}{plain}"
    return {
        "dataset": f"{dataset['name']}, {dataset['length']:,} samples, {dataset['input_dtype']} {shape}",
        "classes": str(len(dataset["classes"])),
        "teacher": f"{teacher['spec']}, {teacher['parameters']:,} parameters",
        "teacher's accuracy": percent(teacher["accuracy"], 2),
        "views": f"{split['views']}: {views}",
        "encoding": f"{manifest.get('encoding') or logits['dtype']}, compression {logits['compression']}, "
        f"amp {manifest['amp']}",
        "fidelity": "; ".join(
            f"mean KL {each['mean_kl']:.1e} at T = {each['temperature']:g}" for each in manifest.get("fidelity", ())
        )
        or "not measured",
        "bytes": f"{split['bytes']:,} for {split['rows']:,} rows",
        "made with": ", ".join(f"{name} {version}" for name, version in manifest["versions"].items()),
        "sha256 of the weights": teacher["weights_sha256"],
        "sha256 of the manifest": split["sha256"],
        "sha256 of the labels": dataset["labels_sha256"] or UNKNOWN,
        "sha256 of some inputs": dataset["sample_sha256"],
    }
