"""The configuration of a run: schema, loading, rules between keys, parameter counts."""

from pangu_sigma.config.init_from import (
    check_init_from,
    with_init_from_of,
    with_tokenizer_of,
    with_vocabulary,
    with_vocabulary_size,
)
from pangu_sigma.config.load_config import config_from_dict, effective, load_config
from pangu_sigma.config.parameter_counts import ParameterCounts, parameter_counts, tensor_shapes
from pangu_sigma.config.resume_rules import changed_keys, check_resume, with_kept_keys
from pangu_sigma.config.schema import Config
from pangu_sigma.config.schema_versions import SCHEMA_VERSION

__all__ = [
    "SCHEMA_VERSION",
    "Config",
    "ParameterCounts",
    "changed_keys",
    "check_resume",
    "check_init_from",
    "config_from_dict",
    "effective",
    "load_config",
    "tensor_shapes",
    "parameter_counts",
    "with_init_from_of",
    "with_kept_keys",
    "with_tokenizer_of",
    "with_vocabulary",
    "with_vocabulary_size",
]
