"""The program in an exported folder's README runs as it stands there and writes what the model writes."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from extract.export.export_formats import Options
from extract.export.export_job import export
from tests.extract.export.conftest import LENGTH

PROMPT = "Once upon a time"


def greedy(source, domain: str) -> str:
    """What the NumPy reference writes until the window is full."""
    eod = source.tokenizer.eod_id
    ids = [eod, *source.tokenizer.encode(PROMPT)]
    while len(ids) < LENGTH and (ids[-1] != eod or len(ids) == 1):
        ids.append(int(source.logits(np.array([ids], np.int32), [domain])[0, -1].argmax()))
    return source.tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("case", "format_", "options"),
    [
        ("full_model", "mindir", Options()),
        ("sub_model", "mindir", Options(signature="sigma", batch_size=2)),
        ("dense", "mindir", Options(signature="sigma")),
        ("full_model", "onnx", Options()),
        ("dense", "onnx", Options()),
    ],
    ids=lambda value: value.signature if isinstance(value, Options) else value,
)
def test_the_readmes_program_writes_the_models_text(stored, tmp_path, case, format_, options):
    source = stored(case)
    export(source.path, tmp_path / "out", format_, options=options)
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "{" not in text.partition("```")[0] and source.groups.names[0] in text
    (program,) = text.split("```python\n")[1:]
    done = subprocess.run(
        [sys.executable, "-c", program.partition("```")[0]],
        capture_output=True,
        cwd=tmp_path / "out",
        env={**os.environ, "GLOG_v": "4", "PYTHONIOENCODING": "utf-8"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode() == greedy(source, source.groups.names[0]) + "\n"
