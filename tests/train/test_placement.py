import numpy as np
import pytest

from longctx.context_parallel import ContextParallelConfig
from longctx.sharding import MeshConfig, make_mesh
from train.placement import BatchPlacement, one_flag_a_device

LENGTH = 24


def batch_of(rows):
    tokens = np.arange(rows * LENGTH, dtype=np.int32).reshape(rows, LENGTH)
    return {"tokens": tokens, "num_bytes": np.arange(rows, dtype=np.float32)}


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_each_device_holds_its_rows_and_its_tokens_of_the_layout(layout):
    mesh = make_mesh(MeshConfig(data=2, context_outer=2, context_inner=2))
    order = ContextParallelConfig(layout=layout).order(LENGTH, 4)
    placement = BatchPlacement(mesh, batch_size=6, order=order)
    np.testing.assert_array_equal(placement.rows, np.arange(6))
    batch = batch_of(6)
    part = {**batch, "tokens": batch["tokens"] if placement.slots is None else batch["tokens"][:, placement.slots]}
    placed = placement.place(part)
    np.testing.assert_array_equal(placed["tokens"], batch["tokens"][:, order])
    np.testing.assert_array_equal(placed["num_bytes"], batch["num_bytes"])
    for shard in placed["tokens"].addressable_shards:
        data, _, outer, inner, _ = np.argwhere(mesh.devices == shard.device)[0]
        first = 6 * (2 * outer + inner)
        np.testing.assert_array_equal(shard.data, batch["tokens"][3 * data : 3 * data + 3, order[first : first + 6]])


def test_a_flag_a_device():
    mesh = make_mesh(MeshConfig(data=2, tensor=4))
    for flag in (True, False):
        flags = one_flag_a_device(flag, mesh)
        assert flags.shape == (8,) and (np.asarray(flags) == flag).all()
        assert {shard.data.shape for shard in flags.addressable_shards} == {(1,)}
