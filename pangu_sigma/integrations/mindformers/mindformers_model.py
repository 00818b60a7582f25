"""The model as MindFormers knows one: a config class and a network whose parameters are this product's tensors.

The network's parameters carry the names and shapes of our checkpoints (`config.parameter_counts.manifest`): shared
ones, every domain's expert groups `[E, …]`, and the routing tables, which never train. So a checkpoint of the one is a
checkpoint of the other, tensor by tensor.
"""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
from mindformers.models import PretrainedConfig, PreTrainedModel
from mindformers.tools.utils import get_output_root_path
from mindspore import Parameter, ParameterTuple, Tensor, context, nn, ops

from pangu_sigma.errors import UserError
from pangu_sigma.integrations.mindformers.batch_columns import column_placeholders, open_text, split_columns
from pangu_sigma.integrations.mindformers.mindformers_settings import model_settings
from pangu_sigma.model.build_model import build_model
from pangu_sigma.model.forward_pass import ForwardPass, WeightedLoss
from pangu_sigma.model.graph_inputs import WEIGHTS, layer_inputs, with_weights
from pangu_sigma.model.model import Model
from pangu_sigma.model.state_dict import model_tensors, restore_model
from pangu_sigma.tensor_names import DOMAIN_EMBEDDING, WORDS, expert_name, is_routing, parse_name


