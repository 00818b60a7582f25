"""Registry of tokenizers: the class of a kind, a tokenizer from its folder, and the files that a checkpoint keeps."""

import os
from collections.abc import Mapping
from pathlib import Path

from pangu_sigma.data.tokenizers.hugging_face_files import NAMES
from pangu_sigma.data.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from pangu_sigma.data.tokenizers.tokenizer import FORMAT_VERSION, INFO_FILE, MODEL_FILE, Tokenizer
from pangu_sigma.errors import UserError
from pangu_sigma.json_reader import parse_object
from pangu_sigma.regular_file import regular
from pangu_sigma.wording import shown


def tokenizer_class(kind: str) -> type[Tokenizer]:
    """The class of a tokenizer kind: ``sentencepiece`` (what ``train`` gives), ``pangu_alpha`` or ``huggingface``."""
    if kind in ("sentencepiece", "train"):
        return SentencePieceTokenizer
    if kind == "pangu_alpha":
        # jieba's import is slow, and few need it.
        from pangu_sigma.data.tokenizers.pangu_alpha_tokenizer import PanguAlphaTokenizer

        return PanguAlphaTokenizer
    if kind == "huggingface":
        from pangu_sigma.data.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer

        return HuggingFaceTokenizer
    raise UserError(f"unknown tokenizer kind '{kind}'; choose train, sentencepiece, pangu_alpha or huggingface")


def read_model(path: str | Path | None, kind: str) -> bytes:
    """The bytes of a ``.model`` file; UserError when the path is not set or cannot be read."""
    if path is None:
        raise UserError(f"data.tokenizer.kind is {kind}, which needs data.tokenizer.path: the path of a .model file")
    try:
        return regular(Path(os.path.expanduser(str(path)))).read_bytes()
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"the tokenizer {path} cannot be read ({reason}); check data.tokenizer.path") from error


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer that ``save`` wrote into ``folder``; UserError names the file that is missing, damaged or
    changed.
    """
    folder = Path(folder)
    try:
        companions = [name for name in NAMES if (folder / name).is_file()]
        files = {name: regular(folder / name).read_bytes() for name in (INFO_FILE, MODEL_FILE, *companions)}
    except OSError as error:
        place = error.filename or folder
        raise UserError(
            f"{place} cannot be read ({error.strerror}); restore it from a checkpoint of the same run"
        ) from error
    return tokenizer_from(files, folder)


def tokenizer_from(files: Mapping[str, bytes], folder: Path) -> Tokenizer:
    """The tokenizer of ``files`` (name -> content), which came from ``folder``. Raises UserError as above."""
    info_path = folder / INFO_FILE
    for name in (INFO_FILE, MODEL_FILE):
        if name not in files:
            raise UserError(f"{folder / name} is no part of the checkpoint; restore it, or use another checkpoint")
    try:
        info = parse_object(files[INFO_FILE])
        kind, eod_id, pad_id = info["kind"], info["eod_id"], info["pad_id"]
        fingerprint, version = info["fingerprint"], info["format_version"]
        if not (isinstance(kind, str) and type(eod_id) is type(pad_id) is int):
            raise TypeError
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{info_path} is damaged; restore it from a checkpoint of the same run") from error
    if version != FORMAT_VERSION:
        raise UserError(
            f"{info_path} has format version {shown(version)}, this release reads {FORMAT_VERSION}; update pangu-sigma"
        )
    try:
        tokenizer = tokenizer_class(kind)(files[MODEL_FILE], eod_id, pad_id, str(folder / MODEL_FILE))
    except ValueError as error:  # a kind or an id that there is not, another file, a package that is missing
        raise UserError(f"{info_path}: {error}") from error
    if tokenizer.fingerprint != fingerprint or tokenizer.vocab_size != info.get("vocab_size"):
        raise UserError(
            f"{folder / MODEL_FILE} is not the tokenizer that {info_path} describes; restore the original file"
        )
    tokenizer.companions = {name: files[name] for name in NAMES if name in files}
    return tokenizer
