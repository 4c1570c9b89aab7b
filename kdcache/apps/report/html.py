"""Contents of the page as plain values, and their rendering with the template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kdcache.analysis.drawing import Picture, data_uri

UNKNOWN = "–"


@dataclass(frozen=True, kw_only=True)
class Table:
    """Table of formatted text; the first cell of each row is its heading.

    Attributes:
        header: Names of the columns.
        rows: Cells of each row.
        caption: Reading aid below the table.
        words: Indices of the text columns; the other columns hold numbers and are aligned to the right.
        folded: Title of a table that is collapsed at first; empty for one that is always shown.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str
    words: Sequence[int] = (0,)
    folded: str = ""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Pictures with a common caption."""

    pictures: Sequence[Picture]
    caption: str


@dataclass(frozen=True, kw_only=True)
class ClassProbability:
    """Probability of one class for one sample, 0 to 1, by the student and by the teacher."""

    label: str
    student: float
    teacher: float | None
    is_true: bool


@dataclass(frozen=True, kw_only=True)
class Card:
    """One sample with the probabilities of its most important classes.

    Attributes:
        index: Sample index.
        true: Name of the true class.
        png: Image; None for a sample that is no image.
        text: Excerpt; None for a sample that is no text.
        probabilities: True class and top classes.
        score: Value by which cards are sorted, as text.
    """

    index: int
    true: str
    png: bytes | None
    text: str | None
    probabilities: Sequence[ClassProbability]
    score: str

    @property
    def image(self) -> str | None:
        return None if self.png is None else data_uri(self.png)


@dataclass(frozen=True, kw_only=True)
class Section:
    """Part of the page under its own heading."""

    anchor: str
    title: str
    lead: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    cards: Sequence[Card] = ()


@dataclass(frozen=True, kw_only=True)
class Page:
    """Contents of a report.

    Attributes:
        missing: Sentences on what could not be shown, and why.
        footer: Time and version of kdcache.
    """

    title: str
    subtitle: str
    sections: Sequence[Section]
    missing: Sequence[str]
    footer: str

    @property
    def files(self) -> dict[str, bytes]:
        """Contents of the PNG files of all pictures, by file name."""
        files: dict[str, bytes] = {}
        for section in self.sections:
            for picture in (each for figure in section.figures for each in figure.pictures):
                files[f"{picture.name}.png"] = picture.png
            files |= {f"sample-{at:03}.png": card.png for at, card in enumerate(section.cards, 1) if card.png}
        return files


def render(page: Page) -> str:
    """Render the page as one HTML file without external resources."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = percent
    return environment.get_template("template.html").render(page=page)


def percent(share: float | None, digits: int = 1) -> str:
    """Format a fraction as a percentage; a dash for None."""
    return UNKNOWN if share is None else f"{share:.{digits}%}"
