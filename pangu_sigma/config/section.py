"""What every section of the configuration has in common: strict types, no unknown keys, never changed after loading.

What `--resume` and `run.init_from` may do with a key stands at its field, or at its section for all of its keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, TypeVar

import pydantic
from pydantic import BaseModel, ConfigDict, Strict

Item = TypeVar("Item")
# Broken rules, each as the key path that it belongs to and a sentence: what is wrong and what to do.
Violations = Iterator[tuple[str, str]]

# YAML knows lists only; they are stored as tuples, because a frozen section must not hold anything that can be changed.
ListOf = Annotated[tuple[Item, ...], Strict(False)]

# What `--resume` may do with a key -> how the reference says it.
RESUME = MappingProxyType(
    {
        "free": "may change: no result depends on it",
        "rounding": "may change: the run is then no longer bit-equal to one without a break, and says so",
        "schedule": "may change: the run says so if steps already done had other learning rates",
        "ahead": "may change, and grow, for steps that are not done yet",
        "fixed": "fixed",
    }
)
# What a run that begins with another model (`run.init_from`) may do with a key -> how the reference says it.
INIT_FROM = MappingProxyType(
    {
        "free": "free",
        "equal": "as in the model",
        "equal if written": "as in the model, or null",
        "taken over": "the model's stays",
    }
)


def Field(*args: Any, resume: str | None = None, init_from: str | None = None, **options: Any) -> Any:
    """pydantic's `Field` with the key of RESUME and of INIT_FROM that holds for it; None: its section's."""
    return pydantic.Field(*args, **options, json_schema_extra={"resume": resume, "init_from": init_from})


class Section(BaseModel):
    """One section of the configuration: frozen, strict (but a whole number is fine for a float), no extra keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True, protected_namespaces=()
    )
    decisions: ClassVar[dict[str, str | None]] = {}

    def __init_subclass__(cls, resume: str | None = None, init_from: str | None = None, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.decisions = {"resume": resume, "init_from": init_from}

    @classmethod
    def decisions_of(cls, name: str) -> tuple[str, str]:
        """The key of RESUME and that of INIT_FROM for the section's key `name`: its field's own, or the section's."""
        own = cls.model_fields[name].json_schema_extra or {}
        return tuple(own.get(kind) or decision for kind, decision in cls.decisions.items())
