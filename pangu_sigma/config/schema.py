"""The whole configuration of a run. Attribute paths are the paths of the YAML file."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import PrivateAttr

from pangu_sigma.config.data_section import DataConfig, DomainConfig
from pangu_sigma.config.finetuning_section import AdaptConfig
from pangu_sigma.config.model_section import ModelConfig
from pangu_sigma.config.run_sections import CheckpointConfig, EvaluateConfig, ExpertsConfig, ParallelConfig, RunConfig
from pangu_sigma.config.section import Field, ListOf, Section
from pangu_sigma.config.training_sections import OptimizerConfig, ScheduleConfig, TrainConfig
from pangu_sigma.config.yaml_text import dump_yaml


class Config(Section, resume="fixed", init_from="free"):
    """The whole configuration as data. `load_config` makes it and checks the rules between its keys (`rules.py`)."""

    schema_version: Literal[2]
    """Version of this schema."""
    paths_from: Literal["current_folder", "file"] = Field("current_folder", resume="free")
    """Where relative paths of this file start; file: at its own folder, as in a run's or model's."""
    run: RunConfig
    model: ModelConfig
    domains: ListOf[DomainConfig] = Field(min_length=1, init_from="equal")
    """The domains, in the order of their ids; each is a distribution of text with its own experts."""
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    experts: ExpertsConfig = ExpertsConfig()
    parallel: ParallelConfig = ParallelConfig()
    adapt: AdaptConfig | None = None
    """What pangu-sigma sft and dpo fine-tune a model on, as configs/sft.yaml and configs/dpo.yaml show; null trains on
    the domains' text."""

    _written: dict[str, Any] | None = PrivateAttr(None)

    def __repr__(self) -> str:
        """What it is about in a line; `to_yaml` and `pangu-sigma config` show all of it."""
        model = self.model.preset or f"{self.model.layers} layers × {self.model.hidden}"
        return f"Config(run.dir={self.run.dir!r}, model={model!r}, domains={self.domain_names})"

    __str__ = __repr__

    def __eq__(self, other: object) -> bool:
        """Whether all keys have the same values, whatever of them was written."""
        return isinstance(other, Config) and self.to_dict() == other.to_dict()

    def written(self) -> dict[str, Any]:
        """The mapping that `load_config` read, with absolute paths: what overrides and processes change, so that what
        follows a key follows them too. Of a configuration made in another way, all of it."""
        return self.to_dict() if self._written is None else copy.deepcopy(self._written)

    def written_as(self, values: Mapping[str, Any]) -> Config:
        """This configuration, which was made of the mapping `values`."""
        config = self.model_copy()
        config._written = copy.deepcopy(dict(values))
        return config

    def model_copy(self, **options: Any) -> Config:
        """pydantic's copy, all of which counts as written."""
        config = super().model_copy(**options)
        config._written = None
        return config

    @property
    def domain_names(self) -> tuple[str, ...]:
        """Names of the domains in the order of their ids."""
        return tuple(domain.name for domain in self.domains)

    @property
    def expert_groups(self) -> dict[str, int]:
        """Domain → experts of its group in every sparse layer, in the order of the domains' ids."""
        return {domain.name: domain.experts for domain in self.domains}

    @property
    def sharded_over_devices(self) -> bool:
        """Whether one graph is cut over a mesh of devices, which may be emulated; several CPU processes have each
        their own."""
        return self.parallel.emulate_mesh or (self.run.device == "Ascend" and self.parallel.devices > 1)

    @property
    def coverage(self) -> dict[str, dict[str, int]]:
        """Sparse layer → domain → number of experts, as a new model's checkpoint covers them."""
        return {layer_name: self.expert_groups for layer_name in self.model.sparse_prefixes}

    @property
    def experts_in_layer(self) -> int:
        """E: the experts of a sparse layer, all domains' together."""
        return sum(domain.experts for domain in self.domains)

    @property
    def experts_per_token(self) -> int:
        """k: the experts that a token takes in a sparse layer."""
        return self.model.choices_of(self.experts_in_layer)

    @property
    def predictions(self) -> int:
        """Next-token distributions that the head computes for a token: one, or one of each expert of a mixture."""
        return self.experts_in_layer if self.model.is_competitive_mixture else 1

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain mappings, lists and scalars, every key in the schema's order."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """The configuration as YAML text, which `load_config` reads back to an equal configuration."""
        return dump_yaml(self.to_dict())