class PanGuSigmaConfig(PretrainedConfig):
    """`model.model_config`: `pangu_sigma` holds our sections `run`, `model`, `domains`, `data` and `train`."""

    model_type = "pangu_sigma"

    def __init__(self, pangu_sigma: Any = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.pangu_sigma = pangu_sigma or {}
        sizes = self.pangu_sigma.get("model") or {}
        # By the names that MindFormers' own tools ask for.
        self.num_layers, self.hidden_size = sizes.get("layers"), sizes.get("hidden")
        self.vocab_size = sizes.get("vocab_size")


class PanGuSigmaForCausalLM(PreTrainedModel):
    """Columns of a planned batch (`batch_columns.columns`) -> mean loss in nats per token.

    Built from the run's text: its vocabulary, and for a new model its tables; `run.init_from` gives weights and tables
    of a model of ours. `expert_tensors`: name -> (sparse layer's number or DOMAIN_EMBEDDING, domain's number), for
    the optimizer.
    """

    config_class = PanGuSigmaConfig
    base_model_prefix = "pangu_sigma"

    def __init__(self, config: PanGuSigmaConfig) -> None:
        super().__init__(config, auto_prefix=False)
        batch = _batch_size(config)
        text = open_text(
            model_settings(config.pangu_sigma, context.get_context("device_target"), get_output_root_path())
        )
        tokenizer = text.corpus.tokenizer
        built = build_model(
            text.config, text.config.model.vocab_size, tokenizer.eod_id, text.tables, text.token_counts,
            initialise=text.weights is None,
        )  # fmt: skip
        if text.weights is not None:
            restore_model(built, text.weights)
        self.inputs = built.training_inputs(batch)
        self.net = built.net
        self.domains, self.layer_names = built.groups.names, tuple(s.name for s in self.inputs.layers)
        self.sizes = built.groups.sizes
        parameters = {name: _parameter(name, tensor) for name, tensor in _domain_tensors(built).items()}
        self.tables = ParameterTuple([p for name, p in parameters.items() if is_routing(name)])
        self.slot_tables = ParameterTuple([p for name, p in parameters.items() if parse_name(name).part == WORDS])
        tensors = text.config.model.expert_network.tensors
        names = [
            expert_name(layer_name, tensor, domain)
            for layer_name in self.layer_names for domain in self.domains for tensor in tensors
        ]  # fmt: skip
        self.experts = ParameterTuple([parameters[name] for name in names])
        per_layer = len(self.domains) * len(tensors)
        self.expert_tensors: dict[str, tuple[int | str, int]] = {
            name: (i // per_layer, i % per_layer // len(tensors)) for i, name in enumerate(names)
        }
        self.expert_tensors |= {p.name: (DOMAIN_EMBEDDING, domain_id) for domain_id, p in enumerate(self.slot_tables)}
        self.layout = built.layout
        self.loss = Objective(self)
        # The network holds the experts now; the store's tables go.
        built.store.close()
        self.load_checkpoint(config)

    def construct(self, *columns: Tensor) -> Tensor:
        tokens = ops.ReduceSum()(columns[WEIGHTS])
        _, by_sample, _, _ = self.loss(columns[WEIGHTS] / tokens, Tensor(0.0, ms.float32), *columns)
        return ops.ReduceSum()(by_sample) / tokens

    def placeholders(self) -> list[Tensor]:
        """Shapes of the columns, for compiling."""
        return column_placeholders(self.inputs)

    @classmethod
    def can_generate(cls) -> bool:
        """No: MindFormers' generation needs operators that CPU lacks; import the checkpoint to generate."""
        return False

    def get_model_parameters(self, only_trainable: bool = True) -> list[Parameter]:
        """The network's parameters, as MindFormers' trainer lists them."""
        return list(self.trainable_params() if only_trainable else self.get_parameters())


class Objective(nn.Cell):
    """weights float32 [B, S], weight of the auxiliary loss, columns -> (objective, loss sums per sample [B], auxiliary
    loss, rows [B, E + 1] of learned gates).

    Expert groups are unstacked along their first axis, so the gradient of a group is the stack of its experts'.
    """

    def __init__(self, model: PanGuSigmaForCausalLM) -> None:
        super().__init__(auto_prefix=False)
        inputs = model.inputs
        self.loss = ForwardPass(model.net, inputs, WeightedLoss(model.net.head, model.layout))
        self.num_routing = len(inputs.routing_specs())
        self.bounds = inputs.separate_bounds
        self.domains = len(model.domains)
        self.sizes = model.sizes
        self.experts = model.experts
        self.each = len(inputs.layers[0].network.tensors) if inputs.layers else 0
        self.slot_tables = model.slot_tables
        self.has_slots = len(inputs.word_tables) > 0
        self.unstack = ops.Unstack(0)
        self.stack = ops.Stack(0)

    def construct(self, weights: Tensor, auxiliary_weight: Tensor, *columns: Tensor):
        fixed, all_routing, _ = split_columns(columns, self.num_routing)
        all_weights = ()
        for layer_index in range(len(self.bounds)):
            all_weights = all_weights + self.group_weights(layer_index)
        flat = ()
        if self.has_slots:
            flat = flat + (self.stack(self.slot_tables),)
        for routing, expert_weights in layer_inputs(all_routing, all_weights, self.bounds):
            flat = flat + routing + expert_weights
        return self.loss(*with_weights(fixed, weights, auxiliary_weight), *flat)

    def group_weights(self, layer_index: int):
        flat = ()
        for domain_id in range(self.domains):
            first = (layer_index * self.domains + domain_id) * self.each
            tensors = ()
            for i in range(self.each):
                tensors = tensors + (self.unstack(self.experts[first + i]),)
            for expert in range(self.sizes[domain_id]):
                for i in range(self.each):
                    flat = flat + (tensors[i][expert],)
        return flat


def _batch_size(config: PanGuSigmaConfig) -> int:
    dataset = getattr(config, "dataset_config", None) or {}
    batch = dataset.get("batch_size") or getattr(config, "batch_size", None)
    if batch is None:
        raise UserError("MindFormers' Trainer builds the model and tells it the batch: set runner_config.batch_size")
    return int(batch)


def _domain_tensors(built: Model) -> dict[str, np.ndarray]:
    """Everything that is no parameter of the network: expert groups, embedding slots, routing tables."""
    shared = {p.name for p in built.net.get_parameters()}
    return {name: tensor for name, tensor in model_tensors(built, None).items() if name not in shared}


def _parameter(name: str, tensor: np.ndarray) -> Parameter:
    return Parameter(Tensor(np.ascontiguousarray(tensor)), name=name, requires_grad=not is_routing(name))
