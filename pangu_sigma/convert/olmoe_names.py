"""Names of OLMoE's tensors in Hugging Face's folders, beside ours: one table for taking over and for handing out.

Source: transformers 4.57, `models/olmoe/modeling_olmoe.py`. nn.Linear's matrices are [out, in], ours [in, out]; expert
tensors stand alone there and as one tensor [experts, in, out] here.
"""

from __future__ import annotations

from dataclasses import dataclass

from pangu_sigma.config import Config
from pangu_sigma.tensor_names import GATE, OUTPUT_WORDS, WORDS, block_index, parse_name, tensor_name

MODEL_TYPE = "olmoe"  # in Hugging Face's config.json
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_TABLES = {
    WORDS: TABLE,
    OUTPUT_WORDS: HEAD,
    tensor_name("norm", "gamma"): "model.norm.weight",
}
_IN_LAYER = {
    tensor_name("norm1", "gamma"): ("input_layernorm", False),
    tensor_name("norm2", "gamma"): ("post_attention_layernorm", False),
    tensor_name("attention", "query", "weight"): ("self_attn.q_proj", True),
    tensor_name("attention", "key", "weight"): ("self_attn.k_proj", True),
    tensor_name("attention", "value", "weight"): ("self_attn.v_proj", True),
    tensor_name("attention", "projection", "weight"): ("self_attn.o_proj", True),
    tensor_name("attention", "query_norm", "gamma"): ("self_attn.q_norm", False),
    tensor_name("attention", "key_norm", "gamma"): ("self_attn.k_norm", False),
    GATE: ("mlp.gate", True),
}
_OF_EXPERT = {tensor_name(matrix, "weight"): f"{matrix}_proj" for matrix in ("gate", "up", "down")}


@dataclass(frozen=True)
class OlmoeTensor:
    """One of Hugging Face's tensors that makes ours, or (`expert`: its number in our tensor) a part of it."""

    name: str
    turned: bool
    expert: int | None = None


def parts_of(config: Config, tensor: str) -> list[OlmoeTensor]:
    """The tensors of Hugging Face that make our `tensor`, in the order of its experts.

    The gate chooses among all experts of a layer: they are numbered domain after domain. Raises ValueError for a tensor
    that OLMoE does not have.
    """
    if tensor in _TABLES:
        return [OlmoeTensor(_TABLES[tensor], False)]
    parsed = parse_name(tensor)
    index = block_index(parsed.layer)
    layer = f"model.layers.{index}"
    if index is not None and parsed.part in _IN_LAYER:
        name, turned = _IN_LAYER[parsed.part]
        return [OlmoeTensor(f"{layer}.{name}.weight", turned)]
    if index is None or parsed.module != "experts" or parsed.tensor not in _OF_EXPERT:
        raise ValueError(f"OlmoeForCausalLM has no place for tensor {tensor}")
    first = sum(d.experts for d in config.domains[: config.domain_names.index(parsed.domain)])
    own, matrix = config.expert_groups[parsed.domain], _OF_EXPERT[parsed.tensor]
    return [OlmoeTensor(f"{layer}.mlp.experts.{first + e}.{matrix}.weight", True, e) for e in range(own)]
