"""NSA on a mesh equals NSA on one device, the result and every gradient, and refuses what it does not serve."""

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx import AttentionSharding, MeshConfig, NsaConfig, make_mesh
from longctx.context_parallel import Layout, nsa, sharded_nsa, sharded_nsa_blocks
from longctx.context_parallel import ring as ring_module
from longctx.testing import assert_context_parallel_equal
from pallas_kernels import Tokens
from pallas_kernels.sparse import BranchKeys, NsaSizes
from pallas_kernels.testing import packed_tokens

DIM, LENGTH = 16, 96
ROWS = ((45, 1, 30), (96,))  # documents that cross shards and blocks, and padding
SIZES = NsaSizes(compress_block=4, compress_stride=2, block_size=8, num_blocks=4, window=10)
CONFIG = NsaConfig(
    num_heads=4, num_kv_heads=2, compress_block=4, compress_stride=2, compress_dim=6, block_size=8, num_blocks=4,
    window=10,
)  # fmt: skip
SHARDINGS = {
    "contiguous": dict(strategy="all_gather", layout=Layout(name="contiguous")),
    "halo_contiguous": dict(window_strategy="halo", layout=Layout(name="contiguous")),
    "halo_zigzag": dict(window_strategy="halo", layout=Layout(name="zigzag")),
    "ring_zigzag": dict(strategy="ring", layout=Layout(name="zigzag")),
    "striped_by_4": dict(strategy="all_gather", layout=Layout(name="striped", stripe_size=4)),
    "unknown": dict(strategy="all_gather"),
}


def build(sharding):
    rng = np.random.default_rng(1)
    layer = nnx.eval_shape(lambda: CONFIG.build(DIM, sharding=sharding, rngs=nnx.Rngs(0)))
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape) / 3, x.dtype), layer)


def batch_of(rows):
    keys = jax.random.split(jax.random.key(0))
    x, weights = (jax.random.normal(key, (2, LENGTH, DIM)) for key in keys)
    batch = dict(x=x, weights=weights)
    if rows is not None:
        tokens = packed_tokens(rows, LENGTH)
        batch |= dict(positions=jnp.asarray(tokens.q_positions), segment_ids=jnp.asarray(tokens.q_segment_ids))
    return batch


def loss(layer, batch):
    where = {name: batch[name] for name in ("positions", "segment_ids") if name in batch}
    return jnp.sum(layer(batch["x"], **where) * batch["weights"])


@pytest.mark.parametrize(
    ("sharding", "rows", "degrees"),
    [
        ("halo_zigzag", ROWS, (4,)),
        pytest.param("halo_zigzag", ROWS, (2,), marks=pytest.mark.slow),
        pytest.param("halo_contiguous", ROWS, (2, 4, 8), marks=pytest.mark.slow),
        pytest.param("contiguous", ROWS, (2, 4, 8), marks=pytest.mark.slow),
        pytest.param("ring_zigzag", ROWS, (2, 4), marks=pytest.mark.slow),
        pytest.param("striped_by_4", ROWS, (3, 8), marks=pytest.mark.slow),
        pytest.param("contiguous", None, (2, 8), marks=pytest.mark.slow),
        pytest.param("unknown", None, (4,), marks=pytest.mark.slow),
    ],
)
def test_equals_one_device(sharding, rows, degrees):
    """The loss, and the gradient of every parameter: of each branch's projections, of the compression and the gates."""
    sharding = AttentionSharding(**SHARDINGS[sharding])
    assert_context_parallel_equal(
        loss, build(sharding), batch_of(rows), degrees=degrees, sharding=sharding, rtol=3e-5, atol=3e-6
    )


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [dict(data=2, tensor=2), dict(fsdp=2, tensor=2)])
def test_over_rows_and_heads(mesh):
    """Beside a split sequence, with the gradient of the input."""
    sharding = AttentionSharding(**SHARDINGS["halo_zigzag"])
    batch = batch_of(ROWS)
    params = {"layer": build(sharding), "x": batch.pop("x")}

    def loss_of(params, batch):
        return loss(params["layer"], batch | {"x": params["x"]})

    want = jax.jit(jax.value_and_grad(loss_of))(params, batch)
    with jax.set_mesh(make_mesh(MeshConfig(**mesh), jax.devices()[:4])):
        got = jax.block_until_ready(jax.jit(jax.value_and_grad(loss_of))(params, batch))
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max(), err_msg=jax.tree_util.keystr(path))


