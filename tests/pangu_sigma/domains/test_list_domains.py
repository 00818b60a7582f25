"""The listing of a checkpoint's domains: what each owns, from a real checkpoint."""

import subprocess
import sys

import numpy as np

from pangu_sigma.checkpoint import CheckpointContents, Fingerprints, save_checkpoint
from pangu_sigma.domains.list_domains import list_files


def saved(folder):
    """A checkpoint of one sparse layer and two domains with 2 and 3 experts of 4 x 6."""
    tensors = {"embedding.word": np.zeros((8, 4), np.float32)}
    sizes = {"code": 2, "math": 3}
    for domain, experts in sizes.items():
        tensors[f"domains.{domain}.blocks.1.experts.up.weight"] = np.ones((experts, 4, 6), np.float32)
        tensors[f"domains.{domain}.blocks.1.routing"] = np.zeros(8, np.int32)
        tensors[f"domains.{domain}.optimizer.m.blocks.1.experts.up.weight"] = np.ones((experts, 4, 6), np.float32)
    contents = CheckpointContents(
        step=1, domains=list(sizes), coverage={"blocks.1": sizes}, config_text="", tokenizer_files={}, probe={},
        state={}, fingerprints=Fingerprints(tokenizer="t", corpora={}),
    )  # fmt: skip
    return save_checkpoint(folder, contents, tensors, keep=1)


def test_every_domain_is_listed_with_its_own_experts_parameters_and_files(tmp_path):
    saved(tmp_path)
    code, math = list_files(tmp_path)
    assert (code.name, code.experts, code.parameters) == ("code", {"blocks.1": 2}, 2 * 4 * 6)
    assert (math.name, math.experts, math.parameters) == ("math", {"blocks.1": 3}, 3 * 4 * 6)
    assert code.files == ("domains/code.safetensors",)
    assert code.bytes > 4 * (2 * 4 * 6 + 8)


def test_the_command_lists_a_run_and_refuses_what_is_none(tmp_path):
    saved(tmp_path / "run")
    command = [sys.executable, "-m", "extract"]
    good = subprocess.run([*command, str(tmp_path / "run")], capture_output=True, text=True)
    assert good.returncode == 0 and "domains/math.safetensors" in good.stdout
    bad = subprocess.run([*command, str(tmp_path / "nothing")], capture_output=True, text=True)
    assert bad.returncode == 2 and bad.stderr.startswith("Error: ") and "Traceback" not in bad.stderr
