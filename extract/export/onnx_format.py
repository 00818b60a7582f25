"""Export to ONNX: one graph that answers a text, in one go or piece by piece with caches, for any batch and length.

The graph is traced from the PyTorch module of the Hugging Face export; weights are streamed into a file beside it.
MindSpore 2.9's own exporter has no Rsqrt, CumSum and NonZero (layer norm, documents, dispatch without drops) and fixes
every length.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from extract.export.export_formats import Options
from extract.export.export_guides import guide
from extract.export.export_source import ExportSource
from extract.export.hf_format import configuration, targets
from extract.export.safetensors_shards import TargetTensor, total_bytes
from pangu_sigma.checkpoint.tensor_file import raw_bytes, write_all
from pangu_sigma.monitor.progress import progress

if TYPE_CHECKING:
    import onnx

    from extract.export.onnx_graph import Values

FILE = "model.onnx"
_DATA = f"{FILE}.data"
_PER_TENSOR = 8192
_ALIGNED = 4096  # runtimes map external tensors into memory where they begin at a page


def weight_bytes(source: ExportSource, options: Options) -> int:
    """Bytes of the data file, and about those of the graph, which grows with the experts."""
    tensors = targets(source, options.dtype)
    experts = sum(source.experts) * len(source.config.model.sparse_prefixes)
    return total_bytes(tensors) + (len(tensors) + 4 * experts) * _PER_TENSOR


def write(source: ExportSource, folder: Path, options: Options) -> list[str]:
    """Write the folder; returns what there is to say. Raises OSError."""
    from onnx import helper

    from extract.export.onnx_graph import traced

    inputs, outputs = interface(source)
    model = traced(configuration(source, options.dtype), inputs, outputs)
    model.producer_name = "pangu-sigma"
    parameters = {v.name: v.type.tensor_type.elem_type for v in model.graph.input if v.name not in inputs}
    # Written anew: an input stays even if nothing depends on it, as of the domains where a gate chooses the experts.
    for described, values in ((model.graph.input, inputs), (model.graph.output, outputs)):
        del described[:]
        described.extend(
            helper.make_tensor_value_info(
                name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape, _MEANINGS.get(name, "")
            )
            for name, (dtype, shape) in values.items()
        )
    metadata = {"domains": json.dumps(list(source.domains)), "positions": str(source.config.model.positions)}
    metadata |= {"eod_id": str(source.tokenizer.eod_id), "pad_id": str(source.tokenizer.pad_id)}
    helper.set_model_props(model, metadata)
    _write_weights(folder, model.graph, parameters, targets(source, options.dtype))
    (folder / FILE).write_bytes(model.SerializeToString())
    source.tokenizer.save(folder / "tokenizer")
    domain = ', "domain": np.zeros(1, np.int64)' if "domain" in inputs else ""
    program = _PROGRAM.replace("{domain}", domain).replace("{window}", str(source.config.data.sequence_length))
    (folder / "README.md").write_text(guide(source, "ONNX", _FILES, program), encoding="utf-8")
    return []


def interface(source: ExportSource) -> tuple[Values, Values]:
    """The graph's inputs and outputs."""
    model, int64 = source.config.model, np.int64

    def caches(name: str, length: str) -> Values:
        value = (np.float32, ["batch", model.heads, length, model.hidden // model.heads])
        return {f"{name}.{layer}.{part}": value for layer in range(model.layers) for part in ("key", "value")}

    domain = {"domain": (int64, ["batch"])} if len(source.domains) > 1 else {}
    inputs = {
        "input_ids": (int64, ["batch", "length"]),
        "attention_mask": (int64, ["batch", "total"]),
        **domain,
        "past_documents": (int64, ["batch", "past"]),
        "next_document": (int64, ["batch"]),
        **caches("past_key_values", "past"),
    }
    outputs = {
        "logits": (np.float32, ["batch", "length", source.vocab]),
        "documents": (int64, ["batch", "total"]),
        "following_document": (int64, ["batch"]),
        **caches("present", "total"),
    }
    return inputs, outputs


def _write_weights(
    folder: Path, graph: onnx.GraphProto, parameters: dict[str, int], tensors: Sequence[TargetTensor]
) -> None:
    """The parameters, types by name, become initializers with their numbers in the data file. ValueError for a tensor
    that the graph has no place for, or a parameter without numbers."""
    with (
        progress("export", total_bytes(tensors), unit="B") as job,
        open(folder / _DATA, "xb", buffering=0) as stream,
    ):
        for tensor in tensors:
            begin = stream.seek(-(-stream.tell() // _ALIGNED) * _ALIGNED)
            for array in tensor.read():
                data = raw_bytes(array)
                write_all(stream, data)
                job.advance(len(data))
            # Experts are one tensor in the checkpoint and one each in the graph.
            names, shape = [tensor.name], tensor.shape
            if tensor.name not in parameters:
                names, shape = [f"{tensor.name}.{expert}" for expert in range(shape[0])], shape[1:]
            length = tensor.nbytes // len(names)
            for number, name in enumerate(names):
                if name not in parameters:
                    raise ValueError(f"the graph has no place for {name}")
                initializer = graph.initializer.add(name=name, data_type=parameters.pop(name), dims=shape)
                initializer.data_location = initializer.EXTERNAL
                where = {"location": _DATA, "offset": begin + number * length, "length": length}
                for key, value in where.items():
                    initializer.external_data.add(key=key, value=str(value))
        os.fsync(stream.fileno())
    if parameters:
        raise ValueError(f"there are no numbers for {', '.join(sorted(parameters))}")


_MEANINGS = {
    "input_ids": "the new token ids",
    "attention_mask": "1 for every token so far, the new ones included; 0 for padding",
    "domain": "number of each sample's domain in the metadata's list of domains",
    "past_documents": "documents as the last call gave it; of length 0 at first",
    "next_document": "following_document as the last call gave it; 1 at first",
    "logits": "after every new token",
    "documents": "the document of every token so far, from 1; 0 for padding",
    "following_document": "the document of the token to come",
}

_FILES = """
| file | what |
| --- | --- |
| `model.onnx`, `model.onnx.data` | one graph for any batch and length, with caches; its weights |
| `tokenizer/` | SentencePiece's model and its reserved ids |"""

_PROGRAM = """import numpy as np
import onnxruntime
import sentencepiece

session = onnxruntime.InferenceSession("model.onnx")
facts = session.get_modelmeta().custom_metadata_map
pieces = sentencepiece.SentencePieceProcessor(model_file="tokenizer/tokenizer.model")
eod = int(facts["eod_id"])
state = {"past_documents": np.zeros((1, 0), np.int64), "next_document": np.ones(1, np.int64)}
for each in session.get_inputs():
    if each.name.startswith("past_key_values"):
        state[each.name] = np.zeros((1, each.shape[1], 0, each.shape[3]), np.float32)

ids = [eod, *pieces.encode("Once upon a time")]
new = ids
while len(ids) < {window}:
    feed = {"input_ids": np.array([new]), "attention_mask": np.ones((1, len(ids)), np.int64), **state{domain}}
    found = dict(zip([each.name for each in session.get_outputs()], session.run(None, feed)))
    new = [int(found.pop("logits")[0, -1, : len(pieces)].argmax())]
    ids = ids + new
    if new[0] == eod:
        break
    state = {"past_documents": found.pop("documents"), "next_document": found.pop("following_document")}
    state |= {name.replace("present", "past_key_values"): cache for name, cache in found.items()}
print(pieces.decode([i for i in ids if i != eod]))
"""
