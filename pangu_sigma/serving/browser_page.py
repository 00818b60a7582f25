"""Browser page to try the model: one HTML file, with a content security policy that confines it to this server."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from importlib import resources

_INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


@dataclass(frozen=True)
class BrowserPage:
    """HTML of the page and the headers it is sent with."""

    html: str
    headers: dict[str, str]


def load_page() -> BrowserPage:
    """Read the page from the package; its policy names the hash of every script and style in it."""
    html = resources.files("pangu_sigma.serving").joinpath("page", "index.html").read_text(encoding="utf-8")
    hashes: dict[str, list[str]] = {"script": [], "style": []}
    for kind, text in _INLINE.findall(html):
        digest = base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
        hashes[kind].append(f"'sha256-{digest}'")
    policy = "; ".join(
        [
            "default-src 'none'",
            f"script-src {' '.join(hashes['script'])}",
            f"style-src {' '.join(hashes['style'])}",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    )
    return BrowserPage(html, {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"})
