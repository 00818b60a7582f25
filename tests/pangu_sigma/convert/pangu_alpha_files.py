"""A PanGu-α model as its own code has it: tensors, checkpoint files, shards, strategy files, and the forward pass.

Nothing here comes from the importer: names, layouts and the cut of shards are written down a second time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

LINEAR_OUT_IN = ("dense1", "dense2", "dense3")
NPY = {"word_embedding": "word", "position_embedding": "position", "top_query_embedding": "top_query"}
TYPES = {"float32": "Float32", "float16": "Float16", "int32": "Int32"}


def make_alpha(
    layers: int, hidden: int, ffn: int, vocab: int, positions: int, seed: int = 0
) -> dict[str, np.ndarray]:
    """Every tensor of a PanGu-α of `layers` layers (the query layer included), float32 under its published name."""
    draw = np.random.default_rng(seed)

    def normal(*shape: int, mean: float = 0.0) -> np.ndarray:
        return (mean + draw.standard_normal(shape, np.float32) / np.float32(math.sqrt(shape[-1]))).astype(np.float32)

    tensors = {
        "backbone.word_embedding.embedding_table": normal(vocab, hidden),
        "backbone.position_embedding.embedding_table": normal(positions, hidden),
        "backbone.top_query_embedding.embedding_table": normal(positions, hidden),
        "backbone.layernorm.gamma": normal(hidden, mean=1.0),
        "backbone.layernorm.beta": normal(hidden),
    }
    for layer in [*(f"backbone.blocks.{i}" for i in range(layers - 1)), "backbone.top_query_layer"]:
        for norm in ("layernorm1", "layernorm2"):
            tensors[f"{layer}.{norm}.gamma"] = normal(hidden, mean=1.0)
            tensors[f"{layer}.{norm}.beta"] = normal(hidden)
        for part in (*LINEAR_OUT_IN, "projection"):
            tensors[f"{layer}.attention.{part}.weight"] = normal(hidden, hidden)
            tensors[f"{layer}.attention.{part}.bias"] = normal(hidden)
        tensors[f"{layer}.output.mapping.weight"], tensors[f"{layer}.output.mapping.bias"] = (
            normal(hidden, ffn), normal(ffn),
        )  # fmt: skip
        tensors[f"{layer}.output.projection.weight"], tensors[f"{layer}.output.projection.bias"] = (
            normal(ffn, hidden), normal(hidden),
        )  # fmt: skip
    return tensors


def alpha_logits(tensors: Mapping[str, np.ndarray], heads: int, tokens: np.ndarray) -> np.ndarray:
    """Logits [S, V] of one document in float64, by PanGu-α's published code: `dense1` to `dense3` multiply by their
    weight's transpose (nn.Dense), `mapping` and `projection` by the weight itself."""
    t = {name.removeprefix("backbone."): array.astype(np.float64) for name, array in tensors.items()}
    length = len(tokens)
    causal = np.where(np.tril(np.ones((length, length), bool)), 0.0, -10000.0)

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * t[f"{name}.gamma"] + t[f"{name}.beta"]

    def dense(name: str, x: np.ndarray) -> np.ndarray:
        return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    def mapping(name: str, x: np.ndarray) -> np.ndarray:
        return x @ t[f"{name}.weight"] + t[f"{name}.bias"]

    def split(x: np.ndarray) -> np.ndarray:
        return x.reshape(length, heads, -1).transpose(1, 0, 2)

    def layer(name: str, h: np.ndarray, queries: np.ndarray | None) -> np.ndarray:
        x = norm(f"{name}.layernorm1", h)
        q = split(dense(f"{name}.attention.dense1", x if queries is None else queries))
        k, v = split(dense(f"{name}.attention.dense2", x)), split(dense(f"{name}.attention.dense3", x))
        scores = q @ k.transpose(0, 2, 1) / math.sqrt(q.shape[-1]) + causal
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        y = (weights / weights.sum(-1, keepdims=True)) @ v
        h = h + mapping(f"{name}.attention.projection", y.transpose(1, 0, 2).reshape(length, -1))
        inner = mapping(f"{name}.output.mapping", norm(f"{name}.layernorm2", h))
        inner = 0.5 * inner * (1 + np.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
        return h + mapping(f"{name}.output.projection", inner)

    words = t["word_embedding.embedding_table"]
    h = words[tokens] + t["position_embedding.embedding_table"][:length]
    blocks = len({name.split(".")[1] for name in t if name.startswith("blocks.")})
    for index in range(blocks):
        h = layer(f"blocks.{index}", h, None)
    h = layer("top_query_layer", norm("layernorm", h), t["top_query_embedding.embedding_table"][:length])
    return h @ words.T


# --- files


def varint(number: int) -> bytes:
    out = b""
    while number > 127:
        out, number = out + bytes([number % 128 + 128]), number // 128
    return out + bytes([number])


def ckpt_bytes(name: str, array: np.ndarray) -> bytes:
    """One tensor as MindSpore writes it into a `.ckpt` file."""
    content = array.tobytes()
    dims = b"".join(b"\x08" + varint(size) for size in array.shape)
    kind = TYPES[array.dtype.name].encode()
    tensor = dims + b"\x12" + varint(len(kind)) + kind + b"\x1a" + varint(len(content)) + content
    tag = name.encode()
    value = b"\x0a" + varint(len(tag)) + tag + b"\x12" + varint(len(tensor)) + tensor
    return b"\x0a" + varint(len(value)) + value


def write_ckpt(path: Path, tensors: Mapping[str, np.ndarray]) -> Path:
    with open(path, "wb") as file:
        for name, array in tensors.items():
            file.write(ckpt_bytes(name, array))
    return path


def write_shards(folder: Path, tensors: Mapping[str, np.ndarray], strategy, npy: Iterable[str] = NPY) -> Path:
    """The published layout: a file for every rank of `strategy` (MindSpore's own message), three embeddings as `.npy`.

    Cut as MindSpore's parallel training does: the device grid [data, model], rank = data * models + model; an axis of
    the tensor is cut over `model` where the tensor map says 0; what is then the same on all `data` ranks is cut along
    axis 0 over them if the optimizer is sharded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pangu_alpha_ckpt_strategy.ckpt").write_bytes(strategy.SerializeToString())
    layouts = {item.param_name: item.parallel_layouts for item in strategy.parallel_layout_item}
    data, models = next(iter(layouts.values())).dev_matrix[0].dim
    outside = {f"backbone.{name}.embedding_table" for name in npy}
    pieces: list[dict[str, np.ndarray]] = [{} for _ in range(data * models)]
    for name, array in tensors.items():
        if name in outside:
            continue
        layout = layouts[name]
        by_model = [array] * models
        for axis, cut in enumerate(layout.tensor_map[0].dim):
            assert cut in (-1, 0)
            if cut == 0:
                by_model = np.split(array, models, axis)
        for model, part in enumerate(by_model):
            by_data = np.split(part, data, 0) if layout.opt_weight_shard_step else [part] * data
            for row, piece in enumerate(by_data):
                pieces[row * models + model][name] = piece
    for rank, piece in enumerate(pieces):
        write_ckpt(folder / f"filerted_{rank}.ckpt", piece)
    for name in npy:
        np.save(folder / f"{name}.npy", tensors[f"backbone.{name}.embedding_table"])
    return folder


def cut_strategy(published: Path, layers: int):
    """MindSpore's message of a published strategy file, cut down to a model of `layers` layers."""
    from mindspore.train.node_strategy_pb2 import ParallelStrategyMap

    strategies = ParallelStrategyMap()
    strategies.ParseFromString(published.read_bytes())
    kept = ParallelStrategyMap(current_stage=strategies.current_stage)
    for item in strategies.parallel_layout_item:
        parts = item.param_name.split(".")
        if "blocks" not in parts or int(parts[parts.index("blocks") + 1]) < layers - 1:
            kept.parallel_layout_item.append(item)
    return kept


def small_strategy(names: Iterable[str], data: int, models: int, sharded: bool = True):
    """A strategy for a grid [data, models] with the published cuts."""
    from mindspore.train.node_strategy_pb2 import ParallelStrategyMap

    strategy = ParallelStrategyMap(current_stage=1)
    for name in names:
        matrix = name.endswith(("weight", "embedding_table"))
        cut = [-1, -1] if matrix else [-1]
        if any(f".{part}." in name for part in (*LINEAR_OUT_IN, "mapping")):
            cut = [-1, 0] if "mapping.weight" in name else ([0, -1] if matrix else [0])
        elif matrix and "embedding" not in name:
            cut = [0, -1]
        item = strategy.parallel_layout_item.add(param_name=name)
        layouts = item.parallel_layouts
        layouts.dev_matrix.add().dim.extend([data, models])
        layouts.tensor_map.add().dim.extend(cut)
        layouts.param_split_shape.add()
        layouts.indices_offset.add()
        layouts.field = 0
        sharded_here = sharded and 0 in cut
        layouts.opt_weight_shard_step = models if sharded_here else 0
        layouts.opt_weight_shard_size = -1 if sharded_here else 0
    return strategy


def ours(name: str) -> tuple[str, bool]:
    """(our tensor's name, transposed) of a PanGu-α tensor, from the issue's table of names."""
    plain = {
        "backbone.word_embedding.embedding_table": "embedding.word",
        "backbone.position_embedding.embedding_table": "embedding.position",
        "backbone.top_query_embedding.embedding_table": "embedding.query",
    }
    if name in plain:
        return plain[name], False
    for old, new in (
        ("backbone.", ""), ("top_query_layer", "query_layer"), ("layernorm1", "norm1"), ("layernorm2", "norm2"),
        ("layernorm", "norm"), ("attention.dense1", "attention.query"), ("attention.dense2", "attention.key"),
        ("attention.dense3", "attention.value"), ("output.mapping", "feed_forward.up"),
        ("output.projection", "feed_forward.down"),
    ):  # fmt: skip
        if old in name:
            name = name.replace(old, new, 1)
    return name, name.endswith((".query.weight", ".key.weight", ".value.weight"))
