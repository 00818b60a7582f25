"""Two optimizer steps of a tiny model in a process of its own: the trainer's own code, numbers as JSON.

    python -m pangu_sigma.doctor.step_work CPU composed OUT.json
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np

from pangu_sigma import runtime
from pangu_sigma.config import SCHEMA_VERSION, config_from_dict, effective
from pangu_sigma.data.mixture_sampler import Batch
from pangu_sigma.training.schedule import scheduled_step
from rre.counted_random import generator

VOCABULARY, EOD = 256, 2
STEPS = 2
SIZES = {
    "schema_version": SCHEMA_VERSION,
    "model": {"layers": 2, "hidden": 64, "heads": 2, "ffn": 128, "positions": 32, "sparse": {"layers": 1}},
    "domains": [{"name": name, "data": ["none"], "experts": 2} for name in ("left", "right")],
    "data": {"sequence_length": 32},
    "optimizer": {"learning_rate": 1e-3},
    "train": {"steps": STEPS, "batch_size": 4},
}


def run(device: str, kernels: str, folder: Path) -> dict[str, object]:
    """Losses (nats per token), gradient norms and seconds of two steps on `device`; the same tokens everywhere."""
    config = effective(
        config_from_dict(SIZES | {"run": {"dir": str(folder), "device": device, "kernels": kernels}})
    )
    runtime.prepare(config.run.device, folder / "mindspore")
    from pangu_sigma.model.build_model import build_model
    from pangu_sigma.training.trainer import Trainer

    model = build_model(config, VOCABULARY, EOD)
    trainer = Trainer(model)
    rows = generator(config.run.seed, "doctor").integers(3, VOCABULARY, (4, 33), dtype=np.int32)
    losses, norms, seconds = [], [], []
    for step in range(STEPS):
        began = time.perf_counter()
        # The same batch again, so that a sound update shows as a lower loss.
        planned = trainer.plan(Batch(rows, np.array([0, 1, 0, 1], np.int32), np.arange(4), step))
        result = trainer.step(scheduled_step(config, step), planned)
        losses.append(result.loss)
        norms.append(result.gradient_norm)
        seconds.append(time.perf_counter() - began)
    model.store.close()
    return {"losses": losses, "norms": norms, "seconds": seconds, "kernels": model.kernels}


if __name__ == "__main__":
    out = Path(sys.argv[3])
    out.write_text(json.dumps(run(sys.argv[1], sys.argv[2], out.parent)), encoding="utf-8")
