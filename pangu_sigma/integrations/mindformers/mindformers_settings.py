"""A MindFormers YAML as this product's configuration: one meaning for both trainers, checked before anything heavy.

The YAML carries our own sections `run`, `model`, `domains`, `data` and `train` (as far as they describe the model and
its text) under the key `pangu_sigma` of `model.model_config`, and by a YAML alias under `train_dataset.data_loader`.
Optimizer, schedule, steps and batch size are MindFormers' own keys.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping
from os.path import abspath, expanduser
from pathlib import Path
from typing import Any

from pangu_sigma.config import SCHEMA_VERSION, Config, config_from_dict
from pangu_sigma.config.load_config import effective, read_values
from pangu_sigma.config.overrides import apply_overrides
from pangu_sigma.config.yaml_text import parse_yaml_11
from pangu_sigma.errors import UserError
from pangu_sigma.wording import listed, shown

SECTIONS = "pangu_sigma"
# Where a YAML names a class -> the class of ours that stands there.
CLASSES = {
    "model.model_config.type": "PanGuSigmaConfig",
    "model.arch.type": "PanGuSigmaForCausalLM",
    "train_dataset.data_loader.type": "PanGuSigmaDataLoader",
    "train_dataset_task.type": "PanGuSigmaDataset",
    "optimizer.type": "PanGuSigmaAdamW",
    "lr_schedule.type": "PanGuSigmaLR",
    "runner_wrapper.type": "PanGuSigmaTrainOneStep",
}
# What the classes of ours read; anything else there would be passed over without a word.
_KEYS = {
    "model.model_config": ("type", SECTIONS),
    "model.arch": ("type",),
    "train_dataset.data_loader": ("type", SECTIONS, "steps"),
    "optimizer": ("type", "betas", "eps", "expert_eps", "weight_decay"),
    "lr_schedule": ("type", "kind", "learning_rate", "warmup_steps", "min_lr_ratio", "total_steps"),
}
TABLE_CHECK = "PanGuSigmaTableCheck"
# What may stand in our sections; everything else of them is said by MindFormers' own keys.
_OURS: dict[str, tuple[str, ...] | None] = {
    "run": ("seed", "kernels", "init_from"),
    "model": None,
    "domains": None,
    "data": None,
    "train": ("precision",),
}
# Keys of MindFormers whose other values would change what is trained without anyone seeing it: (value, what to do).
_FIXED: dict[str, tuple[Any, str]] = {
    "run_mode": ("train", "this integration trains; evaluate and generate with pangu-sigma import mindformers"),
    "use_legacy": (True, "the classes are registered with MindFormers' legacy models"),
    "runner_config.sink_mode": (False, "batches are planned on the host, step by step"),
    "runner_config.epochs": (1, "texts are an endless stream: set train_dataset.data_loader.steps"),
    "runner_config.gradient_accumulation_steps": (1, "MindFormers ignores it on one device"),
    "resume_training": (False, "import the checkpoint and go on from it with run.init_from"),
    "recompute_config.recompute": (False, "MindFormers' recomputation knows its own layers only"),
    "lr_scale": (False, "it multiplies the learning rate by the number of devices"),
    "do_eval": (False, "import the checkpoint and use pangu-sigma evaluate"),
}
_DEFAULTS = {"use_legacy": True, "runner_config.epochs": 1, "runner_config.gradient_accumulation_steps": 1}


def read_yaml(path: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """The YAML at `path` with `section.key=value` overrides, as MindFormers itself would read it (YAML 1.1).

    `pangu_sigma.…` changes our sections, wherever the YAML holds them. Raises UserError naming the file for one that is
    missing or no mapping, and for an override that leads nowhere.
    """
    path = Path(path)
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"{path} does not end in .yaml: give a MindFormers configuration")
    values = read_values(path, "a MindFormers configuration", parse_yaml_11)
    # Our sections by their own name. A YAML alias is one object in two places, so the data loader gets them too.
    longer = [f"model.model_config.{text}" if text.startswith(f"{SECTIONS}.") else text for text in overrides]
    apply_overrides(values, longer, _no_section, root=("model", "model_config", SECTIONS))
    return values


def _no_section(key_path: list[str | int], text: str) -> dict[str, Any]:
    raise UserError(
        f"the override '{text}' changes {'.'.join(map(str, key_path))}, which the file lacks: write it there"
    )


def value_at(values: Mapping[str, Any], path: str, default: Any = None) -> Any:
    """The value at a dotted path; `default` where the path ends early or holds null."""
    value: Any = values
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return default if value is None else value


def settings_of(values: Mapping[str, Any], source: str) -> Config:
    """The configuration that our own trainer would need to train the same run, one process.

    Raises UserError naming `source` and the key for a class that is not ours, a value that would change the run
    silently, or sections that do not hold.
    """
    for path, name in CLASSES.items():
        if value_at(values, path) != name:
            raise UserError(f"{source}: {path} is {shown(value_at(values, path))}: set it to {name}")
    for path, keys in _KEYS.items():
        if unknown := [str(key) for key in value_at(values, path, {}) if key not in keys]:
            raise UserError(
                f"{source}: {path} has {listed(unknown)}, which changes nothing here: it takes {listed(keys)}"
            )
    for path, (required, why) in _FIXED.items():
        if (value := value_at(values, path, _DEFAULTS.get(path, False))) != required:
            raise UserError(f"{source}: {path} is {shown(value)}: set it to {shown(required)} ({why})")
    _check_devices(values, source)
    callbacks = [c.get("type") for c in value_at(values, "callbacks", []) if isinstance(c, Mapping)]
    if TABLE_CHECK not in callbacks:
        raise UserError(f"{source}: callbacks lacks '- type: {TABLE_CHECK}', which guards the routing tables: add it")
    sections = value_at(values, f"model.model_config.{SECTIONS}")
    other = value_at(values, f"train_dataset.data_loader.{SECTIONS}")
    if sections != other:
        raise UserError(
            f"{source}: train_dataset.data_loader.{SECTIONS} differs from model.model_config.{SECTIONS}: write one "
            f"with an anchor (&{SECTIONS}) and the other as its alias (*{SECTIONS})"
        )
    steps = _checked_number(values, "train_dataset.data_loader.steps", source, int)
    batch = _checked_number(values, "runner_config.batch_size", source, int) * _readers(values)
    betas = value_at(values, "optimizer.betas", [0.9, 0.95])
    if not isinstance(betas, list) or len(betas) != 2:
        raise UserError(f"{source}: optimizer.betas is {shown(betas)}: write two numbers, for example [0.9, 0.95]")
    optimizer = {
        "learning_rate": _checked_number(values, "lr_schedule.learning_rate", source),
        "beta1": betas[0],
        "beta2": betas[1],
        "epsilon": _checked_number(values, "optimizer.eps", source, default=1e-8),
        "expert_epsilon": _checked_number(values, "optimizer.expert_eps", source, default=1e-8),
        "weight_decay": _checked_number(values, "optimizer.weight_decay", source, default=0.0),
        "max_grad_norm": _checked_number(values, "runner_wrapper.max_grad_norm", source, default=1.0),
    }
    schedule = {
        "kind": value_at(values, "lr_schedule.kind", "cosine"),
        "warmup_steps": _checked_number(values, "lr_schedule.warmup_steps", source, int, 0),
        "min_lr_ratio": _checked_number(values, "lr_schedule.min_lr_ratio", source, default=0.1),
    }
    total = _checked_number(values, "lr_schedule.total_steps", source, int, -1)
    if total != -1:
        schedule["decay_steps"] = total
    return _settings(
        sections, value_at(values, "context.device_target", "CPU"),
        str(value_at(values, "output_dir", "./output")), source,
        optimizer=optimizer, schedule=schedule, train={"steps": steps, "batch_size": batch},
    )  # fmt: skip


def model_settings(sections: Any, device: str, output: str) -> Config:
    """What model and data loader need of our sections alone; optimizer and steps hold numbers that nobody reads."""
    return _settings(
        sections, device, output, f"the YAML's key {SECTIONS}",
        optimizer={"learning_rate": 1.0}, schedule={}, train={"steps": 1, "batch_size": 1},
    )  # fmt: skip


def _settings(
    sections: Any, device: str, output: str, source: str, optimizer: dict, schedule: dict, train: dict
) -> Config:
    if not isinstance(sections, Mapping):
        raise UserError(f"{source}: model.model_config.{SECTIONS} is missing: describe model, domains and data there")
    sections = copy.deepcopy({key: _plain(value) for key, value in sections.items()})
    for name, value in sections.items():
        if name not in _OURS:
            raise UserError(f"{source}: {SECTIONS} has the section '{name}': it takes {', '.join(_OURS)}")
        allowed = _OURS[name]
        for key in value if allowed and isinstance(value, dict) else ():
            if key not in allowed:
                raise UserError(f"{source}: {SECTIONS}.{name} has '{key}': it takes {', '.join(allowed)}")
    values = {"schema_version": SCHEMA_VERSION, **sections, "optimizer": optimizer, "schedule": schedule}
    values["run"] = {**(sections.get("run") or {}), "dir": abspath(expanduser(output)), "device": device}
    values["train"] = {**(sections.get("train") or {}), **train}
    config = effective(config_from_dict(values, source=source))
    if config.data.stream is not None:
        raise UserError(f"{source}: {SECTIONS}.data.stream is learned from by pangu-sigma train only: leave it out")
    return config


def _plain(value: Any) -> Any:
    """MindFormers' own mappings as plain ones."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _checked_number(values: Mapping[str, Any], path: str, source: str, kind: type = float, default: Any = None) -> Any:
    value = value_at(values, path, default)
    allowed = (int,) if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, allowed):
        hint = " (YAML 1.1, which MindFormers reads, takes 1e-4 for a text: write 1.0e-4)" if kind is float else ""
        raise UserError(f"{source}: {path} is {shown(value)}: write a {'whole ' if kind is int else ''}number{hint}")
    return kind(value)


def _check_devices(values: Mapping[str, Any], source: str) -> None:
    if value_at(values, "use_parallel", False) and value_at(values, "parallel.parallel_mode") not in (
        0,
        "data_parallel",
    ):
        raise UserError(
            f"{source}: parallel.parallel_mode is {shown(value_at(values, 'parallel.parallel_mode'))}: set it "
            "to 0 (data parallel), which is what several devices under MindFormers do here; experts are "
            "cut by pangu-sigma train"
        )
    if value_at(values, "use_parallel", False) and value_at(values, "parallel.gradients_mean", False) is not True:
        raise UserError(f"{source}: parallel.gradients_mean is not true: set it, since each device's loss is a mean")


def _readers(values: Mapping[str, Any]) -> int:
    """Processes that read batches of their own: what the launcher started."""
    return int(os.environ.get("RANK_SIZE", "1")) if value_at(values, "use_parallel", False) else 1
