"""One entry for every format: writes into a hidden folder, which gets its name when everything stands in it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from extract.export.export_source import open_source
from pangu_sigma.checkpoint.atomic_folder import atomic_folder
from pangu_sigma.checkpoint.model_folder import check_output, output_write
from pangu_sigma.errors import UserError

# format -> (its module, the packages that it needs, which an extra of the format's name brings). A module has TAKES
# (names of options), check(source, options), needed_bytes(source, options) and write(source, folder, options) -> what
# to say.
FORMATS: dict[str, tuple[str, tuple[str, ...]]] = {
    "hf": ("extract.export.hf_format", ()),
    "hf-olmoe": ("extract.export.hf_olmoe_format", ()),
    "mindir": ("extract.export.mindir_format", ()),
    "onnx": ("extract.export.onnx_format", ("onnx", "torch", "transformers")),
    "mindformers": ("extract.export.mindformers_format", ()),
}


@dataclass(frozen=True)
class Options:
    """What the formats can be told.

    dtype: of floating tensors. max_shard_bytes (hf, hf-olmoe): largest file. batch_size, signature, capacity_factor
    (mindir): samples of the fixed graphs, the inputs they take, and rows that an expert may take of a sample's window
    as a multiple of an even share (None: all).
    """

    dtype: str = "float32"
    max_shard_bytes: int = 4 << 30
    batch_size: int = 1
    signature: str = "plain"
    capacity_factor: float | None = None


def export(
    model: str | Path,
    out: str | Path,
    format_: str,
    domains: Sequence[str] | None = None,
    options: Options | None = None,
) -> list[str]:
    """Write the model of a run, checkpoint or model folder to the new folder `out`; returns what there is to say.

    `domains`: whose experts go along, None for all. Raises UserError for a mistake, before anything is written where
    that can be known.
    """
    writer = _writer(format_)
    final = check_output(out)
    source = open_source(model, domains)
    options = options or Options()
    _check_taken(format_, writer.TAKES, options)
    writer.check(source, options)
    disk_write = output_write(final)
    with disk_write.explain_errors(), atomic_folder(final) as folder:
        disk_write.check_space([writer.needed_bytes(source, options)], 0)
        return writer.write(source, folder, options)


def _check_taken(format_: str, taken: Collection[str], options: Options) -> None:
    for field in fields(options):
        if field.name not in taken and getattr(options, field.name) != field.default:
            flag = field.name.replace("_bytes", "_size").replace("_", "-")
            raise UserError(f"--{flag} means nothing to the format {format_}; leave it out")


def _writer(format_: str):
    if format_ not in FORMATS:
        raise UserError(f"'{format_}' is no format to export to; choose {', '.join(FORMATS)}")
    module, packages = FORMATS[format_]
    for package in packages:
        if find_spec(package) is None:
            raise UserError(f"exporting to {format_} needs the package {package}: pip install 'pangu-sigma[{format_}]'")
    return import_module(module)
