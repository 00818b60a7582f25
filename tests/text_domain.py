"""A domain's configuration from its files, with the defaults of the schema."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pangu_sigma.config.data_section import DomainConfig


def text_domain(name: str, data: Sequence[str | Path], text_field: str = "text", **more: Any) -> DomainConfig:
    """The domain `name` of the files or globs `data`; `more` keys of it."""
    return DomainConfig(name=name, data=[str(entry) for entry in data], text_field=text_field, **more)
