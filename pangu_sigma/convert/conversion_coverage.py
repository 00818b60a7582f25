"""The proof that a conversion is whole: every tensor of the new model has one origin, every tensor of the old a use."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from pangu_sigma.errors import UserError
from pangu_sigma.wording import listed

Shape = tuple[int, ...]


@dataclass(frozen=True)
class SkippedTensors:
    """Tensors of a source that are no parameters: `rules` maps a rule's name to (pattern of names, what they are)."""

    rules: Mapping[str, tuple[str, str]]

    def rule(self, name: str) -> str | None:
        """The rule by which a tensor is left behind; None for a tensor that must be used."""
        return next((rule for rule, (pattern, _) in self.rules.items() if re.fullmatch(pattern, name)), None)

    def lines(self, counts: Mapping[str, int]) -> list[str]:
        """A sentence for every rule by which so many tensors were left behind."""
        return [f"left behind {count} tensors: {rule} ({self.rules[rule][1]})" for rule, count in counts.items()]


def check_coverage(
    origin: str,
    targets: Mapping[str, Shape],
    assigned: Sequence[tuple[str, str, Shape]],
    sources: Collection[str],
) -> None:
    """Raises UserError, with the list of tensors, unless the conversion is whole.

    targets: the new model's tensors with their shapes. assigned: (target, source, the shape that it gives). sources:
    the old model's tensors, which `origin` names. Every target must be assigned once and in its shape, every source
    used.
    """
    origins: dict[str, list[str]] = {}
    for target, source, _ in assigned:
        origins.setdefault(target, []).append(source)
    problems = {
        "gives a tensor twice": {f"{t} (from {' and '.join(o)})" for t, o in origins.items() if len(o) > 1},
        "lacks what these tensors need": targets.keys() - origins.keys(),
        "has tensors that the model does not": {
            *(f"{source} (as {target})" for target, source, _ in assigned if target not in targets),
            *(set(sources) - {source for _, source, _ in assigned}),
        },
        "has tensors of another shape": {
            f"{source} {list(shape)} where {list(targets[target])} is needed"
            for target, source, shape in assigned
            if target in targets and tuple(shape) != tuple(targets[target])
        },
    }
    sentences = [f"{what}: {listed(names)}" for what, names in problems.items() if names]
    if sentences:
        raise UserError(f"{origin} cannot become this model: it {'; it '.join(sentences)}")
