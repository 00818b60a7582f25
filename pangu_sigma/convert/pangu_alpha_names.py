"""PanGu-α's parameter names as this product's, and which tensors of its checkpoints are no parameters.

Names and layouts are those of the published strategy files and of huawei-noah/Pretrained-Language-Model, PanGu-α:
`dense1` to `dense3` (query, key, value) are [out, in], every other weight is [in, out]. Later code of the same model
has the word and position tables one level deeper (`backbone.embedding.…`).
"""

from __future__ import annotations

import re
from typing import NamedTuple

from pangu_sigma.convert.conversion_coverage import SkippedTensors
from pangu_sigma.tensor_names import POSITIONS, QUERIES, QUERY_LAYER, WORDS, block_name, tensor_name

_TOP = {
    "word_embedding.embedding_table": WORDS,
    "position_embedding.embedding_table": POSITIONS,
    "embedding.word_embedding.embedding_table": WORDS,
    "embedding.position_embedding.embedding_table": POSITIONS,
    "top_query_embedding.embedding_table": QUERIES,
    "layernorm.gamma": tensor_name("norm", "gamma"),
    "layernorm.beta": tensor_name("norm", "beta"),
}
_PARTS = {
    "layernorm1": "norm1",
    "layernorm2": "norm2",
    "attention.dense1": tensor_name("attention", "query"),
    "attention.dense2": tensor_name("attention", "key"),
    "attention.dense3": tensor_name("attention", "value"),
    "attention.projection": tensor_name("attention", "projection"),
    "output.mapping": tensor_name("feed_forward", "up"),
    "output.projection": tensor_name("feed_forward", "down"),
}
_OUT_IN = ("attention.dense1", "attention.dense2", "attention.dense3")
_LAYER = re.compile(
    r"backbone\.(?:blocks\.(?P<block>\d+)|top_query_layer)\.(?P<part>[a-z0-9.]+)\."
    r"(?P<kind>weight|bias|gamma|beta)"
)

SKIPPED = SkippedTensors(
    {
        "adam_m.*, moment1.*": (r"(adam_m|moment1)\..+", "first moments of the optimizer"),
        "adam_v.*, moment2.*": (r"(adam_v|moment2)\..+", "second moments of the optimizer"),
        "accu_grads.*": (r"accu_grads\..+", "accumulated gradients"),
        "counters": (
            r"(optimizer\.)?(global_step|epoch_num|step_num|learning_rate|beta[12]_power|loss_scale|scale_sense"
            r"|current_iterator_step|last_overflow_iterator_step|total_overflow_times)",
            "counters of the training",
        ),
    }
)

EMBEDDING_FILES = {
    "word_embedding.npy": "backbone.word_embedding.embedding_table",
    "position_embedding.npy": "backbone.position_embedding.embedding_table",
    "top_query_embedding.npy": "backbone.top_query_embedding.embedding_table",
}


class PanguAlphaTarget(NamedTuple):
    """Where a parameter goes: our tensor's name, and whether it must be transposed on the way."""

    name: str
    transposed: bool


def target_of(name: str) -> PanguAlphaTarget | None:
    """Our tensor for PanGu-α's parameter `name`; None for a name that PanGu-α does not have."""
    top = _TOP.get(name.removeprefix("backbone.")) if name.startswith("backbone.") else None
    if top is not None:
        return PanguAlphaTarget(top, False)
    match = _LAYER.fullmatch(name)
    if match is None or match["part"] not in _PARTS:
        return None
    layer_name = QUERY_LAYER if match["block"] is None else block_name(int(match["block"]))
    transposed = match["part"] in _OUT_IN and match["kind"] == "weight"
    return PanguAlphaTarget(tensor_name(layer_name, _PARTS[match["part"]], match["kind"]), transposed)
