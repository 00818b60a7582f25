"""Sampling weights of a phase with its replay, and which of the domains are old to it."""

from __future__ import annotations

from pangu_sigma.config.schema import Config


def own_weights(config: Config, index: int) -> dict[str, float]:
    """Domain weights of phase `index` before replay: its own, or where it has none the domains'."""
    weights = config.train.phases[index].weights
    return {domain.name: domain.weight for domain in config.domains} if weights is None else dict(weights)


def old_domains(config: Config, index: int) -> tuple[str, ...]:
    """The domains that are old to phase `index`, in the order of their ids.

    Those that it names, or else those that an earlier phase draws (by its weights or by replay) and its own weights do
    not.
    """
    phase = config.train.phases[index]
    if phase.old is not None:
        return tuple(name for name in config.domain_names if name in phase.old)
    seen: set[str] = set()
    for earlier in range(index):
        seen |= {name for name, weight in own_weights(config, earlier).items() if weight}
        seen |= set(config.train.phases[earlier].old or ())
    own = {name for name, weight in own_weights(config, index).items() if weight}
    return tuple(name for name in config.domain_names if name in seen - own)


def drawn_weights(config: Config, index: int) -> dict[str, float]:
    """Domain weights of phase `index` with its replay: the old domains' own weights come to `replay` of the sum.

    Old domains whose own weights are all 0 are drawn alike.
    """
    weights = own_weights(config, index)
    replay = config.train.phases[index].replay
    if not replay:
        return weights
    old = old_domains(config, index)
    own = {domain.name: domain.weight for domain in config.domains if domain.name in old}
    if not sum(own.values()):
        own = dict.fromkeys(old, 1.0)
    total, total_old = sum(weights.values()), sum(own.values())
    mixed = {name: (1.0 - replay) * weight / total for name, weight in weights.items()}
    for name, weight in own.items():
        mixed[name] = mixed.get(name, 0.0) + replay * weight / total_old
    return mixed
