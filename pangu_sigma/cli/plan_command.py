"""The command `pangu-sigma plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pangu_sigma.cli.arguments import ConfigFile, Json
from pangu_sigma.errors import UserError
from pangu_sigma.plan.hardware import Hardware

DEFAULT = Hardware()


def plan(
    file: ConfigFile,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="section.key=value", help="Changes, e.g. parallel.tensor=8 train.batch_size=512."),
    ] = None,
    devices: Annotated[
        int | None, typer.Option(min=1, help="Devices; parallel.data follows. The configuration's own if left out.")
    ] = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="Let MindSpore cut the training graph for these devices, and check it.")
    ] = False,
    graphs: Annotated[
        Path | None, typer.Option(metavar="DIR", help="With --compile, keep the compiled graphs in this new folder.")
    ] = None,
    as_json: Json = False,
    device_gib: Annotated[float, typer.Option(min=0.1, help="Memory of a device.")] = DEFAULT.device_gib,
    host_gib: Annotated[float, typer.Option(min=0.1, help="Memory of a host.")] = DEFAULT.host_gib,
    devices_per_host: Annotated[int, typer.Option(min=1, help="Devices in a host.")] = DEFAULT.devices_per_host,
    peak_tflops: Annotated[float, typer.Option(min=0.1, help="A device's peak in TFLOP/s.")] = DEFAULT.peak_tflops,
    efficiency: Annotated[
        float, typer.Option(min=0.001, max=1.0, help="Share of the peak that products reach.")
    ] = DEFAULT.efficiency,
    inside_gbps: Annotated[
        float, typer.Option(min=0.001, help="GB/s of a device to others of its host.")
    ] = DEFAULT.inside_gbps,
    between_gbps: Annotated[
        float, typer.Option(min=0.001, help="GB/s of a device to other hosts.")
    ] = DEFAULT.between_gbps,
    to_host_gbps: Annotated[
        float, typer.Option(min=0.001, help="GB/s between a device and its host.")
    ] = DEFAULT.to_host_gbps,
    host_memory_gbps: Annotated[
        float, typer.Option(min=0.001, help="GB/s of a host's memory while it updates experts.")
    ] = DEFAULT.host_memory_gbps,
) -> None:
    """Estimate what FILE.yaml needs on a cluster: memory, bytes and time of a step, and what to change.

    With --compile, MindSpore's own pass also compiles the training graph for all devices, of which none is needed.
    """
    from pangu_sigma.config import load_config
    from pangu_sigma.plan.cluster_plan import plan as make_plan
    from pangu_sigma.plan.plan_text import text

    hardware = Hardware(
        device_gib, host_gib, devices_per_host, peak_tflops, efficiency, inside_gbps, between_gbps, to_host_gbps,
        host_memory_gbps,
    )  # fmt: skip
    config = load_config(file, overrides or ())
    cluster_plan = make_plan(config, hardware, devices)
    if compile:
        from pangu_sigma.monitor.progress import progress
        from pangu_sigma.plan.cluster_plan import for_devices
        from pangu_sigma.plan.compile_plan import compile_plan

        if graphs is not None and graphs.exists():
            raise UserError(f"--graphs {graphs} exists already: name a new folder")
        with progress(f"compile for {cluster_plan['devices']} devices", None, unit="graphs") as job:
            cluster_plan["compiled"] = compile_plan(for_devices(config, devices), graphs)
            job.set(1)
    elif graphs is not None:
        raise UserError("--graphs keeps what --compile makes: add --compile")
    typer.echo(json.dumps(cluster_plan, indent=2) if as_json else text(cluster_plan))