def test_the_program_sends_what_is_stated(monkeypatch):
    """Of the program before it is compiled, with every hop written out."""
    monkeypatch.setattr(ring_module, "MAX_UNROLLED_HOPS", 9)
    degree, sharding = 4, AttentionSharding(**SHARDINGS["halo_zigzag"])
    shapes = (4, LENGTH), (2, 48), (2, LENGTH), (2, LENGTH)
    q, *branches = (jax.ShapeDtypeStruct((2, length, n, 8), jnp.bfloat16) for n, length in shapes)
    uncompressed = jax.ShapeDtypeStruct((2, LENGTH, 2, 16), jnp.bfloat16)
    gates, ids = jax.ShapeDtypeStruct((2, LENGTH, 4, 3), jnp.float32), jax.ShapeDtypeStruct((2, LENGTH), jnp.int32)

    def step(q, compressed, selected, sliding, gates, uncompressed, ids):
        tokens = Tokens.self_attention(ids, ids)
        where = dict(sizes=SIZES, sharding=sharding)

        def attend(q, compressed, selected, sliding, uncompressed):
            blocks, last = sharded_nsa_blocks(uncompressed, segment_ids=ids, positions=ids, **where)
            branches = (BranchKeys(x, x) for x in (compressed, selected, sliding))
            return (sharded_nsa(q, *branches, gates, tokens=tokens, **where), blocks), last

        results, vjp, last = jax.vjp(attend, q, compressed, selected, sliding, uncompressed, has_aux=True)
        return vjp(results), last

    with jax.set_mesh(make_mesh(MeshConfig(context_inner=degree), jax.devices()[:degree])):
        program = jax.jit(step).lower(q, *branches, gates, uncompressed, ids).as_text()
    found = collections.Counter()
    kinds = "collective_permute|all_gather|reduce_scatter|all_reduce"
    for kind, dims, element in re.findall(
        rf"stablehlo\.({kinds})\"?\(.*?-> tensor<([\dx]+)x(\w+)>", program, re.DOTALL
    ):
        num_bytes = int(np.prod([int(n) for n in dims.split("x")])) * {"bf16": 2, "f32": 4, "i32": 4}[element]
        share = {"collective_permute": 1, "all_gather": 3 / 4, "reduce_scatter": 3, "all_reduce": 2 * 3 / 4}[kind]
        found[kind.replace("_", "-"), round(num_bytes * share)] += 1
    stated = collections.Counter()
    fields = dict(degree=degree, q_len=LENGTH, kv_len=LENGTH, num_heads=4, num_kv_heads=2)
    for transfer in nsa.transfers(sharding, sizes=SIZES, rows=2, head_dim=8, setting_fields=fields, dtype="bfloat16"):
        stated[transfer.kind, transfer.num_bytes] += transfer.count
    # Beside it positions and segment ids of the window's tokens, and what its halo rests on, for its schedule.
    beside = found - stated
    assert not stated - found, (found, stated)
    assert all(num_bytes <= 2 * 2 * 2 * 9 * 4 for _, num_bytes in beside), (found, stated)


def refused(sharding, positions=None, **shapes):
    def call(x):
        return sharded_nsa_blocks(x, sizes=SIZES, sharding=sharding, positions=positions)

    with jax.set_mesh(make_mesh(MeshConfig(**shapes))):
        jax.eval_shape(call, jnp.zeros((2, LENGTH, 2, 8)))


def test_refusals():
    with pytest.raises(NotImplementedError, match=r"sharded_nsa: halo must know which tokens a device holds"):
        refused(AttentionSharding(strategy="halo"), context_inner=2, data=4)
    with pytest.raises(ValueError, match=r"sharded_nsa: got positions=None with layout=zigzag"):
        refused(AttentionSharding(layout=Layout(name="zigzag")), context_inner=8)
    with pytest.raises(ValueError, match=r"sharded_nsa: 2 kv heads do not split over the 8 devices"):
        refused(AttentionSharding(), tensor=8)
