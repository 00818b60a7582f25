"""The configuration of a run: schema, loading, rules between keys, parameter counts."""

from pangu_sigma.config.counts import Counts, manifest, parameter_counts, vocabulary_size
from pangu_sigma.config.load import config_from_dict, effective, load_config
from pangu_sigma.config.resume import changed_keys, check_resume
from pangu_sigma.config.schema import SCHEMA_VERSION, Config
from pangu_sigma.config.starting import (
    check_start,
    with_start_of,
    with_tokenizer_of,
    with_vocabulary,
    with_vocabulary_size,
)

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
    "vocabulary_size",
    "with_start_of",
    "with_tokenizer_of",
    "with_vocabulary",
    "with_vocabulary_size",
]
