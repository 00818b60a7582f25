"""The adaptation job: the training run, on examples instead of the domains' text."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from pangu_sigma.checkpoint import find_latest, resolve
from pangu_sigma.config import Config, config_from_dict
from pangu_sigma.config.finetuning_file import load_adaptation, run_dir_of
from pangu_sigma.config.mesh_rules import check_one_process
from pangu_sigma.config.overrides import Overrides
from pangu_sigma.finetuning.finetuning_task import ExampleTask
from pangu_sigma.signals import stop_signals_raise
from pangu_sigma.trained_model import stored_config
from pangu_sigma.training.job import open_run
from pangu_sigma.training.training_result import TrainingResult


def adapt(
    model: Path, file: Path, objective: str, overrides: Overrides = (), resume: bool = False
) -> TrainingResult:
    """Fine-tune `model` (a run, checkpoint or model folder) as the YAML `file` says.

    `objective`: sft or dpo. A run that resumes takes what it is from its own checkpoint; `model` then only has to be
    there where it is the frozen reference. Raises UserError.
    """
    base, start = _base(model, file, overrides, resume)
    config = load_adaptation(file, overrides, objective, base, start)
    check_one_process(config, "set parallel={}")
    with stop_signals_raise(), open_run(config, resume, make_task=partial(ExampleTask, named=model)) as run:
        run.train()
    return TrainingResult.of(config.run.dir, run.stop_signal)


def _base(model: Path, file: Path, overrides: Overrides, resume: bool) -> tuple[Config, str]:
    """The configuration that the file lies over, and the path of the model to begin with."""
    folder = run_dir_of(file, overrides)
    if resume and folder is not None:
        own, _ = find_latest(Path(folder).expanduser())
        if own is not None:
            stored = stored_config(own)
            return stored, stored.run.init_from or str(model)
    # The mesh that the model was trained on is not what it is adapted on.
    values = stored_config(resolve(model)).to_dict() | {"parallel": {}}
    return config_from_dict(values), str(model)
