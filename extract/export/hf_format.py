"""Export to Hugging Face: a folder that `AutoModelForCausalLM.from_pretrained(…, trust_remote_code=True)` runs.

Neither torch nor transformers is needed to write it. Weights are read, converted and written a piece or a matrix at
a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import numpy as np

from extract.export.export_formats import Options
from extract.export.export_guides import network_line
from extract.export.export_source import ExportSource
from extract.export.safetensors_shards import TargetTensor, total_bytes, write_shards
from pangu_sigma.checkpoint.float_types import convert_float
from pangu_sigma.checkpoint.tensor_file import numpy_type
from pangu_sigma.data.tokenizers.hugging_face_files import GENERATION, OF_TOKENIZER
from pangu_sigma.json_reader import parse_object
from pangu_sigma.tensor_names import GATE, TensorName, is_routing
from pangu_sigma.version import VERSION

CODE = ("configuration_pangu_sigma.py", "modeling_pangu_sigma.py")
_TOKENIZER_CODE = "tokenization_pangu_sigma.py"
_TABLES = {"word": "words.0", "position": "positions", "query": "next_positions"}
_NORM = {"gamma": "weight", "beta": "bias"}


def weight_bytes(source: ExportSource, options: Options) -> int:
    """Bytes of the tensors."""
    return total_bytes(targets(source, options.dtype))


def write(source: ExportSource, folder: Path, options: Options) -> list[str]:
    """Write the folder; returns what there is to say. Raises UserError, OSError."""
    for name in CODE:
        (folder / name).write_bytes(_code(name))
    (folder / "README.md").write_text(_card(source), encoding="utf-8")
    write_folder(source, folder, configuration(source, options.dtype))
    write_shards(folder, "model", targets(source, options.dtype), options.max_shard_bytes)
    return []


def write_folder(source: ExportSource, folder: Path, settings: dict) -> None:
    """What every folder for transformers has beside tensors: `settings` as its configuration, the ids that generating
    needs, and the tokenizer."""
    own = {name: settings.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    imported = source.tokenizer.companions.get(GENERATION)
    generation = own if imported is None else parse_object(imported)
    if silent := source.tokenizer.ids_without_piece(source.vocab).tolist():
        generation["suppress_tokens"] = sorted({*(generation.get("suppress_tokens") or ()), *silent})
    for name, values in (("config.json", settings), ("generation_config.json", generation)):
        (folder / name).write_bytes(_json(values))
    for name, content in _tokenizer_files(source).items():
        (folder / name).write_bytes(content)


def targets(source: ExportSource, dtype: str | None) -> list[TargetTensor]:
    """Every tensor of the output, in the order in which the checkpoint's files hold them."""
    return [_target(source, dtype, *owned) for owned in source.by_owner()]


def hf_name(domain: int | None, name: TensorName) -> tuple[str, bool]:
    """(name in the modelling file, whether it is stored turned) of our tensor `name` of the chosen domain `domain`.

    Our matrices are [in, out]; nn.Linear's are [out, in]. Experts stay [experts, in, out]. ValueError for a name that
    the modelling file does not know: no tensor is left out.
    """
    module, tensor = name.module, name.tensor
    if module == "embedding":
        return f"model.{_TABLES[tensor] if domain is None else f'words.{domain}'}.weight", False
    if domain is not None:
        group = f"model.{name.layer}.feed_forward.groups.{domain}"
        if module in ("experts", "routing"):
            return f"{group}.{tensor.replace('.', '_') or module}", False
    elif tensor in _NORM:
        return f"model.{f'{name.layer}.' if name.layer else ''}{module}.{_NORM[tensor]}", False
    elif name.part == GATE:
        return f"model.{name.layer}.feed_forward.router.weight", True
    elif module in ("attention", "feed_forward") and tensor.endswith(("weight", "bias")):
        return f"model.{name}", tensor.endswith("weight")
    raise ValueError(f"the exported model has no place for tensor {name}")


def _target(source: ExportSource, dtype: str | None, full: str, domain: int | None, name: TensorName) -> TargetTensor:
    to, turned = hf_name(domain, name)
    shape = source.shape(full)
    stored, dtype = numpy_type(source.dtype(full)), dtype or source.dtype(full)

    def read() -> Iterator[np.ndarray]:
        if turned:
            yield convert_float(full, source.checkpoint.load([full])[full], dtype).T
            return
        for piece in source.checkpoint.byte_chunks(full):
            yield convert_float(full, np.frombuffer(piece, stored), dtype)

    return TargetTensor(to, "int32" if is_routing(full) else dtype, shape[::-1] if turned else shape, read)


