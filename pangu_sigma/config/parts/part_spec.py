"""Part spec: what counting, planning, decoding and exporting ask of a part of the backbone, whatever its kind.

Whoever treats parts differently asks their spec; no file but the specs' compares a part's name.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypeVar


@dataclass(frozen=True)
class PartSpec:
    """One choice of a key of `model`, by its `name` there.

    `cell`: the class of `pangu_sigma.model.layers` that computes it, `module:Class`; None where the choice is an option
    of another cell. `exports`: exported networks that know it. `in_fused_decode`: whether the fused decode step does.
    """

    name: str
    cell: str | None = None
    exports: tuple[str, ...] = ()
    in_fused_decode: bool = False

    def build(self, *arguments: Any) -> Any:
        """A cell of its class."""
        module, _, name = self.cell.partition(":")
        return getattr(import_module(f"pangu_sigma.model.layers.{module}"), name)(*arguments)


Spec = TypeVar("Spec", bound=PartSpec)


def by_name(*specs: Spec) -> dict[str, Spec]:
    """Specs of one kind of part by their names, the default first."""
    return {spec.name: spec for spec in specs}


def names_with(specs: dict[str, Spec], has: str) -> str:
    """Names of the specs that have a property, for sentences."""
    return " or ".join(name for name, spec in specs.items() if getattr(spec, has))
