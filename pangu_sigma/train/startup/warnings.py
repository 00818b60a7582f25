"""Warnings before a run's first step: what computes otherwise than in its checkpoint, how placement changes weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pangu_sigma.checkpoint import Checkpoint
from pangu_sigma.config import Config
from pangu_sigma.train.schedule import phase_at
from pangu_sigma.trained_model import stored_config

if TYPE_CHECKING:
    from pangu_sigma.model.model import Model


def describe_differences(model: Model, checkpoint: Checkpoint | None) -> list[str]:
    """A sentence for each of kernels, expert store and mesh that is another than under the run's checkpoint.

    With any of them the resumed run computes the same up to the last digits only.
    """
    from parallel.ops.compiled_kernels import library

    config, kernels = model.config, model.kernels
    messages = []
    if config.run.kernels == "auto" and config.run.device == "CPU" and kernels == "composed" and library() is None:
        messages.append("no compiled kernels in this installation: the run is slower; install again with gcc there")
    if checkpoint is None:
        return messages
    stored = stored_config(checkpoint)
    stored_kernels = checkpoint.state.get("kernels", kernels)
    if stored_kernels != kernels:
        messages.append(
            f"the checkpoint is of {stored_kernels} kernels, this run of {kernels} ones: last digits may differ"
        )
    stored_store, store = stored.experts.store, config.experts.store
    if (stored_store == "device") != (store == "device"):
        messages.append(
            f"the checkpoint is of a run with experts.store = {stored_store}, this one has {store}: last digits may "
            "differ"
        )
    stored_mesh, mesh = stored.parallel.mesh, config.parallel.mesh
    if stored_mesh != mesh:
        messages.append(
            f"the checkpoint is of {stored_mesh.size} processes ({stored_mesh.axes}), this run of {mesh.size} "
            f"({mesh.axes}): last digits may differ"
        )
    return messages


def describe_placement(config: Config, sizes: tuple[int, ...], step: int) -> list[str]:
    """A sentence for each placement group whose share of a batch is not its domains' share of the weights at `step`.

    sizes: experts of every group.
    """
    if config.parallel.placement_groups == 1:
        return []
    names, weights = config.domain_names, phase_at(config, step).weights
    groups = config.parallel.mesh.domains_of_groups(sizes)
    total, messages = sum(weights.values()), []
    for index, domains in enumerate(groups):
        share = sum(weights.get(names[d], 0.0) for d in domains) / total
        if abs(share * len(groups) - 1) > 0.01:
            messages.append(
                f"placement group {index} ({', '.join(names[d] for d in domains)}) has {share:.0%} of the weights "
                f"and reads {1 / len(groups):.0%} of every batch: weights hold inside a group"
            )
    return messages
