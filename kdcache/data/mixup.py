"""Mixup and CutMix. Partner, lambda and box follow from a key of (view, sample), not from a position in a batch."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kdcache.core.errors import UsageError
from kdcache.core.specs import number, split_spec
from kdcache.store.records import NONE

# Lambdas are multiples of 1 / WHOLE, so that blending bytes is exact integer arithmetic in every process.
WHOLE = 1 << 16


class Draw(NamedTuple):
    """Random numbers of one (view, sample).

    Attributes:
        partner: Index of the other sample.
        parts: Weight of the sample itself (lambda), in multiples of 1 / `WHOLE`.
        centre: Centre of CutMix's box, (row, column), each from 0 to 1.
    """

    partner: int
    parts: int
    centre: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Mix:
    """Mixup or CutMix with its distribution of lambda.

    Attributes:
        alpha: Both parameters of lambda's Beta distribution; 1 is uniform.
        cut: Paste a box of the partner (CutMix, Yun et al., 2019) instead of blending (mixup, Zhang et al., 2018).
    """

    alpha: float
    cut: bool

    def __str__(self) -> str:
        alpha = np.format_float_positional(self.alpha, trim="-")
        return f"{'cutmix' if self.cut else 'mixup'}:{alpha}"

    def draw(self, key: int, sample: int, samples: int) -> Draw:
        """Draw a partner among the other samples (the sample itself if it is the only one), lambda and a box."""
        # Python's generator is the cheapest one to seed.
        generator = random.Random(key)
        drawn = generator.randrange(max(samples - 1, 1))
        partner = min(drawn + (drawn >= sample), samples - 1)
        parts = round(generator.betavariate(self.alpha, self.alpha) * WHOLE)
        return Draw(partner, parts, (generator.random(), generator.random()))

    def apply(self, image: Tensor, other: Tensor, draw: Draw) -> tuple[Tensor, float]:
        """Mix two uint8 images (C, H, W) of one shape; returns the image and lambda, the weight of the first."""
        return (_paste if self.cut else _blend)(image, other, draw)


def _blend(image: Tensor, other: Tensor, draw: Draw) -> tuple[Tensor, float]:
    blended = image.to(torch.int32).mul_(draw.parts).add_(other.to(torch.int32).mul_(WHOLE - draw.parts))
    return blended.add_(WHOLE // 2).bitwise_right_shift_(16).to(torch.uint8), draw.parts / WHOLE


def _paste(image: Tensor, other: Tensor, draw: Draw) -> tuple[Tensor, float]:
    height, width = image.shape[-2:]
    side = math.sqrt(1 - draw.parts / WHOLE)
    (top, bottom), (left, right) = (
        _edges(centre, side, length) for centre, length in zip(draw.centre, (height, width), strict=True)
    )
    mixed = image.clone()
    mixed[..., top:bottom, left:right] = other[..., top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)


def _edges(centre: float, side: float, length: int) -> tuple[int, int]:
    """Start and end of a box along one axis, clipped to the image as in the paper."""
    middle, half = int(centre * length), int(side * length) // 2
    return max(middle - half, 0), min(middle + half, length)


def parse_mix(spec: str) -> Mix | None:
    """Parse a spec of mixing; None for `none`.

    Args:
        spec: `none`, `mixup:ALPHA`, `cutmix:ALPHA`, or `uniform`: a blend with uniform lambda, as in function
            matching (Beyer et al., 2022).

    Raises:
        UsageError: another spec.
    """
    if spec == NONE:
        return None
    if spec == "uniform":
        return Mix(alpha=1.0, cut=False)
    name, alpha = split_spec(spec)
    try:
        if name not in ("mixup", "cutmix"):
            raise ValueError("an alpha")
        return Mix(alpha=number(alpha, float, 0, above=True), cut=name == "cutmix")
    except ValueError as problem:
        raise UsageError(f"--mix is {spec!r}", "none, uniform, mixup:ALPHA or cutmix:ALPHA, as mixup:0.8") from problem
