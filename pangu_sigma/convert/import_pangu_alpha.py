"""Importing PanGu-α: its published or merged MindSpore checkpoint becomes a model folder with a dense model.

PanGu-α: arXiv 2104.12369; code and strategy files: huawei-noah/Pretrained-Language-Model, PanGu-α. Weights trained with
pipeline stages in MindSpore's later code are another function of the same tensors (the backbone's norm comes after the
query layer there); nothing in the file tells them apart, so such a checkpoint must not be given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pangu_sigma.checkpoint import TensorSpec
from pangu_sigma.checkpoint.model_folder import check_output
from pangu_sigma.config import Config
from pangu_sigma.config.parameter_counts import parameter_counts, tensor_shapes
from pangu_sigma.config.presets import PRESETS
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
from pangu_sigma.convert.pangu_alpha_names import SKIPPED, target_of
from pangu_sigma.convert.pangu_alpha_source import Tensors, open_source
from pangu_sigma.data.tokenizers.tokenizer import Tokenizer
from pangu_sigma.errors import UserError, argument
from pangu_sigma.monitor.progress import progress
from pangu_sigma.tensor_names import POSITIONS, QUERY_LAYER, WORDS, parse_name, tensor_name
from pangu_sigma.wording import listed


@dataclass(frozen=True, kw_only=True)
class PanguAlphaImportSettings(ImportSettings):
    """heads: None takes the published number for the model's size. eod_id: None takes the tokenizer's <eot>, 9."""

    tokenizer: Path
    tokenizer_kind: str = "pangu_alpha"
    heads: int | None = None
    activation: str = "gelu"
    strategy: Path | None = None


@dataclass(frozen=True, repr=False)
class ImportedPanguAlpha(ConvertedModel):
    """The written folder; `skipped` are the source's tensors that are no parameters, by the rule that names them."""

    eod_id: int
    transposed: int
    skipped: dict[str, list[str]]


@dataclass(frozen=True)
class _SourceRows:
    """One tensor of the source and where it goes."""

    source: Tensors
    name: str
    target: str
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that it gives."""
        shape = tuple(self.source.shapes[self.name])
        return shape[::-1] if self.transposed else shape

    def read(self) -> np.ndarray:
        array = np.empty(self.shape, np.float32)
        stored = array.T if self.transposed else array
        self.source.fill(self.name, stored)
        check_finite("the checkpoint", self.name, stored)
        return array


def import_pangu_alpha(source: Path, out: Path, settings: PanguAlphaImportSettings) -> ImportedPanguAlpha:
    """Write `out`, a complete model folder, from the `.ckpt` file or the folder of shards at `source`.

    Weights are stored as float32, which holds every type of such checkpoints exactly. A tensor that the source has
    more than once (slices of a parallel run, an `.npy` file beside it) must be the same everywhere. Raises UserError
    with the list of tensors unless every parameter is there once and every tensor of the source is used or skipped by
    a rule; nothing is written then.
    """
    out = check_output(out)
    tokenizer = open_tokenizer(settings.tokenizer, settings, "give the path of vocab.model", settings.eod_id)
    with progress("read the index", None, unit="shards") as job:
        sources = open_source(source, settings.strategy, job.advance)
    parts, skipped, unknown = _sort(sources)
    shapes = {part.target: part.shape for part in parts}
    config = _config(shapes, str(source), out, settings, tokenizer)
    by_target: dict[str, list[_SourceRows]] = {}
    for part in parts:
        by_target.setdefault(part.target, []).append(part)
    assigned = []
    for same in by_target.values():
        # Copies of one shape are compared when they are read; others are two tensors for one place.
        distinct = same[:1] if len({part.shape for part in same}) == 1 else same
        assigned += [(part.target, part.name, part.shape) for part in distinct]
    targets = tensor_shapes(config, config.model.vocab_size)
    check_coverage(str(source), targets, assigned, [*(name for _, name, _ in assigned), *unknown])

    def read(spec: TensorSpec) -> np.ndarray:
        part, *copies = by_target[spec.name]
        array = part.read()
        for copy in copies:
            if copy.read().tobytes() != array.tobytes():
                raise UserError(f"{source} holds {part.name} twice, with different values: leave only the right one")
        return array

    counts = parameter_counts(config, config.model.vocab_size)
    transposed = sum(same[0].transposed for same in by_target.values())
    written = write_converted(
        out,
        config,
        "import",
        origin={
            "job": "import pangu-alpha",
            "source": source.name,
            "eod_id": tokenizer.eod_id,
            "skipped": skipped,
        },
        card=_card(source, config, tokenizer.eod_id, counts.total, skipped),
        read=read,
        **tokenizer_contents(tokenizer),
    )
    return ImportedPanguAlpha(written, config, tokenizer.eod_id, transposed, skipped)


def _sort(sources: Sequence[Tensors]) -> tuple[list[_SourceRows], dict[str, list[str]], list[str]]:
    """(parameters, tensors left behind by rule, tensors with names that PanGu-α does not have)."""
    parts: list[_SourceRows] = []
    skipped: dict[str, list[str]] = {}
    unknown: list[str] = []
    for source in sources:
        for name in source.shapes:
            rule = SKIPPED.rule(name)
            target = target_of(name)
            if rule is not None:
                skipped.setdefault(rule, []).append(name)
            elif target is None:
                unknown.append(name)
            else:
                parts.append(_SourceRows(source, name, target.name, target.transposed))
    return parts, skipped, unknown


def _config(
    shapes: Mapping[str, tuple[int, ...]], source: str, out: Path, settings: PanguAlphaImportSettings,
    tokenizer: Tokenizer,
) -> Config:  # fmt: skip
    """The model's configuration: its sizes from the weights, the rest as PanGu-α was trained."""
    word = _needed(shapes, WORDS, source)
    up = _needed(shapes, tensor_name(QUERY_LAYER, "feed_forward", "up.weight"), source)
    positions = _needed(shapes, POSITIONS, source)
    if not len(word) == len(up) == len(positions) == 2:
        raise UserError(f"{source} has tables that are no matrices: give PanGu-α's own checkpoint")
    vocab, hidden = word
    blocks = len({layer for name in shapes if (layer := parse_name(name).layer)} - {QUERY_LAYER})
    heads = settings.heads or _published_heads(blocks + 1, hidden)
    model = {
        "vocab_size": vocab,
        "layers": blocks + 1,
        "hidden": hidden,
        "heads": heads,
        "ffn": up[1],
        "positions": positions[0],
        "activation": settings.activation,
    }
    return imported_config(model, source, out, settings, tokenizer, learning_rate=5e-5)


