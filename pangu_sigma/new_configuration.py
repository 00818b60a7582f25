"""A configuration for a user's own files, with everything assumed that they do not say: `pangu-sigma init`."""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from pangu_sigma.checkpoint.folder_locks import refuse_model_folder, removed_if_refused
from pangu_sigma.config import SCHEMA_VERSION, Config
from pangu_sigma.config.config_paths import with_paths_from_file
from pangu_sigma.config.data_section import INFERRED_DOMAIN, RESERVED_NAMES, DomainName
from pangu_sigma.config.load_config import load_values
from pangu_sigma.config.yaml_text import dump_yaml
from pangu_sigma.data.corpus import Corpus, prepare_corpus
from pangu_sigma.data.tokenizers.tokenizer_training import VocabularyTooLarge
from pangu_sigma.errors import UserError
from pangu_sigma.json_reader import LARGE, UnreadableText, parse_object
from pangu_sigma.monitor.result_files import write_text
from pangu_sigma.plan.run_summary import run_summary
from pangu_sigma.wording import listed

FILE = "train.yaml"
PRESET = "tiny"
EPOCHS = 4  # passes over the text of all domains together, within these steps
FEWEST_STEPS, MOST_STEPS = 100, 2000
_VOCABULARIES = (4096, 2048, 1024, 512, 320)
_KINDS = (".jsonl", ".txt")
_HEADER = (
    "# Made by `pangu-sigma init`. Keys that are not written have defaults that fit the model:\n"
    "# `pangu-sigma config` of this file shows them, `pangu-sigma config --describe` explains every key.\n"
)


@dataclass(frozen=True, repr=False)
class NewConfiguration:
    """A configuration that was written to `path`, in its effective form.

    documents, tokens: kept ones, by domain. dropped: documents by domain and reason. messages: what became of them, in
    sentences. passes: how often a run reads a domain's training text, by domain.
    """

    path: Path
    config: Config
    documents: dict[str, int]
    tokens: dict[str, int]
    dropped: dict[str, dict[str, int]]
    messages: list[str]
    passes: dict[str, float]

    def __repr__(self) -> str:
        steps = self.config.train.steps
        return f"NewConfiguration({str(self.path)!r}, tokens={self.tokens}, steps={steps})"

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def summary(self) -> list[str]:
        """What a training builds, and about how long it takes and in how much memory, as `train` says at its start."""
        vocabulary = self.config.data.tokenizer.vocab_size
        assert vocabulary is not None
        return run_summary(self.config, vocabulary)

def write_configuration(folder: Path, data: Sequence[Path]) -> NewConfiguration:
    """Write `folder`/train.yaml, whose run lives in `folder` too, for a domain of each file or folder of `data`.

    The text is tokenised into the folder, where the run finds it. Raises UserError for what is there already, and for
    text that cannot be trained on.
    """
    path = folder / FILE
    if path.exists():
        raise UserError(f"{path} exists already: edit it, remove it, or name another folder")
    refuse_model_folder(folder)
    for source in data:
        if source.is_dir() and folder.resolve().is_relative_to(source.resolve()):
            raise UserError(
                f"{folder} lies in {source}, and the run's own files would become its text: name a folder elsewhere"
            )
    domains = [{"name": name, **_text_of(source)} for name, source in _named(data).items()]
    values: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "paths_from": "current_folder",
        "run": {"dir": str(folder.absolute())},
        "model": {"preset": PRESET},
        "domains": domains,
        "train": {"steps": FEWEST_STEPS},
    }
    with removed_if_refused(folder, ("data",)):
        corpus = _prepared(values)
        _fit_to_text(values, corpus, path)
    config = load_values(copy.deepcopy(values), str(path))
    write_text(path, _HEADER + dump_yaml(with_paths_from_file(values, folder)))
    train, length = config.train, config.data.sequence_length
    assert train.batch_size is not None and length is not None
    drawn = train.steps * train.batch_size * length / len(domains)  # tokens of each: init writes no weights
    return NewConfiguration(
        path,
        config,
        documents={store.name: sum(store.documents.values()) for store in corpus.stores},
        tokens={store.name: sum(store.tokens.values()) for store in corpus.stores},
        dropped={store.name: store.dropped.counts for store in corpus.stores},
        messages=[*corpus.messages(), *corpus.warnings()],
        passes={store.name: drawn / store.tokens["train"] for store in corpus.stores},
    )


