"""Figures of a report: each function draws numbers as a `Picture` with an alternative text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.analysis.calibration import BINS, Calibration, Reliability
from kdcache.analysis.drawing import CORRECT, DASHES, INK, MARKERS, MUTED, PAPER, SERIES, WRONG, Picture, draw, shorten

# Number of epochs beyond which markers would hide the line.
MARKED_EPOCHS = 20
# Number of classes whose counts, and whose names, fit into a matrix of 4 inches.
COUNTS_UP_TO, NAMES_UP_TO = 12, 26
HARDEST_CLASSES = 30

Metrics = Sequence[Mapping[str, Any]]


def curves(runs: Mapping[str, Metrics]) -> list[Picture]:
    """Learning curves: one picture per metric, with the curves of all runs.

    Args:
        runs: Entries of `metrics.jsonl` by the name of the run.
    """
    names = dict.fromkeys(key for entries in runs.values() for entry in entries for key in entry)
    parts = [key for key in names if key not in ("epoch", "view", "seconds", "learning_rate") and "accuracy" not in key]
    panels = {f"curve-{key.replace('_', '-')}": (key.replace("_", " "), [key]) for key in parts}
    panels["curve-accuracy"] = ("accuracy", [key for key in names if "accuracy" in key])
    panels["curve-learning-rate"] = ("learning rate", ["learning_rate"])
    return [_curve(name, title, keys, runs) for name, (title, keys) in panels.items()]


def _curve(name: str, title: str, keys: Sequence[str], runs: Mapping[str, Metrics]) -> Picture:
    lines = [
        (at, run, key, [entry["epoch"] for entry in entries if key in entry], [e[key] for e in entries if key in e])
        for at, (run, entries) in enumerate(runs.items())
        for key in keys
        if any(key in entry for entry in entries)
    ]
    ends = "; ".join(f"{run} {_words(key)} ends at {values[-1]:.4g}" for _, run, key, _, values in lines)

    def paint(figure: Any) -> None:
        axes = figure.add_subplot()
        for at, run, key, epochs, values in lines:
            validation = key.startswith("val_")
            axes.plot(
                epochs,
                values,
                DASHES[at % len(DASHES)],
                color=SERIES[at % len(SERIES)],
                marker=MARKERS[at % len(MARKERS)] if len(epochs) <= MARKED_EPOCHS else None,
                markerfacecolor=PAPER if validation else None,
                linewidth=0.9 if validation else None,
                label=f"{run}, {_words(key)}" if len(keys) > 1 else run,
            )
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        figure.legend(loc="outside lower left", ncols=2 if len(lines) > 1 else 1)

    height = 2.5 + 0.2 * -(-len(lines) // 2)
    return draw(name, f"{title.capitalize()} over the epochs: {ends}.", height, paint)


def _words(key: str) -> str:
    return {"train_accuracy": "training", "val_accuracy": "validation"}.get(key, key.replace("_", " "))


def confusion(
    name: str, run: str, matrix_cc: NDArray[np.int64], classes: Sequence[str], largest_error: float
) -> Picture:
    """A confusion matrix: right answers in one colour, wrong ones in another whose scale ends at `largest_error`.

    Args:
        matrix_cc: (classes, classes), rows are true classes, columns are answers.
        largest_error: share of a true class, above 0 to 1; the same for all runs, so that they can be compared.
    """
    share = matrix_cc / np.maximum(matrix_cc.sum(axis=1, keepdims=True), 1)
    wrong = share * (1 - np.eye(len(classes)))
    row, column = np.unravel_index(int(wrong.argmax()), wrong.shape)
    alt = f"Confusion matrix of {run}. " + (
        f"Most often {classes[int(row)]} is taken for {classes[int(column)]}: {wrong.max():.1%} of its samples."
        if wrong.max() > 0
        else "No sample is taken for another class."
    )

    def paint(figure: Any) -> None:
        from matplotlib.colors import LinearSegmentedColormap

        right_map, wrong_map = (
            LinearSegmentedColormap.from_list(colour, [PAPER, colour]) for colour in (CORRECT, WRONG)
        )
        colours = wrong_map(np.minimum(wrong / largest_error, 1))
        diagonal = np.arange(len(classes))
        colours[diagonal, diagonal] = right_map(share.diagonal())
        axes = figure.add_subplot()
        axes.imshow(colours)
        axes.grid(False)
        axes.set(title=run, xlabel="answer", ylabel="true class")
        if len(classes) <= NAMES_UP_TO:
            short = [shorten(text, 10) for text in classes]
            axes.set_xticks(diagonal, short, rotation=90 if max(map(len, short)) > 2 else 0)
            axes.set_yticks(diagonal, short)
        if len(classes) <= COUNTS_UP_TO:
            for (at, to), count in np.ndenumerate(matrix_cc):
                strong = share[at, to] > 0.55 if at == to else wrong[at, to] > 0.55 * largest_error
                if count:
                    ink = PAPER if strong else INK
                    axes.text(to, at, str(count), ha="center", va="center", fontsize=7.5, color=ink)

    return draw(name, alt, 4.0, paint)


def class_accuracy(accuracies: Mapping[str, NDArray[np.float64]], classes: Sequence[str]) -> Picture:
    """Accuracy by class, one mark per run; of many classes the hardest ones.

    Args:
        accuracies: Accuracy of each class by the name of the run, (classes,); NaN for a class without samples.
    """
    mean = np.nanmean(np.where(np.isnan(list(accuracies.values())), np.inf, list(accuracies.values())), axis=0)
    shown = (
        np.argsort(mean, kind="stable")[:HARDEST_CLASSES] if len(classes) > HARDEST_CLASSES else np.arange(len(mean))
    )
    worst = "; ".join(
        f"{run} is worst on {classes[int(np.nanargmin(values))]} with {np.nanmin(values):.1%}"
        for run, values in accuracies.items()
    )

    def paint(figure: Any) -> None:
        axes = figure.add_subplot()
        places = np.arange(len(shown))
        for at, (run, values) in enumerate(accuracies.items()):
            axes.plot(
                100 * values[shown],
                places + 0.12 * (at - (len(accuracies) - 1) / 2),  # equal accuracies must not hide each other
                linestyle="none",
                marker=MARKERS[at % len(MARKERS)],
                markersize=6,
                color=SERIES[at % len(SERIES)],
                alpha=0.85,
                label=run,
            )
        axes.set_yticks(places, [shorten(classes[i], 16) for i in shown])
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.set(title="accuracy by true class", xlabel="% of the class's test samples")
        figure.legend(loc="outside lower left", ncols=2)

    height = 1.3 + 0.21 * len(shown) + 0.2 * -(-len(accuracies) // 2)
    return draw("class-accuracy", f"Accuracy by class: {worst}.", height, paint)


def reliability_diagram(name: str, run: str, calibration: Calibration) -> Picture:
    """Reliability diagram before and after temperature scaling: accuracy against top probability, and bin counts."""
    before, after = calibration.before, calibration.after
    alt = (
        f"Reliability diagram of {run}: expected calibration error {before.ece:.2%} before and {after.ece:.2%} after "
        f"division of its logits by {calibration.temperature:.2f}."
    )

    def paint(figure: Any) -> None:
        axes, below = figure.subplots(2, sharex=True, height_ratios=(4, 1))
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=":")
        scaled = f"at T = {calibration.temperature:.2f}, ECE {after.ece:.1%}"
        _reliability_line(axes, before, WRONG, "s", f"at T = 1, ECE {before.ece:.1%}")
        _reliability_line(axes, after, CORRECT, "o", scaled)
        axes.set(title=run, ylabel="accuracy", ylim=(-0.03, 1.03), xlim=(0, 1.02))
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=2)
        middles, width = (np.arange(BINS) + 0.5) / BINS, 0.4 / BINS
        total = before.counts_b.sum()
        below.bar(middles - width / 2, before.counts_b / total, width, color=WRONG)
        below.bar(middles + width / 2, after.counts_b / total, width, color=CORRECT)
        below.set(xlabel="top probability", ylabel="share", ylim=(0, 1))
        figure.align_ylabels()

    return draw(name, alt, 4.0, paint)


def _reliability_line(axes: Any, found: Reliability, colour: str, marker: str, label: str) -> None:
    full = found.counts_b > 0
    share = found.counts_b[full] / found.counts_b.sum()
    places = found.confidence_b[full], found.accuracy_b[full]
    axes.plot(*places, color=colour, linewidth=1, alpha=0.6)
    # Area grows with the share, from a visible minimum.
    axes.scatter(*places, 6 + 60 * np.sqrt(share), color=colour, marker=marker, label=label, zorder=3)
