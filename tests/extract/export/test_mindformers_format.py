"""The file for MindFormers holds every tensor of the model as it is; what its network cannot begin with is refused."""

from __future__ import annotations

import pytest
from safetensors.numpy import load_file

from extract.export.export_formats import Options
from extract.export.export_job import export
from pangu_sigma.checkpoint import open_checkpoint
from pangu_sigma.config.parameter_counts import tensor_shapes
from pangu_sigma.errors import UserError
from pangu_sigma.trained_model import stored_config


@pytest.mark.parametrize("case", ["dense", "full_model", "switch"])
def test_every_tensor_goes_byte_for_byte(stored, tmp_path, case):
    checkpoint = open_checkpoint(stored(case).path)
    result = export(checkpoint.path, tmp_path / "out", "mindformers")
    exported = load_file(tmp_path / "out" / "pangu_sigma.safetensors")
    config = stored_config(checkpoint)
    assert set(exported) == set(tensor_shapes(config, config.model.vocab_size))
    for name, tensor in checkpoint.load(checkpoint.names(optimizer=False)).items():
        assert exported[name].tobytes() == tensor.tobytes(), name
    assert str(checkpoint.path) in result.messages[0] and "init_from" in result.messages[0]


def test_a_part_of_the_domains_and_other_types_are_refused(stored, tmp_path):
    with pytest.raises(UserError, match="MindFormers trains whole models"):
        export(stored("full_model").path, tmp_path / "out", "mindformers", ["code"])
    with pytest.raises(UserError, match="MindFormers trains from float32 weights"):
        export(stored("full_model").path, tmp_path / "out", "mindformers", None, Options(dtype="float16"))
    assert not (tmp_path / "out").exists()
