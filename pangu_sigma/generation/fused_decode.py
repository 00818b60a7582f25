"""Fused decode step on CPU: a compiled kernel for each layer and one for the head, called as the cells that they
replace are.

Legend: B rows of the batch (one token of one text each), H heads, W head width, D hidden width, V vocabulary.
"""

from __future__ import annotations

from mindspore import ParameterTuple, Tensor

from pangu_sigma.model.model import Model
from pangu_sigma.tensor_names import QUERY_LAYER
from parallel.ops.compiled_decoding import CompiledDecodeHead, CompiledDecodeLayer


def has_fused_decode(model: Model) -> bool:
    """Whether compiled kernels are used (`run.kernels`) and cover the model: its parts, and table routers."""
    covered = all(part.in_fused_decode for part in model.config.model.parts.values()) and not model.learned
    return model.layout.kernels is not None and covered


class FusedDecodeLayer(CompiledDecodeLayer):
    """`TransformerLayer` of a decode step as one compiled kernel, on the trained network's parameters.

    What a cache holds from a row's position on does not matter, and no row's result depends on other rows. `context`:
    positions int32 [B], keys and values [B*H, L, W].
    """

    def __init__(self, model: Model, layer_name: str) -> None:
        config = model.config.model
        super().__init__(
            model.layout.kernels, config.heads, config.activation, config.norm_epsilon, layer_name == QUERY_LAYER
        )
        # In the kernel's order: norm, query, key, value, projection, norm; then a dense layer's network.
        self.own = ParameterTuple(model.net.layer(layer_name).get_parameters())

    def construct(
        self, h: Tensor, query_rows, cos_sin: tuple, context: tuple, keys: Tensor, routing: tuple, weights: tuple
    ):  # fmt: skip
        queries = h if query_rows is None else query_rows
        outputs = self.run(h, queries, *context, self.settings, self.epsilon, *self.own, *weights)
        return outputs[0], outputs[1:3], None, None


class FusedDecodeHead(CompiledDecodeHead):
    """`TiedHead` of a decode step as one compiled kernel."""

    def logits(self, h: Tensor, batch: int, domain: None, table) -> Tensor:
        """h [B, D], the word table or one of each row -> logits float32 [B, V]."""
        return self.run(h, *table) if isinstance(table, tuple) else self.run(h, table)
