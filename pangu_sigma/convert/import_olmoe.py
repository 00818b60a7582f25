"""Taking over an OLMoE from Hugging Face's format: a folder of `OlmoeForCausalLM` becomes a model folder.

Weights keep the type that they are stored in, bit for bit. The balance loss is Hugging Face's form (`pooled`), so that
a training that goes on has its loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pangu_sigma.checkpoint import TensorSpec
from pangu_sigma.checkpoint.float_types import as_float32, convert_float
from pangu_sigma.checkpoint.model_folder import check_output
from pangu_sigma.checkpoint.tensor_file import numpy_type
from pangu_sigma.config import Config
from pangu_sigma.config.parameter_counts import parameter_counts, tensor_shapes
from pangu_sigma.config.parts.feed_forward_kinds import SILU, SWIGLU
from pangu_sigma.config.parts.head_specs import TIED, UNTIED
from pangu_sigma.config.parts.norm_specs import RMS_NORM
from pangu_sigma.config.parts.position_specs import ROPE
from pangu_sigma.convert.conversion_coverage import check_coverage
from pangu_sigma.convert.converted_folder import (
    ConvertedModel,
    ImportSettings,
    imported_config,
    open_tokenizer,
    tokenizer_contents,
    write_converted,
)
from pangu_sigma.convert.finite_weights import check_finite
from pangu_sigma.convert.olmoe_config import OlmoeConfigFile, read_config
from pangu_sigma.convert.olmoe_names import HEAD, TABLE, OlmoeTensor, parts_of
from pangu_sigma.convert.safetensors_folder import SafetensorsFolder, open_folder
from pangu_sigma.data.tokenizers.hugging_face_files import files_of
from pangu_sigma.errors import UserError, argument
from rre.router_specs import OLMOE


@dataclass(frozen=True, kw_only=True)
class OlmoeImportSettings(ImportSettings):
    """tokenizer: None takes the folder's own tokenizer.json. eod_id: None takes config.json's eos_token_id."""

    tokenizer: Path | None = None
    tokenizer_kind: str = "huggingface"


@dataclass(frozen=True, repr=False)
class ImportedOlmoe(ConvertedModel):
    """The written folder; `tensors`: how many of the source were used."""

    eod_id: int
    tensors: int


def import_olmoe(source: Path, out: Path, settings: OlmoeImportSettings) -> ImportedOlmoe:
    """Write `out`, a complete model folder, from the folder of an `OlmoeForCausalLM` at `source`.

    Raises UserError, and writes nothing, for another architecture or an option of it that this model does not have, and
    with the list of tensors unless every tensor of the source is used and every one of the model assigned once.
    """
    out = check_output(out)
    given = read_config(source / "config.json")
    folder = open_folder(source)
    eod_id = settings.eod_id if settings.eod_id is not None else _eod(given, source)
    tokenizer_file = settings.tokenizer or source / "tokenizer.json"
    tokenizer = open_tokenizer(
        tokenizer_file, settings, f"give {argument('tokenizer')}, and its {argument('tokenizer_kind')}", eod_id
    )
    tokenizer.companions = files_of(source, given, with_tokenizer=settings.tokenizer is None)
    fields = OlmoeConfigFile(given, source / "config.json", len(folder.tensors))
    config = _config(fields, source, out, settings, tokenizer)
    targets = tensor_shapes(config, config.model.vocab_size)
    origins = {name: parts_of(config, name) for name in targets}
    _check(folder, targets, origins, config.model.head == TIED.name)
    specs = [TensorSpec(name, _dtype(folder, origins[name]), shape) for name, shape in targets.items()]

    def read(spec: TensorSpec) -> np.ndarray:
        # Made of its type first: a copy of bfloat16's bits alone would not say what they are.
        array = np.empty(spec.shape, numpy_type(spec.dtype))
        for part in origins[spec.name]:
            own = array if part.expert is None else array[part.expert]
            own[...] = _part(folder, part, spec.dtype)
        return array

    counts = parameter_counts(config, config.model.vocab_size)
    written = write_converted(
        out,
        config,
        "import",
        origin={"job": "import hf", "source": source.name, "architecture": "OlmoeForCausalLM", "eod_id": eod_id}
        | _narrower(folder, specs, origins),
        card=_card(source, config, eod_id, counts.total),
        tensors=specs,
        read=read,
        **tokenizer_contents(tokenizer),
    )
    return ImportedOlmoe(written, config, eod_id, len(folder.tensors))


def _eod(given: dict[str, Any], source: Path) -> int:
    eos = given.get("eos_token_id")
    if type(eos) is int:
        return eos
    raise UserError(f"{source}/config.json names no single eos_token_id: give {argument('eod_id')}")


def _config(fields: OlmoeConfigFile, source: Path, out: Path, settings: OlmoeImportSettings, tokenizer) -> Config:
    """Our configuration of the same function; defaults of absent keys are transformers' own."""
    model = {
        "vocab_size": fields.count("vocab_size"),
        "layers": fields.parts("num_hidden_layers"),
        "hidden": fields.count("hidden_size"),
        "heads": fields.count("num_attention_heads"),
        "ffn": fields.count("intermediate_size"),
        "positions": fields.count("max_position_embeddings", 4096),
        "activation": SILU.name,
        "norm": RMS_NORM.name,
        "norm_epsilon": fields.number("rms_norm_eps", 1e-5),
        "position": ROPE.name,
        "rope_theta": fields.rope_theta(),
        "feed_forward": SWIGLU.name,
        "biases": False,
        "head": (TIED if fields.flag("tie_word_embeddings") else UNTIED).name,
        "query_layer": "none",
        "attention": {"qk_norm": True},
        "init_std": fields.number("initializer_range", 0.02),
        "init_cutoff": 3.0,
        "init_scale_residual": False,
        "sparse": {
            "pattern": "every",
            "router": OLMOE.name,
            "top_k": fields.count("num_experts_per_tok", 8),
            "renormalise": fields.flag("norm_topk_prob"),
            "aux_loss_weight": fields.number("router_aux_loss_coef", 0.01),
            "balance": "pooled",
            "z_loss_weight": 0.0,
        },
    }
    experts = fields.parts("num_experts", 64)
    return imported_config(model, str(source), out, settings, tokenizer, learning_rate=4e-5, experts=experts)


