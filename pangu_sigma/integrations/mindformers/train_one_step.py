"""One optimizer step inside MindFormers: its wrapper, with our objective, our clipping and its own loss scale."""

from __future__ import annotations

from typing import Any

import mindspore as ms
from mindformers.wrapper import MFTrainOneStepCell
from mindspore import ParameterTuple, Tensor, ops

from pangu_sigma.errors import UserError
from pangu_sigma.integrations.mindformers.batch_columns import split_columns
from pangu_sigma.integrations.mindformers.mindformers_model import PanGuSigmaForCausalLM
from pangu_sigma.integrations.mindformers.mindformers_optimizer import PanGuSigmaAdamW
from pangu_sigma.model.graph_inputs import DOMAIN, WEIGHTS
from pangu_sigma.tensor_names import DOMAIN_EMBEDDING


class PanGuSigmaTrainOneStep(MFTrainOneStepCell):
    """`runner_wrapper`: columns of a planned batch -> (loss, overflow, loss scale, learning rate, gradient norm).

    Overflow is detected in the gradients themselves; MindFormers' stock wrapper asks a register that only an NPU has. A
    step that overflowed changes nothing. Over several devices gradients are averaged and received rows added up, so
    all agree which experts train.
    """

    def __init__(self, network: Any, optimizer: Any, use_clip_grad: bool = True, max_grad_norm: float = 1.0,
                 **kwargs: Any) -> None:  # fmt: skip
        model = network
        if not isinstance(model, PanGuSigmaForCausalLM) or not isinstance(optimizer, PanGuSigmaAdamW):
            raise UserError(
                "PanGuSigmaTrainOneStep takes PanGuSigmaForCausalLM and PanGuSigmaAdamW, not "
                f"{type(model).__name__} and {type(optimizer).__name__}: name both in the YAML"
            )
        super().__init__(network, optimizer, use_clip_grad=use_clip_grad, max_grad_norm=max_grad_norm, **kwargs)
        layers = len(model.layer_names)
        owners = {
            name: (layers if index == DOMAIN_EMBEDDING else index, d)
            for name, (index, d) in model.expert_tensors.items()
        }
        optimizer.bind(owners, model.sizes, model.layer_names)
        self.objective = model.loss
        self.limit = float(max_grad_norm) if use_clip_grad else float("inf")
        self.num_routing = len(model.inputs.routing_specs())
        self.is_planned = any(layer.planned for layer in model.inputs.layers)
        self.has_slots = len(model.inputs.word_tables) > 0
        self.domain_ids = Tensor(list(range(len(model.domains))), ms.int32)
        self.trained = ParameterTuple(optimizer.parameters)
        self.value_and_grad = ops.value_and_grad(self.objective, None, self.trained, has_aux=True)
        self.half_square = ops.L2Loss()
        self.stack = ops.Stack()
        self.sum = ops.ReduceSum()
        self.add_up = ops.AllReduce() if self.reducer_flag else None
        self.set_inputs(*model.placeholders())

    def construct(self, *columns: Tensor):
        scale = self.scale_sense
        mask = columns[WEIGHTS]
        tokens = self.sum(mask)
        values, gradients = self.value_and_grad(mask * (scale / tokens), scale, *columns)
        _, by_sample, _, rows = values
        own_rows = self.received(columns, rows)
        # Cleaned before they are averaged: another process may have rows for an expert that has none here.
        gradients = self.grad_reducer(self.of_touched(gradients, own_rows))
        received = self.everywhere(own_rows)
        squares = ()
        for gradient in gradients:
            squares = squares + (self.half_square(gradient),)
        norm = ops.sqrt(self.sum(self.stack(squares)) * 2.0) / scale
        overflow = self.process_loss_scale(ops.logical_not(ops.isfinite(norm)))
        clip = ops.minimum(Tensor(1.0, ms.float32), self.limit / ops.maximum(norm, Tensor(1e-38, ms.float32))) / scale
        scaled = ()
        for gradient in gradients:
            scaled = scaled + (gradient * clip,)
        rate = self.optimizer.get_lr()
        loss = self.sum(by_sample) / tokens
        if not overflow:
            loss = ops.depend(loss, self.optimizer(scaled, received))
        return loss, overflow, scale, rate, norm

    def received(self, columns: tuple[Tensor, ...], rows: tuple[Tensor, ...]):
        """Rows that every expert received here, float32 [E] by sparse layer; samples of every domain last (slots)."""
        counts = ()
        if self.is_planned:
            for of_layer in split_columns(columns, self.num_routing)[2]:
                counts = counts + (ops.cast(of_layer, ms.float32),)
        else:
            for of_layer in rows:
                counts = counts + (self.sum(of_layer, 0)[:-1],)
        if self.has_slots:
            one_hot = ops.cast(columns[DOMAIN].reshape(-1, 1) == self.domain_ids.reshape(1, -1), ms.float32)
            counts = counts + (self.sum(one_hot, 0),)
        return counts

    def everywhere(self, counts: tuple[Tensor, ...]):
        """The counts of all processes together."""
        if self.add_up is None:
            return counts
        totals = ()
        for count in counts:
            totals = totals + (self.add_up(count),)
        return totals

    def of_touched(self, gradients: tuple[Tensor, ...], received: tuple[Tensor, ...]):
        """Gradients with 0 for experts without rows, whose products over nothing leave memory as it was."""
        masked = ()
        for i in range(len(gradients)):
            gradient = gradients[i]
            layer_index = self.optimizer.layer_index[i]
            if layer_index >= 0:
                a, b = self.optimizer.begin[i], self.optimizer.begin[i] + self.optimizer.count[i]
                active = (received[layer_index][a:b] > 0.0).reshape(self.optimizer.spread[i])
                gradient = ops.select(
                    ops.broadcast_to(active, gradient.shape), gradient, ops.zeros_like(gradient)
                )
            masked = masked + (gradient,)
        return masked
