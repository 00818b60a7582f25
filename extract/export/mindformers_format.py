"""Export to MindFormers: one safetensors file that its `load_checkpoint` takes into `PanGuSigmaForCausalLM`.

The network there has our names and shapes (`pangu_sigma.integrations.mindformers.mindformers_model`), so tensors go as
they are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from extract.export.export_formats import Options
from extract.export.export_source import ExportSource
from extract.export.safetensors_shards import TargetTensor, total_bytes, write_shards
from pangu_sigma.checkpoint.float_types import as_float32
from pangu_sigma.errors import UserError
from pangu_sigma.tensor_names import is_routing

STEM = "pangu_sigma"


def check(source: ExportSource, options: Options) -> None:
    """Raises UserError for what MindFormers' network of this model does not hold."""
    if source.domains != source.config.domain_names:
        raise UserError("MindFormers trains whole models: cut domains out with pangu-sigma extract, and export that")


def weight_bytes(source: ExportSource, options: Options) -> int:
    """Bytes of the tensors."""
    return total_bytes(targets(source))


def write(source: ExportSource, folder: Path, options: Options) -> list[str]:
    """Write the folder; returns what there is to say. Raises OSError."""
    # One file: what MindFormers loads on one device.
    write_shards(folder, STEM, targets(source), math.inf)
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
        TargetTensor(name, "int32" if is_routing(name) else "float32", source.shape(name), partial(_read, source, name))
        for name in source.names
    ]


def _read(source: ExportSource, name: str) -> Iterator[np.ndarray]:
    array = source.checkpoint.load([name])[name]
    yield array if is_routing(name) else as_float32(name, array)
