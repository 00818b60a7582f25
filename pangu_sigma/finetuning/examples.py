"""Examples to adapt a model with: JSONL files of prompts with answers, read, put into the template, tokenised.

A line of an sft file is {"prompt": TEXT, "answer": TEXT}, of a dpo file {"prompt": TEXT, "chosen": TEXT, "rejected":
TEXT}; other keys are left alone. Prompt and answer are tokenised as one text; the answer begins with the first token
that the prompt alone does not have, so that what a tokenizer joins across the border is learned as it is joined.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import numpy as np

from pangu_sigma.config.finetuning_section import AdaptConfig
from pangu_sigma.data.chat_template import as_text
from pangu_sigma.data.corpus_files import expand_paths, fingerprint_files, has_lone_surrogate, json_lines, json_object
from pangu_sigma.data.deduplication import digest
from pangu_sigma.data.packed_rows import TokenSequence
from pangu_sigma.data.tokenizers.tokenizer import Tokenizer
from pangu_sigma.errors import UserError

# Keys of the answers by objective; an sft example has one, a dpo example the better one first.
ANSWERS = {"sft": ("answer",), "dpo": ("chosen", "rejected")}
_BATCH = 1024


Answers = tuple[TokenSequence, ...]  # of one prompt: the better one first


@dataclass(frozen=True)
class ExampleSet:
    """One domain's examples: each a tuple of sequences, one per answer.

    `truncated` sequences were cut to the window at their end; `dropped` examples had a prompt that left no room for an
    answer; `fingerprint` of the files and of how they became tokens.
    """

    name: str
    train: tuple[Answers, ...]
    heldout: tuple[Answers, ...]
    truncated: int
    dropped: int
    fingerprint: str

    def sentence(self) -> str:
        """The numbers for people."""
        message = f"{self.name}: {len(self.train)} examples to learn from, {len(self.heldout)} held out"
        if self.truncated:
            message += f", {self.truncated} answers cut at the window's end"
        if self.dropped:
            message += f", {self.dropped} left out because their prompt fills the window"
        return message


def prompt_and_answers(template: str, prompt: str, answers: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """The text in front of the answers, and what each of them adds to it.

    chat: a conversation as the server writes it, the answer behind "Assistant:" and a space. plain: as they are.
    """
    if template == "plain":
        return prompt, tuple(answers)
    return as_text([("user", prompt)]), tuple(f" {answer}" for answer in answers)


def read_lines(files: Sequence[Path], keys: Sequence[str]) -> Iterator[dict[str, str]]:
    """The texts under `keys` of every line. Raises UserError naming file and line where a line is not such a one."""
    for file in files:
        lines = json_lines(file, str(file), "check that it exists and its rights")
        if not lines:
            raise UserError(f"{file} is empty; give one example a line, or leave the file out")
        for line_number, line in lines:
            yield _checked(line, f"{file}:{line_number}", keys)


def _checked(line: str, where: str, keys: Sequence[str]) -> dict[str, str]:
    form = "{" + ", ".join(f'"{key}": "…"' for key in keys) + "}"
    record = json_object(line, where, form)
    for key in keys:
        text = record.get(key)
        if not isinstance(text, str) or not text.strip():
            what = "missing" if key not in record else "no string" if not isinstance(text, str) else "empty"
            raise UserError(f"{where}: the field '{key}' is {what}; write {form}")
        if has_lone_surrogate(text):
            raise UserError(f"{where}: the field '{key}' holds half a surrogate pair; repair the line")
    return {key: record[key].replace("\r\n", "\n").replace("\r", "\n") for key in keys}


def load_examples(
    name: str,
    data: Sequence[str],
    adapt: AdaptConfig,
    tokenizer: Tokenizer,
    sequence_length: int,
    progress: Callable[[str, str, int, int], None] | None = None,
) -> ExampleSet:
    """One domain's examples, ready to be packed into rows of `sequence_length` + 1 tokens.

    Examples are held out by a hash of their text, at least one where there are two. Raises UserError for files that
    cannot be used and where nothing is left to learn from.
    """
    files = expand_paths(name, data)
    if wrong := [file for file in files if file.suffix.lower() != ".jsonl"]:
        raise UserError(f"adapt.examples of '{name}': {wrong[0]} is no .jsonl file; write one JSON object a line")
    keys = ("prompt", *ANSWERS[adapt.objective])
    records = list(read_lines(files, keys))
    limit = sequence_length + 1
    kept: list[Answers] = []
    ranks: list[int] = []
    truncated = dropped = 0
    for start in range(0, len(records), _BATCH):
        for record in records[start : start + _BATCH]:
            example = _tokenised(record, keys, adapt.template, tokenizer)
            if any(sequence.prompt >= limit for sequence in example):
                dropped += 1
                continue
            truncated += sum(len(sequence.ids) > limit for sequence in example)
            kept.append(tuple(TokenSequence(sequence.ids[:limit], sequence.prompt) for sequence in example))
            ranks.append(int.from_bytes(digest("\x1f".join(record[key] for key in keys))[:8], "little"))
        if progress:
            progress(name, "tokenise", min(start + _BATCH, len(records)), len(records))
    if not kept:
        raise UserError(
            f"adapt.examples of '{name}': no prompt leaves room for an answer in {sequence_length} tokens; shorten "
            "them or raise data.sequence_length"
        )
    heldout = _held_out(np.array(ranks, np.uint64), adapt.heldout_fraction)
    settings = json.dumps([adapt.objective, adapt.template, adapt.heldout_fraction, sequence_length])
    parts = (fingerprint_files(files), tokenizer.fingerprint, settings)
    return ExampleSet(
        name=name,
        train=tuple(example for example, is_heldout in zip(kept, heldout, strict=True) if not is_heldout),
        heldout=tuple(example for example, is_heldout in zip(kept, heldout, strict=True) if is_heldout),
        truncated=truncated,
        dropped=dropped,
        fingerprint=hashlib.sha256("\n".join(parts).encode()).hexdigest(),
    )


def _tokenised(record: dict[str, str], keys: Sequence[str], template: str, tokenizer: Tokenizer) -> Answers:
    before, behind = prompt_and_answers(template, record[keys[0]], [record[key] for key in keys[1:]])
    prompt = tokenizer.encode(before)
    texts = [tokenizer.encode(before + text) for text in behind]
    # The first token has nothing before it to be predicted from. Answers of one prompt begin at one place.
    border = max(1, min(_equal_tokens(prompt, ids) for ids in texts))
    return tuple(TokenSequence(np.array([*ids, tokenizer.eod_id], np.int32), border) for ids in texts)


def _equal_tokens(some: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens two texts have in common before the first that differs."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(some, others, strict=False)))


def _held_out(ranks: np.ndarray, fraction: float) -> np.ndarray:
    """Which examples are held out, bool [N]: equal ones together, and never all of them."""
    is_heldout = ranks < np.uint64(min(fraction * 2.0**64, 2.0**64 - 2048))
    if fraction and not is_heldout.any():
        is_heldout = ranks == ranks.min()
    return is_heldout & (ranks != ranks.max()) if is_heldout.all() else is_heldout
