"""What every section of the configuration has in common: strict types, no unknown keys, never changed after loading.

What `--resume` and `run.init_from` may do with a key stands at its field, or at its section for all of its keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Self, TypeVar

import pydantic
from pydantic import BaseModel, ConfigDict, Strict, field_validator
from pydantic_core import PydanticCustomError

Item = TypeVar("Item")
# Largest numbers of a configuration: arithmetic on sizes that anything could have stays finite below them.
LARGEST_INTEGER, LARGEST_FLOAT = 2**63 - 1, 1e36
TOO_LARGE = "too_large"  # pydantic's type of the error of one that is larger
# Broken rules, each a sentence that begins with the key that it belongs to: what is wrong and what to do.
Violations = Iterator[str]

# YAML knows lists only; they are stored as tuples, because a frozen section must not hold anything that can be changed.
ListOf = Annotated[tuple[Item, ...], Strict(False)]

# What `--resume` may do with a key.
RESUME = MappingProxyType(
    {
        "free": "it may change, and no result depends on it",
        "rounding": "it may change, and the run says that it is no longer bit-equal to the run without a break",
        "schedule": "it may change, and the run says the same if steps already done had other learning rates",
        "ahead": "it may change for steps that are not done yet: phases are added, changed, made longer",
        "fixed": "it keeps its value: another one is refused by its name",
    }
)
# What a new run may do with a key whose `run.init_from` names a model.
INIT_FROM = MappingProxyType(
    {
        "free": "it is the new run's own",
        "equal": "it says what the model's tensors are: another value is refused by its name",
        "equal if written": "so too, and null takes the model's value",
        "taken over": "the model's value takes its place",
    }
)


def at_most(key: str, value: float | None, what: str, limit: float) -> Violations:
    """The sentence of a value that is more than `limit`, which is `what`; none for null."""
    if value is not None and value > limit:
        yield f"{key} = {value} is more than {what}: set it to at most {limit}"


def positive_sum(subject: str, weights: Iterable[float]) -> Violations:
    """The sentence of weights, each 0 or more, by which nothing can be drawn; `subject`: how it begins."""
    if not 0 < sum(weights) < math.inf:
        yield f"{subject} do not add up to a positive number: give at least one domain a positive weight"


def divides(key: str, value: int, what: str, number: int) -> Violations:
    """The sentence of a value that does not divide a `number`, which is `what`."""
    if number % value:
        yield f"{key} = {value} does not divide {what}: choose a divisor of {number}, or change that"


def Field(
    *args: Any, resume: str | None = None, init_from: str | None = None, fill: Callable[[Any], Any] | None = None,
    is_path: bool = False, no_path: str | None = None, **options: Any,
) -> Any:  # fmt: skip
    """pydantic's `Field` with the key of RESUME and of INIT_FROM that holds for it; None: its section's.

    fill: what the key's null stands for, made of the configuration as it is written (nulls of other keys included).
    is_path: the key's texts are paths, but for the text `no_path`.
    """
    extra = {"resume": resume, "init_from": init_from, "fill": fill, "is_path": is_path, "no_path": no_path}
    return pydantic.Field(*args, **options, json_schema_extra=extra)


class Section(BaseModel):
    """One section of the configuration: frozen, strict (but a whole number is fine for a float), no extra keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True, protected_namespaces=(),
        use_attribute_docstrings=True,
    )
    decisions: ClassVar[dict[str, str | None]] = {}

    @field_validator("*")
    @classmethod
    def _check_numbers(cls, value: Any) -> Any:
        for number in value.values() if isinstance(value, dict) else (value,):
            largest = LARGEST_FLOAT if isinstance(number, float) else LARGEST_INTEGER
            if isinstance(number, int | float) and abs(number) > largest:
                raise PydanticCustomError(TOO_LARGE, f"a number of at most {largest}")
        return value

    def __init_subclass__(cls, resume: str | None = None, init_from: str | None = None, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.decisions = {"resume": resume, "init_from": init_from}

    @classmethod
    def decisions_of(cls, name: str) -> tuple[str, str]:
        """The key of RESUME and that of INIT_FROM for the section's key `name`: its field's own, or the section's."""
        own = cls.model_fields[name].json_schema_extra or {}
        return tuple(own.get(kind) or decision for kind, decision in cls.decisions.items())

    @classmethod
    def has_fill(cls, name: str) -> bool:
        """Whether a null of the key follows from other keys."""
        return (cls.model_fields[name].json_schema_extra or {}).get("fill") is not None

    def filled(self, written: Any) -> Self:
        """The section with what its nulls stand for in the configuration `written`, as `fill` of their fields says."""
        changes = {}
        for name, field in type(self).model_fields.items():
            value, fill = getattr(self, name), (field.json_schema_extra or {}).get("fill")
            if value is None and fill is not None:
                changes[name] = fill(written)
            elif isinstance(value, Section) and (inner := value.filled(written)) is not value:
                changes[name] = inner
        return self.model_copy(update=changes) if changes else self
