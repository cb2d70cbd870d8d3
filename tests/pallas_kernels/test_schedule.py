"""Schedules against the dense mask: nothing is missed, nothing is called full that is not, and little is wasted."""

import importlib.util
from concurrent.futures import ThreadPoolExecutor

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from pallas_kernels import BlockSizes, Tokens, make_schedule, schedule
from pallas_kernels.mask import Causal, Full, Mask, PerHead, Prefix, SameDocument, Window
from pallas_kernels.mask_grids import Neighborhood
from pallas_kernels.mask_patterns import Chunked, GlobalQueries, Predicate, Strided, Summary, Table
from pallas_kernels.testing import packed_tokens


def scattered(rows: int, columns: int, density: float = 0.3) -> np.ndarray:
    """A table of blocks at random."""
    return np.random.default_rng(0).random((rows, columns)) < density


def far(q_positions, kv_positions, q_segment_ids, kv_segment_ids):
    return abs(q_positions - kv_positions) > 9


def far_tile(q, kv):
    left, right = kv.position_min - q.position_max, kv.position_max - q.position_min
    return (left < -9) | (right > 9), (left > 9) | (right < -9)


sparse_masks = st.one_of(
    st.builds(GlobalQueries, length=st.integers(0, 40)),
    st.builds(Strided, stride=st.integers(1, 6), block=st.integers(1, 8)),
    st.builds(Summary, period=st.integers(5, 20), num=st.integers(1, 5)),
    st.builds(Chunked, size=st.integers(1, 30)),
    st.sampled_from(
        [
            Neighborhood((5, 10), (1, 2)),
            Neighborhood((4, 7), (0, 1), shift_at_edges=False),
            Neighborhood((2, 4, 6), (1, 1, 1), (1, 2, 2)),
            Table(scattered(7, 9), block_q=7, block_kv=6),
            Table(scattered(40, 40)),
            Predicate(far),
            Predicate(far, far_tile),
            PerHead((Window(left=9, right=0), Strided(3, block=4), Prefix(5))),
        ]
    ),
)
masks = st.recursive(
    st.one_of(
        sparse_masks,
        st.just(Full()),
        st.just(SameDocument()),
        st.builds(Causal, offset=st.integers(-20, 20)),
        st.builds(Window, left=st.none() | st.integers(0, 30), right=st.none() | st.integers(0, 30)),
        st.builds(Prefix, length=st.integers(0, 40)),
    ),
    lambda m: st.one_of(
        st.builds(lambda a, b: a & b, m, m), st.builds(lambda a, b: a | b, m, m), st.builds(lambda a: ~a, m)
    ),
    max_leaves=3,
)


@st.composite
def calls(draw):
    q_len = draw(st.integers(1, 50))
    kv_len = draw(st.integers(1, 50))
    tokens = None
    if draw(st.booleans()):
        rng = np.random.default_rng(draw(st.integers(0, 100)))
        q_positions, kv_positions = (rng.permutation(n)[None].astype(np.int32) for n in (q_len, kv_len))
        q_segments, kv_segments = (rng.integers(-1, 3, (2, n)).astype(np.int32) for n in (q_len, kv_len))
        if draw(st.booleans()):
            q_segments, kv_segments = np.sort(q_segments), np.sort(kv_segments)
        tokens = Tokens(
            q_positions=q_positions, kv_positions=kv_positions, q_segment_ids=q_segments, kv_segment_ids=kv_segments
        )
    sizes = BlockSizes(block_q=draw(st.integers(1, 20)), block_kv=draw(st.integers(1, 20)))
    return draw(masks), tokens, q_len, kv_len, sizes


def blocks_of(dense: np.ndarray, rows: int, columns: int, reduction) -> np.ndarray:
    """Reduces a `[B, T, S]` mask over its tiles, ragged ones included."""
    tiles = [
        [
            reduction(dense[:, i : i + rows, j : j + columns], axis=(1, 2))
            for j in range(0, dense.shape[2], columns)
        ]
        for i in range(0, dense.shape[1], rows)
    ]  # fmt: skip
    return np.moveaxis(np.array(tiles), 2, 0)


def inside(ranges: schedule.BlockRanges, num_columns: int, *, full: bool) -> np.ndarray:
    start, stop = (ranges.full_start, ranges.full_stop) if full else (ranges.start, ranges.stop)
    column = np.arange(num_columns)
    within = (np.asarray(start)[..., None] <= column) & (column < np.asarray(stop)[..., None])
    assert within.sum(axis=-2).max() <= 1, "a block is in two ranges"
    within = within.any(axis=-2)  # `[B or 1, rows, lists, columns]`
    return within.all(axis=2) if full else within.any(axis=2)


