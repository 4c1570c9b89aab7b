"""Plots of matrices: heat map of a sweep, confusion matrix. matplotlib is imported when they are drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.core.atomic_files import durable_file
from kdcache.core.errors import MissingExtra
from kdcache.core.plugins import require_extra


def draw_heat_map(rows: list[dict[str, Any]], path: Path) -> list[str]:
    """Draw accuracy by temperature and setting as a PNG.

    Args:
        rows: Rows of a sweep, each with `name`, `temperature` and `score` (0 to 1, or None).

    Returns:
        A line for the user: the path of the plot, or the reason why there is none.
    """
    try:
        require_extra("matplotlib", "plots", "the heat map")
    except MissingExtra as problem:
        return [f"no heat map was drawn: {problem}"]
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["name"] for row in rows))
    temperatures = sorted({row["temperature"] for row in rows})
    scores = {(row["name"], row["temperature"]): row["score"] for row in rows}
    cells = [[scores.get((name, temperature)) for temperature in temperatures] for name in names]
    known = [score for line in cells for score in line if score is not None]
    figure = Figure(figsize=(2.5 + 1.1 * len(temperatures), 1.6 + 0.55 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    low, high = min(known), max(known)
    image = axes.imshow(
        [[float("nan") if score is None else score * 100 for score in line] for line in cells],
        cmap="viridis",
        aspect="auto",
        vmin=low * 100,
        vmax=high * 100 if high > low else low * 100 + 1,
    )
    figure.colorbar(image, ax=axes, label="accuracy in %")
    axes.set(xlabel="temperature", title="mean accuracy of the students")
    axes.set_xticks(range(len(temperatures)), [f"{temperature:g}" for temperature in temperatures])
    axes.set_yticks(range(len(names)), names)
    for y, line in enumerate(cells):
        for x, score in enumerate(line):
            dark = score is not None and score < low + 0.6 * (high - low)
            text = "–" if score is None else f"{score:.2%}"
            axes.text(x, y, text, ha="center", va="center", fontsize=9, color="white" if dark else "black")
    with durable_file(path) as file:
        figure.savefig(file, dpi=150, format="png")
    return [f"heat map: {path}"]


def plot_confusion(confusion_cc: NDArray[np.int64], classes: tuple[str, ...], path: Path) -> None:
    """Draw a confusion matrix as a PNG, with counts in the cells where they fit.

    Args:
        confusion_cc: (classes, classes), rows are true classes, columns are predictions.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    require_extra("matplotlib", "plots", "a confusion matrix as PNG")
    from matplotlib.figure import Figure

    share = confusion_cc / np.maximum(confusion_cc.sum(axis=1, keepdims=True), 1)
    accuracy = confusion_cc.trace() / max(confusion_cc.sum(), 1)
    side = min(max(4.0, 0.45 * len(classes)), 20.0)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the true class")
    axes.set(xlabel="predicted", ylabel="true", title=f"accuracy {accuracy:.2%}")
    if len(classes) <= 40:
        axes.set_xticks(range(len(classes)), classes, rotation=90 if max(map(len, classes)) > 2 else 0)
        axes.set_yticks(range(len(classes)), classes)
    if len(classes) <= 20:
        for (row, column), count in np.ndenumerate(confusion_cc):
            if count:
                color = "white" if share[row, column] > 0.5 else "black"
                axes.text(column, row, str(count), ha="center", va="center", fontsize=8, color=color)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
