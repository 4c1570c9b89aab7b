"""Two samples in one input. Partner, share and box follow from a key of (view, sample), not from a place in a batch."""

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
from kdcache.store.manifest import NONE

# Shares are whole parts of this, so that a blend of bytes is exact arithmetic, the same in every process.
WHOLE = 1 << 16


class Draw(NamedTuple):
    """What was drawn for one (view, sample).

    Attributes:
        partner: index of the other sample.
        share: of the sample itself, in parts of `WHOLE`.
        centre: of the box, (row, column), each from 0 to 1; of cutmix.
    """

    partner: int
    share: int
    centre: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Mix:
    """One way to mix.

    Attributes:
        alpha: both parameters of the Beta distribution that shares are drawn from; 1 is uniform.
        cut: paste a box of the partner (CutMix, Yun et al., 2019) instead of blending (mixup, Zhang et al., 2018).
    """

    alpha: float
    cut: bool

    def __str__(self) -> str:
        alpha = np.format_float_positional(self.alpha, trim="-")
        return f"{'cutmix' if self.cut else 'mixup'}:{alpha}"

    def draw(self, key: int, sample: int, samples: int) -> Draw:
        """Draw a partner among the other samples (itself where there is none), and how to mix with it."""
        # Python's generator: of all at hand it is the cheapest to seed.
        generator = random.Random(key)
        drawn = generator.randrange(max(samples - 1, 1))
        partner = min(drawn + (drawn >= sample), samples - 1)
        share = round(generator.betavariate(self.alpha, self.alpha) * WHOLE)
        return Draw(partner, share, (generator.random(), generator.random()))

    def apply(self, image: Tensor, other: Tensor, draw: Draw) -> tuple[Tensor, float]:
        """Mix two uint8 images (C, H, W) of one shape; also the part of the result, 0 to 1, that is the first's."""
        return (_paste if self.cut else _blend)(image, other, draw)


def _blend(image: Tensor, other: Tensor, draw: Draw) -> tuple[Tensor, float]:
    blended = image.to(torch.int32).mul_(draw.share).add_(other.to(torch.int32).mul_(WHOLE - draw.share))
    return blended.add_(WHOLE // 2).bitwise_right_shift_(16).to(torch.uint8), draw.share / WHOLE


def _paste(image: Tensor, other: Tensor, draw: Draw) -> tuple[Tensor, float]:
    height, width = image.shape[-2:]
    side = math.sqrt(1 - draw.share / WHOLE)
    (top, bottom), (left, right) = (
        _edges(centre, side, length) for centre, length in zip(draw.centre, (height, width), strict=True)
    )
    mixed = image.clone()
    mixed[..., top:bottom, left:right] = other[..., top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)


def _edges(centre: float, side: float, length: int) -> tuple[int, int]:
    """First and past-last pixel of a box, cut off at the edges of the image as the paper does."""
    middle, half = int(centre * length), int(side * length) // 2
    return max(middle - half, 0), min(middle + half, length)


def parse_mix(spec: str) -> Mix | None:
    """The way that a spec means; None for `none`.

    Args:
        spec: `none`, `mixup:ALPHA`, `cutmix:ALPHA`, or `uniform`: a blend in equally likely shares, as in function
            matching (Beyer et al., 2022).

    Raises:
        UsageError: none of these.
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