def assert_longest_first(ranges: schedule.BlockRanges):
    """`order` holds every row once, by the blocks it visits, most first and ties in ascending order."""
    num_visits = np.asarray(ranges.stop - ranges.start).sum(axis=-1)
    assert ranges.order.dtype == np.int32
    wanted = [[sorted(range(len(row)), key=lambda i: -row[i]) for row in lists.T] for lists in num_visits]
    np.testing.assert_array_equal(np.asarray(ranges.order).swapaxes(1, 2), wanted)


@hypothesis.given(calls())
@hypothesis.settings(deadline=None, max_examples=8)
def test_schedule_covers_the_dense_mask(call):
    mask, tokens, q_len, kv_len, sizes = call
    # Compiled as one program: op by op, each of them would be compiled for this example's shapes.
    make = jax.jit(make_schedule, static_argnames=("mask", "q_len", "kv_len", "block_sizes"))
    built = make(mask, tokens, q_len=q_len, kv_len=kv_len, block_sizes=sizes)
    heads = np.asarray(mask.dense(tokens, q_len, kv_len, num_heads=mask.head_groups))
    block_q, block_kv = built.block_sizes.block_q, built.block_sizes.block_kv
    some = blocks_of(heads.any(axis=1), block_q, block_kv, np.any)
    every = blocks_of(heads.all(axis=1), block_q, block_kv, np.all)
    for ranges, transpose in ((built.kv_blocks, False), (built.q_blocks, True)):
        want_some, want_every = (x.swapaxes(1, 2) if transpose else x for x in (some, every))
        visited = inside(ranges, want_some.shape[2], full=False)
        full = inside(ranges, want_some.shape[2], full=True)
        assert (visited | ~want_some).all(), "a block that holds an allowed pair is not visited"
        assert (want_every | ~full).all(), "a block is called full that is not"
        assert (visited | ~full).all(), "a full block is not visited"
        assert_longest_first(ranges)


LENGTH, BLOCK = 96, 8


def assert_exact(mask: Mask, tokens: Tokens | None = None, *, full: bool):
    """No empty block is visited, in either direction, and if `full` no full block is tested."""
    sizes = BlockSizes(block_q=BLOCK, block_kv=BLOCK)
    built = make_schedule(mask, tokens, q_len=LENGTH, kv_len=LENGTH, block_sizes=sizes)
    dense = np.asarray(mask.dense(tokens, LENGTH, LENGTH, num_heads=mask.head_groups))
    some = blocks_of(dense.any(axis=1), BLOCK, BLOCK, np.any)
    every = blocks_of(dense.all(axis=1), BLOCK, BLOCK, np.all)
    np.testing.assert_array_equal(inside(built.kv_blocks, some.shape[2], full=False), some)
    np.testing.assert_array_equal(inside(built.q_blocks, some.shape[1], full=False), some.swapaxes(1, 2))
    if full:
        np.testing.assert_array_equal(inside(built.kv_blocks, some.shape[2], full=True), every)
        np.testing.assert_array_equal(inside(built.q_blocks, some.shape[1], full=True), every.swapaxes(1, 2))
    return built


@pytest.mark.parametrize(
    ("mask", "documents"),
    [
        (Causal(), None),
        (Full(), None),
        (Causal() & Window(left=20), None),
        (Window(left=10, right=30), None),
        (Causal() | Prefix(30), None),
        (SameDocument(), ((40, 8, 48),)),
        (Causal() & SameDocument(), ((40, 8, 48),)),
        (Causal() & SameDocument(), ((27, 1, 41, 9), (3, 88), (96,), (5, 5, 5, 30))),
        (Causal() & Window(left=11) & SameDocument(), ((27, 1, 41, 9), (3, 88), (96,), (5, 5, 5, 30))),
        (SameDocument() & Window(left=20, right=9), ((50, 30), (7, 70))),
    ],
    ids=str,
)
def test_interval_masks_are_exact(mask: Mask, documents):
    """Causal, window, prefix and document masks, packed and padded, visit no empty block and test no full one."""
    assert_exact(mask, packed_tokens(documents, LENGTH) if documents else None, full=True)


