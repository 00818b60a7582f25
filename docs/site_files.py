"""MkDocs hook: what the site's pages need from outside docs/.

The README becomes the first page. CONTRIBUTING, CHANGELOG and the benchmarks' results are pages too, and every other
file that a page links to is copied, so that links are those of the repository. A page that would load a script, a style
or a picture from another address ends the build.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, InclusionLevel

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")
LOADED = re.compile(
    r"<(?:script|img|iframe)\b[^>]*\ssrc=\"?(?:https?:)?//|<link\b(?=[^>]*stylesheet)[^>]*\shref=\"?(?:https?:)?//"
)


def on_files(files, config):
    """Add the pages from outside docs/, and the files that any page links to."""
    pages = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    pages += sorted((ROOT / "benchmarks/results").glob("*.md"))
    texts = [*pages, *DOCS.glob("*.md")]
    targets = {_target(page, link) for page in texts for link in LINK.findall(page.read_text(encoding="utf-8"))}
    outside = {
        path for path in targets if path.is_file() and path.is_relative_to(ROOT) and not path.is_relative_to(DOCS)
    }
    for path in sorted({*pages, *outside}):
        file = File.generated(config, _site_uri(path), abs_src_path=str(path), inclusion=InclusionLevel.INCLUDED)
        files.append(file)
    return files


def on_page_markdown(markdown, page, config, files):
    """Turn links between files of the repository into links between files of the site."""
    source = Path(page.file.abs_src_path)

    def moved(match: re.Match) -> str:
        target = _target(source, match[1])
        return os.path.relpath(_site_uri(target), os.path.dirname(page.file.src_uri)) if target.exists() else match[1]

    return LINK.sub(moved, markdown)


def on_post_page(output, page, config):
    """Refuse a page that loads anything from another address."""
    loaded = LOADED.search(output)
    if loaded is not None:
        raise PluginError(f"{page.file.src_uri} loads something from another address: {loaded[0]}")
    return output


def _target(page: Path, link: str) -> Path:
    """The file of the repository that a page's link means."""
    return Path(os.path.normpath(page.parent / link))


def _site_uri(path: Path) -> str:
    """A file's place in the site: docs/ is its root, everything else keeps its path."""
    return path.relative_to(DOCS if path.is_relative_to(DOCS) else ROOT).as_posix()
