"""Files that a folder of Hugging Face's has beside its tokenizer, which an imported model keeps for those it is handed
out to: special tokens, settings, the chat template, how to generate, and ids of config.json that only they read.

They lie beside the tokenizer of a checkpoint, go wherever it goes, and change nothing of what ids a text has.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pangu_sigma.errors import UserError
from pangu_sigma.json_reader import UnreadableText, parse_object
from pangu_sigma.regular_file import regular

GENERATION = "generation_config.json"
# Files that belong to the folder's own tokenizer.json.
OF_TOKENIZER = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
TOKEN_IDS = "special_token_ids.json"  # our own record of config.json's
NAMES = frozenset({GENERATION, TOKEN_IDS, *OF_TOKENIZER})
_MOST_BYTES = 4 << 20
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def files_of(folder: Path, config: Mapping[str, Any], with_tokenizer: bool) -> dict[str, bytes]:
    """What is kept of a folder of Hugging Face's with this `config`.json, by name.

    with_tokenizer: what belongs to its tokenizer.json too.

    Raises UserError for one that cannot be read, is larger than 4 MiB or, ending in .json, is none.
    """
    # Null ones too: for those that are left out transformers takes its own.
    ids = {name: config[name] for name in _IDS if name in config}
    files = {TOKEN_IDS: (json.dumps(ids, indent=2) + "\n").encode()}
    for name in (GENERATION, *(OF_TOKENIZER if with_tokenizer else ())):
        path = folder / name
        if not path.exists():
            continue
        try:
            with open(regular(path), "rb") as stream:
                content = stream.read(_MOST_BYTES + 1)
            if len(content) > _MOST_BYTES:
                raise UserError(f"{path} has more than {_MOST_BYTES >> 20} MiB: fetch the folder again")
            if name.endswith(".json"):
                parse_object(content)
            else:
                content.decode("utf-8")
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}): fetch the folder again") from error
        except UnreadableText as error:
            raise UserError(f"{error.at(path)}: fetch the folder again") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is no UTF-8 text: fetch the folder again") from error
        files[name] = content
    return files


def end_ids(files: Mapping[str, bytes], vocab_size: int) -> tuple[int, ...]:
    """Ids that end an answer by the imported generation config. Raises UserError where it is damaged."""
    if GENERATION not in files:
        return ()
    try:
        given = parse_object(files[GENERATION]).get("eos_token_id")
    except UnreadableText as error:
        raise UserError(f"{error.at(GENERATION)}; restore it, or import the model again") from error
    ids = given if isinstance(given, list) else [given]
    return tuple(token for token in ids if type(token) is int and 0 <= token < vocab_size)


def token_ids(files: Mapping[str, bytes]) -> dict[str, Any] | None:
    """Ids of bos, eos and pad as the config.json said that the model was imported with; None without such a record.

    Raises UserError where the record is damaged.
    """
    if TOKEN_IDS not in files:
        return None
    try:
        ids = parse_object(files[TOKEN_IDS])
    except UnreadableText as error:
        raise UserError(f"{error.at(TOKEN_IDS)}; restore it, or import the model again") from error
    if not ids.keys() <= set(_IDS):
        raise UserError(f"{TOKEN_IDS} beside the tokenizer is damaged; restore it, or import the model again")
    return ids