@pytest.mark.parametrize(
    ("mask", "num_ranges"),
    [
        (Causal() & (Prefix(4) | Window(left=15)), 2),
        (GlobalQueries(8) | Prefix(8) | Window(left=9, right=9), 3),
        (Causal() & Chunked(24), 1),
        (Causal() & (Chunked(32) | Summary(32, num=8)), 4),
        (Causal() & Strided(4, block=BLOCK), 3),
        (Strided(3), 1),
        (Causal() & Strided(3) & Window(left=30), 1),
        (Neighborhood((4, 24), (1, 2)), 4),
        (Neighborhood((3, 4, 8), (0, 1, 1)), 1),
        (Neighborhood((12, 8), (1, 1)), 1),
        (Table(scattered(12, 12), BLOCK, BLOCK), 5),
        (PerHead((Window(left=9, right=0), Prefix(5))), 1),
        (PerHead((Window(left=9, right=0), Window(left=9, right=0) | Prefix(5))), 2),
        (~Window(left=20, right=20), 2),
    ],
    ids=str,
)
def test_sparse_masks_visit_no_empty_block(mask: Mask, num_ranges: int):
    """The mask says how many ranges its rows need, and the schedule has no more."""
    built = assert_exact(mask, full=False)
    assert built.kv_blocks.start.shape[3] == num_ranges


def test_full_blocks_are_the_longest_run_of_each_range():
    sizes = BlockSizes(block_q=BLOCK, block_kv=BLOCK)
    ranges = make_schedule(
        Prefix(20) | Window(left=30, right=0), q_len=LENGTH, kv_len=LENGTH, block_sizes=sizes
    ).kv_blocks
    last_row = {
        name: np.asarray(getattr(ranges, name))[0, -1, 0].tolist()
        for name in ("start", "stop", "full_start", "full_stop")
    }
    assert last_row == {"start": [0, 7], "stop": [3, 12], "full_start": [0, 9], "full_stop": [2, 11]}


def test_rows_are_dealt_out_longest_first():
    sizes = BlockSizes(block_q=BLOCK, block_kv=BLOCK)
    tokens = packed_tokens(((40, 56), (96,)), LENGTH)
    built = make_schedule(Causal() & SameDocument(), tokens, q_len=LENGTH, kv_len=LENGTH, block_sizes=sizes)
    # Blocks 0 to 4 hold one document, in which block i sees i + 1 blocks, and 5 to 11 the next.
    assert built.kv_blocks.order[..., 0].tolist() == [[11, 10, 4, 9, 3, 8, 2, 7, 1, 6, 0, 5], list(range(12))[::-1]]
    assert built.q_blocks.order[..., 0].tolist() == [[5, 6, 0, 7, 1, 8, 2, 9, 3, 10, 4, 11], list(range(12))]


