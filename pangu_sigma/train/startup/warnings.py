"""What a run should say before it starts: where its last digits may differ from its checkpoint's, and how it reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pangu_sigma.checkpoint import Checkpoint
from pangu_sigma.config import Config
from pangu_sigma.train.schedule import phase_at
from pangu_sigma.trained_model import stored_config

if TYPE_CHECKING:
    from pangu_sigma.model.model import Model


def differences(model: Model, checkpoint: Checkpoint | None) -> list[str]:
    """A sentence for each of kernels, expert store and mesh that is another than under the run's checkpoint."""
    from parallel.ops.compiled_kernels import library

    config, used = model.config, model.kernels
    messages = []
    if config.run.kernels == "auto" and config.run.device == "CPU" and used == "composed" and library() is None:
        messages.append("no compiled kernels in this installation: the run is slower; install again with gcc there")
    if checkpoint is None:
        return messages
    stored = stored_config(checkpoint)
    before = checkpoint.state.get("kernels", used)
    if before != used:
        messages.append(f"the checkpoint is of {before} kernels, this run of {used} ones: last digits may differ")
    was, store = stored.experts.store, config.experts.store
    if (was == "device") != (store == "device"):
        messages.append(
            f"the checkpoint is of a run with experts.store = {was}, this one has {store}: last digits may differ"
        )
    before, mesh = stored.parallel.mesh, config.parallel.mesh
    if before != mesh:
        messages.append(
            f"the checkpoint is of {before.size} processes ({before.axes}), this run of {mesh.size} ({mesh.axes}): "
            "last digits may differ"
        )
    return messages


def placement(config: Config, sizes: tuple[int, ...], step: int) -> list[str]:
    """What placement groups make of the domains' weights at `step`, where it is something else; `sizes`: of the expert
    groups."""
    if config.parallel.placement_groups == 1:
        return []
    names, weights = config.domain_names, phase_at(config, step).weights
    groups = config.parallel.mesh.domains_of_groups(sizes)
    total, messages = sum(weights.values()), []
    for number, domains in enumerate(groups):
        share = sum(weights.get(names[d], 0.0) for d in domains) / total
        if abs(share * len(groups) - 1) > 0.01:
            messages.append(
                f"placement group {number} ({', '.join(names[d] for d in domains)}) has {share:.0%} of the weights "
                f"and reads {1 / len(groups):.0%} of every batch: weights hold inside a group"
            )
    return messages
