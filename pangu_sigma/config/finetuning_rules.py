"""Rules between the `adapt` section and the others."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pangu_sigma.config.schema import Config


def broken_adaptation_rules(config: Config) -> Iterator[tuple[str, str]]:
    """(key, sentence) of what is wrong with an adaptation; nothing for a run that trains on its domains' text."""
    if config.adapt is None:
        return
    yield from _examples(config)
    if config.run.init_from is None:
        yield (
            "run.init_from",
            "run.init_from is null, but adapt changes a trained model: run it with pangu-sigma "
            f"{config.adapt.objective} MODEL FILE.yaml",
        )
    if config.adapt.heldout_fraction == 0 and config.evaluate.every:
        yield (
            "evaluate.every",
            f"evaluate.every = {config.evaluate.every} needs held-out examples, but adapt.heldout_fraction is 0: "
            "set evaluate.every to 0 or hold some examples out",
        )
    if config.data.stream is not None:
        yield "data.stream", "data.stream has no use where adapt names the examples: set it to null"
    drawn = {examples.name for examples in config.adapt.examples if examples.weight}
    for index, phase in enumerate(config.train.phases):
        key = f"train.phases.{index}"
        for name, weight in (phase.weights or {}).items():
            if weight and name not in drawn:
                yield f"{key}.weights.{name}", f"{key}.weights draws {name}, which adapt.examples has no examples of"
        if phase.shared == "regularised" or phase.replay:
            yield (
                key,
                f"{key} is held near the previous model or replays text, which adapt does not do: leave shared "
                "regularised and replay out",
            )


def _examples(config: Config) -> Iterator[tuple[str, str]]:
    seen: set[str] = set()
    for index, examples in enumerate(config.adapt.examples):
        key = f"adapt.examples.{index}.name"
        if examples.name not in config.domain_names:
            yield key, f"{key} = {examples.name} is no domain of the model: it has {', '.join(config.domain_names)}"
        if examples.name in seen:
            yield key, f"{key} = {examples.name} is named twice: list all its files in one item"
        seen.add(examples.name)
    if not 0 < sum(examples.weight for examples in config.adapt.examples) < math.inf:
        yield (
            "adapt.examples",
            "the weights of adapt.examples do not add up to a positive number: give at least one a positive weight",
        )
