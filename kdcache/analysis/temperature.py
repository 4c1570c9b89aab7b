"""What temperature does to the answers in a cache, as one picture: numpy and matplotlib, no torch and no network."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.analysis.distributions import entropy, softmax
from kdcache.analysis.temperature_plot import HIGHEST, LOWEST, TemperatureCurves, draw_temperatures
from kdcache.core.atomic_files import write_durable
from kdcache.core.command_result import Report
from kdcache.core.config import PlotTemperature
from kdcache.core.errors import UsageError
from kdcache.core.plugins import require_extra
from kdcache.core.progress import Progress
from kdcache.core.rng import keyed_sample
from kdcache.store.cache import Cache, open_cache

FEWEST_PANELS, MOST_PANELS = 2, 6
# The curves have so many temperatures, even on a logarithmic axis.
STEPS = 29
# Those that are told in words.
TOLD = (1.0, 2.0, 4.0, 8.0, 16.0)

# Parts of log(classes) between which an entropy counts as neither hard nor flat. A convention, not a finding.
HARD, FLAT = 0.1, 0.7


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
    write_durable(Path(settings.out), draw_temperatures(cache, sample, row, label, panels, curves, len(logits)))
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
    if not FEWEST_PANELS <= count <= MOST_PANELS:
        raise UsageError(
            f"--temperatures has {count} different ones: {', '.join(f'{t:g}' for t in settings.temperatures)}",
            f"{FEWEST_PANELS} to {MOST_PANELS}, a panel each",
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
