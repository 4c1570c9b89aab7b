"""Pictures with matplotlib, where the extra is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kdcache.cache.files import durable_file
from kdcache.errors import MissingExtra
from kdcache.plugins import require_extra


def draw_heat_map(rows: list[dict[str, Any]], path: Path) -> list[str]:
    """Accuracy by temperature and setting, as a PNG; a line that says where it is, or why it is not.

    Args:
        rows: of a sweep, each with `name`, `temperature` and `score` (0 to 1, or None).
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