def _check(
    folder: SafetensorsFolder,
    targets: dict[str, tuple[int, ...]],
    origins: dict[str, list[OlmoeTensor]],
    tied: bool,
) -> None:
    """Coverage in Hugging Face's names, where every expert is a tensor of its own."""
    needed: dict[str, tuple[int, ...]] = {}
    for name, shape in targets.items():
        for part in origins[name]:
            own = shape if part.expert is None else shape[1:]
            needed[part.name] = own[::-1] if part.turned else own
    there = dict(folder.tensors)
    if tied and HEAD in there and TABLE in there:
        _check_same_head(folder)
        del there[HEAD]
    assigned = [(name, name, there[name].shape) for name in needed if name in there]
    check_coverage(str(folder.path), needed, assigned, there)


def _check_same_head(folder: SafetensorsFolder) -> None:
    """Of a tied model, a stored head must be the table of words, as some programs write it twice."""
    head, table = (as_float32(name, folder.read(name)) for name in (HEAD, TABLE))
    if not np.array_equal(head, table):
        raise UserError(
            f"{folder.path} ties its head to {TABLE} (config.json has tie_word_embeddings = true) and holds another "
            f"{HEAD}: set tie_word_embeddings to false if the head is a matrix of its own, else take {HEAD} out"
        )


def _dtype(folder: SafetensorsFolder, parts: list[OlmoeTensor]) -> str:
    """The widest type among a tensor's parts, which holds them all; of different halves that is float32."""
    types = {folder.tensors[part.name].dtype for part in parts}
    return types.pop() if len(types) == 1 else "float32"


def _narrower(
    folder: SafetensorsFolder, specs: list[TensorSpec], origins: dict[str, list[OlmoeTensor]]
) -> dict[str, dict[str, str]]:
    """The types of the folder's tensors that are stored wider here, beside others of their stack."""
    types = {
        part.name: folder.tensors[part.name].dtype
        for spec in specs for part in origins[spec.name] if folder.tensors[part.name].dtype != spec.dtype
    }  # fmt: skip
    return {"dtypes": types} if types else {}


def _part(folder: SafetensorsFolder, part: OlmoeTensor, dtype: str) -> np.ndarray:
    stored = check_finite(str(folder.path), part.name, folder.read(part.name))
    array = convert_float(part.name, stored, dtype)
    return array.T if part.turned else array


def _card(source: Path, config: Config, eod_id: int, parameters: int) -> str:
    model = config.model
    return (
        f"# {source.name}, imported\n\n"
        f"An OLMoE of {parameters:,} parameters, imported from `{source.name}` (Hugging Face's OlmoeForCausalLM).\n\n"
        f"- {model.layers} layers, {model.hidden} wide, {model.heads} heads, {config.domains[0].experts} experts of "
        f"{model.ffn} in each, {config.experts_per_token} for a token\n"
        f"- vocabulary {model.vocab_size:,}, sequences of up to {model.positions} tokens, end-of-document id {eod_id}\n"
        f"- one domain: {config.domains[0].name}\n\n"
        "Here attention restarts after an end-of-document id, which OlmoeForCausalLM only does when its mask says so.\n"
    )
