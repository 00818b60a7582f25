"""What an import needs beside a checkpoint's weights, kept in the run's output folder: tokenizer, configuration, probe.

    OUTPUT/pangu_sigma/config.yaml, text.json, tokenizer/, probe.safetensors
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import save_file

from pangu_sigma.checkpoint.safetensors_header import load_safetensors
from pangu_sigma.config import Config
from pangu_sigma.config.config_paths import stored_text
from pangu_sigma.config.load_config import read_stored
from pangu_sigma.data.packed_sequences import first_sequences
from pangu_sigma.data.tokenizers.tokenizer import Tokenizer
from pangu_sigma.data.tokenizers.tokenizer_registry import load_tokenizer
from pangu_sigma.errors import UserError, argument
from pangu_sigma.json_reader import read_object
from pangu_sigma.monitor.result_files import write_json, write_text

if TYPE_CHECKING:
    from pangu_sigma.integrations.mindformers.batch_columns import Text

FOLDER = "pangu_sigma"
CONFIG, TEXT, TOKENIZER, PROBE = "config.yaml", "text.json", "tokenizer", "probe.safetensors"


@dataclass(frozen=True)
class Companion:
    """The folder, read: `corpora` are fingerprints by domain, `probe` held-out sequences int32 [n, S + 1] by domain."""

    config: Config
    tokenizer: Tokenizer
    corpora: dict[str, str]
    probe: dict[str, np.ndarray]


def write_settings(output: Path, config: Config) -> None:
    """Keep the run's whole configuration; the rest comes by `write_companion` once the text is open."""
    folder = output / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / CONFIG, stored_text(config, folder))


def write_companion(output: Path, text: Text) -> None:
    """Keep the run's tokenizer, corpus fingerprints and probe under `output`."""
    folder = output / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / CONFIG).exists():  # started by another launcher than ours
        write_text(folder / CONFIG, stored_text(text.config, folder))
    shutil.rmtree(folder / TOKENIZER, ignore_errors=True)
    text.corpus.tokenizer.save(folder / TOKENIZER)
    save_file(first_sequences(text.corpus.heldout(), text.config.checkpoint.probe_sequences), folder / PROBE)
    write_json(folder / TEXT, {"corpora": text.corpus.fingerprints})


def find_companion(checkpoint: Path, run: Path | None) -> Path:
    """The companion folder of a checkpoint file: in `run`, or above the file. Raises UserError."""
    candidates = [run] if run is not None else [checkpoint, *checkpoint.resolve().parents][:5]
    for candidate in candidates:
        if (candidate / FOLDER / CONFIG).is_file():
            return candidate / FOLDER
    raise UserError(
        f"no folder {FOLDER} with configuration and tokenizer lies above {checkpoint}: give the run's output_dir as "
        f"{argument('run')}"
        if run is None
        else f"{run} has no folder {FOLDER}: give the output_dir of the MindFormers run"
    )


def read_companion(folder: Path) -> Companion:
    """The folder's contents. Raises UserError naming the file that is missing or damaged."""
    path = folder / CONFIG
    try:
        config = read_stored(path.read_bytes(), path)
        path = folder / TEXT
        corpora = read_object(path)["corpora"]
        path = folder / PROBE
        probe = load_safetensors(path)
        _check_contents(config, corpora, probe)
    except UserError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is missing or damaged: starting the MindFormers training writes it anew") from error
    return Companion(config, load_tokenizer(folder / TOKENIZER), corpora, probe)


def _check_contents(config: Config, corpora: Any, probe: dict[str, np.ndarray]) -> None:
    """Raises ValueError unless both are of this configuration's domains and of the form that was written."""
    if not isinstance(corpora, dict) or not all(isinstance(fingerprint, str) for fingerprint in corpora.values()):
        raise ValueError("no fingerprints")
    shapes = {array.shape[1:] for array in probe.values()}
    if not probe.keys() <= set(config.domain_names) or not shapes <= {(config.data.sequence_length + 1,)}:
        raise ValueError("no probe of this model")
    if any(array.dtype != np.int32 for array in probe.values()):
        raise ValueError("no token ids")
