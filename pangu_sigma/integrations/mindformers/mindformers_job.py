"""`pangu-sigma mindformers`: run a MindFormers YAML with MindFormers' own Trainer, in this process."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from pangu_sigma.checkpoint.folder_locks import refuse_model_folder
from pangu_sigma.config import Config
from pangu_sigma.errors import UserError
from pangu_sigma.integrations.mindformers.companion_files import write_settings
from pangu_sigma.integrations.mindformers.import_mindformers import ENDING, check_file
from pangu_sigma.integrations.mindformers.mindformers_settings import read_yaml, settings_of, value_at
from pangu_sigma.monitor.result_files import write_text
from pangu_sigma.signals import signals_held
from pangu_sigma.wording import shown

EFFECTIVE = "mindformers.yaml"


def train(file: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Train as the YAML at `file` says and return its output folder.

    Raises UserError for a mistake in the YAML, before MindFormers is imported, and where MindFormers is missing.
    """
    values = read_yaml(file, overrides)
    config = settings_of(values, str(file))
    output = Path(config.run.dir)
    refuse_model_folder(output)
    if next(output.glob(f"checkpoint/rank_*/*{ENDING}"), None) is not None:
        raise UserError(f"{output} already holds checkpoints of MindFormers: set another output_dir, or remove them")
    check_installed()
    _check_load(values, str(file), config)
    values["output_dir"] = str(output)
    output.mkdir(parents=True, exist_ok=True)
    if int(os.environ.get("RANK_ID", "0")) == 0:
        write_settings(output, config)
        write_text(output / EFFECTIVE, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    run(values, output)
    return output


def run(values: dict[str, Any], output: Path) -> None:
    """Import MindFormers with its folders under `output`, register our classes, and train."""
    environment(output)
    with signals_held():
        from mindformers import MindFormerConfig, Trainer, build_context

        import pangu_sigma.integrations.mindformers.registration  # noqa: F401 - registers
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as scratch:
        scratch.write(yaml.safe_dump(values))
        scratch.flush()
        # From a file: only then MindFormers fills in its defaults.
        config = MindFormerConfig(scratch.name)
    build_context(config)
    Trainer(config).train()


def environment(output: Path) -> None:
    """What MindSpore and MindFormers read when they are imported: be quiet, and keep files under `output`."""
    os.environ.setdefault("GLOG_v", "4")
    os.environ.setdefault("MS_DEV_JIT_SYNTAX_LEVEL", "2")
    os.environ["LOCAL_DEFAULT_PATH"] = str(output)
    os.environ.setdefault("LOG_MF_PATH", str(output / "log"))
    os.environ.setdefault("OM_MODULES_CACHE", str(output / "modules"))


def check_installed() -> None:
    """Raises UserError where MindFormers is not installed."""
    if find_spec("mindformers") is None:
        raise UserError("MindFormers is not installed: pip install 'pangu-sigma[mindformers]'")


def _check_load(values: dict[str, Any], source: str, config: Config) -> None:
    """Raises UserError unless `load_checkpoint` is a file with every tensor of the model, each in its shape.

    MindFormers itself leaves a parameter that is missing as it was drawn.
    """
    path = value_at(values, "load_checkpoint", "")
    if not path:
        return
    if not Path(path).is_file() or Path(path).suffix != ENDING:
        raise UserError(
            f"{source}: load_checkpoint = {path} is no {ENDING} file: give what MindFormers or an export to "
            "mindformers wrote"
        )
    if (kind := value_at(values, "load_ckpt_format")) != "safetensors":
        raise UserError(f"{source}: load_ckpt_format is {shown(kind)}: set it to safetensors")
    check_file(Path(path), config)
