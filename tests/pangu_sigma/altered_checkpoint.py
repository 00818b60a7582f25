"""A tensor of a checkpoint altered by someone who also computes every hash anew."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from pangu_sigma.checkpoint import open_checkpoint
from pangu_sigma.checkpoint.manifest import sign
from pangu_sigma.checkpoint.safetensors_header import read_header


def alter(folder: Path, tensor: str, change: Callable[[bytearray], None]) -> None:
    """`change` the bytes of a tensor in the checkpoint `folder`; file and manifest stay consistent."""
    stored = open_checkpoint(folder)
    entry = stored.manifest.tensors[tensor]
    path = folder / entry.slices[0].file
    file = stored.manifest.files[entry.slices[0].file]
    spec, begin = read_header(path, file.header_bytes, file.header_sha256)[tensor]
    content = bytearray(path.read_bytes())
    own = content[begin : begin + spec.nbytes]
    change(own)
    content[begin : begin + spec.nbytes] = own
    path.write_bytes(content)
    fields = json.loads((folder / "manifest.json").read_text())
    fields["files"][entry.slices[0].file]["sha256"] = hashlib.sha256(content).hexdigest()
    fields["tensors"][tensor]["slices"][0]["sha256"] = hashlib.sha256(own).hexdigest()
    (folder / "manifest.json").write_bytes(sign(json.dumps(fields, indent=1, ensure_ascii=False).encode() + b"\n"))
