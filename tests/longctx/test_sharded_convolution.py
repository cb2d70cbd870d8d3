"""Short convolutions over a split sequence equal the sum written out, forward and every gradient, and send halos."""

import collections
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx import AttentionSharding, MeshConfig, make_mesh
from longctx.context_parallel import (
    ConvolutionShape,
    Layout,
    PrefillPlan,
    continued_convolution,
    convolution,
    convolution_of_context,
    empty_recent,
    sharded_short_convolution,
)
from longctx.context_parallel.chain import Chain
from longctx.context_parallel.layout import permute, unpermute
from pallas_kernels.testing import assert_close

LENGTH, ROWS, WIDTH = 64, 2, 4
HEADS = ((2, 3), (4, 5))  # of each array: heads, dims
SHAPE = ConvolutionShape(width=WIDTH, heads=HEADS)
LAYOUTS = {name: Layout(name=name) for name in ("contiguous", "zigzag", "striped")}
# Runs are of 32 tokens down to 4: documents begin inside them, where two meet, and in each token of a halo.
DOCUMENTS = (((0, 7), (1, 1), (2, 1), (3, 7), (4, 1), (5, 15), (6, 17), (-1, 15)), ((0, 64),))


def segment_ids():
    return jnp.asarray(np.stack([np.repeat(*zip(*row, strict=True)) for row in DOCUMENTS]), jnp.int32)


def inputs(dtype="float32", length=LENGTH):
    random = np.random.default_rng(0)

    def some(*shape):
        return jnp.asarray(random.standard_normal(shape), dtype)

    return {
        "x": tuple(some(ROWS, length, *of) for of in HEADS),
        "kernel": tuple(some(WIDTH, *of).astype("float32") for of in HEADS),
        "dy": tuple(some(ROWS, length, *of) for of in HEADS),
    }


def written_out(xs, kernels, ids):
    """sum_s kernel[W - 1 - (t - s)] x[s] over the last W tokens s <= t of t's document."""
    index = jnp.arange(xs[0].shape[1])
    apart = index[:, None] - index[None, :]
    seen = jnp.broadcast_to((apart >= 0) & (apart < WIDTH), (ROWS, *apart.shape))
    if ids is not None:
        ids = jnp.maximum(ids, -1)
        seen &= ids[:, :, None] == ids[:, None, :]

    def one(x, kernel):
        weights = jnp.where(seen[..., None, None], kernel[jnp.clip(WIDTH - 1 - apart, 0, WIDTH - 1)], 0.0)
        return jnp.einsum("btsnh,bsnh->btnh", weights, x.astype("float32"), precision="highest")

    return tuple(one(x, kernel) for x, kernel in zip(xs, kernels, strict=True))


def with_gradients(convolve, arrays, ids):
    """Every y and gradient by name, in float32."""
    ys, vjp = jax.vjp(lambda xs, kernels: convolve(xs, kernels, ids), arrays["x"], arrays["kernel"])
    results = {"y": ys} | dict(zip(("dx", "dkernel"), vjp(arrays["dy"]), strict=True))
    return {f"{name} of {i}": x for name, xs in results.items() for i, x in enumerate(xs)}


@functools.cache
def on_one_device(packed):
    """Of the sum written out."""
    run = jax.jit(functools.partial(with_gradients, written_out))
    return jax.device_get(run(inputs(), segment_ids() if packed else None))


def over_devices(mesh_shape, layout, *, packed=True, dtype="float32"):
    """The same over a mesh, in the order of the sequence."""
    degree = mesh_shape.get("context_outer", 1) * mesh_shape.get("context_inner", 1)
    order = LAYOUTS[layout].order(LENGTH, degree)
    arrays = inputs(dtype)
    arrays |= {name: tuple(permute(x, order) for x in arrays[name]) for name in ("x", "dy")}
    ids = permute(segment_ids(), order) if packed else None
    sharding = AttentionSharding(layout=LAYOUTS[layout])

    def convolve(xs, kernels, ids):
        return sharded_short_convolution(xs, kernels, segment_ids=ids, sharding=sharding)

    devices = jax.devices()[: int(np.prod(list(mesh_shape.values())))]
    with jax.set_mesh(make_mesh(MeshConfig(**mesh_shape), devices)):
        got = jax.block_until_ready(jax.jit(functools.partial(with_gradients, convolve))(arrays, ids))
    return {name: x if "kernel" in name else unpermute(x, order) for name, x in jax.device_get(got).items()}


