"""A page of text, pictures and tables: what it is made of, and how it becomes one HTML file that needs no other."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files


@dataclass(frozen=True)
class Card:
    """One number to see first.

    Attributes:
        value: the number with its unit.
        caption: what it is.
    """

    value: str
    caption: str


@dataclass(frozen=True)
class Figure:
    """A picture and the sentence that says what it means.

    Attributes:
        svg: an `<svg>` element.
        caption: plain text.
    """

    svg: str
    caption: str


@dataclass(frozen=True)
class Table:
    """Rows of text; the first cell of each row is its heading, and one with no other cell is the heading of a group.

    Attributes:
        caption: plain text.
        columns: headings.
        rows: cells.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Tile:
    """A small image of a gallery.

    Attributes:
        image: a data address.
        caption: plain text below it.
    """

    image: str
    caption: str


@dataclass(frozen=True)
class Strip:
    """A row of a gallery: one image, and those that belong to it.

    Attributes:
        subject: the image that the row is about.
        good: whether the caption of the subject is good news.
        tiles: the others.
    """

    subject: Tile
    good: bool
    tiles: tuple[Tile, ...]


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        title: plain text.
        paragraphs: plain text, before the pictures.
        figures: side by side where there is room.
        tables: below the pictures.
        gallery: below the tables.
        notes: small print, plain text.
    """

    title: str
    paragraphs: tuple[str, ...]
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    gallery: tuple[Strip, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Page:
    """The whole page.

    Attributes:
        title: plain text.
        lead: one paragraph below the title.
        cards: the numbers to see first.
        findings: sentences, the result in short.
        sections: the rest.
        footer: plain text.
    """

    title: str
    lead: str
    cards: tuple[Card, ...]
    findings: tuple[str, ...]
    sections: tuple[Section, ...]
    footer: str


def render(page: Page) -> str:
    """The page as HTML. All text is escaped; only the pictures are markup."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = files("ntkit.report").joinpath("templates/page.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source).render(page=page)