def test_ranges_left_over_become_one(monkeypatch):
    """Rows that need more ranges than there is room for are visited in full from the last range on."""
    monkeypatch.setattr(schedule, "_MAX_RANGES_OF_ALL_ROWS", 2 * (LENGTH // BLOCK))
    sizes = BlockSizes(block_q=BLOCK, block_kv=BLOCK)
    built = make_schedule(Strided(3, block=BLOCK), q_len=LENGTH, kv_len=LENGTH, block_sizes=sizes)
    visited = inside(built.kv_blocks, LENGTH // BLOCK, full=False)[0]
    assert ["".join("1" if x else "." for x in row) for row in visited[:3]] == [
        "1..1111111..",
        ".1..1111111.",
        "..1..1111111",
    ]


def test_groups_of_rows_equal_all_at_once(monkeypatch):
    def build():
        built = make_schedule(Causal(), q_len=500, kv_len=300, block_sizes=BlockSizes(block_q=8, block_kv=16))
        return built.kv_blocks, built.q_blocks

    whole = build()
    monkeypatch.setattr(schedule, "_MAX_TILES_AT_ONCE", 100)
    jax.tree.map(np.testing.assert_array_equal, build(), whole)


@pytest.mark.parametrize(
    "mask",
    [
        Causal() & Window(left=4095),
        Causal() & (Prefix(4) | Window(left=4095)) & Chunked(65536),
        Neighborhood((64, 128, 128), (3, 3, 3)),
        Table(np.eye(512, dtype=bool), block_q=2048, block_kv=2048),
    ],
    ids=["window", "sinks", "neighborhood", "table"],
)
def test_a_million_tokens_take_little_memory(mask):
    def build():
        built = make_schedule(
            mask,
            Tokens.self_attention(None, jnp.zeros((1, 1 << 20), "int32")),
            q_len=1 << 20,
            kv_len=1 << 20,
            block_sizes=BlockSizes(block_q=128, block_kv=128),
        )
        return built.kv_blocks, built.q_blocks

    memory = jax.jit(build).lower().compile().memory_analysis()
    assert memory.temp_size_in_bytes < 64e6


def test_wrong_lengths_are_refused():
    with pytest.raises(ValueError, match="make_schedule: kv_len=0, wanted at least one token"):
        make_schedule(Causal(), q_len=4, kv_len=0)


def walked(walk: schedule.Walk, num_columns: int) -> np.ndarray:
    """Which blocks a walk visits, `[blocks of queries, blocks of keys]`."""
    column = np.arange(num_columns)
    within = (np.asarray(walk.start)[..., None] <= column) & (column < np.asarray(walk.stop)[..., None])
    assert within.sum(axis=1).max() <= 1, "a block is visited twice"
    return within.any(axis=1)


@pytest.mark.slow
@hypothesis.given(calls(), st.integers(1, 5), st.integers(1, 5))
@hypothesis.settings(deadline=None, max_examples=8)
def test_a_merged_walk_covers_the_schedule(call, merge_q, merge_kv):
    mask, tokens, q_len, kv_len, sizes = call
    make = jax.jit(make_schedule, static_argnames=("mask", "q_len", "kv_len", "block_sizes"))
    built = make(mask, tokens, q_len=q_len, kv_len=kv_len, block_sizes=sizes)
    walk = jax.jit(lambda x: schedule.merged_walk(x, merge_q=merge_q, merge_kv=merge_kv)[1:])(built)
    visited = inside(built.kv_blocks, built.q_blocks.num_rows, full=False)
    want = blocks_of(visited, merge_q, merge_kv, np.any).any(axis=0)
    got = walked(schedule.Walk(sizes, *walk), want.shape[1])
    assert got.shape == want.shape
    assert (got | ~want).all(), "a block that the schedule visits is left out"
    assert (np.diff(walk[0], axis=1) >= 0).all(), "ranges are out of order"
    assert walk[0].shape[1] <= want.shape[1]


@pytest.mark.parametrize(
    ("mask", "documents"),
    [
        pytest.param(Causal(), None, marks=pytest.mark.slow),
        pytest.param(Full(), None, marks=pytest.mark.slow),
        (Causal() & Window(left=20), None),
        pytest.param(Causal() & (Prefix(4) | Window(left=15)), None, marks=pytest.mark.slow),
        (Causal() & SameDocument(), ((27, 1, 31, 9),)),
    ],
    ids=str,
)
def test_a_merged_walk_visits_what_a_schedule_of_large_blocks_does(mask: Mask, documents):
    tokens = packed_tokens(documents, 90) if documents else None
    small, large = (
        make_schedule(mask, tokens, q_len=90, kv_len=90, block_sizes=BlockSizes(block_q=q, block_kv=kv))
        for q, kv in ((4, 8), (12, 16))
    )
    walk = schedule.merged_walk(small, merge_q=3, merge_kv=2)
    assert walk.block_sizes == large.block_sizes
    num_columns = large.q_blocks.num_rows
    np.testing.assert_array_equal(walked(walk, num_columns), inside(large.kv_blocks, num_columns, full=False)[0])


def test_a_merged_walk_of_short_sequences_has_one_block():
    built = make_schedule(Causal(), q_len=20, kv_len=3, block_sizes=BlockSizes(block_q=8, block_kv=4))
    walk = schedule.merged_walk(built, merge_q=4, merge_kv=8)
    assert walk.block_sizes == BlockSizes(block_q=20, block_kv=3)
    assert (walk.start.tolist(), walk.stop.tolist()) == ([[0]], [[1]])


STATIC_SIZES = BlockSizes(block_q=8, block_kv=16)


def static(mask=None, **lengths):
    """A static schedule that is built, not found."""
    schedule.static_schedule.cache_clear()
    return schedule.static_schedule(
        mask or Causal(), **{"q_len": 100, "kv_len": 90} | lengths, block_sizes=STATIC_SIZES
    )


def times_num_visits(x):
    ranges = static().kv_blocks
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(ranges)), "traced, not computed"
    return x * float((ranges.stop - ranges.start).sum())


def mesh_of_8() -> jax.sharding.Mesh:
    return jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))


def shard_mapped(f, **options):
    return jax.shard_map(f, in_specs=PartitionSpec("x"), out_specs=PartitionSpec("x"), **options)


def under_a_mesh(f):
    def run(x):
        with jax.set_mesh(mesh_of_8()):
            return f(x)

    return run


def under_strict_promotion(f):
    def run(x):
        with jax.numpy_dtype_promotion("strict"):
            return f(x)

    return run