QUICK = {("zigzag", 4, True), ("contiguous", 8, True)}


def every_case():
    for case in itertools.product(("contiguous", "zigzag"), (1, 2, 3, 4, 8), (True, False)):
        if LENGTH % LAYOUTS[case[0]].multiple(case[1]) == 0:
            yield pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)


@pytest.mark.parametrize(("layout", "degree", "packed"), list(every_case()))
def test_every_layout_and_degree(layout, degree, packed):
    got, want = over_devices({"context_inner": degree}, layout, packed=packed), on_one_device(packed)
    assert got.keys() == want.keys()
    for name, x in got.items():
        assert_close(name, x, want[name], "float32")


@pytest.mark.parametrize(
    "mesh_shape",
    [
        {"data": 2, "context_inner": 2, "tensor": 2},
        pytest.param({"context_outer": 2, "context_inner": 1, "tensor": 4}, marks=pytest.mark.slow),  # 2 heads over 4
        pytest.param({"data": 4, "context_inner": 2}, marks=pytest.mark.slow),  # rows that do not divide
    ],
)
def test_beside_other_axes_and_in_bfloat16(mesh_shape):
    """Kernels' gradients are summed over rows; heads that do not divide are computed by each device."""
    for name, x in over_devices(mesh_shape, "zigzag").items():
        assert_close(name, x, on_one_device(True)[name], "float32")
    for name, x in over_devices(mesh_shape, "zigzag", dtype="bfloat16").items():
        assert_close(name, x, on_one_device(True)[name], "bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize(("way", "told_by"), [("of_runs_before", "y of 0"), ("to_runs_before", "dx of 0")])
def test_a_wrong_chain_fails(way, told_by, monkeypatch):
    """The suite can fail: no halo is told by the result, one that does not go home by the gradient."""
    monkeypatch.setattr(Chain, way, lambda self, x: jnp.zeros_like(x))
    got, want = over_devices({"context_inner": 2}, "contiguous"), on_one_device(True)
    with pytest.raises(AssertionError, match=f"^{told_by}: rms error"):
        assert_close(told_by, got[told_by], want[told_by], "float32")


@pytest.mark.parametrize("degree", [pytest.param(1, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("length", [2, 13])  # shorter than what a token reads, and longer; runs of 1 token and of 2
def test_a_context_and_what_follows_it_equal_one_row(length, degree):
    arrays, total = inputs(), length + 3
    xs, kernels = tuple(x[:, :total] for x in arrays["x"]), arrays["kernel"]
    want = written_out(xs, kernels, None)
    plan = PrefillPlan(length=length, degree=degree)
    places = jnp.asarray(plan.places)
    with jax.set_mesh(make_mesh(MeshConfig(context_inner=degree, tensor=2), jax.devices()[: 2 * degree])):

        @jax.jit
        def run(xs, kernels):
            context = [jnp.where((places >= 0)[:, None, None], x[:, places], 7.0) for x in xs]
            ys, recent = convolution_of_context(context, kernels, plan=plan)
            first, recent = continued_convolution([x[:, length : length + 2] for x in xs], kernels, recent)
            second, recent = continued_convolution([x[:, length + 2 :] for x in xs], kernels, recent)
            return ys, first, second, recent

        ys, first, second, recent = jax.block_until_ready(run(xs, kernels))
        empty = empty_recent(SHAPE, batch_size=ROWS, dtype="bfloat16")
    for i, x in enumerate(want):
        np.testing.assert_allclose(ys[i][:, plan.places >= 0], x[:, plan.places[plan.places >= 0]], atol=1e-5)
        np.testing.assert_allclose(jnp.concatenate([first[i], second[i]], axis=1), x[:, length:], atol=1e-5)
        np.testing.assert_array_equal(recent[i], xs[i][:, total - WIDTH + 1 :])
        assert empty[i].shape == recent[i].shape and empty[i].dtype == jnp.bfloat16 and not empty[i].any()


def sent(layout, degree, *, packed, dtype="bfloat16", width=WIDTH):
    """Numbers of the program's collectives by kind and bytes, forward and backward, before it is compiled."""
    sharding = AttentionSharding(layout=LAYOUTS[layout])
    mesh = make_mesh(MeshConfig(context_inner=degree), jax.devices()[:degree])

    def step(arrays, ids):
        def convolve(xs, kernels, ids):
            return sharded_short_convolution(xs, kernels, segment_ids=ids, sharding=sharding)

        return with_gradients(convolve, arrays, ids)

    with jax.set_mesh(mesh):
        text = jax.jit(step).lower(inputs(dtype), segment_ids() if packed else None).as_text()
    found, sizes = collections.Counter(), {"f32": 4, "bf16": 2, "i32": 4}
    kinds = "collective_permute|all_reduce|all_gather|all_to_all"
    for kind, body in re.findall(rf"stablehlo\.({kinds})\"?\(.*?-> tensor<([\w]+)>", text, flags=re.DOTALL):
        *dims, element = body.split("x")
        found[kind.replace("_", "-"), sizes[element] * int(np.prod([int(n) for n in dims]))] += 1
    return found


@pytest.mark.parametrize(("layout", "degree", "packed"), [("contiguous", 4, True), ("zigzag", 8, False)])
def test_transfers_are_the_collectives_of_the_program(layout, degree, packed):
    stated = collections.Counter()
    sharding = AttentionSharding(layout=LAYOUTS[layout])
    for transfer in convolution.transfers(
        sharding, rows=ROWS, shape=SHAPE, degree=degree, heads_split=1, dtype="bfloat16", segment_ids=packed
    ):
        stated[transfer.kind, transfer.num_bytes] += transfer.count
    of_kernels = collections.Counter({("all-reduce", WIDTH * num * dim * 4): 1 for num, dim in HEADS})
    assert sent(layout, degree, packed=packed) == stated + of_kernels
    assert convolution.transfers(
        sharding, rows=1, shape=SHAPE, degree=1, heads_split=1, dtype="bfloat16", segment_ids=True
    ) == ()  # fmt: skip


def test_channels_of_heads_that_do_not_divide_are_whole():
    assert [SHAPE.channels(split) for split in (1, 2, 4)] == [26, 13, 6 + 5]


REFUSALS = [
    (
        ("zigzag", 4, 32),
        "a convolution of 4 tokens reads 3 before a device's own, got runs of 2 (32 tokens over 8 devices, "
        "layout=zigzag); make rows longer, or conv_size smaller",
    ),
    (
        ("striped", 4, 64),
        "a convolution needs devices that hold runs of neighbouring tokens, got layout=striped; choose "
        "layout=contiguous or zigzag",
    ),
    (
        ("zigzag", 4, 56),
        "a convolution over 8 devices takes a multiple of 16 tokens, got 56; pad the rows, or change the layout or the "
        "mesh",
    ),
]


@pytest.mark.parametrize(("split", "message"), REFUSALS)
def test_what_cannot_be_split_is_refused_in_a_sentence(split, message):
    layout, width, length = split
    sharding = AttentionSharding(layout=LAYOUTS[layout])
    assert convolution.refusal(sharding, width=width, seq_len=length, degree=8) == message
    assert convolution.refusal(sharding, width=width, seq_len=length, degree=1) is None
    arrays = inputs(length=length)
    with jax.set_mesh(make_mesh(MeshConfig(context_inner=8))):
        with pytest.raises(ValueError, match=re.escape(message)):
            sharded_short_convolution(arrays["x"], arrays["kernel"], sharding=sharding)
    assert convolution.refusal(AttentionSharding(), width=3, seq_len=32, degree=8) is None
