"""Export to Hugging Face's own `OlmoeForCausalLM`: a folder that transformers loads without any code of ours.

For models that are OLMoEs by their configuration. Neither torch nor transformers is needed to write it. Every expert is
a tensor of its own there and files are in the order of names, so memory holds one layer's experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from extract.export.export_formats import Options
from extract.export.export_source import ExportSource
from extract.export.hf_format import write_folder
from extract.export.safetensors_shards import TargetTensor, total_bytes, write_shards
from pangu_sigma.checkpoint.float_types import convert_float
from pangu_sigma.convert.olmoe_names import MODEL_TYPE, OlmoeTensor, parts_of
from pangu_sigma.data.tokenizers.hugging_face_files import token_ids
from pangu_sigma.errors import UserError

EXPERT_MATRICES = 3


def check(source: ExportSource, options: Options) -> None:
    """Raises UserError for a model of an OLMoE's parts that is none."""
    model = source.config.model
    wrong = []
    if model.has_query_layer:
        wrong.append(f"model.query_layer is {model.query_layer}")
    if model.domain_parameters.embedding != "shared":
        wrong.append(f"model.domain_parameters.embedding is {model.domain_parameters.embedding}")
    if len(model.sparse_prefixes) != model.layers:
        wrong.append(f"{len(model.sparse_prefixes)} of {model.layers} layers are sparse")
    if wrong:
        raise UserError(
            f"{source.checkpoint.path} is no OlmoeForCausalLM ({'; '.join(wrong)}), and no other format has its parts"
        )


def weight_bytes(source: ExportSource, options: Options) -> int:
    """Bytes of the tensors."""
    return total_bytes(targets(source, options.dtype))


def write(source: ExportSource, folder: Path, options: Options) -> list[str]:
    """Write the folder; returns what there is to say. Raises UserError, OSError."""
    write_folder(source, folder, configuration(source, options.dtype))
    write_shards(folder, "model", targets(source, options.dtype), options.max_shard_bytes)
    sparse = source.config.model.sparse
    if sparse.balance == "pooled" and not sparse.z_loss_weight:
        return []
    return ["OlmoeForCausalLM's auxiliary loss is pooled over layers, without z-loss: training has another loss there"]


def targets(source: ExportSource, dtype: str | None) -> list[TargetTensor]:
    """Every tensor of the output."""
    experts = _ExpertTensors(source)
    return [
        _target(experts, dtype, full, part)
        for full in source.names
        for part in parts_of(source.config, full)
    ]


class _ExpertTensors:
    """Tensors of a model that were read last: those of one layer's experts."""

    def __init__(self, source: ExportSource) -> None:
        self.source = source
        self._last: dict[str, np.ndarray] = {}

    def read(self, name: str) -> np.ndarray:
        if name not in self._last:
            while len(self._last) >= EXPERT_MATRICES * len(self.source.domains):
                self._last.pop(next(iter(self._last)))
            self._last[name] = self.source.checkpoint.load([name])[name]
        return self._last[name]


def _target(experts: _ExpertTensors, dtype: str | None, full: str, part: OlmoeTensor) -> TargetTensor:
    source = experts.source
    dtype = dtype or source.imported_dtypes.get(part.name, source.dtype(full))
    shape = source.shape(full) if part.expert is None else source.shape(full)[1:]

    def read() -> Iterator[np.ndarray]:
        array = experts.read(full)
        array = convert_float(full, array if part.expert is None else array[part.expert], dtype)
        yield array.T if part.turned else array

    return TargetTensor(part.name, dtype, shape[::-1] if part.turned else shape, read)


def configuration(source: ExportSource, dtype: str | None) -> dict:
    """config.json."""
    model, tokenizer = source.config.model, source.tokenizer
    # transformers gives the row of a padding id no gradient: an id that stands for something else is none.
    own = {
        "bos_token_id": None,
        "eos_token_id": tokenizer.eod_id,
        "pad_token_id": None if tokenizer.pad_id == tokenizer.eod_id else tokenizer.pad_id,
    }
    return {
        "architectures": ["OlmoeForCausalLM"],
        "model_type": MODEL_TYPE,
        "dtype": dtype or source.main_dtype,
        "vocab_size": source.vocab,
        "hidden_size": model.hidden,
        "intermediate_size": model.ffn,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.heads,
        "hidden_act": model.activation,
        "max_position_embeddings": model.positions,
        "initializer_range": model.init_std,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rope_theta,
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": model.attention.dropout,
        "clip_qkv": None,
        "num_experts": sum(source.experts),
        "num_experts_per_tok": source.config.experts_per_token,
        "norm_topk_prob": model.sparse.renormalise,
        "router_aux_loss_coef": model.sparse.aux_loss_weight,
        "output_router_logits": False,
        "tie_word_embeddings": model.head_spec.is_tied,
        "use_cache": True,
    } | (token_ids(tokenizer.companions) or own)
