"""Training one stage: a run that goes on from the stage before it, with the domains that come in.

A stage's run lies in a folder of its own and shares the files that did not change with the run before it. It gets its
folder's name only when its domains and its plan stand in it, so that whatever has the name can be trained.
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING

from pangu_sigma.checkpoint import Checkpoint, find_latest
from pangu_sigma.config import Config, config_from_dict, load_config
from pangu_sigma.config.load_config import effective
from pangu_sigma.config.resume_rules import with_changeable_keys
from pangu_sigma.errors import UserError
from pangu_sigma.lifelong.stage_plan import Plan, Stage
from parallel.comm.atomic_folder import atomic_folder

if TYPE_CHECKING:
    from pangu_sigma.domains.add_domain import NewDomain


def finished(plan: Plan, stage: Stage) -> Checkpoint | None:
    """The checkpoint at the end of a stage; None while the stage is not done. Raises UserError for a damaged one."""
    folder = plan.run_dir(stage)
    if not (folder / "checkpoints").is_dir():
        return None
    checkpoint, _ = find_latest(folder)
    if checkpoint is None or checkpoint.step < plan.end(stage):
        return None
    return checkpoint


def train_stage(
    plan: Plan, stage: Stage, tokenizer: Path | None
) -> tuple[Checkpoint | None, signal.Signals | None]:
    """Train the stage to its end, from its last checkpoint if it has begun.

    Returns the checkpoint at its end, None if it is not done, and the signal that came meanwhile, None if none did.
    tokenizer: model file of the tokenizer of all stages. Raises UserError as `train` and `domains add` do.
    """
    done = finished(plan, stage)
    if done is not None:
        return done, None
    folder = plan.run_dir(stage)
    if stage.number == 0:
        config = effective(plan.config(stage, tokenizer))
    else:
        if not folder.is_dir():
            _prepare(plan, stage, folder)
        config = _stored(plan, folder)
    from pangu_sigma.training.job import train

    # A first stage that was killed before its first checkpoint begins anew, its metrics too.
    result = train(config, resume=folder.is_dir())
    return finished(plan, stage), result.stop_signal


def _stored(plan: Plan, folder: Path) -> Config:
    """The configuration that the stage's run has, with what may change from start to start as it is now."""
    values = with_changeable_keys(load_config(folder / "config.yaml"), plan.base)
    values["run"]["dir"] = str(folder)
    return config_from_dict(values, source=f"{folder}/config.yaml")


def _prepare(plan: Plan, stage: Stage, folder: Path) -> None:
    """Make the stage's run from the one before it: domains that are new come in, and the plan becomes the stage's."""
    before = plan.run_dir(plan.stages[stage.number - 1])
    try:
        with atomic_folder(folder) as unfinished:
            if not (plan.grows and stage.new):
                _plan(plan, stage, before, out=unfinished)
            elif plan.by_domain:
                _add_domains(plan, stage, before, unfinished)
            else:
                _expand(plan, stage, before, unfinished)
    except UserError as error:
        raise UserError(f"stage {stage.number + 1} ({stage.name}) cannot begin: {error}") from error


def _plan(plan: Plan, stage: Stage, run: Path, out: Path | None = None) -> None:
    """Give a run, or a new one that shares its files, the plan of all stages up to this one."""
    from pangu_sigma.domains.follow_up_training import plan_training

    phases = [plan.phase(other) for other in plan.stages[: stage.number + 1]]
    limit = plan.base.data.max_domains_per_batch
    plan_training(run, phases, f"stage {stage.name}", max_domains_per_batch=limit, out=out)


def new_domain(plan: Plan, stage: Stage, name: str) -> NewDomain:
    """A domain that comes in with a stage, as the configuration under the stages describes it."""
    from pangu_sigma.domains.add_domain import NewDomain

    domain = next(domain for domain in plan.base.domains if domain.name == name)
    return NewDomain(**domain.model_dump(), init=stage.policy.init)


def _add_domains(plan: Plan, stage: Stage, before: Path, run: Path) -> None:
    """The new domains' own groups come in; the first one makes the new run, the others change it where it lies."""
    from pangu_sigma.domains.add_domain import add_domain

    for index, name in enumerate(stage.new):
        add_domain(before if index == 0 else run, new_domain(plan, stage, name), out=run if index == 0 else None)
    _plan(plan, stage, run)


def _expand(plan: Plan, stage: Stage, before: Path, run: Path) -> None:
    """The gates grow by the new domain's experts; the model as it was is kept with the run, which is held near it."""
    from pangu_sigma.config.domain_edits import FollowUpTraining
    from pangu_sigma.domains.expand_gates import expand_domain

    _plan(plan, plan.stages[stage.number - 1], before, out=run)
    policy = stage.policy
    follow_up = FollowUpTraining(stage.new[0], stage.steps, policy.shared, policy.replay, policy.regularise)
    expand_domain(run, new_domain(plan, stage, stage.new[0]), follow_up)
