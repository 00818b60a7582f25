"""Saves checkpoints one after another until it is killed; run by test_killed_saves.py as a process of its own.

    python saving_process.py RUN FIRST_STEP

Prints `saved STEP` after each. Every save changes the shared parameters and one of two domains.
"""

import itertools
import sys
from pathlib import Path

import numpy as np

from pangu_sigma.checkpoint import CheckpointContents, Fingerprints, save_checkpoint

run, first = Path(sys.argv[1]), int(sys.argv[2])
names = [f"blocks.{i}.feed_forward.up.weight" for i in range(8)]
names += [f"domains.{domain}.blocks.9.experts.up.weight" for domain in ("code", "law")]
for step in itertools.count(first):
    tensors = {name: np.full((4, 256, 256), step if "law" not in name else step // 2, np.float32) for name in names}
    contents = CheckpointContents(
        step=step,
        domains=["code", "law"],
        coverage={"blocks.9": {"code": 4, "law": 4}},
        config_text="schema_version: 2\n",
        tokenizer_files={"tokenizer.model": b"pieces"},
        probe={},
        state={"step": step},
        fingerprints=Fingerprints(tokenizer="t", corpora={}),
    )
    save_checkpoint(run, contents, tensors, keep=2)
    print("saved", step, flush=True)
