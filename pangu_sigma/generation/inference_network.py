"""The network at inference, on the parameters of a trained one: no copies, so an optimizer step shows at once.

It is `pangu_sigma.model.backbone` with other parts: attention cores with a cache, experts that suit few rows, or fused
layers. What a row of a decode step computes under a table router depends on nothing else in the batch.

Legend: T rows, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mindspore as ms
from mindspore import Tensor, nn
from mindspore.nn.utils import no_init_parameters

from pangu_sigma.model.backbone import Backbone, output_head, sparse_feed_forward, transformer_layers
from pangu_sigma.model.build_model import COMPUTE_TYPES
from pangu_sigma.model.graph_inputs import GraphInputs, LayerInputs, split_inputs
from pangu_sigma.model.model import Model
from pangu_sigma.tensor_names import name_without_cells, tensor_name
from rre.experts import CompiledExperts, RaggedExperts


def own_tables(model: Model) -> bool:
    """Whether every domain has a word table of its own, which is then an input of the graphs."""
    return model.config.model.domain_parameters.embedding == "own"


def inference_inputs(model: Model, texts: int, length: int, slots: int, planned: bool = False) -> GraphInputs:
    """Inputs of a graph over so many texts of `length` tokens; a layer's `slots` are `planned` or in a fixed order."""
    config = model.config.model
    layers = (LayerInputs(layer_name, slots, config.expert_network, planned) for layer_name in config.sparse_prefixes)
    tables = ((model.vocab, config.hidden),) * texts if own_tables(model) else ()
    return GraphInputs(tuple(layers), tables, texts, length, config.hidden, config.ffn)


class InferenceNetwork(Backbone):
    """`Backbone` on the parameters of `model`, whose flat inputs are the variable ones of `inputs`: where each domain
    has its own, the word table [V, D] of each text; then those of the sparse layers from the bottom up."""

    def __init__(
        self, model: Model, layers: Sequence[nn.Cell], inputs: GraphInputs, head: nn.Cell | None = None
    ) -> None:
        config, layout = model.config.model, model.layout.for_few_rows()
        with no_init_parameters():
            head = head or output_head(config, model.vocab, layout, model.groups.total)
            super().__init__(config, model.vocab, layout, layers, head)
        self.graph_inputs = inputs
        self.samples, self.bounds = inputs.batch, inputs.bounds
        self.no_dropout = Tensor([0], ms.int32)
        share_parameters(self, model.net)

    @nn.Cell.compile_phase.setter
    def compile_phase(self, phase: str) -> None:
        """MindSpore sets it at every call, in every cell of the graph one after the other; it seldom changes."""
        if phase != self._compile_phase:
            nn.Cell.compile_phase.fset(self, phase)

    def outputs(self, h: Tensor, positions: Tensor, last, context: tuple, caches: tuple, flat: tuple[Tensor, ...]):
        """Embedded rows h_TD, position ids [T] -> (logits float32 [T, V], or of the rows `last` int32 [n] alone, new
        keys and values of all layers)."""
        _, sparse_inputs, _ = split_inputs(flat, self.bounds)
        h, kept, _, _ = self.through_layers(h, positions, context, caches, self.no_dropout, sparse_inputs)
        if last is not None:
            h = self.head.select(h, last)
        logits = self.head.logits(h, self.samples, None, self.word_table(flat))
        return logits.reshape(-1, logits.shape[-1]), kept

    def word_table(self, flat: tuple[Tensor, ...]):
        """The word table [V, D], or the tuple of each text's."""
        words = self.embedding.words
        return split_inputs(flat, self.bounds)[0] if words.per_domain else words.word


def inference_layers(model: Model, cores: Sequence[nn.Cell], table_experts: Callable[[], nn.Cell]) -> list[nn.Cell]:
    """Transformer layers around these attention cores. Under a learned gate every expert is an input, in the others the
    experts are what `table_experts` makes for each layer."""
    config, layout = model.config.model, model.layout.for_few_rows()
    compute = COMPUTE_TYPES[model.config.train.precision]

    def gated_experts() -> nn.Cell:
        # One operator of static shapes, which compiles in a moment however many experts there are.
        if layout.kernels:
            return CompiledExperts(layout.kernels, config.expert_network, exact_rows=0)
        return RaggedExperts(layout, config.expert_network, compute)

    with no_init_parameters():
        sparse = []
        for router in model.routers:
            experts = gated_experts() if router.learned else table_experts()
            sparse.append(sparse_feed_forward(config, router, layout, compute, experts=experts))
            sparse[-1].router.routes_only = router.learned
        return transformer_layers(config, layout, compute, sparse, cores)


def share_parameters(network: Backbone, trained: nn.Cell) -> None:
    """Put the parameters of the trained network in place of those of the same names in another one."""
    parameters = {parameter.name: parameter for parameter in trained.get_parameters()}
    for path, cell in network.cells_and_names():
        for attribute, own in list(cell.parameters_and_names(expand=False)):
            name = name_without_cells(tensor_name(path, attribute))
            if name in parameters:
                setattr(cell, attribute, parameters[name])
            elif own.name not in parameters:
                own.name = name
