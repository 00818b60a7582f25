"""Checkpoints: one folder per saved step, shared parameters and every domain in files of their own, all hashed."""

from pangu_sigma.checkpoint.checkpoint_contents import CheckpointContents
from pangu_sigma.checkpoint.checkpoint_reader import Checkpoint, StoredTensors, open_checkpoint
from pangu_sigma.checkpoint.find_checkpoint import find_latest, resolve
from pangu_sigma.checkpoint.manifest import Fingerprints
from pangu_sigma.checkpoint.model_folder import write_model_folder
from pangu_sigma.checkpoint.retention import remove_stale
from pangu_sigma.checkpoint.save_checkpoint import SaveResult, save_checkpoint
from pangu_sigma.checkpoint.streamed_checkpoint import StreamedCheckpoint
from pangu_sigma.checkpoint.tensor_file import BFLOAT16, LazyTensor, TensorSpec
from pangu_sigma.errors import CheckpointError
