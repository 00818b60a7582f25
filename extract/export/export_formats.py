"""The registry of export formats: what is known of each one without importing what writes it."""

from __future__ import annotations

from dataclasses import dataclass

from pangu_sigma.errors import UserError
from rre.router_specs import OLMOE_NETWORK, PANGU_NETWORK


@dataclass(frozen=True)
class ExportFormat:
    """A format: its file, and what is checked and told of it for it.

    module: in this folder, with weight_bytes(source, options); write(source, folder, options) -> sentences for the
    user; and, if a model of parts that its network knows may still be none for it, check(source, options), which raises
    UserError. program: who runs it. network: whose parts it writes; specs of parts and routers say which networks know
    them. options: fields of `Options` that mean something to it, `dtype` apart. float32_only: what to do instead, where
    it has no other element type. packages: what writing needs beside our own dependencies; the extra of its name brings
    them.
    """

    module: str
    program: str
    network: str = PANGU_NETWORK
    options: tuple[str, ...] = ()
    float32_only: str | None = None
    packages: tuple[str, ...] = ()


@dataclass(frozen=True)
class Options:
    """What the formats can be told.

    dtype: of floating tensors, None each its own. max_shard_bytes: largest file. batch_size, signature,
    capacity_factor: samples of fixed graphs, the inputs they take, and rows that an expert may take of a sample's
    window as a multiple of an even share (None: all). Raises UserError for values out of range.
    """

    dtype: str | None = None
    max_shard_bytes: int = 4 << 30
    batch_size: int = 1
    signature: str = "plain"
    capacity_factor: float | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"batch_size is {self.batch_size}: give at least 1")


FORMATS = {
    "hf": ExportFormat("hf_format", "Hugging Face", options=("max_shard_bytes",)),
    "hf-olmoe": ExportFormat("hf_olmoe_format", "OlmoeForCausalLM", OLMOE_NETWORK, ("max_shard_bytes",)),
    "mindir": ExportFormat(
        "mindir_format", "MindSpore", options=("batch_size", "signature", "capacity_factor"),
        float32_only="MindSpore Lite's converter lowers it for its device (--fp16=on)",
    ),
    "onnx": ExportFormat(
        "onnx_format", "onnxruntime", float32_only="onnxruntime's own tools convert it to float16",
        packages=("onnx", "torch", "transformers"),
    ),
    "mindformers": ExportFormat(
        "mindformers_format", "MindFormers", float32_only="MindFormers trains from float32 weights"
    ),
}  # fmt: skip


def takers(option: str) -> str:
    """Names of the formats that an option means something to, for its help text."""
    return ", ".join(name for name, format_ in FORMATS.items() if option in format_.options)
