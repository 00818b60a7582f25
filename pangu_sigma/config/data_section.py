"""The `domains` and `data` sections: which texts there are and how they become sequences."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, StringConstraints

from pangu_sigma.config.section import Field, ListOf, Section, Violations
from pangu_sigma.errors import argument

# A domain's name becomes a file name and a part of tensor names.
DomainName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=64)]
Text = Annotated[str, StringConstraints(min_length=1)]
# A checkpoint stores a domain in a file of its name, beside files and folders that have these names.
RESERVED_NAMES = frozenset(
    {"shared", "manifest", "config", "tokenizer", "probe", "optimizer", "state", "trainer", "domains", "all", "none"}
)
# The command line takes it in a domain's place: the domain is to be inferred from the text.
INFERRED_DOMAIN = "auto"
# Large files of a checkpoint are numbered so.
_SHARD_NUMBER = re.compile(r"-\d{5}-of-\d{5}$")
PANGU_ALPHA_VOCABULARY = 40000
# `data.stream.path` of documents that come through standard input.
STANDARD_INPUT = "-"


# Files or globs; one may be written without a list.
Paths = Annotated[ListOf[Text], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]


def _sequence_length(written: Any) -> int:
    """As long as the model's positions, where the batch is left to us too; else what files that write it mean."""
    return min(written.model.positions, 1024 if written.train.batch_size is None else 128)


def _vocabulary(written: Any) -> int:
    """As many pieces as a preset's word embedding has rows, under the same condition."""
    return (written.train.batch_size is None and written.model.vocab_size) or 4096


class DomainConfig(Section, resume="fixed", init_from="free"):
    """One domain: its name, its texts, the size of its expert group and how often it is drawn."""

    name: DomainName = Field(init_from="equal")
    """Name of the domain; files and tensors are named after it."""
    data: Paths = Field(min_length=1, is_path=True, resume="free")
    """Files of the domain, or globs: .jsonl (a document a line) or .txt (cut at blank lines); one may stand alone."""
    text_field: Text = "text"
    """Key of the text in a line of a .jsonl file."""
    filters: Literal["none", "text", "code"] = "none"
    """Documents to drop: text: endless repetition; code: also where one or two words are most of it."""
    stars_field: Text | None = None
    """With filters code, key of a repository's stars in a .jsonl line; under two, it is dropped."""
    experts: int = Field(4, ge=1, init_from="equal")
    """Size of the domain's expert group in every sparse layer; groups may differ in size."""
    weight: float = Field(1.0, ge=0)
    """How often the domain is drawn, relative to the others."""

    def violations(self, key: str) -> Violations:
        """Broken rules of the domain, which stands at `key`."""
        if self.name in RESERVED_NAMES:
            yield f"{key}.name = {self.name} is reserved for a file of the checkpoint: choose another name"
        if self.name == INFERRED_DOMAIN:
            yield (
                f"{key}.name = {self.name} is reserved: {argument('domain', self.name)} has a text's domain "
                "inferred; choose another name"
            )
        if self.stars_field is not None and self.filters != "code":
            yield (
                f"{key}.stars_field is set, but only code is judged by its stars: set it to null, or {key}.filters to "
                "code"
            )
        if _SHARD_NUMBER.search(self.name):
            yield f"{key}.name = {self.name} ends like a numbered file of the checkpoint: choose another name"


class TokenizerConfig(Section, resume="fixed", init_from="taken over"):
    """Where the tokenizer comes from."""

    kind: Literal["train", "sentencepiece", "pangu_alpha", "huggingface"] = "train"
    """Train one from the domains' mix, or load a file: SentencePiece's, PanGu-α's, a tokenizer.json."""
    path: Text | None = Field(None, is_path=True, resume="free")
    """The tokenizer's model file; null if and only if it is trained."""
    vocab_size: int | None = Field(None, ge=64, fill=_vocabulary)
    """Pieces of a trained tokenizer; null: model.vocab_size or 4096, under a written batch_size 4096."""
    eod: int | Text | None = None
    """Piece or id that ends documents in a tokenizer that is given; null takes the usual one."""

    @property
    def known_size(self) -> int | None:
        """Size of the vocabulary where no file has to be read for it, else None."""
        return {"train": self.vocab_size, "pangu_alpha": PANGU_ALPHA_VOCABULARY}.get(self.kind)

    def violations(self) -> Violations:
        """Broken rules of the tokenizer section."""
        if self.kind == "train" and self.path is not None:
            yield (
                "data.tokenizer.path is set, but data.tokenizer.kind is train: set the path to null, or the kind to "
                "sentencepiece, pangu_alpha or huggingface"
            )
        if self.kind == "train" and self.eod is not None:
            yield (
                "data.tokenizer.eod is set, but a trained tokenizer has an end of documents of its own: set it to "
                "null, or data.tokenizer.kind to that of a file"
            )
        if self.kind != "train" and self.path is None:
            yield f"data.tokenizer.path is missing: data.tokenizer.kind = {self.kind} needs the tokenizer's model file"


class StreamConfig(Section, resume="fixed", init_from="free"):
    """An endless source of documents that training learns from as they arrive, instead of the domains' files."""

    path: Text = Field(resume="free", is_path=True, no_path=STANDARD_INPUT)
    """A growing .jsonl file, or - for standard input."""
    domain: DomainName | None = None
    """Domain of every document; null takes the one that the document's domain_field names."""
    domain_field: Text = "domain"
    """Key of the domain's name in a line, where domain is null."""
    text_field: Text = "text"
    """Key of the text in a line."""


class DataConfig(Section, resume="fixed", init_from="free"):
    """How texts become sequences."""

    tokenizer: TokenizerConfig = TokenizerConfig()
    sequence_length: int | None = Field(None, ge=2, fill=_sequence_length)
    """Tokens in a sequence; null: model.positions up to 1024, or 128 under a written train.batch_size."""
    cache: Text | None = Field(None, resume="free", is_path=True)
    """Folder of the tokenised domains; null takes the folder 'data' in run.dir."""
    heldout_fraction: float = Field(0.05, ge=0, lt=1)
    """Share of a domain's documents kept from training for evaluation, at least one; 0 keeps none."""
    deduplicate: Literal["none", "exact", "near"] = "exact"
    """Documents to drop before the split: none, copies (exact), or also those that resemble one (near)."""
    prefetch: int = Field(2, ge=0, resume="free")
    """Batches read ahead of the step; 0 reads each when it is needed."""
    max_domains_per_batch: int | None = Field(None, ge=1)
    """Most domains that one optimizer step mixes; null sets no limit."""
    stream: StreamConfig | None = None
    """Source of documents to learn from as they arrive; null trains on the domains' files.
    `pangu-sigma train FILE.yaml --stream SOURCE` sets it."""
