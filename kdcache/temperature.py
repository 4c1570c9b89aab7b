"""What temperature does to the answers in a cache, as one picture: numpy and matplotlib, no torch and no network."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.cache.files import write_durable
from kdcache.cache.reader import Cache, open_cache
from kdcache.config import PlotTemperature
from kdcache.errors import UsageError
from kdcache.keys import keyed_sample
from kdcache.plugins import require_extra
from kdcache.progress import Progress
from kdcache.records import Report
from kdcache.report.distributions import entropy, softmax
from kdcache.report.drawing import shorten

FEWEST_PANELS, MOST_PANELS = 2, 6
# Of more classes only the likeliest are drawn.
DRAWN_UP_TO, TOP_CLASSES = 20, 10

# The curves' temperatures, even on a logarithmic axis.
LOWEST, HIGHEST, STEPS = 0.25, 32.0, 29
# Those that are told in words.
TOLD = (1.0, 2.0, 4.0, 8.0, 16.0)

# Parts of log(classes) between which an entropy counts as neither hard nor flat. A convention, not a finding.
HARD, FLAT = 0.1, 0.7

COLOURS = ("#0b62c4", "#d1660a", "#14804a", "#7d3cc9", "#c2185b", "#7a6400")


@dataclass(frozen=True, kw_only=True)
class TemperatureCurves:
    """Top probability and entropy of some samples over temperatures, as quantiles over the samples.

    Attributes:
        temperatures_t: ascending.
        top_qt: 10 %, 50 % and 90 % quantiles of the top probability, (3, temperatures).
        entropy_qt: likewise of the entropy in nats.
    """

    temperatures_t: NDArray[np.float64]
    top_qt: NDArray[np.float64]
    entropy_qt: NDArray[np.float64]


def temperature_curves(logits_nc: NDArray[Any], temperatures_t: NDArray[np.float64]) -> TemperatureCurves:
    """How top probability and entropy of some samples go with the temperature.

    Args:
        logits_nc: (samples, classes).
        temperatures_t: all above 0.
    """
    top, entropies = [], []
    with Progress("temperatures", len(temperatures_t), "temperatures") as progress:
        for temperature in temperatures_t.tolist():
            top.append(np.quantile(softmax(logits_nc, temperature).max(axis=1), (0.1, 0.5, 0.9)))
            entropies.append(np.quantile(entropy(logits_nc, temperature), (0.1, 0.5, 0.9)))
            progress.advance(1)
    return TemperatureCurves(
        temperatures_t=temperatures_t, top_qt=np.stack(top, axis=1), entropy_qt=np.stack(entropies, axis=1)
    )


def plot_temperature(settings: PlotTemperature) -> Report:
    """Draw what temperature does to one sample and to many, and tell it in numbers.

    Raises:
        UsageError: an output that is no .png, a number of panels that cannot be drawn, or no such sample.
        CacheNotFound, CacheIncomplete, CacheDamaged: the cache cannot be read.
        MissingExtra: matplotlib is not installed.
    """
    _check(settings)
    require_extra("matplotlib", "plots", "a picture of temperatures")
    cache = open_cache(settings.cache, settings.split)
    _check_cache(settings, cache)
    logits = cache.rows(keyed_sample(len(cache), settings.samples, settings.seed, "plot temperature"))
    sample = _median_sample(settings, cache) if settings.sample is None else settings.sample
    grid = np.geomspace(LOWEST, HIGHEST, STEPS)
    curves = temperature_curves(logits, grid)
    told = temperature_curves(logits, np.array(TOLD))
    panels = tuple(sorted(settings.temperatures))
    row = cache.rows([sample])[0]
    label = int(cache.column("labels")[sample])
    write_durable(Path(settings.out), _draw(cache, sample, row, label, panels, curves, len(logits)))
    data = {
        "picture": settings.out,
        "cache": settings.cache,
        "split": settings.split,
        "samples": len(logits),
        "max_entropy": math.log(len(cache.classes)),
        "temperatures": _told(told),
        "curves": _told(curves),
        "sample": {
            "index": sample,
            "label": cache.classes[label],
            "panels": [
                {
                    "temperature": temperature,
                    "entropy": float(entropy(row, temperature)),
                    "probabilities": softmax(row, temperature).tolist(),
                }
                for temperature in panels
            ],
        },
        "neither_hard_nor_flat": _between(curves, len(cache.classes)),
    }
    return Report(data, _text(settings, cache, told, data))


def _check(settings: PlotTemperature) -> None:
    """What needs no cache to be refused."""
    if Path(settings.out).suffix.lower() != ".png":
        raise UsageError(f"--out is {settings.out!r}", "a file that ends with .png", "name it as temperature.png")
    count = len(set(settings.temperatures))
    if not FEWEST_PANELS <= count <= MOST_PANELS or not all(map(math.isfinite, settings.temperatures)):
        raise UsageError(
            f"--temperatures has {count} different ones: {', '.join(f'{t:g}' for t in settings.temperatures)}",
            f"{FEWEST_PANELS} to {MOST_PANELS} finite ones, a panel each",
            "give them as --temperatures 0.5,1,2,4,8,16",
        )


def _check_cache(settings: PlotTemperature, cache: Cache) -> None:
    if settings.sample is not None and settings.sample >= len(cache):
        raise UsageError(
            f"--sample is {settings.sample}",
            f"0 to {len(cache) - 1}: the split {settings.split} has {len(cache):,} samples",
            "choose another one, or leave it out for one of median entropy",
        )
    if len(cache.classes) < 2:
        raise UsageError(
            f"{cache.path} has {len(cache.classes)} class",
            "at least two: a single one always has probability 1",
            "choose another cache",
        )


def _median_sample(settings: PlotTemperature, cache: Cache) -> int:
    """The drawn sample whose entropy at temperature 1 is in the middle."""
    drawn = keyed_sample(len(cache), settings.samples, settings.seed, "plot temperature")
    order = np.argsort(entropy(cache.rows(drawn)), kind="stable")
    return int(drawn[order[len(order) // 2]])


def _told(curves: TemperatureCurves) -> list[dict[str, float]]:
    names = ("p10", "median", "p90")
    return [
        {
            "temperature": float(temperature),
            **{f"top_probability_{name}": float(curves.top_qt[q, at]) for q, name in enumerate(names)},
            **{f"entropy_{name}": float(curves.entropy_qt[q, at]) for q, name in enumerate(names)},
        }
        for at, temperature in enumerate(curves.temperatures_t)
    ]


def _between(curves: TemperatureCurves, classes: int) -> list[float] | None:
    """The lowest and the highest of the temperatures at which the median entropy is neither hard nor flat."""
    share = curves.entropy_qt[1] / math.log(classes)
    found = curves.temperatures_t[(share >= HARD) & (share <= FLAT)]
    return [float(found[0]), float(found[-1])] if len(found) else None


def _text(settings: PlotTemperature, cache: Cache, told: TemperatureCurves, data: dict[str, Any]) -> str:
    limit = data["max_entropy"]
    lines = [
        f"{cache.path}: {data['samples']:,} samples, {len(cache.classes)} classes, entropy at most {limit:.3f} nats",
        f"{'T':>6}  {'median top probability':>22}  {'median entropy':>14}",
    ]
    for at, temperature in enumerate(told.temperatures_t):
        lines.append(f"{temperature:>6g}  {told.top_qt[1, at]:>22.4f}  {told.entropy_qt[1, at]:>14.4f}")
    if not cache.manifest.recipe.is_plain(0):
        lines.append("the answers are those to view 0, which is varied")
    between = data["neither_hard_nor_flat"]
    if between is None:
        lines.append(
            f"At no temperature from {LOWEST:g} to {HIGHEST:g} is the median entropy from {HARD:.0%} to {FLAT:.0%} of "
            "its limit: the answers are all but one-hot or all but even."
        )
    else:
        lines.append(
            f"From T = {between[0]:.2g} to {between[1]:.2g} the median entropy is from {HARD:.0%} to {FLAT:.0%} of its "
            "limit: the other classes have weight, and are not yet alike. A range to sweep; which T teaches best only "
            "students tell."
        )
    lines.append(
        f"sample {data['sample']['index']} (true class {data['sample']['label']}) is in the panels: {settings.out}"
    )
    return "\n".join(lines)


def _draw(
    cache: Cache,
    sample: int,
    logits_c: NDArray[Any],
    label: int,
    panels: tuple[float, ...],
    curves: TemperatureCurves,
    samples: int,
) -> bytes:
    """The picture as a PNG.

    Args:
        logits_c: of the sample in the panels, (classes,).
        label: its true class.
        samples: how many the curves are of.
    """
    import matplotlib
    from matplotlib.figure import Figure

    classes = len(cache.classes)
    # By logits, because a high temperature must not decide which classes are seen.
    shown = np.argsort(-logits_c, kind="stable")[:TOP_CLASSES] if classes > DRAWN_UP_TO else np.arange(classes)
    names = [shorten(cache.classes[i], 12) for i in shown]
    style: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10}
    with matplotlib.rc_context(style | {"axes.grid": True, "axes.axisbelow": True, "grid.color": "#e3e7eb"}):
        rows = -(-len(panels) // 2)
        figure = Figure(figsize=(8, 2.1 * rows + 7.4), layout="constrained")
        parts: Any = figure.subfigures(3, height_ratios=(2.1 * rows, 3, 3.6))
        above, bars, below = parts
        which = f"the {len(shown)} likeliest of {classes} classes" if classes > len(shown) else f"{classes} classes"
        true = "in orange" if label in shown else "not among them"
        name = shorten(cache.classes[label], 40)
        above.suptitle(f"Sample {sample}: {which}\nTrue class: {name}, {true}", weight="bold")
        _draw_panels(above, logits_c, panels, shown, names, label)
        _draw_bars(bars, logits_c, panels, shown, names)
        below.suptitle(f"{samples:,} samples: median, and 10 to 90 % of them", weight="bold")
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
        colours = [COLOURS[1] if index == label else COLOURS[0] for index in shown]
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
        axes.bar(places, softmax(logits_c, temperature)[shown], width, color=COLOURS[at], label=f"T = {temperature:g}")
    axes.set_title("The same, class by class", loc="left", weight="bold")
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
        COLOURS,
        strict=False,
    ):
        axes.fill_between(curves.temperatures_t, quantiles[0], quantiles[2], color=colour, alpha=0.2, linewidth=0)
        axes.plot(curves.temperatures_t, quantiles[1], color=colour, linewidth=2)
        for temperature in panels:
            axes.axvline(temperature, color="#59636e", linewidth=0.6, linestyle=":")
        axes.set_xscale("log", base=2)
        ticks = [0.25, 0.5, 1, 2, 4, 8, 16, 32]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set(xlabel="temperature", xlim=(LOWEST, HIGHEST), ylim=(0, None))
        axes.set_title(name, loc="left")
        if name == "top probability":
            even = 1 / classes
            axes.set_ylim(0, 1.02)
            axes.axhline(even, color="#1c2127", linewidth=1, linestyle="--")
            axes.text(LOWEST * 1.1, even, f"1 / {classes}", va="bottom")
        else:
            axes.axhline(math.log(classes), color="#1c2127", linewidth=1, linestyle="--")
            axes.text(LOWEST * 1.1, math.log(classes), f"log({classes}) = {math.log(classes):.2f}", va="bottom")
            axes.set_ylim(0, 1.1 * math.log(classes))
