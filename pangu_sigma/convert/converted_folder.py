"""Writing the model folder that a conversion makes: coverage proven first, tensors one at a time, progress shown."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pangu_sigma.checkpoint import Checkpoint, ModelFolder, TensorSpec, write_model_folder
from pangu_sigma.checkpoint.model_folder import check_output, check_space
from pangu_sigma.config.parameter_counts import is_routing
from pangu_sigma.monitor.progress import progress
from pangu_sigma.signals import sigterm_as_ctrl_c


def write_with_progress(out: Path, model: ModelFolder, what: str) -> Checkpoint:
    """Writes `model` to `out` under a bar named `what`; an interruption leaves nothing behind. Raises UserError."""
    check_space(out, model)
    with sigterm_as_ctrl_c(), progress(what, model.bytes, unit="B") as job:
        return write_model_folder(out, model, progress=lambda done, total: job.set(done))


def new_specs(shapes: Mapping[str, tuple[int, ...]]) -> list[TensorSpec]:
    """How the tensors of `shapes` are stored in a new model: routing tables as int32, all others as float32."""
    return [TensorSpec(name, "int32" if is_routing(name) else "float32", shape) for name, shape in shapes.items()]


__all__ = ["check_output", "new_specs", "write_with_progress"]