def configuration(source: ExportSource, dtype: str | None) -> dict:
    """config.json."""
    model, tokenizer = source.config.model, source.tokenizer
    module = "modeling_pangu_sigma"
    return {
        "architectures": ["PanGuSigmaForCausalLM"],
        "model_type": "pangu_sigma",
        "auto_map": {
            "AutoConfig": "configuration_pangu_sigma.PanGuSigmaConfig",
            "AutoModel": f"{module}.PanGuSigmaModel",
            "AutoModelForCausalLM": f"{module}.PanGuSigmaForCausalLM",
        },
        "dtype": dtype or source.main_dtype,
        "vocab_size": source.vocab,
        "hidden_size": model.hidden,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "intermediate_size": model.ffn,
        "max_position_embeddings": model.positions,
        "activation_function": model.activation,
        "layer_norm_epsilon": model.norm_epsilon,
        "initializer_range": model.init_std,
        "query_layer": model.has_query_layer,
        "sparse_layers": list(model.sparse_prefixes),
        "router": model.router,
        "domains": list(source.domains),
        "experts": list(source.experts),
        "domain": source.domains[0],
        "embedding_slots": "per_domain" if model.domain_parameters.embedding == "own" else "shared",
        "bos_token_id": tokenizer.eod_id,
        "eos_token_id": tokenizer.eod_id,
        "pad_token_id": tokenizer.pad_id,
        "ids_without_piece": tokenizer.ids_without_piece(source.vocab).tolist(),
        "tie_word_embeddings": True,
        "use_cache": True,
        "pangu_sigma_version": VERSION,
    }


def _code(name: str) -> bytes:
    return files("extract.export").joinpath("hf_files", name).read_bytes()


def _tokenizer_files(source: ExportSource) -> dict[str, bytes]:
    """What AutoTokenizer needs, by name: the tokenizer's own, settings, and where it is ours its code."""
    settings = _json(_tokenizer(source))
    if source.tokenizer.kind == "huggingface":
        companions = source.tokenizer.companions
        imported = {name: companions[name] for name in OF_TOKENIZER if name in companions}
        return {"tokenizer.json": source.tokenizer.model, "tokenizer_config.json": settings} | imported
    return {
        "tokenizer.model": source.tokenizer.model,
        "tokenizer_config.json": settings,
        _TOKENIZER_CODE: _code(_TOKENIZER_CODE),
    }


def _tokenizer(source: ExportSource) -> dict:
    tokenizer = source.tokenizer
    if tokenizer.kind == "huggingface":
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": tokenizer.piece(tokenizer.eod_id),
            "pad_token": tokenizer.piece(tokenizer.pad_id),
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
            "model_max_length": source.config.model.positions,
        }
    settings = {
        "tokenizer_class": "PanGuSigmaTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_pangu_sigma.PanGuSigmaTokenizer", None]},
        "kind": tokenizer.kind,
        "eod_id": tokenizer.eod_id,
        "pad_id": tokenizer.pad_id,
        "padding_side": "left",
        "model_max_length": source.config.model.positions,
    }
    if tokenizer.kind == "pangu_alpha":
        import jieba

        settings["jieba_version"] = jieba.__version__
    return settings


def _json(values: dict) -> bytes:
    return json.dumps(values, indent=2, ensure_ascii=False).encode() + b"\n"


def _card(source: ExportSource) -> str:
    """README.md in the form of a model card."""
    return _CARD.format(
        domains=", ".join(source.domains),
        network=network_line(source),
        step=source.checkpoint.step,
        fingerprint=source.tokenizer.fingerprint[:12],
        domain_argument=f', domain="{source.domains[0]}"' if len(source.domains) > 1 else "",
        positions=source.config.model.positions,
    )


_CARD = """---
library_name: transformers
pipeline_tag: text-generation
---

# PanGu-Σ: {domains}

{network}. Trained for {step:,} steps; its tokenizer's
fingerprint is {fingerprint}….

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(".", trust_remote_code=True)
inputs = tokenizer("…", return_tensors="pt")
ids = model.generate(**inputs, max_new_tokens=64{domain_argument})
print(tokenizer.decode(ids[0], skip_special_tokens=True))
```

The tokenizer puts the end-of-document token first, because every document begins after one. Positions and attention
restart after each. At most {positions:,} tokens a document.
"""
