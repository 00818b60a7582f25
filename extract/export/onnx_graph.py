"""The exported PyTorch module as an ONNX graph, traced without its weights: caches are inputs and outputs."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from extract.export.hf_files.configuration_pangu_sigma import PanGuSigmaConfig
from extract.export.hf_files.modeling_pangu_sigma import PanGuSigmaExpertGroup, PanGuSigmaModel

OPSET = 17  # the first with LayerNormalization; every runtime of the last years has it
# The graph's inputs or outputs: NumPy type and shape by name; a free axis has a name instead of a length.
Values = Mapping[str, tuple[type, Sequence[int | str]]]
# Lengths that no operator of the graph knows: short, because the exporter copies the parameters that it sees.
_UNSEEN = {"vocab_size": 8, "intermediate_size": 8, "max_position_embeddings": 8}
_SIZES = {"batch": 2, "length": 3, "past": 2, "total": 5}  # of the example; every axis stays free


class CachedModel(nn.Module):
    """The network as a function of the graph's inputs in the order of their `names`; it stands in for its own cache."""

    def __init__(self, network: PanGuSigmaModel, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = network, names

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """-> logits, documents, following_document, present keys and values."""
        self.given, self.present = dict(zip(self.names, inputs, strict=True)), []
        tokens, past, first = (self.given[name] for name in ("input_ids", "past_documents", "next_document"))
        domain = self.given.get("domain", torch.zeros_like(first))
        real = (self.given["attention_mask"][:, past.shape[1] :] != 0).long()
        own, following = self.model.documents(tokens, real, first[:, None])
        documents = torch.cat([past, own], 1)
        places = torch.arange(past.shape[1], documents.shape[1])
        positions, visible = self.model.positions_and_visible(own, documents, places)
        states, _ = self.model.run(tokens, domain, positions, visible, self, places)
        h = states[-1].view(tokens.shape[0], -1, states[-1].shape[-1])
        return self.model.logits(h, domain), documents, following[:, -1], *self.present

    def update(self, k: Tensor, v: Tensor, layer: int, options: object) -> list[Tensor]:
        """What transformers' caches do: keys and values [B, H, S, W] of a layer behind those that came before."""
        pairs = (("key", k), ("value", v))
        grown = [torch.cat([self.given[f"past_key_values.{layer}.{part}"], new], 2) for part, new in pairs]
        self.present += grown
        return grown


def traced(settings: Mapping[str, object], inputs: Values, outputs: Values) -> onnx.ModelProto:
    """The graph of the model with these settings (its config.json); its parameters, whose shapes mean nothing, and
    those of `inputs` that it needs are its inputs.

    Every expert's matrices are parameters of their own, with its number in the group behind the stacked ones' name.
    """
    with torch.device("meta"):
        config = PanGuSigmaConfig(**{**settings, **_UNSEEN}, attn_implementation="eager")
        network = PanGuSigmaModel(config).eval()
    for group in (module for module in network.modules() if isinstance(module, PanGuSigmaExpertGroup)):
        for name, stacked in list(group.named_parameters()):
            delattr(group, name)
            setattr(group, name, nn.ParameterList(stacked.unbind()))
    # Tracing computes, but only shapes count: each parameter is one number, seen as many.
    numbers = {name: torch.zeros((), dtype=p.dtype).expand(p.shape) for name, p in network.state_dict().items()}
    network.load_state_dict(numbers, assign=True)
    example = tuple(
        torch.from_numpy(np.zeros([_SIZES.get(axis, axis) for axis in shape], dtype))
        for dtype, shape in inputs.values()
    )
    stream = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            CachedModel(network, list(inputs)),
            example,
            stream,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_axes={
                name: {i: axis for i, axis in enumerate(shape) if isinstance(axis, str)}
                for name, (_, shape) in {**inputs, **outputs}.items()
            },
            opset_version=OPSET,
            dynamo=False,  # the newer exporter needs onnxscript
            export_params=False,
            keep_initializers_as_inputs=True,  # else parameters with equal numbers become one
            do_constant_folding=False,
        )
    return onnx.load_from_string(stream.getvalue())
