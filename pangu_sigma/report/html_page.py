"""The frame of a self-contained HTML page: header, links to its sections, sections, style sheet."""

from collections.abc import Iterable

from pangu_sigma.report.html_tables import cell
from pangu_sigma.report.style_sheet import STYLE


def html_page(
    title: str, kind: str, header: str, sections: Iterable[tuple[str, str, str]], footer: str = ""
) -> str:
    """The page `title` of this `kind`; sections: (anchor, title, HTML). `title` is escaped, all else is HTML."""
    sections = list(sections)
    links = "".join(f'<a href="#{key}">{name}</a>' for key, name, _ in sections)
    body = "".join(f'<section id="{key}"><h2>{name}</h2>{content}</section>' for key, name, content in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{cell(title)} – {kind}</title><style>{STYLE}</style></head>\n"
        f"<body><main><header><h1>{cell(title)}</h1>{header}<nav>{links}</nav></header>\n{body}{footer}</main></body></html>\n"
    )
