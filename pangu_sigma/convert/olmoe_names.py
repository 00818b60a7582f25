"""Names of OLMoE's tensors in Hugging Face's folders, beside ours: one table for taking over and for handing out.

Source: transformers 4.57, `models/olmoe/modeling_olmoe.py`. nn.Linear's matrices are [out, in], ours [in, out]; expert
tensors stand alone there and as one tensor [experts, in, out] here.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter

from pangu_sigma.checkpoint.folder_layout import domain_of
from pangu_sigma.config import Config
from pangu_sigma.config.parameter_counts import is_expert

_TABLES = {
    "embedding.word": "model.embed_tokens.weight",
    "head.word": "lm_head.weight",
    "norm.gamma": "model.norm.weight",
}
_IN_LAYER = {
    "norm1.gamma": ("input_layernorm", False),
    "norm2.gamma": ("post_attention_layernorm", False),
    "attention.query.weight": ("self_attn.q_proj", True),
    "attention.key.weight": ("self_attn.k_proj", True),
    "attention.value.weight": ("self_attn.v_proj", True),
    "attention.projection.weight": ("self_attn.o_proj", True),
    "attention.query_norm.gamma": ("self_attn.q_norm", False),
    "attention.key_norm.gamma": ("self_attn.k_norm", False),
    "router.weight": ("mlp.gate", True),
}
# model.sparse apart: what a configuration must say so that its function is OlmoeForCausalLM's.
NEEDED = {
    "norm": "rmsnorm", "position": "rope", "feed_forward": "swiglu", "activation": "silu", "biases": False,
    "query_layer": "none", "domain_parameters.embedding": "shared",
}  # fmt: skip


@dataclass(frozen=True)
class OlmoeTensor:
    """One of Hugging Face's tensors that makes ours, or (`expert`: its number in our tensor) a part of it."""

    name: str
    turned: bool
    expert: int | None = None


def unlike_olmoe(config: Config) -> list[str]:
    """What in a configuration is not OlmoeForCausalLM's, as `key is value` sentences."""
    model, sparse = config.model, config.model.sparse
    own = {key: attrgetter(key)(model) for key in NEEDED}
    wrong = [f"model.{key} is {own[key]}" for key, value in NEEDED.items() if own[key] != value]
    if model.expert_feed_forward != "swiglu":
        wrong.append(f"model.sparse.feed_forward is {model.expert_feed_forward}")
    if not model.attention.qk_norm:
        wrong.append("model.attention.qk_norm is false")
    if model.router != "olmoe":
        wrong.append(model.router_setting.replace(" = ", " is "))
    if len(model.sparse_prefixes) != model.layers:
        wrong.append(f"{len(model.sparse_prefixes)} of {model.layers} layers are sparse")
    if sparse.shared_expert:
        wrong.append("model.sparse.shared_expert is true")
    return wrong


def parts_of(config: Config, tensor: str) -> list[OlmoeTensor]:
    """The tensors of Hugging Face that make our `tensor`, in the order of its experts.

    The gate chooses among all experts of a layer: they are numbered domain after domain. Raises ValueError for a tensor
    that OLMoE does not have.
    """
    if tensor in _TABLES:
        return [OlmoeTensor(_TABLES[tensor], False)]
    domain = domain_of(tensor)
    local_name = tensor if domain is None else tensor.removeprefix(f"domains.{domain}.")
    kind, _, rest = local_name.partition(".")
    index, _, part = rest.partition(".")
    layer = f"model.layers.{index}"
    if kind == "blocks" and part in _IN_LAYER:
        name, turned = _IN_LAYER[part]
        return [OlmoeTensor(f"{layer}.{name}.weight", turned)]
    matrix = part.removeprefix("experts.").removesuffix(".weight")
    if kind != "blocks" or not is_expert(tensor) or matrix not in ("gate", "up", "down"):
        raise ValueError(f"OlmoeForCausalLM has no place for tensor {tensor}")
    first = sum(d.experts for d in config.domains[: config.domain_names.index(domain)])
    own = next(d.experts for d in config.domains if d.name == domain)
    return [OlmoeTensor(f"{layer}.mlp.experts.{first + e}.{matrix}_proj.weight", True, e) for e in range(own)]
