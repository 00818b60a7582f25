"""Warnings before a run's first step: what computes otherwise than in its checkpoint, how placement changes weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pangu_sigma.checkpoint import Checkpoint
from pangu_sigma.config import Config
from pangu_sigma.config.resume_rules import changed_keys
from pangu_sigma.trained_model import stored_config
from pangu_sigma.training.schedule import domain_weights, same_rates

if TYPE_CHECKING:
    from pangu_sigma.model.model import Model


def describe_differences(model: Model, checkpoint: Checkpoint | None) -> list[str]:
    """Whether the compiled kernels are missing, and what keeps a resumed run from being the one without a break."""
    from parallel.ops.compiled_kernels import library

    config, kernels = model.config, model.kernels
    messages = []
    if config.run.kernels == "auto" and config.run.device == "CPU" and kernels == "composed" and library() is None:
        messages.append("no compiled kernels in this installation: the run is slower; install again with gcc there")
    if checkpoint is None:
        return messages
    differences = not_bit_equal(stored_config(checkpoint), config, checkpoint.step)
    stored_kernels = checkpoint.state.get("kernels", kernels)
    if stored_kernels != kernels:
        differences.append(f"kernels were {stored_kernels} and are {kernels}")
    if differences:
        messages.append(f"no longer bit-equal to the run without a break: {'; '.join(differences)}")
    return messages


def not_bit_equal(stored: Config, config: Config, step: int) -> list[str]:
    """What makes the run with `config` another one than if it had done its first `step` steps with it too, as far as a
    configuration tells: "train.gradient_accumulation_steps was 2 and is 4"."""
    allowed = changed_keys(stored, config, step).allowed
    # Which kernels computed is known. Host and disk compute alike; the device store has all experts in the graph.
    alike = "device" not in (stored.experts.store, config.experts.store)
    known = ("run.kernels", "experts.store") if alike else ("run.kernels",)
    changes = [change for change in allowed if change.resume == "rounding" and change.key not in known]
    planned = [change for change in allowed if change.resume == "schedule"]
    # The last phase ends where the run does.
    planned = planned or [change for change in allowed if change.resume == "ahead"]
    if planned and not same_rates(stored, config, step):
        changes += planned
    sentences = [str(change) for change in changes]
    model, has_losses = config.model, config.adapt is None or config.adapt.auxiliary_losses
    is_weighed = any(option.weighs_loss and model.router_options[option.name] for option in model.router_spec.options)
    accumulates = any(change.key == "train.gradient_accumulation_steps" for change in changes)
    if accumulates and model.sparse_prefixes and has_losses and is_weighed:
        sentences.append("the gates' losses are those of each micro-batch, and so are others from here on")
    return sentences


def describe_placement(config: Config, sizes: tuple[int, ...], step: int) -> list[str]:
    """A sentence for each placement group whose share of a batch is not its domains' share of the weights at `step`.

    sizes: experts of every group.
    """
    if config.parallel.placement_groups == 1:
        return []
    names, weights = config.domain_names, domain_weights(config, step)
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
