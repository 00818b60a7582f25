"""What every section of the configuration has in common: strict types, no unknown keys, never changed after loading."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Strict

Item = TypeVar("Item")
# Broken rules, each as the key path that it belongs to and a sentence: what is wrong and what to do.
Violations = Iterator[tuple[str, str]]

# YAML knows lists only; they are stored as tuples, because a frozen section must not hold anything that can be changed.
ListOf = Annotated[tuple[Item, ...], Strict(False)]


class Section(BaseModel):
    """One section of the configuration: frozen, strict (but a whole number is fine for a float), no extra keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True, protected_namespaces=()
    )
