"""Token store of a domain, built once: duplicates dropped, held-out documents set aside, both parts tokenised.

The result lies in a folder of the cache whose name carries the fingerprint of corpus, tokenizer and settings, so a
changed corpus is noticed and made anew. ``store.json`` is written last and lists every file's sha256, which is
checked at each use.
"""

import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pangu_sigma.config.data_section import DataConfig, DomainConfig
from pangu_sigma.data.corpus_files import (
    TEXT_DOCUMENT_CHARS,
    Document,
    expand_paths,
    fingerprint_files,
    iterate_documents,
    stat_files,
)
from pangu_sigma.data.deduplication import SIMILARITY, Deduplicator, digest
from pangu_sigma.data.document_filters import REASONS, RULES, reason_to_drop
from pangu_sigma.data.dropped_documents import DroppedDocuments, place
from pangu_sigma.data.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from pangu_sigma.data.tokenizers.tokenizer import Tokenizer
from pangu_sigma.errors import UserError, disk_errors_explained
from pangu_sigma.json_reader import read_object
from parallel.comm.atomic_folder import atomic_folder, rename_unless_there

FORMAT_VERSION = 2
INFO_FILE = "store.json"
# progress(domain, stage "read" or "tokenise", documents done, documents in all or 0 while unknown)
Progress = Callable[[str, str, int, int], None]

_DROP, _TRAIN, _HELDOUT = 0, 1, 2
_BATCH_CHARS = 1_000_000  # documents are compared and encoded in batches of about this size
_PARTS = ("train", "heldout")
_COUNTS = "token_counts.npy"
_INFO_KEYS = (
    "name", "fingerprint", "corpus_fingerprint", "tokenizer_fingerprint", "documents", "tokens", "unknown_tokens"
)  # fmt: skip
_FILES = ("train.bin", "train.idx", "heldout.bin", "heldout.idx", _COUNTS)


@dataclass(frozen=True)
class DomainStore:
    """Tokenised text of a domain, on disk.

    ``train`` and ``heldout`` token stores; ``token_counts`` int64 [V] of the training part, end-of-document ids
    included; ``documents`` and ``tokens`` per part, ``unknown_tokens`` of them that stand for characters which the
    tokenizer cannot write; ``dropped`` documents with their reasons; ``fingerprint`` of all that decided the content,
    and of the corpus and the tokenizer alone, so that a difference can be named.
    """

    name: str
    train: IndexedDataset
    heldout: IndexedDataset
    token_counts: np.ndarray
    fingerprint: str
    corpus_fingerprint: str
    tokenizer_fingerprint: str
    documents: dict[str, int]
    tokens: dict[str, int]
    unknown_tokens: dict[str, int]
    dropped: DroppedDocuments
    folder: Path

    @property
    def unknown_share(self) -> float:
        """Share of the tokens, training and held-out, that stand for what the tokenizer cannot write."""
        return sum(self.unknown_tokens.values()) / max(sum(self.tokens.values()), 1)

    @property
    def identity(self) -> dict[str, str]:
        """What a checkpoint keeps to refuse a changed input by name: corpus, tokenizer, data settings."""
        return {
            "corpus": self.corpus_fingerprint,
            "tokenizer": self.tokenizer_fingerprint,
            "data settings": self.fingerprint,
        }


