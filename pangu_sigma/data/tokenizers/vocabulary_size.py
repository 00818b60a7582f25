"""Vocabulary size that a configuration will have, from the tokenizer's file alone, before anything is tokenised."""

from __future__ import annotations

from pathlib import Path

from pangu_sigma.config import Config
from pangu_sigma.errors import UserError


def vocabulary_size(config: Config) -> int:
    """Rows of the word embedding of a model that is yet to be built: model.vocab_size, or the tokenizer's size.

    Raises UserError if a given SentencePiece model must be asked and cannot be read.
    """
    tokenizer = config.data.tokenizer
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    if tokenizer.known_size is not None:
        return tokenizer.known_size
    path = Path(str(tokenizer.path))
    if not path.is_file():
        raise UserError(f"data.tokenizer.path = {path} does not exist: give the path of a SentencePiece model")
    if tokenizer.kind == "huggingface":
        # The one kind that needs our own reader; without it `config` and `plan` import no NumPy.
        from pangu_sigma.data.tokenizers.tokenizer_registry import read_model, tokenizer_class

        model = read_model(path, tokenizer.kind)
        return tokenizer_class(tokenizer.kind)(model, eod_id=0, origin=f"data.tokenizer.path = {path}").vocab_size
    import sentencepiece

    try:
        return int(sentencepiece.SentencePieceProcessor(model_file=str(path)).vocab_size())
    except (RuntimeError, OSError) as error:
        raise UserError(f"data.tokenizer.path = {path} is not a SentencePiece model: give another file") from error
