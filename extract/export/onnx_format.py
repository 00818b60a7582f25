"""Export to ONNX: one graph that answers a text, in one go or piece by piece with caches, for any batch and length.

The graph is built operator by operator from the checkpoint, which needs no MindSpore and one tensor in memory.
MindSpore 2.9's own exporter has no Rsqrt, CumSum and NonZero (layer norm, documents, dispatch without drops) and fixes
every length.

Legend: B samples, S new tokens, P cached ones, K = P + S, T = B*S rows, D hidden width, H heads, W = D/H, V vocabulary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from extract.export.export_guides import onnx_guide
from extract.export.export_source import ExportSource, check_pangu
from pangu_sigma.checkpoint.float_types import as_float32
from pangu_sigma.config.parameter_counts import is_routing
from pangu_sigma.errors import UserError
from pangu_sigma.monitor.progress import progress

if TYPE_CHECKING:
    from extract.export.export_job import Options
    from extract.export.onnx_builder import OnnxBuilder

TAKES = ("dtype",)
FILE = "model.onnx"
MASKED_SCORE = -10000.0
_SMALL_FILES = 4 << 20
_PER_TENSOR = 8192


def check(source: ExportSource, options: Options) -> None:
    """Raises UserError for options that mean nothing here."""
    check_pangu(source)
    if options.dtype != "float32":
        raise UserError(
            "an ONNX file is written in float32: leave --dtype out; onnxruntime's own tools convert it to float16"
        )


def needed_bytes(source: ExportSource, options: Options) -> int:
    """Bytes that the folder will take."""
    experts = sum(source.experts) * len(source.config.model.sparse_prefixes)
    numbers = sum(math.prod(source.shape(name)) for name in source.names)
    return 4 * numbers + (len(source.names) + 4 * experts) * _PER_TENSOR + len(source.tokenizer.model) + _SMALL_FILES


def write(source: ExportSource, folder: Path, options: Options) -> list[str]:
    """Write the folder; returns what there is to say. Raises OSError."""
    from extract.export.onnx_builder import OnnxBuilder

    # Routing tables are whole numbers of 8 bytes, everything else of 4.
    total = sum(4 * (1 + is_routing(name)) * math.prod(source.shape(name)) for name in source.names)
    with progress("export", total, unit="B") as job:
        builder = OnnxBuilder(folder, FILE, job.advance)
        try:
            _OnnxModel(source, builder).build()
        finally:
            builder.close()
    source.tokenizer.save(folder / "tokenizer")
    (folder / "README.md").write_text(onnx_guide(source), encoding="utf-8")
    return []


class _OnnxModel:
    """Builds the graph bottom up, reading each tensor when its layer comes."""

    def __init__(self, source: ExportSource, builder: OnnxBuilder) -> None:
        self.source, self.builder, self.model = source, builder, source.config.model
        self.op, self.constant = builder.op, builder.constant
        self.several = len(source.domains) > 1
        self.slots = self.model.domain_parameters.embedding == "own"
        self.used: set[str] = set()

    def build(self) -> None:
        """Add everything and save. ValueError if a tensor of the model was left out."""
        model, op = self.model, self.op
        self.shapes()
        positions, mask = self.documents()
        h = op("Gather", self.word_table(), self.word_ids())
        h = op("Add", h, op("Gather", self.weight("embedding.position"), positions))
        for layer in range(model.blocks):
            h = self.layer(f"blocks.{layer}", layer, h, None, mask)
        h = self.norm("norm", h)
        if model.query_layer == "next_position":
            queries = op("Gather", self.weight("embedding.query"), positions)
            h = self.layer("query_layer", model.blocks, h, queries, mask)
        self.head(h)
        if left := set(self.source.names) - self.used:
            raise ValueError(f"the graph has no place for {', '.join(sorted(left))}")
        self.save()

    def weight(self, name: str) -> str:
        """A shared tensor."""
        return self.builder.weight(name, self.read(name))

    def read(self, name: str) -> np.ndarray:
        self.used.add(name)
        return as_float32(name, self.source.checkpoint.load([name])[name])

    def shapes(self) -> None:
        """Sizes that are known when the graph runs."""
        op, constant = self.op, self.constant
        shape = op("Shape", "input_ids")
        self.length = op("Gather", shape, constant(1))
        self.past = op("Gather", op("Shape", "past_documents"), constant(1))
        self.rows = op("Reshape", "input_ids", constant([-1]))
        self.batch_and_length = shape
        self.row_domain = None
        if self.several:
            wide = op("Expand", op("Unsqueeze", "domain", constant([1])), shape)
            self.row_domain = op("Reshape", wide, constant([-1]))

    def documents(self) -> tuple[str, str]:
        """Positions int64 [T] and the mask float32 [B, 1, S, K] that is added to scores.

        Documents of a row count from 1, padding has 0. A token sees the tokens of its document up to itself, so their
        number is its position plus one, padding and earlier documents left out.
        """
        op, constant = self.op, self.constant
        real = op("Slice", "attention_mask", self.as_list(self.past), constant([2**62]), constant([1]))
        real = op("Cast", op("Not", op("Equal", real, constant(0))), to=_INT64)
        ended = op("Cast", op("Equal", "input_ids", constant(self.source.tokenizer.eod_id)), to=_INT64)
        ended = op("Mul", ended, real)
        first = op("Unsqueeze", "next_document", constant([1]))
        following = op("Add", op("CumSum", ended, constant(1)), first)
        own = op("Mul", op("Sub", following, ended), real)
        keys = op("Concat", "past_documents", own, axis=1)
        self.builder.call_it(keys, "documents")
        last = op("Gather", following, constant(-1), axis=1)
        self.builder.call_it(last, "following_document")

        own_rows = op("Unsqueeze", own, constant([2]))
        theirs = op("Unsqueeze", keys, constant([1]))
        same = op("And", op("Equal", own_rows, theirs), op("Greater", theirs, constant(0)))
        total = op("Add", self.past, self.length)
        of_keys = op("Range", constant(0), total, constant(1))
        of_queries = op("Unsqueeze", op("Range", self.past, total, constant(1)), constant([1]))
        visible = op("And", same, op("LessOrEqual", of_keys, of_queries))
        counted = op("ReduceSum", op("Cast", visible, to=_INT64), constant([2]), keepdims=0)
        positions = op("Max", op("Sub", counted, constant(1)), constant(0))
        hidden = op("Where", visible, constant(0.0, np.float32), constant(MASKED_SCORE, np.float32))
        return op("Reshape", positions, constant([-1])), op("Unsqueeze", hidden, constant([1]))

    def word_table(self) -> str:
        """[V, D], or the domains' tables one after the other."""
        if not self.slots:
            self.table = self.weight("embedding.word")
        else:
            names = [f"domains.{domain}.embedding.word" for domain in self.source.domains]
            self.table = self.builder.weight("embedding.word", np.concatenate([self.read(name) for name in names]))
        return self.table

    def word_ids(self) -> str:
        if not (self.slots and self.several):
            return self.rows
        return self.op("Add", self.rows, self.op("Mul", self.row_domain, self.constant(self.source.vocab)))

    def layer(self, prefix: str, number: int, h: str, queries: str | None, mask: str) -> str:
        """h [T, D] -> [T, D]."""
        x = self.norm(f"{prefix}.norm1", h)
        h = self.op("Add", h, self.attention(f"{prefix}.attention", number, queries or x, x, mask))
        x = self.norm(f"{prefix}.norm2", h)
        if prefix in self.model.sparse_prefixes:
            return self.op("Add", h, self.sparse(prefix, x))
        up, down = (
            {part: self.weight(f"{prefix}.feed_forward.{name}.{part}") for part in ("weight", "bias")}
            for name in ("up", "down")
        )
        return self.op("Add", h, self.feed_forward(x, up, down))

    def norm(self, name: str, x: str) -> str:
        gamma, beta = self.weight(f"{name}.gamma"), self.weight(f"{name}.beta")
        return self.op("LayerNormalization", x, gamma, beta, axis=-1, epsilon=self.model.norm_epsilon)

    def affine(self, x: str, tensors: Mapping[str, str]) -> str:
        return self.op("Gemm", x, tensors["weight"], tensors["bias"])

    def feed_forward(self, x: str, up: Mapping[str, str], down: Mapping[str, str]) -> str:
        return self.affine(self.activate(self.affine(x, up)), down)

    def activate(self, x: str) -> str:
        """FastGELU x * sigmoid(1.702 x), or GELU's tanh form as x * sigmoid(2 u)."""
        op, number = self.op, partial(self.constant, dtype=np.float32)
        if self.model.activation == "fast_gelu":
            return op("Mul", x, op("Sigmoid", op("Mul", x, number(1.702))))
        slope = 2.0 * math.sqrt(2.0 / math.pi)
        inner = op("Add", op("Mul", op("Mul", x, x), number(slope * 0.044715)), number(slope))
        return op("Mul", x, op("Sigmoid", op("Mul", x, inner)))

    def attention(self, name: str, number: int, queries: str, x: str, mask: str) -> str:
        op, constant = self.op, self.constant
        heads, width = self.model.heads, self.model.hidden // self.model.heads

        def by_head(part: str, rows: str) -> str:
            tensors = {kind: self.weight(f"{name}.{part}.{kind}") for kind in ("weight", "bias")}
            shape = op("Concat", self.batch_and_length, constant([heads, width]), axis=0)
            return op("Transpose", op("Reshape", self.affine(rows, tensors), shape), perm=[0, 2, 1, 3])

        q, k, v = by_head("query", queries), by_head("key", x), by_head("value", x)
        k = op("Concat", f"past_key_values.{number}.key", k, axis=2)
        v = op("Concat", f"past_key_values.{number}.value", v, axis=2)
        self.builder.call_it(k, f"present.{number}.key")
        self.builder.call_it(v, f"present.{number}.value")
        q = op("Mul", q, constant(1.0 / math.sqrt(width), np.float32))
        scores = op("Add", op("MatMul", q, op("Transpose", k, perm=[0, 1, 3, 2])), mask)
        y = op("Transpose", op("MatMul", op("Softmax", scores, axis=-1), v), perm=[0, 2, 1, 3])
        projection = {kind: self.weight(f"{name}.projection.{kind}") for kind in ("weight", "bias")}
        return self.affine(op("Reshape", y, constant([-1, heads * width])), projection)

    def sparse(self, prefix: str, x: str) -> str:
        """Rows find their experts; each expert computes exactly its rows."""
        op, constant = self.op, self.constant
        weight = None
        if self.model.router == "switch":
            probabilities = op("Softmax", op("MatMul", x, self.weight(f"{prefix}.router.weight")), axis=-1)
            ids = op("ArgMax", probabilities, axis=-1, keepdims=0)
            weight = op("ReduceMax", probabilities, axes=[-1], keepdims=1)
        else:
            ids = op("Gather", self.routing(prefix), self.table_entries())
        row_indices, results, number = [], [], 0
        for domain, size in zip(self.source.domains, self.source.experts, strict=True):
            named: list[dict[str, str]] = [{} for _ in range(size)]
            for part in ("up.weight", "up.bias", "down.weight", "down.bias"):
                tensor = self.read(f"domains.{domain}.{prefix}.experts.{part}")
                for e in range(size):
                    name = f"domains.{domain}.{prefix}.experts.{e}.{part}"
                    named[e][part] = self.builder.weight(name, tensor[e])
                del tensor
            for expert in named:
                up, down = ({p: expert[f"{n}.{p}"] for p in ("weight", "bias")} for n in ("up", "down"))
                token_indices = op("Transpose", op("NonZero", op("Equal", ids, constant(number))), perm=[1, 0])
                own_rows = op("GatherND", x, token_indices)
                row_indices.append(token_indices)
                results.append(self.feed_forward(own_rows, up, down))
                number += 1
        # Every row stands in exactly one result.
        y = op("ScatterND", x, op("Concat", *row_indices, axis=0), op("Concat", *results, axis=0))
        return y if weight is None else op("Mul", y, weight)

    def routing(self, prefix: str) -> str:
        """The tables of a layer one after the other, counting the layer's experts."""
        tables, first = [], 0
        for domain, size in zip(self.source.domains, self.source.experts, strict=True):
            name = f"domains.{domain}.{prefix}.routing"
            self.used.add(name)
            tables.append(self.source.checkpoint.load([name])[name].astype(np.int64) + first)
            first += size
        return self.builder.weight(f"{prefix}.routing", np.concatenate(tables))

    def table_entries(self) -> str:
        if not self.several:
            return self.rows
        return self.op("Add", self.rows, self.op("Mul", self.row_domain, self.constant(self.source.vocab)))

    def head(self, h: str) -> None:
        """logits [B, S, V] by the word table of each sample."""
        op, constant = self.op, self.constant
        free = op("Concat", self.batch_and_length, constant([-1]), axis=0)
        if not (self.slots and self.several):
            logits = op("Reshape", op("Gemm", h, self.table, transB=1), free)
        else:
            size = [len(self.source.domains), self.source.vocab, self.model.hidden]
            tables = op("Gather", op("Reshape", self.table, constant(size)), "domain")
            logits = op("MatMul", op("Reshape", h, free), op("Transpose", tables, perm=[0, 2, 1]))
        self.builder.call_it(logits, "logits")

    def as_list(self, scalar: str) -> str:
        return self.op("Unsqueeze", scalar, self.constant([0]))

    def save(self) -> None:
        model = self.model
        heads, width = model.heads, model.hidden // model.heads
        int64, float32 = np.int64, np.float32

        def caches(name: str, length: str) -> list[tuple[str, type, list[int | str]]]:
            parts = [f"{name}.{i}.{part}" for i in range(model.layers) for part in ("key", "value")]
            return [(part, float32, ["batch", heads, length, width]) for part in parts]

        inputs = [("input_ids", int64, ["batch", "length"]), ("attention_mask", int64, ["batch", "total"])]
        if self.several:
            inputs.append(("domain", int64, ["batch"]))
        inputs += [("past_documents", int64, ["batch", "past"]), ("next_document", int64, ["batch"])]
        outputs = [
            ("logits", float32, ["batch", "length", self.source.vocab]),
            ("documents", int64, ["batch", "total"]),
            ("following_document", int64, ["batch"]),
        ]
        inputs, outputs = inputs + caches("past_key_values", "past"), outputs + caches("present", "total")
        metadata = {
            "domains": json.dumps(list(self.source.domains)),
            "eod_id": str(self.source.tokenizer.eod_id),
            "pad_id": str(self.source.tokenizer.pad_id),
            "positions": str(model.positions),
        }
        self.builder.save(inputs, outputs, _MEANINGS, metadata)


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
_INT64 = 7  # TensorProto.INT64, without importing onnx for every format
