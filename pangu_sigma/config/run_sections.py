"""The `run`, `experts`, `evaluate`, `checkpoint` and `parallel` sections: what happens around the training loop."""

from __future__ import annotations

import math
from typing import Any, Literal

from pangu_sigma.config.data_section import Text
from pangu_sigma.config.section import Field, Section, Violations
from pangu_sigma.errors import UserError
from parallel.mesh import Mesh, mesh_problems


class ProfileConfig(Section, resume="free", init_from="free"):
    """Which steps MindSpore's profiler watches."""

    start: int = Field(ge=1)
    """First profiled step (steps count from 1)."""
    steps: int = Field(ge=1)
    """Number of profiled steps."""


class RunConfig(Section, resume="free", init_from="free"):
    """Where the run lives and what it writes."""

    dir: Text = Field(is_path=True)
    """The run's folder: checkpoints, metrics.jsonl, TensorBoard files, report."""
    init_from: Text | None = Field(None, is_path=True)
    """Run, checkpoint or model folder whose weights, tables and tokenizer a new run begins with."""
    seed: int = Field(1234, ge=0, le=2**31 - 1, resume="fixed")
    """Seed of every random draw."""
    device: Literal["CPU", "Ascend"] = Field("CPU", resume="fixed")
    """Where the run computes."""
    kernels: Literal["auto", "compiled", "composed"] = Field("auto", resume="rounding")
    """CPU kernels: compiled ones if installed, or composed of MindSpore's operators."""
    log_every: int = Field(10, ge=1)
    """Steps between two lines of metrics.jsonl."""
    tensorboard: bool = True
    """Whether TensorBoard files are written too."""
    profile: ProfileConfig | None = None
    """Steps to profile with MindSpore's profiler, e.g. {start: 20, steps: 3}; null profiles none."""


class ExpertsConfig(Section, resume="rounding", init_from="free"):
    """Where experts and their optimizer state live while training."""

    store: Literal["device", "host", "disk"] = "device"
    """All experts in every step, or tables in host memory or files of which a step takes its own."""
    resident_gib: float = Field(4.0, gt=0, resume="free")
    """With store disk, GiB of experts and their moments in memory at a time."""
    grouped_matmul: bool = True
    """Whether a single Ascend device takes a layer's experts as one grouped product; float16, bfloat16."""


def _evaluation_interval(written: Any) -> int:
    """None where no text is held out, and on a mesh, where a file says that it shall be measured between steps."""
    text = written.data if written.adapt is None else written.adapt
    if text.heldout_fraction == 0 or written.parallel.devices > 1:
        return 0
    return max(10, min(written.train.steps // 10, 1000))


def _evaluation_batch(written: Any) -> int:
    rows = written.parallel.data * written.parallel.expert
    return math.ceil(8 / rows) * rows


class EvaluateConfig(Section, resume="free", init_from="free"):
    """Held-out loss while training."""

    every: int | None = Field(None, ge=0, fill=_evaluation_interval)
    """Steps between two evaluations, 0 for none; null: train.steps / 10 (10 to 1000), none on a mesh."""
    batches: int = Field(8, ge=1)
    """Batches of held-out text per domain, while training and by `pangu-sigma evaluate`."""
    batch_size: int | None = Field(None, ge=1, fill=_evaluation_batch)
    """Sequences in an evaluation batch; null: 8, or the next multiple of the ranks that read."""

    def batch_limit(self, asked: int | None) -> int | None:
        """Batches of each text to measure, None for all: those `asked` for, 0 for all, or `batches` where none are."""
        if asked is not None and asked < 0:
            raise UserError(f"batches is {asked}: give a number of batches of each text, or 0 for all of them")
        return (self.batches if asked is None else asked) or None


class CheckpointConfig(Section, resume="free", init_from="free"):
    """When the run's state is saved and how long it is kept."""

    every: int | None = Field(None, ge=0, fill=lambda written: max(100, min(written.train.steps // 10, 1000)))
    """Steps between two checkpoints, 0: at the end only; null: train.steps / 10, but 100 to 1000."""
    every_seconds: float | None = Field(None, gt=0)
    """Seconds between two checkpoints, whatever the steps; null sets no time."""
    keep: int = Field(3, ge=1)
    """Number of newest checkpoints that are kept."""
    probe_sequences: int = Field(2, ge=0)
    """Held-out sequences per domain that travel in a checkpoint, to verify a model alone."""


class ParallelConfig(Section, resume="rounding", init_from="free"):
    """The device mesh: data x expert x tensor x pipeline ranks; with all of them 1, one process trains alone.
    `pangu-sigma plan` tells what a larger mesh needs."""

    data: int = Field(1, ge=1)
    """Data-parallel ranks beside the expert axis, whose ranks read samples too."""
    expert: int = Field(1, ge=1)
    """Parts that the experts are cut into; each reads samples of its own."""
    tensor: int = Field(1, ge=1)
    """Parts that heads, inner widths and the vocabulary are cut into; Ascend."""
    pipeline: int = Field(1, ge=1)
    """Pipeline stages, each with an equal run of layers; Ascend."""
    placement: Literal["global", "domain"] = Field("global", resume="fixed")
    """Whether rows travel between all expert parts, or inside a placement group of domains."""
    placement_groups: int = Field(1, ge=1, resume="fixed")
    """Under placement domain, runs of domains whose experts and readers sit together."""
    optimizer_parallel: bool = False
    """Whether shared weights and moments are cut over the ranks that read samples; Ascend."""
    sequence_parallel: bool = False
    """Whether rows outside attention and feed-forward are cut over the tensor axis; Ascend."""
    expert_chunks: int = Field(1, ge=1)
    """Parts of a rank's experts, each exchanging rows while another computes; Ascend."""
    workers: int = Field(1, ge=1)
    """Processes of a run on CPU."""
    emulate_mesh: bool = False
    """On CPU, whether processes emulate the devices of an Ascend mesh, each computing the whole graph."""
    timeout: float = Field(600.0, gt=0, resume="free")
    """Seconds that a process waits for the others before the run is given up."""

    def violations(self) -> Violations:
        """Broken rules of the mesh itself."""
        axes = self.model_dump(include={"data", "expert", "tensor", "pipeline", "placement", "placement_groups"})
        yield from (f"parallel.{sentence}" for sentence in mesh_problems(**axes))

    @property
    def devices(self) -> int:
        """Ranks of the mesh. Without the placement, which may be one that no mesh has: a rule of its own tells that."""
        return Mesh(self.data, self.expert, self.tensor, self.pipeline).size

    @property
    def mesh(self) -> Mesh:
        """The mesh of these numbers; they were checked when the configuration was loaded."""
        return Mesh(self.data, self.expert, self.tensor, self.pipeline, self.placement, self.placement_groups)