def prepare_domain(
    source: DomainConfig,
    tokenizer: Tokenizer,
    config: DataConfig,
    progress: Progress | None = None,
    known_corpus: str | None = None,
) -> DomainStore:
    """Tokenise a domain, or open what an earlier call made of the same input in ``config.cache``.

    ``known_corpus``: fingerprint of the text, by which its store is found where its files are gone.

    A document is held out by a hash of its content, at least one unless the fraction is 0 (then none); duplicates (as
    ``config.deduplicate`` says) are dropped before, so that no held-out document is among the training ones.
    ``config.sequence_length`` S only sets the least size: S + 1 tokens. Raises UserError for unusable input (see
    ``corpus_files``), a corpus too small to train on or to hold anything out, a damaged cache (named), and a full disk.
    """
    if known_corpus is not None and not is_text_here(source):
        folder = find_store(source, tokenizer.fingerprint, config, known_corpus)
        if folder is not None:
            return open_store(folder, tokenizer.vocab_size)
    files = expand_paths(source.name, source.data)
    before = stat_files(files)
    corpus = fingerprint_files(files)
    settings = _settings(source, config)
    fingerprint = _fingerprint(corpus, tokenizer.fingerprint, settings)
    folder = _folder(source, config, fingerprint)
    if not folder.exists():
        info = {
            "format_version": FORMAT_VERSION,
            "name": source.name,
            "fingerprint": fingerprint,
            "corpus_fingerprint": corpus,
            "tokenizer_fingerprint": tokenizer.fingerprint,
            "settings": settings,
        }
        with (
            disk_errors_explained(f"tokenising domain '{source.name}' into {folder}", "set another data.cache"),
            atomic_folder(folder, rename_unless_there, shared=True) as fresh,
        ):
            info |= _build(fresh, source, files, tokenizer, config, progress or _quiet)
            if stat_files(files) != before:
                raise UserError(f"a file of domain '{source.name}' changed while it was read; start again")
            _write_info(fresh, info)
    with disk_errors_explained(f"the token store {folder}", "set another data.cache"):
        store = open_store(folder, tokenizer.vocab_size)
    if store.tokens["train"] < config.sequence_length + 1:
        raise UserError(
            f"domain '{source.name}' has {store.tokens['train']} training tokens, fewer than one sequence of "
            f"{config.sequence_length + 1}; add text or lower data.sequence_length"
        )
    return store


def is_text_here(source: DomainConfig) -> bool:
    """Whether all files that a domain names are there."""
    try:
        return bool(expand_paths(source.name, source.data))
    except UserError:
        return False


def find_store(source: DomainConfig, tokenizer: str, config: DataConfig, corpus: str) -> Path | None:
    """The folder in which text with the fingerprint ``corpus`` was tokenised, by a tokenizer with the fingerprint
    ``tokenizer``; None where it is not in the cache."""
    folder = _folder(source, config, _fingerprint(corpus, tokenizer, _settings(source, config)))
    return folder if folder.is_dir() else None


def _settings(source: DomainConfig, config: DataConfig) -> dict[str, object]:
    """What decides the content of a store beside its text and its tokenizer."""
    settings = {
        "text_field": source.text_field,
        # Earlier stores held a document out at 0 too; they are no longer found.
        "heldout_fraction": config.heldout_fraction or None,
        "deduplicate": f"near {SIMILARITY}" if config.deduplicate == "near" else config.deduplicate,
        "text_document_chars": TEXT_DOCUMENT_CHARS,
        "format_version": FORMAT_VERSION,
    }
    if RULES[source.filters]:
        # Only where there are rules, so that stores without any are still found.
        settings |= {"filters": source.filters, "stars_field": source.stars_field, "filter_rules": REASONS}
    return settings


def _fingerprint(corpus: str, tokenizer: str, settings: dict[str, object]) -> str:
    return hashlib.sha256("\n".join([corpus, tokenizer, json.dumps(settings, sort_keys=True)]).encode()).hexdigest()


def _folder(source: DomainConfig, config: DataConfig, fingerprint: str) -> Path:
    return Path(config.cache) / f"{source.name}-{fingerprint[:16]}"


