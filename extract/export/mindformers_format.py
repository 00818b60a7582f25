"""Export to MindFormers: one safetensors file that its `load_checkpoint` takes into `PanGuSigmaForCausalLM`.

The network there has our names and shapes (`pangu_sigma.integrations.mindformers.mindformers_model`), so tensors go as
they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from extract.export.export_source import ExportSource, check_pangu
from extract.export.safetensors_shards import TargetTensor, write_shards
from pangu_sigma.checkpoint.float_types import as_float32
from pangu_sigma.errors import UserError
from pangu_sigma.monitor.progress import progress
from pangu_sigma.tensor_names import is_routing

if TYPE_CHECKING:
    from pathlib import Path

    from extract.export.export_job import Options

TAKES = ("dtype",)
STEM = "pangu_sigma"
_SMALL_FILES = 1 << 16


def check(source: ExportSource, options: Options) -> None:
    """Raises UserError for what MindFormers' network of this model does not hold."""
    check_pangu(source)
    if options.dtype != "float32":
        raise UserError(f"MindFormers trains from float32 weights, not {options.dtype}: leave --dtype out")
    if source.domains != source.config.domain_names:
        raise UserError("MindFormers trains whole models: cut domains out with pangu-sigma extract, and export that")


def needed_bytes(source: ExportSource, options: Options) -> int:
    """Bytes that the folder will take."""
    return sum(target.nbytes for target in targets(source)) + _SMALL_FILES


def write(source: ExportSource, folder: Path, options: Options) -> list[str]:
    """Write the folder; returns what there is to say. Raises OSError."""
    tensors = targets(source)
    with progress("export", sum(t.nbytes for t in tensors), unit="B") as job:
        # One file: what MindFormers loads on one device.
        write_shards(folder, STEM, tensors, sum(t.nbytes for t in tensors) + 1, job.advance)
    model = str(source.checkpoint.path.resolve())
    text = (
        f"# {source.checkpoint.path.name} for MindFormers\n\n```yaml\n"
        f"load_checkpoint: {STEM}.safetensors   # with its folder\nload_ckpt_format: safetensors\n"
        f"model:\n  model_config:\n    pangu_sigma:\n      run: {{init_from: {json.dumps(model)}}}\n```\n\n"
        "`init_from` gives tokenizer and routing tables; alone, without `load_checkpoint`, it gives the weights too.\n"
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
    return [
        f"in the YAML: load_checkpoint: OUT/{STEM}.safetensors, load_ckpt_format: safetensors, and pangu_sigma.run."
        f"init_from: {model} for tokenizer and routing tables"
    ]


def targets(source: ExportSource) -> list[TargetTensor]:
    """Every tensor of the model, under its own name."""
    return [
        TargetTensor(
            name, "I32" if is_routing(name) else "F32", source.shape(name), lambda name=name: _read(source, name)
        )
        for name in source.names
    ]


def _read(source: ExportSource, name: str) -> Iterator[np.ndarray]:
    array = source.checkpoint.load([name])[name]
    yield array if is_routing(name) else as_float32(name, array)
