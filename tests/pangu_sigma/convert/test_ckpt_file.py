"""MindSpore's checkpoint files, against MindSpore's own writer and reader."""

import pickle
import tracemalloc

import numpy as np
import pytest

from pangu_sigma.convert.ckpt_file import CkptFile
from pangu_sigma.errors import UserError
from tests.pangu_sigma.convert.pangu_alpha_files import write_ckpt


@pytest.fixture(scope="module")
def tensors():
    draw = np.random.default_rng(0)
    return {
        "backbone.a.weight": draw.standard_normal((5, 7), np.float32),
        "backbone.b": draw.standard_normal(300, np.float32),
        "half": draw.standard_normal((3, 2, 4), np.float32).astype(np.float16),
        "scalar": np.float32(2.5).reshape(()),
        "count": np.arange(4, dtype=np.int32),
    }


@pytest.fixture(scope="module")
def theirs(tensors, tmp_path_factory):
    """A file that MindSpore wrote."""
    import mindspore as ms

    path = tmp_path_factory.mktemp("ms") / "theirs.ckpt"
    ms.save_checkpoint([{"name": n, "data": ms.Tensor(a)} for n, a in tensors.items()], str(path))
    return path


def read(file: CkptFile, name: str) -> np.ndarray:
    target = np.empty(file.tensors[name].shape, np.float32)
    file.fill(name, target)
    return target


def test_what_mindspore_wrote_is_read_bit_for_bit(theirs, tensors):
    file = CkptFile(theirs)
    assert list(file.tensors) == list(tensors)
    assert {n: t.shape for n, t in file.tensors.items()} == {n: a.shape for n, a in tensors.items()}
    for name in ("backbone.a.weight", "backbone.b", "half", "scalar"):
        np.testing.assert_array_equal(read(file, name), tensors[name].astype(np.float32))


def test_the_tests_own_writer_writes_mindspores_bytes(theirs, tensors, tmp_path):
    assert write_ckpt(tmp_path / "mine.ckpt", tensors).read_bytes() == theirs.read_bytes()


def test_bfloat16_is_widened_exactly(tmp_path):
    import mindspore as ms

    values = ms.Tensor(np.array([[1.5, -2.0**-130], [3e38, 0.0]], np.float32)).astype(ms.bfloat16)
    ms.save_checkpoint([{"name": "w", "data": values}], str(tmp_path / "b.ckpt"))
    np.testing.assert_array_equal(
        read(CkptFile(tmp_path / "b.ckpt"), "w"), values.astype(ms.float32).asnumpy()
    )


def test_a_crc_behind_the_message_is_checked(tensors, tmp_path):
    import mindspore as ms

    path = tmp_path / "crc.ckpt"
    data = [{"name": n, "data": ms.Tensor(a)} for n, a in tensors.items()]
    ms.save_checkpoint(data, str(path), crc_check=True)
    file = CkptFile(path)
    np.testing.assert_array_equal(read(file, "backbone.b"), tensors["backbone.b"])
    content = bytearray(path.read_bytes())
    content[content.index(b"backbone.b") + 40] ^= 1
    path.chmod(0o600)
    path.write_bytes(content)
    with pytest.raises(UserError, match="CRC does not match"):
        CkptFile(path)


def test_a_tensor_in_several_values_is_one_and_is_read_in_blocks(tmp_path):
    """MindSpore writes tensors of more than 512 MB in slices of the same tag, with the whole tensor's dims."""
    from mindspore.train.checkpoint_pb2 import Checkpoint

    complete = np.random.default_rng(1).standard_normal((1000, 33), np.float32)
    with open(tmp_path / "sliced.ckpt", "wb") as out:
        for part in np.array_split(complete.reshape(-1), 7):
            message = Checkpoint()
            value = message.value.add(tag="w")
            value.tensor.dims.extend(complete.shape)
            value.tensor.tensor_type = "Float32"
            value.tensor.tensor_content = part.tobytes()
            out.write(message.SerializeToString())
    file = CkptFile(tmp_path / "sliced.ckpt")
    np.testing.assert_array_equal(read(file, "w"), complete)
    into = np.zeros((33, 1000), np.float32)
    file.fill("w", into.T)
    np.testing.assert_array_equal(into, complete.T)


def test_memory_holds_the_tensor_asked_for_and_a_block(tmp_path):
    tensors = {f"t{i}": np.zeros((1024, 4096), np.float32) for i in range(8)}
    write_ckpt(tmp_path / "large.ckpt", tensors)
    target = np.empty((1024, 4096), np.float32)
    del tensors
    tracemalloc.start()
    file = CkptFile(tmp_path / "large.ckpt")
    for name in file.tensors:
        file.fill(name, target)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 9 << 20


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no tensors"),
        (b"PK\x03\x04 a zip file of PyTorch", "no MindSpore checkpoint"),
        (pickle.dumps({"w": [1.0, 2.0]}), "no MindSpore checkpoint"),
        ("Größe".encode() * 100, "no MindSpore checkpoint"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path, content, message):
    (tmp_path / "other.ckpt").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        CkptFile(tmp_path / "other.ckpt")
    assert "other.ckpt" in str(error.value)


def test_a_file_cut_off_anywhere_is_refused(tmp_path):
    complete = write_ckpt(tmp_path / "w.ckpt", {"a": np.ones(3, np.float32), "b": np.ones((2, 2), np.float32)})
    content = complete.read_bytes()
    first = len(write_ckpt(tmp_path / "a.ckpt", {"a": np.ones(3, np.float32)}).read_bytes())
    for size in range(1, len(content)):
        complete.write_bytes(content[:size])
        if size == first:  # a whole message: what is missing shows in the coverage
            assert list(CkptFile(complete).tensors) == ["a"]
            continue
        with pytest.raises(UserError, match="w.ckpt"):
            CkptFile(complete)


def test_a_tensor_of_another_size_than_its_shape_is_refused(tmp_path):
    path = write_ckpt(tmp_path / "w.ckpt", {"a": np.ones((4, 2), np.float32)})
    path.write_bytes(path.read_bytes().replace(b"\x08\x04\x08\x02", b"\x08\x04\x08\x03"))
    with pytest.raises(UserError, match="tensor a has 32 bytes where"):
        CkptFile(path)


def test_a_name_twice_is_refused(tmp_path):
    one = write_ckpt(tmp_path / "one.ckpt", {"a": np.ones(2, np.float32), "b": np.ones(2, np.float32)}).read_bytes()
    (tmp_path / "two.ckpt").write_bytes(one + one)
    with pytest.raises(UserError, match="holds tensor a twice"):
        CkptFile(tmp_path / "two.ckpt")
