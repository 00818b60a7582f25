"""Tokenizer training: a SentencePiece BPE model from the domains' mix, or the tokenizer that a configuration names.

Settings that make it exact for any text, code included: identity normalisation, no dummy prefix, spaces kept, byte
fallback for characters outside the vocabulary. Line ends and tabs are pieces of their own; runs of spaces are learned
like words. Digits stand alone, so that numbers are read digit by digit.
"""

import hashlib
import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from pangu_sigma.config.data_section import DomainConfig
from pangu_sigma.data.corpus_files import expand_paths, fingerprint_files, iterate_documents
from pangu_sigma.data.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from pangu_sigma.data.tokenizers.tokenizer import Tokenizer
from pangu_sigma.data.tokenizers.tokenizer_registry import load_tokenizer, read_model, tokenizer_class
from pangu_sigma.errors import UserError, disk_errors_explained
from parallel.comm.atomic_folder import atomic_folder, rename_unless_there
from rre.counted_random import key64, uniform

TRAINING_BYTES = 10_000_000  # about this much text of the mix decides the pieces
MOST_REPEATS = 4.0  # a small domain with a large weight is repeated at most so often
SMALLEST_VOCABULARY = 320  # 256 bytes, 3 specials, 3 layout pieces, and some room for merges
_LAYOUT = ("\n", "\n\n", "\t")
_RESERVED = 256 + 3 + len(_LAYOUT)
_LONGEST_LINE = 4000  # characters; SentencePiece skips longer training sentences
_RECIPE = "bpe-1"  # part of the cache key: change it with anything below that changes the pieces
_UNTRAINABLE = "\x00\u2581\u2585\u2047"  # SentencePiece's own signs: training skips a sentence that has one


class VocabularyTooLarge(UserError):
    """A text has too few different pieces for the vocabulary that it shall fill."""


def build_tokenizer(
    kind: str,
    sources: Sequence[DomainConfig],
    cache_dir: str | Path,
    path: str | Path | None = None,
    vocab_size: int = 4096,
    eod: int | str | None = None,
) -> Tokenizer:
    """The tokenizer of a configuration's ``data.tokenizer``.

    All kinds but ``train`` read ``path``; ``eod`` is the id or piece that ends documents there, None the usual one.
    ``train`` trains on ``sources`` and keeps the result under ``cache_dir`` by the contents of the corpora, so that it
    is trained once and again when a corpus changes. UserError for an unknown kind and an unusable model or corpus.
    """
    if kind != "train":
        return tokenizer_class(kind)(read_model(path, kind), eod, origin=str(path))
    settings = [_RECIPE, sentencepiece.__version__, str(vocab_size)]
    for source in sources:
        files = fingerprint_files(expand_paths(source.name, source.data))
        settings.append(f"{source.name}|{source.weight!r}|{source.text_field}|{files}")
    key = hashlib.sha256("\n".join(settings).encode()).hexdigest()[:16]
    folder = Path(cache_dir) / f"tokenizer-{key}"
    if not folder.exists():
        tokenizer = train_tokenizer(sources, vocab_size)
        with (
            disk_errors_explained(f"keeping the tokenizer in {folder}", "set another data.cache"),
            atomic_folder(folder, rename_unless_there, shared=True) as fresh,
        ):
            tokenizer.save(fresh)
    return load_tokenizer(folder)


def train_tokenizer(sources: Sequence[DomainConfig], vocab_size: int) -> SentencePieceTokenizer:
    """Train on the mix of ``sources``, weighted by their ``weight``: the same text gives the same bytes.

    Ids: ``<pad>`` 0, ``<unk>`` 1 (never made), ``<eod>`` 2, then layout, bytes, merges, characters: ``vocab_size`` in
    all. Raises UserError when the vocabulary is too small to hold the bytes, VocabularyTooLarge when the text cannot
    fill it.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(
            f"data.tokenizer.vocab_size is {vocab_size}; a trained tokenizer needs {SMALLEST_VOCABULARY} or more"
        )
    lines = _learnable(list(_mixed_lines(sources)), (vocab_size - _RESERVED) // 2)
    if not lines:
        names = ", ".join(source.name for source in sources)
        raise UserError(f"the domains {names} hold no text to train a tokenizer on: add some, or name other files")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=1.0,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            user_defined_symbols=list(_LAYOUT),
            pad_id=0,
            unk_id=1,
            eos_id=2,
            bos_id=-1,
            pad_piece="<pad>",
            unk_piece="<unk>",
            eos_piece="<eod>",
            unk_surface="\ufffd",
            max_sentence_length=8 * _LONGEST_LINE,  # bytes
            num_threads=1,  # the number is written into the model, and one is fast enough
            minloglevel=2,
        )
    except RuntimeError as error:
        most = re.search(r"value <= (\d+)", str(error))
        if most is None:
            raise UserError(
                f"the tokenizer could not be trained ({error}); try another data.tokenizer.vocab_size"
            ) from error
        raise VocabularyTooLarge(
            f"data.tokenizer.vocab_size {vocab_size} is more than this text can fill; "
            f"set it to {most.group(1)} or less, or add text"
        ) from error
    return SentencePieceTokenizer(model.getvalue())


def _mixed_lines(sources: Sequence[DomainConfig]) -> Iterator[str]:
    """Lines of the domains' documents, each document repeated (or left out) so that bytes follow the weights."""
    files = {source.name: expand_paths(source.name, source.data) for source in sources}
    size = {name: sum(file.stat().st_size for file in paths) for name, paths in files.items()}
    weights = {source.name: source.weight for source in sources}
    if sum(weights.values()) <= 0:
        weights = dict.fromkeys(weights, 1.0)
    total = min(TRAINING_BYTES, sum(size.values()))
    for source in sources:
        share = total * weights[source.name] / sum(weights.values())
        rate = min(share / max(size[source.name], 1), MOST_REPEATS)
        key = key64("tokenizer", source.name)
        for index, document in enumerate(iterate_documents(source.name, files[source.name], source.text_field)):
            repeats = int(rate + uniform(key, np.array([index]))[0])
            if repeats:
                lines = [line for line in document.text.split("\n") if line]
                for line in lines * repeats:
                    for start in range(0, len(line), _LONGEST_LINE):
                        yield line[start : start + _LONGEST_LINE]


def _learnable(lines: list[str], most: int) -> list[str]:
    """The lines cut at characters that get no piece: all but the ``most`` frequent, and SentencePiece's own signs.

    SentencePiece reserves a piece for every character it sees, and ten thousand Chinese ones would leave no room for
    merges in a small vocabulary; what is left out is written in bytes.
    """
    counts: Counter[str] = Counter()
    for line in lines:
        counts.update(line)
    for char in (*_UNTRAINABLE, *_LAYOUT):
        counts.pop(char, None)
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    total = sum(counts.values())
    kept: set[str] = set()
    covered = 0
    for char, count in ranked[:most]:
        if covered >= 0.9999 * total:
            break
        kept.add(char)
        covered += count
    refused = "".join(char for char, _ in ranked if char not in kept) + _UNTRAINABLE + "\t"
    cut = re.compile("[" + re.escape(refused) + "]+")
    return [part for line in lines for part in cut.split(line) if part]
