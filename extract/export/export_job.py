"""One entry for every format: writes into a hidden folder, which gets its name when everything stands in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from extract.export.export_formats import FORMATS, Options
from extract.export.export_source import ExportSource, open_source
from pangu_sigma.checkpoint.float_types import FLOAT_TYPES
from pangu_sigma.checkpoint.model_folder import check_output, output_write
from pangu_sigma.errors import UserError
from parallel.comm.atomic_folder import atomic_folder
from rre.router_specs import ROUTER_SPECS

_SMALL_FILES = 16 << 20  # everything but weights and tokenizer


@dataclass(frozen=True, repr=False)
class Export:
    """A model that was written for another program: its folder, and sentences on what its user should know."""

    path: Path
    format: str
    messages: tuple[str, ...]

    def __repr__(self) -> str:
        return f"Export({str(self.path)!r}, format={self.format!r})"

    def __fspath__(self) -> str:
        return str(self.path)


def export(
    model: str | Path,
    out: str | Path,
    format_: str,
    domains: Sequence[str] | None = None,
    options: Options | None = None,
) -> Export:
    """Write the model of a run, checkpoint or model folder to the new folder `out`.

    `domains`: whose experts go along, None for all. Raises UserError for a mistake, before anything is written where
    that can be known.
    """
    writer = _writer(format_)
    final = check_output(out)
    source = open_source(model, domains)
    options = options or Options()
    _check_options(format_, options)
    if FORMATS[format_].float32_only:
        options = replace(options, dtype="float32")
    _check_parts(format_, source)
    if hasattr(writer, "check"):
        writer.check(source, options)
    disk_write = output_write(final)
    needed = writer.weight_bytes(source, options) + len(source.tokenizer.model) + _SMALL_FILES
    with disk_write.explain_errors(), atomic_folder(final) as folder:
        disk_write.check_space([needed], 0)
        messages = writer.write(source, folder, options)
    return Export(Path(out), format_, tuple(messages))


def _check_options(format_: str, options: Options) -> None:
    spec = FORMATS[format_]
    for field in fields(options):
        if field.name not in ("dtype", *spec.options) and getattr(options, field.name) != field.default:
            setting = field.name.replace("_bytes", "_size")
            raise UserError(f"{setting} means nothing to the format {format_}; leave it out")
    if options.dtype not in (None, *FLOAT_TYPES):
        raise UserError(f"'{options.dtype}' is no element type; choose {', '.join(FLOAT_TYPES)}")
    if spec.float32_only and options.dtype not in (None, "float32"):
        raise UserError(f"{format_} is written in float32: leave dtype out; {spec.float32_only}")


def _check_parts(format_: str, source: ExportSource) -> None:
    model, network = source.config.model, FORMATS[format_].network
    unlike = model.parts_unlike(network)
    if unlike:
        others = [name for name, other in FORMATS.items() if not model.parts_unlike(other.network)]
        raise UserError(
            f"{source.checkpoint.path} has parts that the format {format_} does not have yet ({'; '.join(unlike)}): "
            + (f"export it with format {' or '.join(others)}" if others else "no format has them all")
        )
    if model.sparse_prefixes and network not in model.router_spec.exports:
        known = [name for name, spec in ROUTER_SPECS.items() if network in spec.exports]
        raise UserError(
            f"{source.checkpoint.path} routes by {model.router_setting}, which the format {format_} does not have yet: "
            f"export a model of router {' or '.join(known)}"
        )


def _writer(format_: str) -> ModuleType:
    if format_ not in FORMATS:
        raise UserError(f"'{format_}' is no format to export to; choose {', '.join(FORMATS)}")
    for package in FORMATS[format_].packages:
        if find_spec(package) is None:
            raise UserError(f"exporting to {format_} needs the package {package}: pip install 'pangu-sigma[{format_}]'")
    return import_module(f"{__package__}.{FORMATS[format_].module}")
