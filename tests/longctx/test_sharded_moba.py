"""MoBA on a mesh equals MoBA on one device, forward and every gradient, and refuses what it does not serve."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx import AttentionSharding, MeshConfig, make_mesh
from longctx.context_parallel import Layout, empty_moba_cache, moba, sharded_moba, sharded_moba_decode
from longctx.context_parallel import ring as ring_module
from longctx.context_parallel.layout import permute, unpermute
from pallas_kernels import Tokens
from pallas_kernels.sparse import moba_attention
from pallas_kernels.testing import assert_close, packed_tokens

LENGTH = 96
ROWS = ((45, 1, 30), (96,))  # documents that cross shards and chunks, and padding
NAMES = ("out", "dq", "dk", "dv")
LAYOUTS = {
    "contiguous": Layout(name="contiguous"),
    "zigzag": Layout(name="zigzag"),
    "striped": Layout(name="striped"),
    "striped_by_4": Layout(name="striped", stripe_size=4),
}
CASES = [
    ("ring", "contiguous", {"context_inner": 8}),
    ("ring", "zigzag", {"context_inner": 4}),
    ("ring", "zigzag", {"data": 2, "context_outer": 2, "tensor": 2}),
    ("ring", "striped", {"context_outer": 2, "context_inner": 2}),
    ("all_gather", "zigzag", {"context_inner": 2}),
    ("all_gather", "striped_by_4", {"context_inner": 4}),
    ("all_gather", "contiguous", {"fsdp": 2, "context_inner": 2, "tensor": 2}),
    ("ring", "zigzag", {"data": 2, "tensor": 2}),
    ("ring", "contiguous", {"data": 4, "context_inner": 2}),
]
QUICK = [case for case in CASES if case[:2] == ("all_gather", "striped_by_4")]


def inputs(dtype="float32"):
    shapes = (2, LENGTH, 4, 8), (2, LENGTH, 2, 8), (2, LENGTH, 2, 8), (2, LENGTH, 4, 8)
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)]


def with_gradients(attend):
    @jax.jit
    def run(q, k, v, dout):
        out, vjp = jax.vjp(attend, q, k, v)
        return out, *vjp(dout)

    return run


@functools.cache
def on_one_device(chunk_size, top_k):
    tokens = jax.tree.map(jnp.asarray, packed_tokens(ROWS, LENGTH))
    attend = functools.partial(moba_attention, chunk_size=chunk_size, top_k=top_k, tokens=tokens)
    return with_gradients(functools.partial(attend, implementation="reference"))(*inputs())


def over_a_mesh(strategy, layout, mesh_shape, *, chunk_size=8, top_k=3):
    """Results by name in the order of the sequence."""
    degree = mesh_shape.get("context_outer", 1) * mesh_shape.get("context_inner", 1)
    order = LAYOUTS[layout].order(LENGTH, degree)
    tokens = jax.tree.map(lambda x: jnp.asarray(permute(x, order)), packed_tokens(ROWS, LENGTH))
    sharding = AttentionSharding(strategy=strategy, layout=LAYOUTS[layout])
    attend = functools.partial(sharded_moba, chunk_size=chunk_size, top_k=top_k, tokens=tokens, sharding=sharding)
    mesh = make_mesh(MeshConfig(**mesh_shape), jax.devices()[: int(np.prod(list(mesh_shape.values())))])
    with jax.set_mesh(mesh):
        got = jax.block_until_ready(with_gradients(attend)(*(permute(x, order) for x in inputs())))
    return {name: unpermute(np.asarray(x), order) for name, x in zip(NAMES, got, strict=True)}


@pytest.mark.parametrize(
    ("strategy", "layout", "mesh_shape"),
    [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES],
    ids=str,
)
def test_equals_one_device(strategy, layout, mesh_shape):
    got = over_a_mesh(strategy, layout, mesh_shape)
    for name, want in zip(NAMES, on_one_device(8, 3), strict=True):
        assert_close(name, got[name], want, "float32")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chunk_size", "top_k"),
    [(20, 2), pytest.param(8, 1, marks=pytest.mark.slow), pytest.param(97, 4, marks=pytest.mark.slow)],
)
def test_chunks_that_cross_shards_and_choices_that_are_none(chunk_size, top_k):
    got = over_a_mesh("ring", "zigzag", {"context_inner": 4}, chunk_size=chunk_size, top_k=top_k)
    for name, want in zip(NAMES, on_one_device(chunk_size, top_k), strict=True):
        assert_close(name, got[name], want, "float32")


@pytest.mark.slow
def test_tokens_default_to_one_document_over_the_whole_row():
    """One row of positions for two of the batch; without a layout the shards are in order."""
    arguments = dict(chunk_size=20, top_k=2)
    arrays = inputs()
    attend = functools.partial(moba_attention, implementation="reference", **arguments)
    want = with_gradients(attend)(*arrays)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, context_inner=2), jax.devices()[:4])):
        got = with_gradients(functools.partial(sharded_moba, tokens=Tokens(), **arguments))(*arrays)
        jax.block_until_ready(got)
    for name, x, y in zip(NAMES, got, want, strict=True):
        assert_close(name, x, y, "float32")


def refused(sharding, tokens=None, **shapes):
    q, k, v, _ = inputs()
    with jax.set_mesh(make_mesh(MeshConfig(**shapes))):
        jax.eval_shape(
            lambda q, k, v: sharded_moba(
                q, k, v, chunk_size=8, top_k=2, tokens=tokens or Tokens(), sharding=sharding
            ),
            q, k, v,
        )  # fmt: skip


def test_refusals():
    for strategy in ("ulysses", "halo"):
        with pytest.raises(
            NotImplementedError, match=rf"sharded_moba: .* got strategy={strategy}; choose one of those"
        ):
            refused(AttentionSharding(strategy=strategy), context_inner=2, data=4)
    with pytest.raises(ValueError, match=r"sharded_moba: got positions=None with layout=zigzag"):
        refused(AttentionSharding(layout=LAYOUTS["zigzag"]), context_inner=8)
    with pytest.raises(ValueError, match=r"sharded_moba: 2 kv heads do not split over the 8 devices"):
        refused(AttentionSharding(), tensor=8)


@pytest.mark.parametrize(
    ("strategy", "layout"), [("ring", "zigzag"), pytest.param("all_gather", "striped", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("top_k", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_the_program_sends_what_is_stated(strategy, layout, top_k, monkeypatch):
    """Of the program before it is compiled, with every hop written out."""
    monkeypatch.setattr(ring_module, "MAX_UNROLLED_HOPS", 9)
    sharding, degree = AttentionSharding(strategy=strategy, layout=LAYOUTS[layout]), 4
    q, k, v, dout = inputs("bfloat16")
    ids = jnp.zeros((2, LENGTH), jnp.int32)

    def step(q, k, v, dout, ids):
        tokens = Tokens.self_attention(ids, ids)
        attend = functools.partial(sharded_moba, chunk_size=8, top_k=top_k, tokens=tokens, sharding=sharding)
        return jax.vjp(attend, q, k, v)[1](dout)

    with jax.set_mesh(make_mesh(MeshConfig(context_inner=degree), jax.devices()[:degree])):
        program = jax.jit(step).lower(q, k, v, dout, ids).as_text()
    found = collections.Counter()
    kinds = "collective_permute|all_gather|reduce_scatter|all_reduce"
    for kind, dims, element in re.findall(
        rf"stablehlo\.({kinds})\"?\(.*?-> tensor<([\dx]+)x(\w+)>", program, re.DOTALL
    ):
        num_bytes = int(np.prod([int(n) for n in dims.split("x")])) * {"bf16": 2, "f32": 4, "i32": 4}[element]
        share = {"collective_permute": 1, "all_gather": 3 / 4, "reduce_scatter": 3, "all_reduce": 2 * 3 / 4}[kind]
        found[kind.replace("_", "-"), round(num_bytes * share)] += 1
    stated = collections.Counter()
    for transfer in moba.transfers(
        sharding, rows=2, seq_len=LENGTH, num_heads=4, num_kv_heads=2, head_dim=8, chunk_size=8, top_k=top_k,
        degree=degree, dtype="bfloat16",
    ):  # fmt: skip
        stated[transfer.kind, transfer.num_bytes] += transfer.count
    # Beside it what the hops that are left out rest on: two tokens of each run.
    beside = found - stated
    assert not stated - found and all(num_bytes <= 64 * degree * 2 for _, num_bytes in beside), (found, stated)


def test_a_cache_of_no_chunks_and_a_choice_of_none_are_refused():
    with pytest.raises(ValueError, match="empty_moba_cache: chunk_size: got 0, wanted"):
        empty_moba_cache(
            batch_size=1, max_length=8, num_kv_heads=1, head_dim=4, chunk_size=0, dtype="float32"
        )  # fmt: skip
    cache = empty_moba_cache(batch_size=1, max_length=8, num_kv_heads=1, head_dim=4, chunk_size=4, dtype="float32")
    x = jnp.ones((1, 2, 1, 4))
    with pytest.raises(ValueError, match="sharded_moba_decode: top_k: got 0, wanted"):
        sharded_moba_decode(x, x, x, cache, top_k=0)
