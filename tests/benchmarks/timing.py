"""Two or more ways to do one thing, timed in turn: machines drift, so only ratios within a round are compared."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

import torch


def side_by_side(
    sides: Mapping[str, Callable[[], float]],
    *,
    rounds: int,
    what: str,
    target: Mapping[str, str],
    samples: int | None = None,
) -> None:
    """Time every side once a round, after one round that does not count, and print medians and ratios to the first.

    Args:
        sides: each does its work and returns the seconds that count.
        target: what a side's ratio is hoped to be, for print.
        samples: Samples that each side works on, to print their rate.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, side in sides.items():
            seconds[name].append(side())
    base = next(iter(sides))
    print(f"{what}, {rounds} rounds, {torch.get_num_threads()} threads")
    for name, measured in seconds.items():
        counted = measured[1:]
        ratios = [value / reference for value, reference in zip(counted, seconds[base][1:], strict=True)]
        rate = "" if samples is None else f"{samples / statistics.median(counted):8.1f} samples/s "
        print(
            f"  {name:<28} {statistics.median(counted):8.3f} s {rate} × {base}: median {statistics.median(ratios):.3f} "
            f"({min(ratios):.3f} to {max(ratios):.3f})  {target.get(name, '')}"
        )
