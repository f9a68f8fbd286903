"""The page: blocks of text, tables and figures, rendered to one HTML file that needs nothing else.

All text is escaped by the template; figures are the only markup that is passed through, and they are built here.
"""

from __future__ import annotations

import io
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from headwater.report import theme
from headwater.report.layout import NARROW, WIDE

_MARGIN = 16  # pixels round a figure in a file of its own; in the page, the page's own margin does

_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_HEX = re.compile(r"#[0-9a-f]{6}\b")
_LONG_DECIMAL = re.compile(r"-?\d+\.\d{3,}")
_FONT_FAMILY = re.compile(r"(font(?:-family)?: [^;']*)'[^;]*")  # matplotlib writes either, by its version


@dataclass(frozen=True)
class FigureBlock:
    """A figure, drawn once wide and once narrow.

    Args:
        name: file name without ending, unique in the page.
        caption: what is to be seen, and how it was made.
        alt: the same for those who cannot see it, in one sentence.
        draw: from a width in pixels to the figure.
    """

    name: str
    caption: str
    alt: str
    draw: Callable[[float], Figure]
    kind: str = "figure"


@dataclass(frozen=True)
class Cell:
    """One cell of a table; `small` is a second, quieter line, `dot` the name of a colour, `sort` the number that the
    cell counts as in a sortable table."""

    text: str
    small: str = ""
    dot: str = ""
    sort: float | None = None


@dataclass(frozen=True)
class Table:
    """A table whose first column names the row; on a phone every row becomes a card. `totals` rows at the end are set
    apart; `sortable` lets the reader sort by any column; `left` aligns texts at the left."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    totals: int = 0
    sortable: bool = False
    left: bool = False
    kind: str = "table"


@dataclass(frozen=True)
class Facts:
    """Pairs of a name and a value."""

    pairs: Sequence[tuple[str, str]]
    kind: str = "facts"


@dataclass(frozen=True)
class Text:
    text: str
    kind: str = "text"


@dataclass(frozen=True)
class Note:
    """Something the reader should know before trusting what is shown, or why there is nothing."""

    text: str
    kind: str = "note"


@dataclass(frozen=True)
class Code:
    """A file's text, folded away behind `title`."""

    title: str
    text: str
    kind: str = "code"


Block = FigureBlock | Table | Facts | Text | Note | Code


@dataclass(frozen=True)
class Section:
    anchor: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A whole report. `tiles` are the few numbers that come first: (name, value, quieter line)."""

    kicker: str
    title: str
    lead: str
    tiles: Sequence[tuple[str, str, str]]
    sections: Sequence[Section]
    footer: str = ""


@dataclass(frozen=True)
class DrawnFigure:
    """A figure's two inline drawings, and its files by ending."""

    wide: Markup
    narrow: Markup
    files: dict[str, bytes] = field(default_factory=dict)


def _padded(figure: Figure) -> Bbox:
    """The figure with a margin of `_MARGIN` pixels, in inches."""
    return figure.bbox_inches.padded(_MARGIN / 72)


def svg_bytes(figure: Figure) -> bytes:
    """The figure as an SVG file that is the same for the same figure."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the reader's own font draws the text
        figure.savefig(
            buffer,
            format="svg",
            bbox_inches=_padded(figure),
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    return _NOT_XML.sub("", buffer.getvalue().decode("utf-8")).encode("utf-8")


def png_bytes(figure: Figure) -> bytes:
    """The figure as a PNG file of two dots a pixel."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(buffer, format="png", bbox_inches=_padded(figure), dpi=144, metadata={"Software": None})
    return buffer.getvalue()


def inline_svg(svg: bytes, name: str, alt: str, css_class: str) -> Markup:
    """An SVG file made ready for the page: colours become the page's variables, text takes the page's font, every id
    gets `name` in front so that several drawings can share a page; the margin and decimals beyond a hundredth go."""
    root = ET.fromstring(svg)
    ids = {e.get("id"): f"{name}-{i}" for i, e in enumerate(root.iter()) if e.get("id")}
    used = {value[5:-1] for e in root.iter() for value in e.attrib.values() if value.startswith("url(#")}
    used |= {value[1:] for e in root.iter() if (value := e.get(f"{{{_XLINK}}}href", "")).startswith("#")}
    for parent in root.iter():
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(f"{{{_SVG}}}")
        attributes = dict(element.attrib)
        element.attrib.clear()
        for key, value in attributes.items():
            if key == "id":
                if value in used:
                    element.set("id", ids[value])
            elif key == f"{{{_XLINK}}}href":
                element.set("href", f"#{ids[value[1:]]}")
            elif value.startswith("url(#"):
                element.set(key, f"url(#{ids[value[5:-1]]})")
            elif key == "transform" and value.startswith(("rotate(-0 ", "rotate(0 ")):
                continue
            elif key == "style":
                value = _HEX.sub(lambda m: theme.VARIABLE_OF.get(m[0], m[0]), value)
                element.set(key, _FONT_FAMILY.sub(r"\1var(--sans)", value))
            else:
                element.set(key, _LONG_DECIMAL.sub(lambda m: f"{float(m[0]):.2f}", value))
    width, height = (f"{float(n) - 2 * _MARGIN:g}" for n in root.get("viewBox", "0 0 1 1").split()[2:])
    root.attrib.clear()
    for key, value in {
        "class": css_class,
        "viewBox": f"{_MARGIN} {_MARGIN} {width} {height}",
        "width": width,
        "height": height,
        "role": "img",
        "aria-label": alt,
    }.items():
        root.set(key, value)
    return Markup(ET.tostring(root, encoding="unicode", short_empty_elements=True))


def draw(block: FigureBlock) -> DrawnFigure:
    """Draws and saves a figure in both widths; its files are those of the wide drawing."""
    with theme.style():
        wide, narrow = block.draw(WIDE), block.draw(NARROW)
        svg = svg_bytes(wide)
        return DrawnFigure(
            wide=inline_svg(svg, f"{block.name}-w", block.alt, "wide"),
            narrow=inline_svg(svg_bytes(narrow), f"{block.name}-n", block.alt, "narrow"),
            files={"svg": svg, "png": png_bytes(wide)},
        )


def render(page: Page) -> tuple[str, dict[str, bytes]]:
    """The page's HTML, and the files of its figures by file name."""
    blocks = [b for section in page.sections for b in section.blocks if isinstance(b, FigureBlock)]
    drawn = {block.name: draw(block) for block in blocks}
    environment = Environment(
        loader=PackageLoader("headwater.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    sortable = any(isinstance(b, Table) and b.sortable for section in page.sections for b in section.blocks)
    script = environment.loader.get_source(environment, "sort.js")[0] if sortable else ""  # type: ignore[union-attr]
    css = environment.loader.get_source(environment, "report.css")[0]  # type: ignore[union-attr]
    colours = {name: theme.css_variables(dark) for name, dark in (("light", False), ("dark", True))}
    html = environment.get_template("report.html").render(
        page=page,
        drawn=drawn,
        css=Markup(css),
        script=Markup(script),
        light=Markup(colours["light"]),
        dark=Markup(colours["dark"]),
    )
    files = {f"{name}.{ending}": data for name, d in drawn.items() for ending, data in d.files.items()}
    return _NOT_XML.sub("", html), files
