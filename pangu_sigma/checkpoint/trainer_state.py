"""Trainer's state in a checkpoint (`state.json`): what its fields must be, checked before anybody uses one.

A model folder has few of them or none; what a run goes on from needs those of `check_resumable`. Unknown fields stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from pangu_sigma.checkpoint.tensor_file import damaged
from pangu_sigma.errors import CheckpointError

_Count = Annotated[int, Field(ge=0, lt=1 << 62)]
_TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]


class _StateModel(BaseModel):
    """Base of the state's records: fields that are not listed are left alone."""

    model_config = ConfigDict(strict=True, extra="allow")


class _DomainCursor(_StateModel):
    cursor: _Count
    identity: dict[str, Any] = {}


class _SamplerState(_StateModel):
    kind: str = ""
    seed: int = 0
    step: _Count = 0
    sample: _Count = 0
    sequence_length: _Count = 0
    tokenizer: str = ""
    byte: _Count = 0
    line: _Count = 0
    given: _Count = 0
    domains: dict[str, _DomainCursor] = {}
    tails: dict[str, list[_TokenId]] = {}


class _LossScaleState(_StateModel):
    value: FiniteFloat
    clean: _Count


class _DomainChange(_StateModel):
    step: _Count
    change: str


class _TeacherState(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    phase: _Count
    step: _Count
    model: str
    fisher: str | None = None


class _ReferenceState(_StateModel):
    path: str
    sha256: str


class _TrainerState(_StateModel):
    sampler: _SamplerState | None = None
    shared_steps: _Count = 0
    loss_scale: _LossScaleState | None = None
    skipped: _Count = 0
    tokens: _Count = 0
    kernels: str | None = None
    domain_changes: list[_DomainChange] = []
    config_before: str | None = None
    previous: _TeacherState | None = None
    reference: _ReferenceState | None = None
    origin: dict[str, Any] | None = None


def check_state(state: Mapping[str, Any], path: Path) -> None:
    """Raises CheckpointError, naming the file at `path` and the field, for one that is not of its kind."""
    try:
        _TrainerState.model_validate(state)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(ascii(step)[1:-1] if isinstance(step, str) else str(step) for step in first["loc"])
        raise damaged(path, f"{field}: {first['msg']}") from error


def check_resumable(state: Mapping[str, Any], path: Path) -> None:
    """Raises CheckpointError unless `state`, checked already, has all that a run goes on from."""
    needed = {"sampler", "shared_steps", "loss_scale", "skipped", "tokens"}
    sampler = state.get("sampler") or {}
    needed_of_sampler = {"seed", "step", "sample", "domains"}
    if sampler.get("kind"):
        needed_of_sampler |= {"sequence_length", "tokenizer", "byte", "line", "given", "tails", "read"}
    elif any("identity" not in entry for entry in sampler.get("domains", {}).values()):
        needed_of_sampler |= {"domains.identity"}
    missing = sorted(needed - state.keys()) + [f"sampler.{key}" for key in sorted(needed_of_sampler - sampler.keys())]
    if missing:
        raise CheckpointError(
            f"{path} lacks {missing[0]}, without which no run goes on: begin a new run with run.init_from"
        )
