"""Strategy files, against MindSpore's own reader and its own cutting."""

import numpy as np
import pytest

from pangu_sigma.convert.strategy_file import ShardedLayout, read_strategy
from pangu_sigma.errors import UserError


@pytest.mark.parametrize(
    ("size", "layers", "hidden"), [("13B", 40, 5120), ("2.6B", 32, 2560)], ids=["13B", "2.6B"]
)
def test_the_published_files_are_read_as_mindspore_reads_them(published, size, layers, hidden):
    from mindspore.parallel._parallel_serialization import _build_searched_strategy, _convert_to_list

    path = published / f"pangu_alpha_{size}_ckpt_strategy.ckpt"
    layouts = read_strategy(path)
    theirs = _convert_to_list(_build_searched_strategy(str(path)))
    assert layouts.keys() == theirs.keys()
    for name, layout in layouts.items():
        devices, tensor_map, _, _, step, ways = theirs[name][:6]
        assert (list(layout.devices), list(layout.tensor_map)) == (devices, tensor_map)
        assert layout.optimizer_ways == (ways if step else 0)
    assert sum(".dense1.weight" in name and name.startswith("backbone.") for name in layouts) == layers
    mapping = layouts["backbone.blocks.0.output.mapping.weight"]
    assert mapping.device_count == 512 and mapping.cuts == (64, 8)
    assert mapping.full_shape((hidden // 64, 4 * hidden // 8)) == (hidden, 4 * hidden)


@pytest.mark.parametrize(
    ("devices", "tensor_map", "ways"),
    [
        ((4, 2), (0, -1), -1),
        ((4, 2), (-1, 0), -1),
        ((4, 2), (0, -1), 2),
        ((4, 2), (-1, 0), 4),
        ((4, 2), (1, 0), 0),
        ((4, 2), (-1, -1), 0),
        ((2, 2, 2), (1, 0), -1),
        ((2, 2, 2), (0, -1), -1),
        ((2, 4), (1, -1), 4),
        ((2, 4), (1, -1), 2),
    ],
)
def test_slices_are_those_that_mindspore_cuts(devices, tensor_map, ways):
    import mindspore as ms
    from mindspore.parallel._tensor import _construct_tensor_layout_for_opt_shard, _load_tensor

    full_tensor = np.arange(16 * 24, dtype=np.float32).reshape(16, 24)
    layout = ShardedLayout(devices, tensor_map, ways)
    size = tuple(full // cuts for full, cuts in zip(full_tensor.shape, layout.cuts, strict=True))
    free = [axis for axis in range(len(devices)) if len(devices) - 1 - axis not in tensor_map]
    equal = int(np.prod([devices[axis] for axis in free]))
    step = int(np.prod(devices[free[0] + 1 :])) if free and len(free) == 1 else 1
    shard = equal if ways < 0 else ways
    grid, axes, shape = _construct_tensor_layout_for_opt_shard(
        list(devices), list(tensor_map), step if shard else 0, shard, list(full_tensor.shape)
    )
    assert layout.full_shape(size) == full_tensor.shape
    for rank in range(int(np.prod(devices))):
        theirs = _load_tensor(ms.Tensor(full_tensor.reshape(shape)), grid, axes, rank_id=rank).reshape(size)
        box = tuple(slice(begin, end) for begin, end in layout.box(rank, size))
        np.testing.assert_array_equal(full_tensor[box], theirs)


def test_other_files_are_refused_by_name(tmp_path):
    for content, reason in ((b"", "of no parameter"), (b"hello", "no MindSpore strategy file"), (b"\x08\x01", "of no")):
        (tmp_path / "strategy.ckpt").write_bytes(content)
        with pytest.raises(UserError, match=reason) as error:
            read_strategy(tmp_path / "strategy.ckpt")
        assert "strategy.ckpt" in str(error.value)
    with pytest.raises(UserError, match="cannot be read"):
        read_strategy(tmp_path / "none.ckpt")


def test_pipeline_stages_are_refused(tmp_path):
    from tests.pangu_sigma.convert.pangu_alpha_files import small_strategy

    strategy = small_strategy(["backbone.layernorm.gamma"], 2, 2)
    strategy.parallel_layout_item.extend(small_strategy(["backbone.layernorm.beta"], 4, 2).parallel_layout_item)
    (tmp_path / "strategy.ckpt").write_bytes(strategy.SerializeToString())
    with pytest.raises(UserError, match="pipeline stages cannot be imported"):
        read_strategy(tmp_path / "strategy.ckpt")
