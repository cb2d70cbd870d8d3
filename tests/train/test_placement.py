import re

import numpy as np
import pytest

from longctx import AttentionSharding, masks
from longctx.context_parallel import Balancer, ContextParallelConfig, Layout
from longctx.sharding import MeshConfig, make_mesh
from train.placement import BatchPlacement, one_a_device

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


def test_rows_of_a_balanced_layout_have_orders_of_their_own():
    rng = np.random.default_rng(0)
    rows = []
    for documents in ((16, 16), (3, 20, 9)):
        row = {"tokens": rng.integers(9, size=32, dtype=np.int32)}
        row["positions"] = np.concatenate([np.arange(n, dtype=np.int32) for n in documents])
        row["segment_ids"] = np.repeat(np.arange(len(documents), dtype=np.int32), documents)
        rows.append(row)
    layout = Layout(name="balanced", chunk_size=1)
    mask = masks.causal() & masks.documents()
    balancer = Balancer(masks={mask: 1}, sharding=AttentionSharding(layout=layout), degree=4, length=32)
    placement = BatchPlacement(make_mesh(MeshConfig(data=2, context_inner=4)), batch_size=2, order=balancer)
    found = [placement.balance_of(row) for row in rows]
    assert not np.array_equal(found[0].order, found[1].order)
    cut = [{name: x[placement.slots(row)] for name, x in row.items()} for row in rows]
    placed = placement.place({name: np.stack([row[name] for row in cut]) for name in cut[0]})
    for name, array in placed.items():
        want = np.stack([row[name][of.order] for row, of in zip(rows, found, strict=True)])
        np.testing.assert_array_equal(array, want)
    assert re.fullmatch(
        r"(striped|back_and_forth)(, \d+ pairs .*)?: 1\.\d+ of even work, 1\.\d+ as dealt", str(found[1])
    )
    whole = BatchPlacement(make_mesh(MeshConfig(data=8)), batch_size=8, order=np.arange(32))
    assert whole.balance_of(rows[0]) is None


class OfOneProcess:
    """A sharding of which this process holds two pieces only: rows 2 and 3, the second and the last quarter."""

    def addressable_devices_indices_map(self, shape):
        return {place: (slice(2, 4), slice(place * 6, place * 6 + 6)) for place in (1, 3)}


def test_a_process_reads_its_rows_and_its_tokens_only(monkeypatch):
    monkeypatch.setattr("train.placement.batch_sharding", lambda mesh, ndim: OfOneProcess())
    pieces = {}

    def make(shape, sharding, piece):
        indices = sharding.addressable_devices_indices_map(shape).items()
        pieces.update({(len(shape), place): piece(index[: len(shape)]) for place, index in indices})
        return shape

    monkeypatch.setattr("jax.make_array_from_callback", make)
    order = ContextParallelConfig(layout="zigzag").order(LENGTH, 4)
    placement = BatchPlacement(None, batch_size=6, order=order)
    np.testing.assert_array_equal(placement.rows, [2, 3])
    np.testing.assert_array_equal(placement.slots, [*order[6:12], *order[18:24]])
    batch = batch_of(6)
    part = {"tokens": batch["tokens"][2:4, placement.slots], "num_bytes": batch["num_bytes"][2:4]}
    assert placement.place(part) == {"tokens": (6, LENGTH), "num_bytes": (6,)}
    for place in (1, 3):
        np.testing.assert_array_equal(pieces[2, place], batch["tokens"][2:4, order[place * 6 : place * 6 + 6]])
        np.testing.assert_array_equal(pieces[1, place], batch["num_bytes"][2:4])


def test_a_flag_a_device():
    mesh = make_mesh(MeshConfig(data=2, tensor=4))
    for flag in (True, False):
        flags = one_a_device(flag, mesh)
        assert flags.shape == (8,) and (np.asarray(flags) == flag).all()
        assert {shard.data.shape for shard in flags.addressable_shards} == {(1,)}
