"""From numbers to the sections on answers and caches: tables, figures and the words that say how to read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kdcache.analysis import figures
from kdcache.analysis.calibration import BINS, HIGHEST, LOWEST
from kdcache.analysis.confusion import MATRIX_CLASSES
from kdcache.apps.report.html import UNKNOWN, Card, Figure, Section, Table, percent
from kdcache.apps.report.metrics import Answers, MeasuredRun

# A table of more classes than these is no help.
LISTED_CLASSES = 100


def errors(answers: Sequence[Answers], classes: Sequence[str]) -> Section:
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
        title="What is taken for what",
        tables=tables,
        figures=[Figure(pictures=pictures, caption=f"{per_class} {how_to_read}")],
    )


def _known(value: float) -> str:
    return UNKNOWN if np.isnan(value) else f"{value:.1%}"


def calibration(answers: Sequence[Answers]) -> Section:
    """Whether probabilities can be believed."""
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
    header = ["who", "ECE as it is", "ECE after scaling", "NLL as it is", "NLL after scaling", "fitted T"]
    caption = (
        f"ECE is the expected calibration error: the gap between top probability and accuracy, averaged over {BINS} "
        "bins of equal width (Guo et al., 2017). NLL is the mean negative log-likelihood of the labels in nats. A "
        "fitted T above 1 says that the network was too sure of itself, below 1 too unsure. This T is for calibration; "
        "it is not the temperature of distillation."
    )
    lead = (
        f"One temperature is fitted to each network on {first.fitted:,} test samples, a half drawn by key, by the "
        f"least negative log-likelihood. Everything shown is of the other {first.judged:,}."
    )
    reading = (
        "Answers are put into bins by their probability; a point is the share of a bin that is right. On the dotted "
        "line probabilities are true; below it the network is too sure. The larger a point and the taller its bar, the "
        "more answers are in its bin: a small one says little."
    )
    return Section(
        anchor="calibration",
        title="Calibration",
        lead=[lead],
        tables=[Table(header=header, rows=rows, caption=caption)],
        figures=[Figure(pictures=pictures, caption=reading)],
    )


def _fitted(temperature: float) -> str:
    """A fitted temperature; one that ran to an end of its range is no finding but a bound."""
    if temperature > 0.999 * HIGHEST:
        return f"> {HIGHEST:g}"
    return f"< {LOWEST:g}" if temperature < 1.001 * LOWEST else f"{temperature:.3f}"


def agreement(runs: Sequence[MeasuredRun]) -> Section:
    """How students follow their teacher."""
    rows = [
        [each.run.name, each.run.role, found.split, f"{found.samples:,}", f"{found.same:.2%}", f"{found.kl:.4g}"]
        for each in runs
        for found in each.agreements
    ]
    header = ["run", "role", "split", "samples", "same top class", "KL(teacher ‖ student), nats"]
    caption = (
        "Compared with the cached answers, on plain samples. KL is averaged over samples at temperature 1; it is 0 "
        "where the distributions are the same. Samples of the training split are drawn by key. A student can agree "
        "more with its teacher than with the labels, also where the teacher is wrong. A teacher's own run shows what "
        "encoding and arithmetic cost."
    )
    table = Table(header=header, rows=rows, caption=caption, words=(0, 1, 2))
    return Section(anchor="agreement", title="Agreement with the teacher", tables=[table])


def samples(cards: Sequence[Card], name: str, *, has_teacher: bool) -> Section:
    """Single samples, worst first."""
    order = (
        f"The test samples on which {name} is furthest from its teacher: the largest KL(teacher ‖ student) first."
        if has_teacher
        else f"The test samples with the largest loss of {name}; there are no cached answers of a teacher to them."
    )
    lead = (
        "Listed are the true class (✓) and each top answer, with probabilities at temperature 1. These are the worst "
        "cases and no fair sample: look for wrong labels and for samples that people would argue about."
    )
    return Section(
        anchor="samples",
        title="Worst disagreements" if has_teacher else "Worst answers",
        lead=[order, lead],
        cards=cards,
    )


def cached(caches: dict[str, dict[str, Any]]) -> Section:
    """What the manifests say.

    Args:
        caches: path → what `inspect_cache` tells of its splits, by split.
    """
    tables = [
        Table(
            header=[f"{split} split", ""],
            rows=[[name, value] for name, value in _facts(found).items()],
            caption=f"The {split} split of {path}, as its manifest says.",
            words=(0, 1),
        )
        for path, splits in caches.items()
        for split, found in splits.items()
    ]
    lead = (
        "A split's manifest answers by its sha256 for every byte of the split: it holds the digest of the ledger, and "
        "the ledger the checksum of each chunk."
    )
    return Section(anchor="cache", title="What was cached", lead=[lead], tables=tables)


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
        "encoding": f"{logits['dtype']}, compression {logits['compression']}, amp {manifest['amp']}",
        "bytes": f"{split['bytes']:,} for {split['rows']:,} rows",
        "made with": ", ".join(f"{name} {version}" for name, version in manifest["versions"].items()),
        "sha256 of the weights": teacher["weights_sha256"],
        "sha256 of the manifest": split["sha256"],
        "sha256 of the labels": dataset["labels_sha256"] or UNKNOWN,
        "sha256 of some inputs": dataset["sample_sha256"],
    }
