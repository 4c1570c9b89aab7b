"""Pictures in two colour schemes, as small PNGs. matplotlib comes in with the first figure, not with this module."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# 4 inches are a phone's width: what is set in 9 points is then read at about that size.
WIDTH_INCHES, DPI = 4.0, 150
# Lines, letters and one scale of colours need no more, and a palette halves the file.
COLOURS = 96


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """Colours of one scheme; the page has the same ones in its style sheet.

    Attributes:
        series: of runs, in their order; they differ in lightness too, for print and for the colour-blind.
        right: of right answers.
        wrong: of wrong ones.
    """

    name: str
    paper: str
    ink: str
    muted: str
    rule: str
    series: tuple[str, ...]
    right: str
    wrong: str


LIGHT = Scheme(
    name="light",
    paper="#ffffff",
    ink="#1c2127",
    muted="#59636e",
    rule="#d5dbe1",
    series=("#0b62c4", "#d1660a", "#14804a", "#7d3cc9", "#c2185b", "#7a6400", "#00808a", "#5a5a5a"),
    right="#0b62c4",
    wrong="#d1660a",
)
DARK = Scheme(
    name="dark",
    paper="#171b21",
    ink="#e8ebee",
    muted="#a2abb5",
    rule="#3a424c",
    series=("#6cb1ff", "#ffa257", "#56d08c", "#c4a3ff", "#ff85b3", "#e0c34f", "#4fd6df", "#b9b9b9"),
    right="#4a97ee",
    wrong="#f08a35",
)
DASHES, MARKERS = ("-", "--", "-.", ":"), ("o", "s", "^", "D", "v", "P")


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture in both schemes.

    Attributes:
        name: of its files, without an ending.
        alt: what it shows, for those who cannot see it.
        png: PNG files by the name of the scheme.
        width: in pixels of the file.
        height: likewise.
    """

    name: str
    alt: str
    png: dict[str, bytes]
    width: int
    height: int

    @property
    def light(self) -> str:
        return data_uri(self.png[LIGHT.name])

    @property
    def dark(self) -> str:
        return data_uri(self.png[DARK.name])


def shorten(text: str, length: int) -> str:
    """A name in at most `length` letters, without its middle: names are often alike in front or at the end."""
    if len(text) <= length:
        return text
    return f"{text[: length // 2]}…{text[len(text) - (length - 1 - length // 2) :]}"


def data_uri(png: bytes) -> str:
    """A PNG as part of a page, which then asks nobody for it."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def draw(name: str, alt: str, height_inches: float, paint: Callable[[Any, Scheme], None]) -> Picture:
    """Let `paint(figure, scheme)` draw one picture for each scheme."""
    import matplotlib
    from matplotlib.figure import Figure

    png: dict[str, bytes] = {}
    size = (0, 0)
    for scheme in (LIGHT, DARK):
        with matplotlib.rc_context(_style(scheme)):
            figure = Figure(figsize=(WIDTH_INCHES, height_inches), dpi=DPI, layout="constrained")
            paint(figure, scheme)
            png[scheme.name], size = _small_png(figure)
    return Picture(name=name, alt=alt, png=png, width=size[0], height=size[1])


def _small_png(figure: Any) -> tuple[bytes, tuple[int, int]]:
    from PIL import Image

    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    image = Image.open(drawn).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    image.save(small, format="png", optimize=True)
    return small.getvalue(), image.size


def _style(scheme: Scheme) -> Any:
    return {
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
        "figure.facecolor": scheme.paper,
        "savefig.facecolor": scheme.paper,
        "axes.facecolor": scheme.paper,
        "text.color": scheme.ink,
        "axes.labelcolor": scheme.ink,
        "axes.titlecolor": scheme.ink,
        "xtick.color": scheme.muted,
        "ytick.color": scheme.muted,
        "axes.edgecolor": scheme.muted,
        "grid.color": scheme.rule,
    }
