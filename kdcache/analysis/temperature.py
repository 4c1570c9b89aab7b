"""Plot of how the temperature changes cached soft targets: numpy and matplotlib, without torch or a network."""

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
from kdcache.core.commands import PlotTemperatureArgs
from kdcache.core.errors import UsageError
from kdcache.core.plugins import require_extra
from kdcache.core.progress import Progress
from kdcache.core.rng import keyed_sample
from kdcache.core.text_table import text_table
from kdcache.store.cache import Cache, open_cache
from kdcache.store.records import ONE_CLASS

FEWEST_PANELS, MOST_PANELS = 2, 6
# Number of temperatures of the curves, evenly spaced on a logarithmic axis.
STEPS = 29
# Temperatures of the printed table.
PRINTED = (1.0, 2.0, 4.0, 8.0, 16.0)

# Fractions of log(classes) between which an entropy counts as neither hard nor flat. A convention, not a finding.
HARD, FLAT = 0.1, 0.7


def temperature_curves(logits_nc: NDArray[Any], temperatures_t: NDArray[np.float64]) -> TemperatureCurves:
    """Quantiles of top probability and entropy over samples, as functions of the temperature.

    Args:
        logits_nc: Logits, (samples, classes).
        temperatures_t: Temperatures above 0, (temperatures,).
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


def plot_temperature(settings: PlotTemperatureArgs) -> Report:
    """Plot the effect of the temperature on one sample and on many, and print it in numbers.

    Raises:
        UsageError: the output is no .png, the number of panels cannot be drawn, or there is no such sample.
        CacheNotFound, CacheIncomplete, CacheDamaged: the cache cannot be read.
        MissingExtra: matplotlib is not installed.
    """
    _check(settings)
    require_extra("matplotlib", "plots", "a plot of temperatures")
    cache = open_cache(settings.cache, settings.split)
    _check_cache(settings, cache)
    logits = cache.rows(keyed_sample(len(cache), settings.samples, settings.seed, "plot temperature"))
    sample = _median_sample(settings, cache) if settings.sample is None else settings.sample
    grid = np.geomspace(LOWEST, HIGHEST, STEPS)
    curves = temperature_curves(logits, grid)
    printed = temperature_curves(logits, np.array(PRINTED))
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
        "temperatures": _records(printed),
        "curves": _records(curves),
        "sample": {
            "index": sample,
            "label": cache.classes[label] if label >= 0 else None,
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
    return Report(data, _text(settings, cache, printed, data))


def _check(settings: PlotTemperatureArgs) -> None:
    """Refuse settings that are wrong for any cache."""
    if Path(settings.out).suffix.lower() != ".png":
        raise UsageError(f"--out is {settings.out!r}", "a file that ends with .png", "name it as temperature.png")
    count = len(set(settings.temperatures))
    if not FEWEST_PANELS <= count <= MOST_PANELS:
        raise UsageError(
            f"--temperatures has {count} different ones: {', '.join(f'{t:g}' for t in settings.temperatures)}",
            f"{FEWEST_PANELS} to {MOST_PANELS}, a panel each",
            "give them as --temperatures 0.5,1,2,4,8,16",
        )


def _check_cache(settings: PlotTemperatureArgs, cache: Cache) -> None:
    if settings.sample is not None and settings.sample >= len(cache):
        raise UsageError(
            f"--sample is {settings.sample}",
            f"0 to {len(cache) - 1}: the split {settings.split} has {len(cache):,} samples",
            "choose another one, or leave it out for one of median entropy",
        )
    if not cache.encoding.dense:
        raise UsageError(
            f"{cache.place} holds {cache.encoding.spec}, which leaves out most classes",
            "a cache with the logits of every class, such as float16 or quantized:8",
            "choose another cache",
        )
    if cache.manifest.answers != ONE_CLASS:
        holds = "embeddings" if cache.manifest.is_embedding else "logits of samples with any number of classes each"
        raise UsageError(f"{cache.place} holds {holds}", "one class per sample: softmax is drawn")
    if len(cache.classes) < 2:
        raise UsageError(
            f"{cache.place} has {len(cache.classes)} class",
            "at least two: a single one always has probability 1",
            "choose another cache",
        )


def _median_sample(settings: PlotTemperatureArgs, cache: Cache) -> int:
    """Index of the sample of median entropy at temperature 1."""
    drawn = keyed_sample(len(cache), settings.samples, settings.seed, "plot temperature")
    order = np.argsort(entropy(cache.rows(drawn)), kind="stable")
    return int(drawn[order[len(order) // 2]])


def _records(curves: TemperatureCurves) -> list[dict[str, float]]:
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
    """Lowest and highest temperature at which the median entropy is neither hard nor flat."""
    share = curves.entropy_qt[1] / math.log(classes)
    found = curves.temperatures_t[(share >= HARD) & (share <= FLAT)]
    return [float(found[0]), float(found[-1])] if len(found) else None


def _text(settings: PlotTemperatureArgs, cache: Cache, printed: TemperatureCurves, data: dict[str, Any]) -> str:
    limit = data["max_entropy"]
    header = ["T", "median top probability", "median entropy"]
    medians = zip(printed.temperatures_t, printed.top_qt[1], printed.entropy_qt[1], strict=True)
    rows = [[f"{temperature:g}", f"{top:.4f}", f"{nats:.4f}"] for temperature, top, nats in medians]
    lines = [
        f"{cache.place}: {data['samples']:,} samples, {len(cache.classes)} classes, entropy at most {limit:.3f} nats",
        *text_table(header, rows, numbers=header),
    ]
    if not cache.manifest.recipe.is_plain(0):
        lines.append("the logits are those of view 0, which is augmented or mixed")
    between = data["neither_hard_nor_flat"]
    if between is None:
        lines.append(
            f"At no temperature from {LOWEST:g} to {HIGHEST:g} is the median entropy from {HARD:.0%} to {FLAT:.0%} of "
            "its limit: the distributions are nearly one-hot or nearly uniform."
        )
    else:
        lines.append(
            f"From T = {between[0]:.2g} to {between[1]:.2g} the median entropy is from {HARD:.0%} to {FLAT:.0%} of its "
            "limit: the other classes have weight and still differ. Sweep this range; only the accuracy of students "
            "shows which T is best."
        )
    lines.append(
        f"sample {data['sample']['index']} (true class {data['sample']['label'] or 'not known'}) is in the panels: "
        f"{settings.out}"
    )
    return "\n".join(lines)