def _fit_to_text(values: dict[str, Any], corpus: Corpus, path: Path) -> None:
    """Write a sequence length that the shortest text has, and steps for a few epochs, into `values`."""
    train_tokens = {store.name: store.tokens["train"] for store in corpus.stores}
    longest, fewest = load_values(dict(values), str(path)).data.sequence_length, min(train_tokens.values())
    assert longest is not None  # filled in, as the rest is
    if fewest <= longest:
        values["data"] = {**values.get("data", {}), "sequence_length": 2 ** int(math.log2(max(2, fewest - 1)))}
    config = load_values(dict(values), str(path))
    batch_size, length = config.train.batch_size, config.data.sequence_length
    assert batch_size is not None and length is not None
    steps = EPOCHS * sum(train_tokens.values()) / (batch_size * length)
    values["train"] = {"steps": max(FEWEST_STEPS, min(math.ceil(steps / 10) * 10, MOST_STEPS))}


def _named(data: Sequence[Path]) -> dict[str, Path]:
    """Domain -> its file or folder. A name is the file's, with its folder's in front where two are alike."""
    for path in data:
        if not path.exists():
            raise UserError(f"{path} does not exist: name files (.txt, .jsonl) or folders of them")
    if len({path.resolve() for path in data}) < len(data):
        raise UserError("a file or folder is named twice: name each once, one domain each")
    names = [_name(path) for path in data]
    counts = Counter(names)
    names = [
        _name(path.resolve().parent) + "_" + name if counts[name] > 1 else name
        for path, name in zip(data, names, strict=True)
    ]
    for path, name in zip(data, names, strict=True):
        others = [str(other) for other, its in zip(data, names, strict=True) if its == name and other != path]
        if others:
            raise UserError(
                f"{path} and {others[0]} would both be the domain {name}: rename one, or put both into one folder, "
                "which is one domain"
            )
    return dict(zip(names, data, strict=True))


def _name(path: Path) -> str:
    """A valid domain name made from a file's or folder's name."""
    stem = path.name if path.is_dir() else path.stem
    name = re.sub(r"[^a-z0-9_-]+", "_", (stem or path.resolve().name).lower()).strip("_-")[:48]
    try:
        TypeAdapter(DomainName).validate_python(name)
    except ValidationError:
        name = "domain"
    return f"{name}_text" if name in {*RESERVED_NAMES, INFERRED_DOMAIN} else name


def _text_of(source: Path) -> dict[str, object]:
    """`data` and `text_field` of a domain whose text is a file, or all that lies in a folder."""
    files = [source]
    if source.is_dir():
        files = sorted(file for file in source.rglob("*") if file.suffix.lower() in _KINDS and file.is_file())
    if not files:
        raise UserError(f"{source} holds no .txt and no .jsonl file: convert its text to one of them")
    patterns = [str(source.absolute())]
    if source.is_dir():
        suffixes = sorted({file.suffix for file in files})
        patterns = [f"{escape(str(source.absolute()))}/**/*{suffix}" for suffix in suffixes]
    fields = set()
    for file in files:
        if file.suffix.lower() not in _KINDS:
            raise UserError(f"{file} is neither .txt nor .jsonl: convert it to one of them")
        if not file.is_file():
            raise UserError(f"{file} is a pipe or a device and no regular file: name a text file")
        with open(file, "rb") as stream:
            if b"\0" in stream.read(1 << 16):
                raise UserError(f"{file} is no text but binary data: name a text file in UTF-8")
        if not source.is_dir() and not file.stat().st_size:
            raise UserError(f"{file} is empty: put text into it, or leave it out")
        if file.suffix.lower() == ".jsonl":
            fields.add(_text_field(file))
    if len(fields) > 1:
        keys = listed(fields)
        raise UserError(f"{source} has files with the text under different keys ({keys}): make a folder for each")
    field = next(iter(fields), "text")
    return {"data": patterns} | ({} if field == "text" else {"text_field": field})


def _text_field(file: Path) -> str:
    """Key of the text in a .jsonl file: text where there is one, else the longest string of the first line."""
    with open(file, encoding="utf-8-sig", errors="replace") as stream:
        line = next((line for line in stream if line.strip()), "")
    try:
        record = parse_object(line, LARGE, lenient=True)
    except UnreadableText:
        return "text"  # reading it says what is wrong
    lengths = {key: len(value) for key, value in record.items() if isinstance(value, str)}
    return "text" if "text" in lengths or not lengths else max(lengths, key=lengths.__getitem__)


def _prepared(values: dict) -> Corpus:
    """The tokenised text, with as large a vocabulary as it can fill, which is written into `values` if it is not the
    default. Sequences of any length fit: how long they may be is seen from the text."""
    for size in _VOCABULARIES:
        if size != _VOCABULARIES[0]:
            values["data"] = {"tokenizer": {"vocab_size": size}}
        config = load_values({**values, "data": {**values.get("data", {}), "sequence_length": 2}}, FILE)
        try:
            return prepare_corpus(config)
        except VocabularyTooLarge:
            if size == _VOCABULARIES[-1]:
                raise
    raise AssertionError("the last vocabulary returns or raises")
