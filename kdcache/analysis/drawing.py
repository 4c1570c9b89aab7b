"""Figures as small PNGs in one palette. matplotlib is imported with the first figure, not with this module."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# 4 inches are a phone's width, so that text set in 9 points is read at about that size.
WIDTH_INCHES, DPI = 4.0, 150
# Lines, letters and one colour scale need no more, and an indexed palette halves the file.
COLOURS = 96


# One palette on white paper, which a page shows as a white card in its dark scheme too.
PAPER, INK, MUTED, RULE = "#ffffff", "#1c2127", "#59636e", "#d5dbe1"
# Runs in their order; the colours differ in lightness too, for print and for the colour-blind.
SERIES = ("#0b62c4", "#d1660a", "#14804a", "#7d3cc9", "#c2185b", "#7a6400", "#00808a", "#5a5a5a")
CORRECT, WRONG = SERIES[:2]
DASHES, MARKERS = ("-", "--", "-.", ":"), ("o", "s", "^", "D", "v", "P")

_STYLE: Any = {
    "font.size": 9,
    "font.family": "sans-serif",
    "text.parse_math": False,  # a class or a run may be named $100
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.7,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.edgecolor": MUTED,
    "grid.color": RULE,
}


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One figure as a PNG.

    Attributes:
        name: File name without its suffix.
        alt: Alternative text, for readers who cannot see the picture.
        png: Contents of the PNG file.
        width: Width in pixels.
        height: Height in pixels.
    """

    name: str
    alt: str
    png: bytes
    width: int
    height: int

    @property
    def uri(self) -> str:
        return data_uri(self.png)


def shorten(text: str, length: int) -> str:
    """Shorten a name to at most `length` letters by leaving out its middle: names often share a prefix or a suffix."""
    if len(text) <= length:
        return text
    return f"{text[: length // 2]}…{text[len(text) - (length - 1 - length // 2) :]}"


def data_uri(png: bytes) -> str:
    """Data URI of a PNG, for a page without external files."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def draw(name: str, alt: str, height_inches: float, paint: Callable[[Any], None]) -> Picture:
    """Render the figure that `paint(figure)` draws."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, height_inches), dpi=DPI, layout="constrained")
        paint(figure)
        png, (width, height) = _small_png(figure)
    return Picture(name=name, alt=alt, png=png, width=width, height=height)


def _small_png(figure: Any) -> tuple[bytes, tuple[int, int]]:
    from PIL import Image

    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    image = Image.open(drawn).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    image.save(small, format="png", optimize=True)
    return small.getvalue(), image.size
