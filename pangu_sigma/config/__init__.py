"""The configuration of a run: schema, loading, rules between keys, parameter counts."""

from pangu_sigma.config.init_from import (
    check_start,
    with_start_of,
    with_tokenizer_of,
    with_vocabulary,
    with_vocabulary_size,
)
from pangu_sigma.config.load_config import config_from_dict, effective, load_config
from pangu_sigma.config.parameter_counts import Counts, manifest, parameter_counts
from pangu_sigma.config.resume_rules import changed_keys, check_resume
from pangu_sigma.config.schema import Config
from pangu_sigma.config.schema_versions import SCHEMA_VERSION

__all__ = [
    "SCHEMA_VERSION",
    "Config",
    "Counts",
    "changed_keys",
    "check_resume",
    "check_start",
    "config_from_dict",
    "effective",
    "load_config",
    "manifest",
    "parameter_counts",
    "with_start_of",
    "with_tokenizer_of",
    "with_vocabulary",
    "with_vocabulary_size",
]