def open_store(folder: str | Path, vocab_size: int) -> DomainStore:
    """Open a domain's folder. Every file's size and sha256 are checked first: UserError names the first that
    differs.
    """
    folder = Path(folder)
    advice = f"remove the folder {folder} and start again to tokenise anew"
    path = folder / INFO_FILE
    try:
        info = read_object(path)
        # Stores of earlier versions have no hash of what describes them.
        if info.pop("sha256", None) not in (None, _info_digest(info)):
            raise ValueError("sha256")
        files = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in info["files"].items()}
        described = {key: info[key] for key in _INFO_KEYS}
        described["dropped"] = DroppedDocuments.stored(info["dropped"], info["dropped_examples"])
    except OSError as error:
        raise UserError(f"the token store's {path} cannot be read ({error.strerror}); {advice}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"the token store's {path} is damaged; {advice}") from error
    for name in _FILES:
        if (size := _size(folder / name)) is None:
            raise UserError(f"the token store {folder / name} is missing; {advice}")
        if name not in files or size != files[name][0]:
            raise UserError(f"the token store {folder / name} has {size} bytes, not what {INFO_FILE} says; {advice}")
        if _sha256(folder / name) != files[name][1]:
            raise UserError(f"the token store {folder / name} is damaged (its sha256 differs); {advice}")
    train, heldout = (IndexedDataset(folder / part) for part in _PARTS)
    counts = np.load(folder / _COUNTS, allow_pickle=False)
    if counts.shape != (vocab_size,):
        raise UserError(f"the token store {folder} is of a vocabulary of {counts.size}, not {vocab_size}; {advice}")
    return DomainStore(train=train, heldout=heldout, token_counts=counts, folder=folder, **described)


def unigram_loss(token_counts: np.ndarray, heldout_counts: np.ndarray) -> float:
    """Loss of the unigram model, which any language model must beat: mean negative log likelihood (nats per token) of
    the held-out tokens under the training part's frequencies.

    Both int64 [V]: how often each token occurs. One is added to every training count, so that a token never seen has a
    probability.
    """
    log_p = np.log(token_counts + 1.0) - np.log(token_counts.sum() + len(token_counts))
    return float(-(heldout_counts * log_p).sum() / heldout_counts.sum())


def _build(
    folder: Path,
    source: DomainConfig,
    files: Sequence[Path],
    tokenizer: Tokenizer,
    config: DataConfig,
    progress: Progress,
) -> dict[str, dict]:
    """Write both parts and the counts; what is returned goes into ``store.json``."""
    parts, dropped = _assign(source, files, tokenizer, config, progress)
    done = 0
    with (
        IndexedDatasetBuilder(folder / _PARTS[0], tokenizer.vocab_size, tokenizer.eod_id) as train,
        IndexedDatasetBuilder(folder / _PARTS[1], tokenizer.vocab_size, tokenizer.eod_id) as heldout,
    ):
        writers = {_TRAIN: train, _HELDOUT: heldout}
        for batch in _batches(source, files):
            chosen = parts[done : done + len(batch)].tolist()
            kept = [(part, document.text) for part, document in zip(chosen, batch, strict=True) if part != _DROP]
            for (part, _), ids in zip(kept, tokenizer.encode_batch([text for _, text in kept]), strict=True):
                writers[part].add(ids)
            done += len(batch)
            progress(source.name, "tokenise", done, len(parts))
    stores = {part: IndexedDataset(folder / part) for part in _PARTS}
    counts = {part: store.counts(tokenizer.vocab_size) for part, store in stores.items()}
    unk = tokenizer.unk_id
    np.save(folder / _COUNTS, counts["train"], allow_pickle=False)
    return {
        "documents": {part: store.documents for part, store in stores.items()},
        "tokens": {part: store.tokens for part, store in stores.items()},
        "unknown_tokens": {part: 0 if unk is None else int(c[unk]) for part, c in counts.items()},
        "dropped": dropped.counts,
        "dropped_examples": dropped.examples,
    }


def _assign(
    source: DomainConfig,
    files: Sequence[Path],
    tokenizer: Tokenizer,
    config: DataConfig,
    progress: Progress,
) -> tuple[np.ndarray, DroppedDocuments]:
    """The part of every document of the corpus in order (uint8 [documents]), and what was dropped."""
    finder = None if config.deduplicate == "none" else Deduplicator(config.deduplicate)
    parts: list[int] = []
    ranks: list[int] = []  # the content hash: below the fraction of its range means held out
    dropped = DroppedDocuments.none_yet(source)
    places = array("Q")  # of the documents that `finder` was asked of: the file's index and the line in 32 bits each
    indices = {file: index for index, file in enumerate(files)}
    for batch in _batches(source, files):
        reasons = _reasons(source, batch, tokenizer)
        filled = [document for document, reason in zip(batch, reasons, strict=True) if reason is None]
        places.extend(indices[document.file] << 32 | document.line for document in filled)
        found = iter(finder.duplicates([d.text for d in filled]) if finder else [None] * len(filled))
        for document, reason in zip(batch, reasons, strict=True):
            original = None
            if reason is None and (duplicate := next(found)) is not None:
                reason, at = duplicate.reason, places[duplicate.original]
                original = place(Document("", files[at >> 32], at & 0xFFFFFFFF))
            rank = int.from_bytes(digest(document.text)[:8], "little")
            if reason is None:
                parts.append(_HELDOUT if rank < config.heldout_fraction * 2.0**64 else _TRAIN)
            else:
                parts.append(_DROP)
                dropped.add(reason, document, original)
            ranks.append(rank)
        progress(source.name, "read", len(parts), 0)
    assigned = np.array(parts, dtype=np.uint8)
    kept = np.flatnonzero(assigned != _DROP)
    if not len(kept):
        filtered = dropped.total - dropped.counts["empty"]
        why = f" but {filtered} documents that its filters drop" if filtered else ""
        raise UserError(f"domain '{source.name}' has no text in {_shown(files)}{why}: add some, or name other files")
    if not config.heldout_fraction:
        return assigned, dropped
    by_rank = kept[np.argsort(np.array(ranks, dtype=np.uint64)[kept], kind="stable")]
    if ranks[by_rank[0]] == ranks[by_rank[-1]]:
        lost = f" of {len(parts):,} ({dropped.advice(source.name)})" if dropped.total else ""
        raise UserError(
            f"domain '{source.name}' has a single document left to learn from{lost}, so nothing can be held out; "
            "add documents, or give one long text as .txt, which is cut at blank lines"
        )
    # Few documents may all fall on one side; equal ones (kept when nothing is deduplicated) must stay together.
    ranks_kept = np.array(ranks, dtype=np.uint64)
    if not (assigned == _HELDOUT).any():
        assigned[(assigned == _TRAIN) & (ranks_kept == ranks_kept[by_rank[0]])] = _HELDOUT
    if not (assigned == _TRAIN).any():
        assigned[(assigned == _HELDOUT) & (ranks_kept == ranks_kept[by_rank[-1]])] = _TRAIN
    return assigned, dropped


def _reasons(source: DomainConfig, batch: Sequence[Document], tokenizer: Tokenizer) -> list[str | None]:
    """Why each document is not learned from, duplicates aside: it is empty, or a filter's reason; None to keep it."""
    reasons: list[str | None] = [None if document.text.strip() else "empty" for document in batch]
    if not RULES[source.filters]:
        return reasons
    filled = [index for index, reason in enumerate(reasons) if reason is None]
    ids = tokenizer.encode_batch([batch[index].text for index in filled])
    for index, tokens in zip(filled, ids, strict=True):
        reasons[index] = reason_to_drop(source.filters, batch[index].text, tokens, batch[index].stars)
    return reasons


def _batches(source: DomainConfig, files: Sequence[Path]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in iterate_documents(source.name, files, source.text_field, source.stars_field):
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write_info(folder: Path, info: dict) -> None:
    entries = {name: {"bytes": _size(folder / name), "sha256": _sha256(folder / name)} for name in _FILES}
    with open(folder / INFO_FILE, "w", encoding="utf-8") as stream:
        whole = info | {"files": entries}
        json.dump(whole | {"sha256": _info_digest(whole)}, stream, indent=2, ensure_ascii=False)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())


def _info_digest(info: dict) -> str:
    """The hash of what describes a store, itself left out."""
    return hashlib.sha256(json.dumps(info, sort_keys=True).encode()).hexdigest()


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _shown(files: Sequence[Path]) -> str:
    return str(files[0]) + (f" and {len(files) - 1} more" if len(files) > 1 else "")


def _quiet(domain: str, stage: str, done: int, total: int) -> None:
    """No progress is wanted."""
