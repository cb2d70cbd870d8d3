"""Tree attention over a split cache equals attention on one device, and sends what it says whatever the cache holds."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx import AttentionSharding, KVCache, MeshConfig, make_mesh, masks
from longctx.context_parallel import empty_cache, sharded_decode
from longctx.context_parallel import tree as tree_module
from longctx.context_parallel.kv_cache import room_of
from longctx.context_parallel.tree import tree_decode, tree_transfers
from pallas_kernels import Tokens, blockwise_attention
from pallas_kernels.testing import assert_close

SLOTS = 48
CAUSAL = masks.causal() & masks.documents()
CONTEXT = ("context_outer", "context_inner")
KV_SPEC = jax.P(None, CONTEXT)


def mesh_of(**shape):
    return make_mesh(MeshConfig(**shape), jax.devices()[: int(np.prod(list(shape.values())))])


def inputs(q_len, *, num_heads=4, num_kv_heads=2, value_dim=8, dtype="float32", slots=SLOTS, batch_size=2):
    shapes = (
        (batch_size, q_len, num_heads, 8),
        (batch_size, slots, num_kv_heads, 8),
        (batch_size, slots, num_kv_heads, value_dim),
    )
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)]


def tokens_of(lengths, q_len, *, degree, slots=SLOTS):
    """Rows that hold so many tokens each, dealt out to the devices in turn; the queries are the last of them."""
    place = np.arange(slots, dtype=np.int32)
    positions = (place % (slots // degree)) * degree + place // (slots // degree)
    held = positions[None] < np.array(lengths)[:, None]
    q_positions = np.array(lengths, np.int32)[:, None] - q_len + np.arange(q_len, dtype=np.int32)
    return Tokens(
        q_positions=jnp.asarray(q_positions),
        q_segment_ids=jnp.zeros(q_positions.shape, jnp.int32),
        kv_positions=jnp.asarray(np.broadcast_to(positions, held.shape)),
        kv_segment_ids=jnp.asarray(np.where(held, 0, -1).astype(np.int32)),
    )


def tree(mesh, **options):
    """tree_decode over the context axes of a mesh, queries on every device."""
    keys = jax.P(None, CONTEXT)
    tokens = Tokens(q_positions=jax.P(), q_segment_ids=jax.P(), kv_positions=keys, kv_segment_ids=keys)
    return jax.jit(
        jax.shard_map(
            functools.partial(tree_decode, axes=CONTEXT, **options),
            mesh=mesh,
            in_specs=(jax.P(), KV_SPEC, KV_SPEC, tokens),
            out_specs=jax.P(),
            check_vma=False,
        )
    )


def assert_tree_equals_one_device(degree, arrays, tokens, *, mask=CAUSAL, dtype="float32", **options):
    attend = jax.jit(functools.partial(blockwise_attention, mask=mask, return_lse=True, **options))
    want = attend(*(x.astype("float32") for x in arrays), tokens=tokens)
    got = jax.block_until_ready(tree(mesh_of(context_inner=degree), mask=mask, **options)(*arrays, tokens))
    assert got[0].dtype == dtype
    for name, x, y in zip(("out", "lse"), got, want, strict=True):
        assert_close(name, np.asarray(x, np.float32), y, dtype)
    return got


@pytest.fixture(params=["gathered", "reduced"])
def merge(request, monkeypatch):
    if request.param == "reduced":
        monkeypatch.setattr(tree_module, "GATHER_UP_TO", 0)
    return request.param


@pytest.mark.parametrize(
    ("degree", "q_len"),
    [(4, 5), (8, 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((2, 1), (2, 5), (4, 1), (8, 5)))],
)
def test_equals_one_device(degree, q_len, merge):
    """Rows hold 48 and 21 tokens: the second leaves devices with unlike numbers of keys."""
    assert_tree_equals_one_device(degree, inputs(q_len), tokens_of((48, 21), q_len, degree=degree))


@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        (dict(num_kv_heads=1), {}),
        pytest.param(dict(num_kv_heads=4, value_dim=24), {}, marks=pytest.mark.slow),
        pytest.param({}, dict(mask=masks.sliding_window(left=3) & masks.documents()), marks=pytest.mark.slow),
        ({}, dict(mask=CAUSAL & masks.per_head(masks.strided(3), masks.sliding_window(left=9)))),
        pytest.param({}, dict(logits_soft_cap=0.7), marks=pytest.mark.slow),
        (dict(dtype="bfloat16"), {}),
    ],
    ids=["mqa", "value_dim", "window", "per_head", "soft_cap", "bfloat16"],
)
@pytest.mark.parametrize("merge", ["gathered", pytest.param("reduced", marks=pytest.mark.slow)], indirect=True)
def test_heads_masks_options_and_dtypes(shapes, options, merge):
    tokens = tokens_of((48, 21), 2, degree=4)
    dtype = shapes.get("dtype", "float32")
    assert_tree_equals_one_device(4, inputs(2, **shapes), tokens, dtype=dtype, **options)


def test_rows_that_see_nothing(merge):
    """One row holds two tokens, so that most devices have no key of it, the other none at all."""
    out, lse = assert_tree_equals_one_device(8, inputs(2), tokens_of((2, 0), 2, degree=8))
    assert np.all(out[1] == 0) and np.all(lse[1] == -np.inf) and np.all(np.isfinite(lse[0]))


def test_a_wrong_merge_fails(monkeypatch, merge):
    """The suite can fail: parts that are added up without weights are told apart."""
    monkeypatch.setattr(tree_module, "_weight", lambda part_max, top: jnp.ones_like(part_max))
    with pytest.raises(AssertionError):
        assert_tree_equals_one_device(4, inputs(1), tokens_of((48, 21), 1, degree=4))


def decode_steps(chunks, *, mask=CAUSAL, sharding=None, **shapes):
    """The results of chunks of new tokens, one after the other, and the cache after them."""
    q, k, v = inputs(SLOTS, **shapes)
    cache = empty_cache(
        batch_size=2, max_length=SLOTS, num_kv_heads=k.shape[2], head_dim=8, dtype=k.dtype, mask=mask, sharding=sharding
    )
    step = jax.jit(functools.partial(sharded_decode, mask=mask, sharding=sharding))
    start, pieces = 0, []
    for chunk in chunks:
        at = np.s_[:, start : start + chunk]
        out, cache = jax.block_until_ready(step(q[at], k[at], v[at], cache))
        pieces.append(np.asarray(out))
        start += chunk
    want = jax.jit(functools.partial(blockwise_attention, mask=mask))(*(x[:, :start] for x in (q, k, v)))
    assert_close("out", np.concatenate(pieces, axis=1), want, "float32")
    return cache, (k[:, :start], v[:, :start])


@pytest.mark.parametrize(
    ("mesh_shape", "mask"),
    [
        pytest.param({"context_inner": 8}, CAUSAL, marks=pytest.mark.slow),
        ({"data": 2, "context_outer": 2, "tensor": 2}, masks.causal()),
        pytest.param({"data": 4, "tensor": 2}, CAUSAL, marks=pytest.mark.slow),
        pytest.param({"context_inner": 2, "tensor": 4}, masks.sliding_window(left=6), marks=pytest.mark.slow),
        ({"context_inner": 2, "tensor": 2}, masks.causal() & masks.per_head(masks.sliding_window(2), masks.full())),
    ],
    ids=["context", "all", "whole_sequences", "whole_kv_heads", "whole_heads"],
)
def test_a_cache_is_filled_in_turn(mesh_shape, mask):
    """By chunks longer and shorter than the number of devices: the slots then hold every token once, evenly dealt."""
    with jax.set_mesh(mesh_of(**mesh_shape)):
        cache, (k, v) = decode_steps((11, 3, 3), mask=mask)
    degree = mesh_shape.get("context_inner", 1) * mesh_shape.get("context_outer", 1)
    rows = 2 // mesh_shape.get("data", 1) if 2 % mesh_shape.get("data", 1) == 0 else 2
    heads = 1 if mesh_shape.get("tensor") == 2 and mask.head_groups == 1 else 2
    assert {s.data.shape for s in cache.k.addressable_shards} == {(rows, SLOTS // degree, heads, 8)}
    positions = np.asarray(cache.positions)
    held = positions.reshape(degree, -1)
    np.testing.assert_array_equal(np.sort(positions[positions >= 0]), np.arange(17))
    assert np.ptp((held >= 0).sum(axis=1)) <= 1
    np.testing.assert_array_equal(np.asarray(cache.k)[:, np.argsort(positions)[-17:]], k)
    np.testing.assert_array_equal(np.asarray(cache.v)[:, np.argsort(positions)[-17:]], v)


def test_axes_of_another_mesh():
    auto = (jax.sharding.AxisType.Auto,)
    with jax.set_mesh(jax.make_mesh((4,), ("sp",), axis_types=auto, devices=jax.devices()[:4])):
        cache, _ = decode_steps((5,), sharding=AttentionSharding(sequence=("sp",)))
    assert cache.k.addressable_shards[0].data.shape == (2, SLOTS // 4, 2, 8)


def test_a_full_cache():
    """Room is rounded up to a multiple of the devices; the last token that finds a slot is the last that is right."""
    with jax.set_mesh(mesh_of(context_inner=4)):
        cache = empty_cache(batch_size=1, max_length=5, num_kv_heads=1, head_dim=8, dtype="float32", mask=CAUSAL)
        assert cache.room == 8 and cache.k.shape[1] == 8
        q, k, v = inputs(8, num_heads=1, num_kv_heads=1, slots=8, batch_size=1)
        step = jax.jit(functools.partial(sharded_decode, mask=CAUSAL))
        for start in (0, 3, 6):  # the third chunk does not fit
            _, cache = jax.block_until_ready(step(*(x[:, start % 6 : start % 6 + 3] for x in (q, k, v)), cache))
        assert cache.length == 9 > cache.room
        np.testing.assert_array_equal(np.sort(cache.positions), np.arange(8))
        with pytest.raises(ValueError, match="decode: T=9 tokens do not fit a cache of 8; raise max_length in init_ca"):
            sharded_decode(*(jnp.concatenate([x, x[:, :1]], axis=1) for x in (q, k, v)), cache, mask=CAUSAL)


def test_a_cache_of_another_mesh_is_refused():
    q, k, v = inputs(1, slots=1)
    cache = empty_cache(batch_size=2, max_length=6, num_kv_heads=2, head_dim=8, dtype="float32", mask=CAUSAL)
    with (
        jax.set_mesh(mesh_of(context_inner=4)),
        pytest.raises(ValueError, match="a cache of 6 slots does not split over the 4 devices of mesh axes .*; make"),
    ):
        sharded_decode(q, k, v, cache, mask=CAUSAL)


@pytest.mark.parametrize("num_filled", [(0, 0, 0), (3, 3, 1), (4, 4, 4), (2, 0, 0)])
def test_room_is_where_the_first_token_finds_no_slot(num_filled):
    held, free = sum(num_filled), [5 - n for n in num_filled]
    position = held
    while free[position % 3]:
        free[position % 3] -= 1
        position += 1
    assert room_of(np.array(num_filled), 5) == position


@pytest.mark.parametrize(
    "mesh_shape",
    [{"context_inner": 2, "data": 2, "tensor": 2}, pytest.param({"context_inner": 4}, marks=pytest.mark.slow)],
    ids=str,
)
@pytest.mark.parametrize("with_sinks", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_gradients_equal_one_device(mesh_shape, with_sinks):
    """Of queries, of new keys and values, of a cache that holds 13 tokens, and of sinks."""
    q, new_k, new_v = inputs(3, slots=3)
    _, k, v = inputs(1)
    dout = jax.random.normal(jax.random.key(7), q.shape)
    sinks = jax.random.normal(jax.random.key(8), (q.shape[2],))

    def run(cache_k, cache_v, positions):
        def attend(q, new_k, new_v, cache_k, cache_v, sinks):
            cache = KVCache(cache_k, cache_v, positions, length=jnp.asarray(13, jnp.int32), room=jnp.asarray(SLOTS))
            return sharded_decode(q, new_k, new_v, cache, mask=CAUSAL, sinks=sinks if with_sinks else None)[0]

        def with_gradients(*arrays):
            out, vjp = jax.vjp(attend, *arrays)
            return out, *vjp(dout)

        return jax.block_until_ready(jax.jit(with_gradients)(q, new_k, new_v, cache_k, cache_v, sinks))

    degree = mesh_shape["context_inner"]
    place = np.arange(SLOTS)
    dealt = (place % (SLOTS // degree)) * degree + place // (SLOTS // degree)

    def held(positions):
        return jnp.asarray(np.where(positions < 13, positions, -1).astype(np.int32))

    want = run(k, v, held(place))
    with jax.set_mesh(mesh_of(**mesh_shape)):
        got = run(k[:, dealt], v[:, dealt], held(dealt))
    for name, x, y in zip(("out", "dq", "dk_new", "dv_new", "dk", "dv", "dsinks"), got, want, strict=True):
        x = np.asarray(x)[:, np.argsort(dealt)] if name in ("dk", "dv") else x
        assert_close(name, x, y, "float32")


KINDS = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"


def collectives(program: str) -> list[tuple[str, int]]:
    """Kind and bytes of the result of every collective in a compiled program."""
    found = []
    for match in re.finditer(rf"= (\w+)\[([\d,]*)\][^ ]* ({KINDS})(?:-start)?\(", program):
        dtype, shape, kind = match.groups()
        size = {"f32": 4, "bf16": 2, "s32": 4}[dtype]
        found.append((kind, size * int(np.prod([int(n) for n in shape.split(",") if n]))))
    assert len(found) == len(re.findall(rf" (?:{KINDS})(?:-start)?\(", program)), "a collective of several arrays"
    return found


def sent(kind: str, num_bytes: int, size: int) -> int:
    """What a device sends of a collective with such a result, were every byte sent once."""
    return {"all-gather": 1, "all-reduce": 2}[kind] * num_bytes * (size - 1) // size


def lowered_decode(degree, q_len, slots, *, dtype="float32"):
    mesh = mesh_of(context_inner=degree)
    kv, everywhere = (jax.NamedSharding(mesh, spec) for spec in (KV_SPEC, jax.P()))

    def struct(*shape, dtype=dtype, sharding=everywhere):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    cache = KVCache(
        k=struct(2, slots, 2, 8, sharding=kv),
        v=struct(2, slots, 2, 8, sharding=kv),
        positions=struct(slots, dtype=jnp.int32, sharding=jax.NamedSharding(mesh, jax.P(CONTEXT))),
        length=struct(dtype=jnp.int32),
        room=struct(dtype=jnp.int32),
    )
    new = struct(2, q_len, 2, 8)
    with jax.set_mesh(mesh):
        step = jax.jit(functools.partial(sharded_decode, mask=CAUSAL), donate_argnums=3)
        return step.lower(struct(2, q_len, 4, 8), new, new, cache)


@pytest.mark.parametrize(("degree", "q_len"), [pytest.param(2, 1, marks=pytest.mark.slow), (8, 5)])
def test_a_step_sends_what_is_stated_whatever_the_cache_holds(degree, q_len, merge):
    """And the cache is updated in place: the program aliases it, and gathers nothing of its size."""
    stated = tree_transfers(batch_size=2, q_len=q_len, num_heads=4, key_dim=8, value_dim=8, size=degree)
    forward = sorted((t.kind, t.num_bytes) for t in stated if t.phase == "forward" for _ in range(t.count))
    for slots in (64, 4096):
        program = lowered_decode(degree, q_len, slots).compile().as_text()
        assert sorted((kind, sent(kind, n, degree)) for kind, n in collectives(program)) == forward
        assert len(re.findall(r"may-alias|must-alias", program.splitlines()[0])) == 5
        assert not re.search(rf"\[2,{slots},", program), "an array that holds the whole cache"
    assert [kind for kind, _ in forward] == (["all-gather"] if merge == "gathered" else ["all-reduce"] * 2)


def test_few_partial_results_are_gathered_and_many_reduced():
    shape = dict(batch_size=1, num_heads=32, key_dim=128, value_dim=128, size=8)
    assert [t.kind for t in tree_transfers(q_len=1, **shape)] == ["all-gather", "all-reduce"]
    assert [t.kind for t in tree_transfers(q_len=64, **shape)] == ["all-reduce"] * 3
    assert tree_transfers(q_len=1, **(shape | {"size": 1})) == ()


def test_a_backward_pass_sends_what_is_stated():
    degree, q_len = 4, 3
    lowered = jax.jit(
        jax.shard_map(
            functools.partial(tree_module.tree_backward, mask=CAUSAL, axes=CONTEXT),
            mesh=mesh_of(context_inner=degree),
            in_specs=(
                *(jax.P(), KV_SPEC, KV_SPEC, jax.P(), jax.P(), jax.P(), jax.P()),
                Tokens(q_positions=jax.P(), q_segment_ids=jax.P(), kv_positions=KV_SPEC, kv_segment_ids=KV_SPEC),
            ),
            out_specs=(jax.P(), KV_SPEC, KV_SPEC),
            check_vma=False,
        )
    ).lower(
        *inputs(q_len),
        jnp.zeros((2, q_len, 4, 8)),
        jnp.zeros((2, 4, q_len)),
        jnp.zeros((2, q_len, 4, 8)),
        jnp.zeros((2, 4, q_len)),
        tokens_of((48, 21), q_len, degree=degree),
    )
    stated = tree_transfers(batch_size=2, q_len=q_len, num_heads=4, key_dim=8, value_dim=8, size=degree)
    backward = [(t.kind, t.num_bytes) for t in stated if t.phase == "backward"]
    assert [(kind, sent(kind, n, degree)) for kind, n in collectives(lowered.compile().as_text())] == backward
