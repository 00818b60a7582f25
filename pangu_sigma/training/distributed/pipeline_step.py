"""Pipeline-parallel train step: the gradients of a whole step in one graph, of which a rank compiles its own stage.

What `GradientStep` takes one micro-batch at a time comes here for all of them:
1. `MicroBatches` slices the inputs and sums the losses (`PipelinedLoss`) of the micro-batches;
2. MindSpore's pipeline pass divides the graph at the stages of its cells, runs them 1F1B and sends activations and
   their gradients between neighbours;
3. `AccumulatedGradients` takes the sums over all micro-batches out of the pass's buffers.

Activated experts are parameters of this graph, and not inputs: the pass treats every input as batch-major data. The
host sets them before a step and takes their gradients after it.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops
from mindspore.common.initializer import initializer

from pangu_sigma.model.graph_inputs import GraphInputs, placeholders, split_pipeline_inputs
from pangu_sigma.model.pangu import PanGuSigma
from pangu_sigma.model.pipeline_stages import stage_of
from parallel.micro_batches import AccumulatedGradients, MicroBatches
from parallel.operator_layout import MeshLayout
from parallel.ops.primitives import square_sums


class PipelinedLoss(nn.Cell):
    """The objective of one micro-batch, by domain: inputs as of `GraphInputs.pipeline_specs` -> [d].

    The sum over d is what trains: MindSpore's gradient of a vector is that of its sum.
    """

    def __init__(self, net: PanGuSigma, layout: MeshLayout, inputs: GraphInputs) -> None:
        super().__init__(auto_prefix=False)
        self.net = net
        weights = inputs.expert_tensors().items()
        self.experts = ParameterTuple(
            [Parameter(initializer("zeros", s, ms.float32), name=n, parallel_optimizer=False) for n, (_, s) in weights]
        )
        self.bounds = inputs.separate_bounds
        by_row = ("rows", 1)
        self.mul, self.sum = layout(ops.Mul(), by_row, by_row), layout(ops.ReduceSum(), by_row)
        self.column = layout(ops.ExpandDims(), ("rows",))

    def construct(self, *inputs: Tensor) -> Tensor:
        fixed, domain_one_hot, sparse_inputs = split_pipeline_inputs(inputs, self.experts, self.bounds)
        tokens, labels, weights, positions, segments = fixed
        h, _, _ = self.net(tokens, positions, segments, None, None, (), sparse_inputs)
        losses = self.net.head(h, labels, None, self.net.output_table((), tokens))
        by_sample = self.column(self.sum(self.mul(losses, weights), 1), 1)
        return self.sum(self.mul(by_sample, domain_one_hot), 0)


class UnpipelinedTrainStep(nn.Cell):
    """Train step of all pipeline stages in one process, which an emulated mesh runs: (inputs of `PipelinedLoss` for a
    whole step) -> (objective by domain [d], gradients of all experts and of all shared parameters).

    The parameters of the experts are the loss' own: `experts`.
    """

    def __init__(
        self, net: PanGuSigma, inputs: GraphInputs, layout: MeshLayout, micro_batches: int, num_domains: int
    ) -> None:
        super().__init__(auto_prefix=False)
        loss = PipelinedLoss(net, layout, inputs)
        self.experts = loss.experts
        trained = ParameterTuple([*loss.experts, *net.trainable_params()])
        self.loss = MicroBatches(loss, micro_batches)
        self.value_and_grad = ops.value_and_grad(self.loss, None, trained)
        self.set_train()
        self.set_inputs(*placeholders(inputs.pipeline_specs(micro_batches, num_domains)))

    def construct(self, *inputs: Tensor):
        objective, gradients = self.value_and_grad(*inputs)
        end = len(self.experts)
        return objective, gradients[:end], gradients[end:]


class PipelineTrainStep(nn.Cell):
    """Pipeline-parallel train step of one stage: (inputs of `PipelinedLoss` for a whole step) -> (objective by domain
    [d], gradients of this stage's experts, of its shared parameters, squared norms of the latter [n]).

    Inputs: this rank's sequences of all micro-batches, concatenated on axis 0. The objective is known on the last stage
    alone.
    """

    def __init__(
        self, net: PanGuSigma, inputs: GraphInputs, layout: MeshLayout, micro_batches: int, stage: int,
        optimizer_parallel: bool, num_domains: int,
    ) -> None:  # fmt: skip
        super().__init__(auto_prefix=False)
        net.set_stages(layout.mesh)
        if optimizer_parallel and net.tied_embedding() is not None:
            net.send_tied_embedding(layout)
        loss = PipelinedLoss(net, layout, inputs)
        self.shared = ParameterTuple(
            [p for p in net.trainable_params() if stage_of(p.name, net.layers, layout.mesh) == stage]
        )
        self.experts = ParameterTuple(
            [p for p in loss.experts if stage_of(p.name, net.layers, layout.mesh) == stage]
        )
        # Tied embeddings: the last stage computes with the first one's word table. If the pass sends it as a parameter,
        # the last stage must send its gradient back.
        tied_embedding = None if optimizer_parallel else net.tied_embedding()
        self.has_tied_copy = tied_embedding is not None and 0 < stage == layout.mesh.pipeline - 1
        # Parameters of another stage in this graph: their values are received, their memory must be here.
        self.borrowed_parameters = ParameterTuple([tied_embedding] if self.has_tied_copy else [])
        trained = ParameterTuple([*self.experts, *self.shared, *self.borrowed_parameters])
        # An attribute, so that set_train reaches the network, and operators' scopes name their layers.
        self.loss = MicroBatches(loss, micro_batches)
        self.value_and_grad = ops.value_and_grad(self.loss, None, trained)
        self.accumulated = AccumulatedGradients(self.experts, optimizer_parallel) if len(self.experts) else None
        self.accumulated_shared = AccumulatedGradients(self.shared, optimizer_parallel)
        self.square_sums = square_sums(layout, [parameter.shape for parameter in self.shared])
        self.set_train()
        self.set_inputs(*placeholders(inputs.pipeline_specs(micro_batches, num_domains), layout))

    @property
    def transient_parameters(self) -> tuple[Parameter, ...]:
        """The parameters without values between steps, which no checkpoint has: experts of a step, sums of gradients,
        borrowed parameters."""
        sums = [] if self.accumulated is None else [*self.accumulated.buffers]
        return (*self.experts, *sums, *self.accumulated_shared.buffers, *self.borrowed_parameters)

    def construct(self, *inputs: Tensor):
        objective, gradients = self.value_and_grad(*inputs)
        end = len(self.experts) + len(self.shared)
        experts, shared = gradients[: len(self.experts)], gradients[len(self.experts) : end]
        if self.has_tied_copy:
            # Keeps the Send of the tied embedding's gradient, which nothing else here reads, from being pruned.
            objective = ops.depend(objective, gradients[end])
        if self.accumulated is not None:
            experts = self.accumulated(experts)
        shared = self.accumulated_shared(shared)
        return objective, experts, shared, self.square_sums(*shared)
