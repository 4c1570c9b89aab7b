"""The page: what stands on it, as plain values, and the template that shows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kdcache.analysis.drawing import DARK, LIGHT, Picture, data_uri

UNKNOWN = "–"


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of ready text; the first cell of each is its heading.

    Attributes:
        caption: how it is to be read.
        words: positions of the columns that hold words; the others hold numbers, which stand to the right.
        folded: what it is called while it is folded away; empty for one that is open.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str
    words: Sequence[int] = (0,)
    folded: str = ""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Pictures that are read in one way, and how."""

    pictures: Sequence[Picture]
    caption: str


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One class of one sample: its probabilities, 0 to 1, by the student and by the teacher."""

    label: str
    student: float
    teacher: float | None
    is_true: bool


@dataclass(frozen=True, kw_only=True)
class Card:
    """One sample with what was said of it.

    Attributes:
        png: the image; None where it is none.
        text: an excerpt; None where it is no text.
        score: what the cards are ordered by, ready to show.
    """

    index: int
    true: str
    png: bytes | None
    text: str | None
    answers: Sequence[Answer]
    score: str

    @property
    def image(self) -> str | None:
        return None if self.png is None else data_uri(self.png)


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page under a heading of its own."""

    anchor: str
    title: str
    lead: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    cards: Sequence[Card] = ()


@dataclass(frozen=True, kw_only=True)
class Page:
    """Everything that a report shows.

    Attributes:
        missing: what is not there and why, a sentence each.
        footer: when and by what it was made.
    """

    title: str
    subtitle: str
    sections: Sequence[Section]
    missing: Sequence[str]
    footer: str

    @property
    def files(self) -> dict[str, bytes]:
        """Its pictures as files: name → PNG."""
        files: dict[str, bytes] = {}
        for section in self.sections:
            for picture in (each for figure in section.figures for each in figure.pictures):
                files[f"{picture.name}.png"] = picture.png[LIGHT.name]
                files[f"{picture.name}-dark.png"] = picture.png[DARK.name]
            files |= {f"sample-{at:03}.png": card.png for at, card in enumerate(section.cards, 1) if card.png}
        return files


def render(page: Page) -> str:
    """The page as one HTML file that asks for no other."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = percent
    return environment.get_template("template.html").render(page=page, light=LIGHT, dark=DARK)


def percent(share: float | None, digits: int = 1) -> str:
    """A share as text; a dash where there is none."""
    return UNKNOWN if share is None else f"{share:.{digits}%}"
