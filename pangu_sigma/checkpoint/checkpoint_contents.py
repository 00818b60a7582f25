"""Checkpoint contents beside the tensors: coverage, configuration, tokenizer, probe, trainer state, fingerprints."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from pangu_sigma.checkpoint import folder_layout
from pangu_sigma.checkpoint.file_plan import (
    PlannedFile,
    check_tensor_names,
    plan_content,
    plan_tokenizer,
    probe_tensors,
)
from pangu_sigma.checkpoint.manifest import (
    CoverageCell,
    FileEntry,
    Fingerprints,
    Manifest,
    TensorEntry,
    coverage_cells,
)
from pangu_sigma.checkpoint.tensor_file import TensorSpec


@dataclass(frozen=True, kw_only=True)
class CheckpointContents:
    """Everything of a checkpoint but the model's and the optimizer's tensors, for one writing process or several.

    coverage: sparse layer -> domain -> number of experts; empty for a dense model. probe: domain -> int32 [sequences,
    S + 1]. state: the trainer's, or where a model folder came from; anything that JSON holds. Raises ValueError, in its
    methods too, for what makes no whole checkpoint.
    """

    step: int = 0
    domains: Sequence[str]
    coverage: Mapping[str, Mapping[str, int]]
    config_text: str
    tokenizer_files: Mapping[str, bytes]
    probe: Mapping[str, np.ndarray] = field(default_factory=dict)
    state: Mapping[str, Any]
    fingerprints: Fingerprints

    def __post_init__(self) -> None:
        if self.step < 0:
            raise ValueError(f"step={self.step} must be at least 0")
        folder_layout.check_domains(self.domains)

    @cached_property
    def probe_arrays(self) -> dict[str, np.ndarray]:
        """The probe by tensor name; it lies in the domains' tensor files."""
        return probe_tensors(self.probe, self.domains)

    def expert_groups_of(self, specs: Sequence[TensorSpec]) -> tuple[CoverageCell, ...]:
        """The expert groups among all tensors `specs`, as the manifest lists them. Raises ValueError for a tensor of a
        domain that is not listed, and for a reserved name."""
        check_tensor_names((spec.name for spec in specs), self.domains)
        return coverage_cells(self.coverage, self.domains, specs)

    def small_files(self) -> list[PlannedFile]:
        """The other files but the manifest: configuration, state and tokenizer."""
        state = json.dumps(self.state, allow_nan=False, ensure_ascii=False)
        given = {folder_layout.CONFIG: self.config_text, folder_layout.STATE: state}
        planned = [plan_content(path, text.encode()) for path, text in given.items()]
        return planned + plan_tokenizer(self.tokenizer_files)

    def manifest(
        self, cells: Sequence[CoverageCell], files: Mapping[str, FileEntry], tensors: Mapping[str, TensorEntry]
    ) -> Manifest:
        """The manifest of what was written."""
        return Manifest(
            format_version=folder_layout.FORMAT_VERSION,
            step=self.step,
            domains=tuple(self.domains),
            fingerprints=self.fingerprints,
            coverage=tuple(cells),
            files=dict(files),
            tensors=dict(sorted(tensors.items())),
        )