@pytest.mark.parametrize(
    ("wrap", "shape"),
    [
        (lambda f: f, ()),
        (jax.jit, ()),
        (jax.grad, ()),
        (lambda f: jax.jit(jax.value_and_grad(f)), ()),
        (lambda f: jax.grad(jax.checkpoint(f)), ()),
        (jax.vmap, (8,)),
        (lambda f: lambda x: jax.lax.scan(lambda carry, y: (f(carry), y), jnp.float32(1), x), (8,)),
        (lambda f: shard_mapped(f, mesh=mesh_of_8()), (8,)),
        (lambda f: jax.jit(shard_mapped(f, mesh=mesh_of_8())), (8,)),
        (lambda f: under_a_mesh(jax.jit(f)), (8,)),
        (lambda f: under_a_mesh(jax.jit(shard_mapped(f))), (8,)),
        (lambda f: under_a_mesh(jax.jit(shard_mapped(jax.vmap(f)))), (8,)),
        (under_strict_promotion, ()),
    ],
    ids=[
        *("eager", "jit", "grad", "jit_grad", "checkpoint", "vmap", "scan", "eager_shard_map", "shard_map"),
        *("set_mesh", "set_mesh_shard_map", "set_mesh_shard_map_vmap", "strict_promotion"),
    ],
)
def test_a_static_schedule_is_computed_while_tracing(wrap, shape):
    wrap(times_num_visits)(jnp.ones(shape, jnp.float32))


def test_a_static_schedule_is_computed_under_an_abstract_mesh():
    with jax.sharding.use_abstract_mesh(AbstractMesh((16,), ("x",), axis_types=(AxisType.Auto,))):
        jax.jit(times_num_visits).trace(jax.ShapeDtypeStruct((16,), jnp.float32))


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_a_static_schedule_is_computed_for_devices_that_are_not_there():
    devices = topologies.get_topology_desc("v5e:2x4", platform="tpu").devices
    mesh = jax.sharding.Mesh(np.array(devices), ("x",), axis_types=(AxisType.Auto,))
    x = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("x")))
    with jax.set_mesh(mesh):
        jax.jit(shard_mapped(times_num_visits)).lower(x).compile()


def test_a_static_schedule_is_that_of_tokens_in_order():
    got, want = static(), make_schedule(Causal(), q_len=100, kv_len=90, block_sizes=STATIC_SIZES)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert static(q_len=3).block_sizes == BlockSizes(block_q=3, block_kv=16)
    with pytest.raises(ValueError, match="read-only"):
        got.kv_blocks.start[:] = 0


def test_a_static_schedule_is_built_once():
    assert static() is schedule.static_schedule(Causal(), q_len=100, kv_len=90, block_sizes=STATIC_SIZES)


@pytest.mark.slow
def test_static_schedules_are_built_side_by_side():
    schedule.static_schedule.cache_clear()
    lengths = [40, 50, 60] * 3
    with ThreadPoolExecutor(max_workers=9) as threads:
        built = list(threads.map(lambda n: schedule.static_schedule(Causal(), n, n, STATIC_SIZES), lengths))
    assert [x.q_len for x in built] == lengths
    for x, n in zip(built, lengths, strict=True):
        want = make_schedule(Causal(), q_len=n, kv_len=n, block_sizes=STATIC_SIZES)
        jax.tree.map(np.testing.assert_array_equal, x, want)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_errors_of_a_static_schedule_reach_the_caller(wrap):
    for _ in range(2):  # nor is a failure kept
        with pytest.raises(ValueError, match="make_schedule: kv_len=0, wanted at least one token"):
            wrap(lambda: static(kv_len=0).kv_blocks.stop)()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"tokens": Tokens(q_positions=jnp.zeros((1, 8), jnp.int32))},
            r"tokens.q_positions has shape \(1, 8\), wanted \(1, 16\)",
        ),
        ({"tokens": Tokens(kv_segment_ids=jnp.zeros((2, 16)))}, "tokens.kv_segment_ids is float32, wanted int32"),
        ({"tokens": {}}, "tokens={}, wanted None or a Tokens"),
        ({"mask": None}, "mask=None, wanted a Mask"),
        ({"block_sizes": (4, 4)}, r"block_sizes=\(4, 4\), wanted None or a BlockSizes"),
    ],
)
def test_what_no_schedule_can_be_made_of(changed, message):
    call = {"mask": Causal(), "tokens": None, "block_sizes": STATIC_SIZES} | changed
    with pytest.raises(ValueError, match=f"make_schedule: {message}"):
        make_schedule(call.pop("mask"), call.pop("tokens"), q_len=16, kv_len=16, **call)