def _needed(shapes: Mapping[str, tuple[int, ...]], name: str, source: str) -> tuple[int, ...]:
    if name not in shapes:
        raise UserError(
            f"{source} lacks {name}, without which it is no PanGu-α model (it has {len(shapes)} of its tensors: "
            f"{listed(shapes, 4)}); the published shards need word_embedding.npy, position_embedding.npy and "
            "top_query_embedding.npy beside them"
        )
    return shapes[name]


def _published_heads(layers: int, hidden: int) -> int:
    for sizes in PRESETS.values():
        if (sizes["layers"], sizes["hidden"]) == (layers, hidden):
            return sizes["heads"]
    raise UserError(
        f"the weights do not tell the number of attention heads, and no published PanGu-α has {layers} layers of width "
        f"{hidden}: give {argument('heads')}"
    )


def skipped_lines(skipped: Mapping[str, Sequence[str]]) -> list[str]:
    """A sentence for every rule by which tensors were left behind."""
    return SKIPPED.lines({rule: len(names) for rule, names in skipped.items()})


def _card(source: Path, config: Config, eod_id: int, parameters: int, skipped: Mapping[str, Sequence[str]]) -> str:
    model = config.model
    left = "".join(f"- {line}\n" for line in skipped_lines(skipped)) or "- every tensor of the source is in the model\n"
    return (
        f"# {source.name}, imported\n\n"
        f"A dense PanGu-α model of {parameters:,} parameters, imported from `{source.name}`.\n\n"
        f"- {model.layers} layers (the query layer included), {model.hidden} wide, {model.heads} heads, "
        f"feed-forward {model.ffn}, {model.activation}\n"
        f"- vocabulary {model.vocab_size:,}, sequences of up to {model.positions} tokens, end-of-document id {eod_id}\n"
        f"- one domain: {config.domains[0].name}\n"
        f"{left}\n"
        "`manifest.json` lists every tensor with its hash; `pangu-sigma generate` and `pangu-sigma upcycle` take this "
        "folder.\n"
    )
