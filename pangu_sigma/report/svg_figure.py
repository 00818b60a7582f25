"""Pictures drawn by matplotlib, as SVG inside a page: text stays text, and colours are variables of the style sheet, so
that one picture serves light and dark pages."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING

from markupsafe import Markup

from pangu_sigma.monitor.printable_text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FILES = resources.files("pangu_sigma.report")
_PALETTE = (_FILES / "palette.css").read_text(encoding="utf-8")
# Colours of the light page -> the variables that stand for them and for the dark page's.
_VARIABLES = {value: name for name, value in re.findall(r"--(\w+): (#\w{6});", _PALETTE.partition("@media")[0])}
# Settings of matplotlib that are colours of the style sheet.
_COLOURS = {
    "text.color": "ink", "axes.edgecolor": "rule", "grid.color": "grid", "xtick.color": "faint", "ytick.color": "faint",
}  # fmt: skip


def colour(name: str) -> str:
    """The colour `--name` of the light page, in whose place the picture has the variable."""
    return next(value for value, variable in _VARIABLES.items() if variable == name)


@dataclass(frozen=True)
class Picture:
    """A picture and the same as text: `header` and `rows` of the table that stands below it (none where it is told
    elsewhere)."""

    svg: Markup
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()


def draw_svg(
    label: str, width: float, height: float, draw: Callable[[Figure], None], *, css: str = "chart", alone: bool = False
) -> Markup:
    """What `draw` paints on a figure of width x height pixels, as an <svg> element with the text alternative `label`.

    alone: a whole SVG file, which brings its colours. Equal figures give equal bytes, whatever the user's matplotlibrc;
    matplotlib's settings are as before afterwards.
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    # Equal ids in two pictures of a page belong to equal clip paths and markers.
    settings = {"svg.hashsalt": f"{width} {label}", **{key: colour(name) for key, name in _COLOURS.items()}}
    with (
        resources.as_file(_FILES / "pictures.mplstyle") as sheet,
        style.context(["default", str(sheet), settings]),
        warnings.catch_warnings(),
    ):
        # A name's characters need not be in the font that measures it: the reader's fonts show them.
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        figure = Figure(figsize=(width / 72, height / 72))
        draw(figure)
        figure.savefig(buffer, format="svg")
    text = re.search(r"<svg[^>]*>(.*)</svg>", buffer.getvalue(), re.DOTALL)[1]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|\n\s*|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"<[^>]+>", lambda tag: _tidy(tag[0]), text)
    head = '<svg class="{}" viewBox="0 0 {:g} {:g}" width="{:g}" height="{:g}" role="img" aria-label="{}"'
    head = Markup(head).format(css, width, height, width, height, printable(label))
    if alone:
        return head + Markup(f' xmlns="http://www.w3.org/2000/svg"><style>{_PALETTE}</style>{text}</svg>\n')
    return head + Markup(f">{text}</svg>")


def pixel_axes(figure: Figure) -> Axes:
    """Axes over the whole figure whose units are its pixels, from the upper left corner; nothing is drawn of them."""
    axes = figure.add_axes((0, 0, 1, 1))
    width, height = figure.get_size_inches() * 72
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    return axes


def _tidy(tag: str) -> str:
    """A tag of matplotlib's SVG with the page's colours and font, hundredths of pixels, and no ids of groups."""
    tag = re.sub(r"#[0-9a-f]{6}", lambda match: f"var(--{_VARIABLES[match[0]]})", tag)
    tag = re.sub(r"-?\d+\.\d{3,}", lambda match: f"{float(match[0]):.2f}", tag)
    tag = re.sub(r"(font: [^;'\"]*px) [^;\"]*", r"\1 var(--font)", tag)
    return re.sub(r'^<g id="[^"]*"', "<g", tag).replace("xlink:href", "href")
