"""Self-contained HTML pages from Jinja2 templates: all text is escaped, nothing is fetched from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from markupsafe import Markup, escape

from pangu_sigma.monitor.printable_text import compact, duration, printable, printable_lines
from pangu_sigma.monitor.text_tables import number, perplexity


def render_page(template: str, *, title: str, sections: Iterable[tuple[str, str, Any]], **values: Any) -> str:
    """The page of a `template` (a file of this package by its path) that extends `report/page.html`.

    sections: (anchor, title, what the template's block `section` shows as `data`). values: what else it knows.
    Whatever a template inserts is escaped and without control characters.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("pangu_sigma", ""), autoescape=True, undefined=StrictUndefined, finalize=_harmless,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "number": number,
        "perplexity": perplexity,
        "compact": lambda value: compact(value) if isinstance(value, int | float) else "–",
        "bytes": lambda value: f"{compact(value)}B" if isinstance(value, int | float) else "–",
        "duration": lambda value: duration(value) if isinstance(value, int | float) else "–",
        "lines": lambda text: Markup(escape(printable_lines(text))),
    }
    return environment.get_template(template).render(title=title, sections=list(sections), **values)


def _harmless(value: object) -> object:
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value
