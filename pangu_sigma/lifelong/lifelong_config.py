"""The YAML of `pangu-sigma lifelong`: stages over one ordinary configuration."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from pangu_sigma.config.data_section import DomainName, Text
from pangu_sigma.config.section import ListOf, Section
from pangu_sigma.config.training_sections import RegulariseConfig

# A stage's name becomes a part of a folder's name.
StageName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_+-]*$", max_length=80)]


class PolicyConfig(Section):
    """How a stage treats what was learned before it; null takes the default, or, in a stage, the sequence's policy."""

    shared: Literal["frozen", "train", "regularised"] | None = None
    """Whether the shared parameters keep every bit, train, or train near the previous model; null: frozen where domains
    have expert groups of their own, train elsewhere."""
    regularise: RegulariseConfig | None = None
    """With shared regularised, what holds a stage near the previous model, as in a phase."""
    replay: float | None = Field(None, ge=0, lt=1)
    """Share of a stage's samples that the domains of earlier stages give; 0 if null."""
    init: Text | None = None
    """How a new domain's experts begin, as in `domains add`: mean (if null), from:DOMAIN, nearest, dense:MODEL,
    random."""


class StageConfig(Section):
    """One stretch of learning."""

    name: StageName | None = None
    """Name of the stage; null joins the names of its domains."""
    domains: ListOf[DomainName] = Field(min_length=1)
    """Domains that the stage learns; those it is the first to name come in with it."""
    steps: int = Field(ge=1)
    """Optimizer steps of the stage."""
    policy: PolicyConfig = PolicyConfig()
    """This stage's own policy, key by key."""


class InferenceConfig(Section):
    """How text without an expert group of its own is measured: its domain is inferred among those there are."""

    top: int = Field(1, ge=1)
    """How many of the likeliest domains are mixed; fewer where fewer exist."""
    prior: Literal["uniform", "updating"] = "uniform"
    """What is believed before a sequence: every domain alike, or what the last ones taught."""


class LifelongConfig(Section):
    """A sequence of stages over the configuration `base`, all of whose domains are measured after every stage."""

    schema_version: Literal[2]
    """Version of this schema."""
    base: Text
    """Configuration file of the model, its data and all domains; its train.steps give way to the stages'"""
    changes: ListOf[Text] = ()
    """Changes of it, section.key=value, as on the command line."""
    grows: bool | None = None
    """Whether a domain's experts come in with the stage that names it first; null: where domains have expert groups
    of their own. A learned gate grows new columns, and freezes the old ones with their experts (Lifelong-MoE)."""
    policy: PolicyConfig = PolicyConfig()
    """From the second stage on, for all stages."""
    inference: InferenceConfig = InferenceConfig()
    """How a domain is inferred where none is given."""
    measure: Literal["all", "own", "new"] = "all"
    """What is measured after a stage. all: every domain's text, under every expert group. own: each domain that was
    learned, under its own experts alone. new: as own, but a domain whose parameters are by their hashes those of the
    stage before keeps its loss."""
    measure_batches: int | None = Field(None, ge=1)
    """How many batches of each text are measured at most; evaluate.batches of the base if null."""
    stages: ListOf[StageConfig] = Field(min_length=1)
    """The stages, one after the other."""
