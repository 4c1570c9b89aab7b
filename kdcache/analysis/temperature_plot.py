"""Drawing of the temperature plot: panels of one sample, curves of many. numpy and matplotlib, without torch."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.analysis.distributions import entropy, softmax
from kdcache.analysis.drawing import INK, MUTED, RULE, SERIES, shorten
from kdcache.store.cache import Cache

# Number of classes up to which all are drawn, and number of the likeliest ones that are drawn of more.
DRAWN_UP_TO, TOP_CLASSES = 20, 10

# Temperature range of the curves.
LOWEST, HIGHEST = 0.25, 32.0


@dataclass(frozen=True, kw_only=True)
class TemperatureCurves:
    """Top probability and entropy of some samples over temperatures, as quantiles over the samples.

    Attributes:
        temperatures_t: Ascending temperatures, (temperatures,).
        top_qt: 10 %, 50 % and 90 % quantiles of the top probability, (3, temperatures).
        entropy_qt: The same quantiles of the entropy in nats, (3, temperatures).
    """

    temperatures_t: NDArray[np.float64]
    top_qt: NDArray[np.float64]
    entropy_qt: NDArray[np.float64]


def draw_temperatures(
    cache: Cache,
    sample: int,
    logits_c: NDArray[Any],
    label: int,
    panels: tuple[float, ...],
    curves: TemperatureCurves,
    samples: int,
) -> bytes:
    """Contents of the PNG file.

    Args:
        sample: Index of the sample in the panels.
        logits_c: Logits of that sample, (classes,).
        label: True class of that sample.
        panels: Temperatures of the panels.
        samples: Number of samples behind the curves.
    """
    import matplotlib
    from matplotlib.figure import Figure

    classes = len(cache.classes)
    # By logits, because a high temperature must not decide which classes are seen.
    shown = np.argsort(-logits_c, kind="stable")[:TOP_CLASSES] if classes > DRAWN_UP_TO else np.arange(classes)
    names = [shorten(cache.classes[i], 12) for i in shown]
    style: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10}
    style["text.parse_math"] = False  # a class may be named $100
    with matplotlib.rc_context(style | {"axes.grid": True, "axes.axisbelow": True, "grid.color": RULE}):
        rows = -(-len(panels) // 2)
        figure = Figure(figsize=(8, 2.1 * rows + 7.4), layout="constrained")
        parts: Any = figure.subfigures(3, height_ratios=(2.1 * rows, 3, 3.6))
        above, bars, below = parts
        which = f"the {len(shown)} likeliest of {classes} classes" if classes > len(shown) else f"{classes} classes"
        true = "not known"
        if label >= 0:
            true = f"{shorten(cache.classes[label], 40)}, {'in orange' if label in shown else 'not among them'}"
        above.suptitle(f"Sample {sample}: {which}\nTrue class: {true}", weight="bold")
        _draw_panels(above, logits_c, panels, shown, names, label)
        _draw_bars(bars, logits_c, panels, shown, names)
        below.suptitle(f"{samples:,} samples: median, and 10 to 90 % quantiles", weight="bold")
        _draw_curves(below, curves, panels, classes)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=130)
    return file.getvalue()


def _draw_panels(
    part: Any, logits_c: NDArray[Any], panels: tuple[float, ...], shown: NDArray[Any], names: list[str], label: int
) -> None:
    grid = part.subplots(-(-len(panels) // 2), 2, squeeze=False, sharex=True, sharey=True)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, temperature in zip(grid.flat, panels, strict=False):
        colours = [SERIES[1] if index == label else SERIES[0] for index in shown]
        axes.bar(range(len(shown)), softmax(logits_c, temperature)[shown], color=colours)
        axes.set_title(f"T = {temperature:g}: entropy {entropy(logits_c, temperature):.2f} nats", loc="left")
        axes.set(ylim=(0, 1))
        _name_classes(axes, names)
    for axes in grid[:, 0]:
        axes.set_ylabel("probability")


def _draw_bars(
    part: Any, logits_c: NDArray[Any], panels: tuple[float, ...], shown: NDArray[Any], names: list[str]
) -> None:
    axes = part.subplots()
    width = 0.84 / len(panels)
    for at, temperature in enumerate(panels):
        places = np.arange(len(shown)) + (at - (len(panels) - 1) / 2) * width
        axes.bar(places, softmax(logits_c, temperature)[shown], width, color=SERIES[at], label=f"T = {temperature:g}")
    axes.set_title("The same, by class", loc="left", weight="bold")
    axes.set(ylabel="probability")
    _name_classes(axes, names)
    axes.set_ylim(0, 1.3 * axes.get_ylim()[1])  # room for the legend
    axes.legend(frameon=False, ncols=len(panels) // 2 + 1, loc="upper right")


def _name_classes(axes: Any, names: list[str]) -> None:
    if max(map(len, names)) > 3:
        axes.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor")
    else:
        axes.set_xticks(range(len(names)), names)
    axes.grid(axis="x", visible=False)


def _draw_curves(part: Any, curves: TemperatureCurves, panels: tuple[float, ...], classes: int) -> None:
    from matplotlib.ticker import NullFormatter

    for axes, quantiles, name, colour in zip(
        part.subplots(1, 2),
        (curves.top_qt, curves.entropy_qt),
        ("top probability", "entropy, nats"),
        SERIES,
        strict=False,
    ):
        axes.fill_between(curves.temperatures_t, quantiles[0], quantiles[2], color=colour, alpha=0.2, linewidth=0)
        axes.plot(curves.temperatures_t, quantiles[1], color=colour, linewidth=2)
        for temperature in panels:
            axes.axvline(temperature, color=MUTED, linewidth=0.6, linestyle=":")
        axes.set_xscale("log", base=2)
        ticks = [0.25, 0.5, 1, 2, 4, 8, 16, 32]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set(xlabel="temperature", xlim=(LOWEST, HIGHEST), ylim=(0, None))
        axes.set_title(name, loc="left")
        if name == "top probability":
            even = 1 / classes
            axes.set_ylim(0, 1.02)
            axes.axhline(even, color=INK, linewidth=1, linestyle="--")
            axes.text(LOWEST * 1.1, even, f"1 / {classes}", va="bottom")
        else:
            axes.axhline(math.log(classes), color=INK, linewidth=1, linestyle="--")
            axes.text(LOWEST * 1.1, math.log(classes), f"log({classes}) = {math.log(classes):.2f}", va="bottom")
            axes.set_ylim(0, 1.1 * math.log(classes))
