"""What the README of a MINDIR export says: its files, and a program for each signature."""

from __future__ import annotations

from extract.export.export_guides import guide
from extract.export.export_source import ExportSource

_FILES = """
| file | what |
| --- | --- |
| `prefill.mindir` | a whole window of {batch} at once |
| `decode.mindir` | one token of each after it |
| `graphs.json` | every input, output and state by name, with shapes and meaning |
| `tokenizer/` | SentencePiece's model and its reserved ids |{table}

Weights beyond 1 GiB lie in a folder beside their graph; `graphs.json` names the files."""

_SIGMA_TABLE = """
| `expert_ids.npy` | expert of every token id: int32 [sparse layers, domains, vocabulary] |"""

_SIGMA_STATE = """
The graphs have the inputs of Huawei's deployed PanGu-Σ and no others: routing, mask and positions are made outside.
Caches are parameters inside ({state}): `prefill` writes them anew, `decode` adds its token's. The two graphs do not
share them by themselves, so what `prefill` has filled is handed over."""

_PLAIN = """import json

import mindspore as ms
import numpy as np
import sentencepiece

facts = json.load(open("graphs.json"))
pieces = sentencepiece.SentencePieceProcessor(model_file="tokenizer/tokenizer.model")
prefill, decode = (ms.nn.GraphCell(ms.load(name)) for name in facts["graphs"])
batch, window = facts["batch"], facts["window"]


def integers(*shape, of=0):
    return np.full(shape, of, np.int32)


ids = [facts["eod_id"], *pieces.encode("Once upon a time")]
tokens = integers(batch, window, of=facts["pad_id"])
tokens[:, : len(ids)] = ids
domain = [{domain}]
logits, *state = prefill(ms.Tensor(tokens), ms.Tensor(integers(batch, of=len(ids))), *domain)
logits = logits.asnumpy()[:, len(ids) - 1]
while len(ids) < window:
    ids.append(int(logits[0, : len(pieces)].argmax()))
    if ids[-1] == facts["eod_id"]:
        break
    token, place = integers(batch, 1, of=ids[-1]), integers(batch, of=len(ids) - 1)
    logits, *state = decode(ms.Tensor(token), ms.Tensor(place), *state, *domain)
    logits = logits.asnumpy()[:, 0]
print(pieces.decode([i for i in ids if i != facts["eod_id"]]))
"""

_SIGMA = """import json

import mindspore as ms
import numpy as np
import sentencepiece

facts = json.load(open("graphs.json"))
pieces = sentencepiece.SentencePieceProcessor(model_file="tokenizer/tokenizer.model")
prefill, decode = (ms.nn.GraphCell(ms.load(name)) for name in facts["graphs"])
batch, window = facts["batch"], facts["window"]


def inputs(ids, start, end):
    \"\"\"The six inputs for the places from start to end of a text; the last token stands at end - 1 or before.\"\"\"
    tokens = np.full((batch, window), facts["pad_id"], np.int32)
    tokens[:, : len(ids)] = ids
    ended = tokens == facts["eod_id"]
    documents = ended.cumsum(1) - ended
    mask = np.tril(documents[:, :, None] == documents[:, None, :])
    positions = mask.sum(2) - 1
    last = np.full(batch, len(ids) - 1)
    found = [tokens[:, start:end], {experts}mask[:, start:end], positions[:, start:end], last, last + 1]
    return [ms.Tensor(np.ascontiguousarray(each, np.float32 if each.dtype == bool else np.int32)) for each in found]


ids = [facts["eod_id"], *pieces.encode("Once upon a time")]
logits = prefill(*inputs(ids, 0, window))
filled = {each.name: each for each in prefill.get_parameters()}
for each in decode.get_parameters():
    if each.name in facts["graphs"]["{decode}"]["state"]:
        each.set_data(filled[each.name])
while len(ids) < window:
    ids.append(int(logits.asnumpy()[0, : len(pieces)].argmax()))
    if ids[-1] == facts["eod_id"]:
        break
    logits = decode(*inputs(ids, len(ids) - 1, len(ids)))
print(pieces.decode([i for i in ids if i != facts["eod_id"]]))
"""
_SIGMA_EXPERTS = 'np.load("expert_ids.npy")[:, 0, tokens[:, start:end]], '  # of the domain number 0


def mindir_guide(
    source: ExportSource, signature: str, batch: int, graphs: list[str], state: list[str], table: bool
) -> str:
    """Markdown for the folder of a MINDIR export. `graphs`: the files; `table`: whether expert_ids.npy is there."""
    files = _FILES.format(batch="one sample" if batch == 1 else f"{batch} samples", table=_SIGMA_TABLE if table else "")
    if signature == "sigma":
        files += "\n" + _SIGMA_STATE.format(state=", ".join(f"`{name}`" for name in state))
        program = _SIGMA.replace("{experts}", _SIGMA_EXPERTS if table else "").replace("{decode}", graphs[1])
    else:
        several = len(source.domains) > 1
        program = _PLAIN.replace("{domain}", _numbered(source, "ms.Tensor(integers(batch))") if several else "")
    return guide(source, "MINDIR", files, program)


def _numbered(source: ExportSource, tensor: str) -> str:
    names = ", ".join(f"{domain_id} {name}" for domain_id, name in enumerate(source.domains))
    return f"\n    {tensor},  # number of each sample's domain: {names}\n"
