"""Linear attention over a split sequence equals one device, forward and every gradient, and sends states alone."""

import collections
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx import AttentionSharding, MeshConfig, cross_entropy, make_mesh
from longctx.context_parallel import Layout, sharded_linear_attention, state_passing
from longctx.context_parallel.chain import Chain
from longctx.context_parallel.layout import permute, unpermute
from longctx.testing import assert_context_parallel_equal
from pallas_kernels.linear import api, reference
from pallas_kernels.linear.api import linear_attention
from pallas_kernels.testing import assert_close, relative_errors

LENGTH, ROWS, HEADS, KEY_DIM, VALUE_DIM = 96, 4, 4, 8, 6
LAYOUTS = {name: Layout(name=name) for name in ("contiguous", "zigzag", "striped")}
DECAYS = {"none": None, "fixed": (HEADS,), "scalar": (ROWS, LENGTH, HEADS), "vector": (ROWS, LENGTH, HEADS, KEY_DIM)}
# (segment id, tokens). Runs are of 48 tokens down to 6, so documents begin inside them and exactly where two meet, a
# document is one token at such a place, or goes over many devices; padding fills devices, and stands at both ends.
DOCUMENTS = (
    ((0, 12), (1, 1), (2, 11), (3, 30), (4, 6), (5, 1), (6, 1), (7, 14), (-1, 20)),
    ((0, 96),),
    ((0, 5), (1, 43), (-1, 48)),
    ((-1, 7), (0, 40), (1, 1), (2, 41), (-1, 7)),
)
GIVEN = ("q", "k", "v", "decay", "beta", "initial_state")
DELTA = "delta_"  # before the name of a decay: with write strengths
NAMES = ("out", "state", *(f"d{name}" for name in GIVEN))


def segment_ids():
    rows = [np.repeat(*zip(*row, strict=True)) for row in DOCUMENTS]
    return jnp.asarray(np.stack(rows), jnp.int32)


def inputs(decay="scalar", *, num_key_heads=HEADS, dtype="float32", with_states=True):
    """The arrays that are differentiated in by name, and the cotangents of out and of the state."""
    shapes = {
        "q": (ROWS, LENGTH, num_key_heads, KEY_DIM),
        "k": (ROWS, LENGTH, num_key_heads, KEY_DIM),
        "v": (ROWS, LENGTH, HEADS, VALUE_DIM),
        "decay": DECAYS[decay.removeprefix(DELTA)],
        "initial_state": (ROWS, HEADS, KEY_DIM, VALUE_DIM) if with_states else None,
        "dout": (ROWS, LENGTH, HEADS, VALUE_DIM),
        "dstate": (ROWS, HEADS, KEY_DIM, VALUE_DIM) if with_states else None,
    }
    keys = jax.random.split(jax.random.key(0), len(shapes))
    arrays = {
        name: None if shape is None else jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    if arrays["decay"] is not None:
        arrays["decay"] = -0.2 * jnp.abs(arrays["decay"])
    arrays["beta"] = None
    if decay.startswith(DELTA):
        arrays["k"] /= jnp.linalg.norm(arrays["k"], axis=-1, keepdims=True)
        arrays["beta"] = jax.nn.sigmoid(jax.random.normal(jax.random.key(1), (ROWS, LENGTH, HEADS)))
    return {name: x.astype(dtype) if name in ("q", "k", "v", "dout") else x for name, x in arrays.items()}


def of_tokens(name, x):
    """Whether an array, or its gradient, has a dim of tokens."""
    return x is not None and name in ("q", "k", "v", "decay", "beta", "dout", "out") and x.ndim > 1


def with_gradients(attend, arrays, ids, **options):
    """out, the state after the row if there is one before it, and every gradient, by name."""
    given = {name: arrays[name] for name in GIVEN if arrays[name] is not None}
    has_states = arrays["initial_state"] is not None

    def call(given):
        return attend(**given, segment_ids=ids, return_state=has_states, **options)

    result, vjp = jax.vjp(call, given)
    (gradients,) = vjp((arrays["dout"], arrays["dstate"]) if has_states else arrays["dout"])
    named = dict(zip(("out", "state"), result, strict=True)) if has_states else {"out": result}
    return named | {f"d{name}": x for name, x in gradients.items()}


@functools.cache
def on_one_device(decay, packed, num_key_heads=HEADS, with_states=True):
    arrays = inputs(decay, num_key_heads=num_key_heads, with_states=with_states)
    run = jax.jit(functools.partial(with_gradients, linear_attention, implementation="reference"))
    return jax.device_get(run(arrays, segment_ids() if packed else None))


def outputs(attend, arrays, ids):
    """The same of the forward pass alone."""
    given = {name: arrays[name] for name in GIVEN}
    return dict(zip(("out", "state"), attend(**given, segment_ids=ids, return_state=True), strict=True))


def over_devices(arrays, ids, mesh_shape, layout, *, run=with_gradients, **options):
    """The same over a mesh, brought back into the order of the sequence."""
    degree = mesh_shape.get("context_outer", 1) * mesh_shape.get("context_inner", 1)
    order = LAYOUTS[layout].order(LENGTH, degree)
    arrays = {name: permute(x, order) if of_tokens(name, x) else x for name, x in arrays.items()}
    ids = None if ids is None else permute(ids, order)
    attend = functools.partial(sharded_linear_attention, sharding=AttentionSharding(layout=LAYOUTS[layout]), **options)
    mesh = make_mesh(MeshConfig(**mesh_shape), jax.devices()[: int(np.prod(list(mesh_shape.values())))])
    with jax.set_mesh(mesh):
        got = jax.device_get(jax.block_until_ready(jax.jit(functools.partial(run, attend))(arrays, ids)))
    return {name: unpermute(x, order) if of_tokens(name.removeprefix("d"), x) else x for name, x in got.items()}


def assert_equals_one_device(decay, packed, mesh_shape, layout, *, dtype="float32", shapes=None, **options):
    shapes = shapes or {}
    want = on_one_device(decay, packed, **shapes)
    got = over_devices(
        inputs(decay, dtype=dtype, **shapes), segment_ids() if packed else None, mesh_shape, layout, **options
    )
    assert got.keys() == want.keys()
    for name in sorted(got, key=NAMES.index):
        if name == "ddecay" and decay.endswith("fixed"):
            # The sum over all tokens of terms that cancel out: its error is that of the op on one device, 3e-6.
            assert max(relative_errors(name, got[name], want[name])) < 1e-5
            continue
        assert_close(name, got[name], want[name], dtype)
    if packed:
        padding = np.asarray(segment_ids()) < 0
        for name in ("out", "dq", "dk", "dv"):
            assert not got[name][padding].any(), f"{name} of padding"


def slowly(values) -> list:
    """What is not run in CI."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


QUICK = {  # what CI runs; the rest is slow
    ("scalar", True, "zigzag", 8),
    ("vector", True, "contiguous", 8),
    ("delta_scalar", True, "zigzag", 4),
}


def every_case():
    decays = *DECAYS, *(DELTA + decay for decay in DECAYS)
    for case in itertools.product(decays, (True, False), ("contiguous", "zigzag"), (2, 3, 4, 8)):
        names = (case[0], "packed" if case[1] else "whole_rows", *case[2:])
        yield pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow, id="-".join(map(str, names)))


@pytest.mark.parametrize(("decay", "packed", "layout", "degree"), list(every_case()))
def test_every_decay_layout_and_degree(decay, packed, layout, degree):
    assert_equals_one_device(decay, packed, {"context_inner": degree}, layout)


def test_the_quick_cases_are_there():
    assert {param.values for param in every_case()} >= QUICK


MESHES = {
    "beside_data_and_tensor": ({"data": 2, "context_inner": 2, "tensor": 2}, "fixed", "zigzag", 1),
    "two_context_axes": ({"context_outer": 2, "context_inner": 2, "fsdp": 2}, "scalar", "contiguous", 2),
    "eight": ({"context_outer": 4, "context_inner": 2}, "scalar", "zigzag", 2),
    "whole_sequences": ({"data": 2, "tensor": 4}, "fixed", "contiguous", 2),
    "whole_sequences_of_the_delta_rule": ({"data": 4, "tensor": 2}, "delta_scalar", "contiguous", 4),
    "the_delta_rule_beside_data_and_tensor": ({"data": 2, "context_inner": 2, "tensor": 2}, "delta_fixed", "zigzag", 1),
    "rows_that_do_not_divide": ({"data": 8}, "fixed", "contiguous", HEADS),
}


@pytest.mark.parametrize("name", slowly(MESHES))
def test_beside_other_axes_with_shared_heads(name):
    """Key heads that the devices of the heads do not divide are repeated; a decay of a head is summed over all rows."""
    mesh_shape, decay, layout, num_key_heads = MESHES[name]
    assert_equals_one_device(decay, True, mesh_shape, layout, shapes={"num_key_heads": num_key_heads})


@pytest.mark.parametrize("layout", slowly(["contiguous", "zigzag"]))
def test_as_it_is_trained_in_bfloat16_without_states(layout):
    shapes = {"with_states": False, "num_key_heads": 2}
    assert_equals_one_device("scalar", True, {"context_inner": 4}, layout, dtype="bfloat16", shapes=shapes)


@pytest.mark.parametrize("layout", slowly(["contiguous", "zigzag"]))
def test_normalized(layout):
    """The sums of the weights are a state of one column more, and go the same way."""
    arrays = inputs("scalar")
    arrays |= {name: jnp.abs(arrays[name]) for name in ("q", "k")}
    for name, sign in (("initial_state", jnp.abs), ("dstate", lambda x: x)):
        column = jax.random.normal(jax.random.key(len(name)), (*arrays[name].shape[:3], 1))
        arrays[name] = jnp.concatenate([arrays[name], sign(column)], axis=3)
    want = jax.jit(functools.partial(with_gradients, linear_attention, normalize=True))(arrays, segment_ids())
    got = over_devices(arrays, segment_ids(), {"context_inner": 4}, layout, normalize=True)
    for name, x in got.items():
        assert_close(name, x, want[name], "float32")


def test_no_mesh_is_the_op():
    arrays = inputs(with_states=False)
    call = {name: arrays[name] for name in ("q", "k", "v", "decay")}
    with jax.set_mesh(jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))):
        got = jax.make_jaxpr(lambda call: sharded_linear_attention(**call))(call)
    assert "shard_map" not in str(got)


@pytest.mark.slow
def test_maps_of_several_parts_of_a_run(monkeypatch):
    """An implementation that works on parts of a row at once gives their maps, in the order of the tokens."""

    def in_halves(make):
        def states(*arrays, decay, **options):
            cut = arrays[0].shape[1] // 2
            halves = [make(*(x[:, of] for x in arrays), decay=decay[:, of], **options) for of in np.s_[:cut, cut:]]
            return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *halves)

        return states

    monkeypatch.setitem(api.STATES, "reference", in_halves(reference.states))
    monkeypatch.setitem(api.STATE_COTANGENTS, "reference", in_halves(reference.state_cotangents))
    assert_equals_one_device("scalar", False, {"context_inner": 2}, "contiguous", implementation="reference")


MUTATIONS = {
    "nothing_is_sent": ("_from_before", lambda self, x, distance, upward: jnp.zeros_like(x)),
    "documents_go_on_where_runs_meet": ("reached", lambda self, ids: jnp.ones((len(ids), self.num_runs), bool)),
    "the_scan_is_inclusive": ("_before_each", lambda self, own, first, upward: own.apply(first)),
}


@pytest.mark.parametrize(
    "name", ["documents_go_on_where_runs_meet", *slowly(["nothing_is_sent", "the_scan_is_inclusive"])]
)
def test_a_wrong_chain_fails(name, monkeypatch):
    """The suite can fail: each of these is told apart by the output alone."""
    monkeypatch.setattr(Chain, *MUTATIONS[name])
    got = over_devices(inputs("fixed"), segment_ids(), {"context_inner": 4}, "contiguous", run=outputs)
    with pytest.raises(AssertionError, match="^out: rms error"):
        assert_close("out", got["out"], on_one_device("fixed", True)["out"], "float32")


AXES = AttentionSharding(sequence=("sp",), layout=LAYOUTS["zigzag"])


@pytest.mark.slow
def test_the_parity_kit_serves_it():
    rng = np.random.default_rng(0)
    shapes = {"table": (19, 16), **dict.fromkeys(("q", "k", "v"), (16, 16)), "decay": (2,)}
    params = {name: jnp.asarray(0.3 * rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}
    tokens, targets = (jnp.asarray(rng.integers(0, 19, (2, 32)), jnp.int32) for _ in range(2))
    batch = {"tokens": tokens, "targets": targets, "segment_ids": jnp.asarray(np.arange(32)[None] // [[9], [16]])}
    batch["segment_ids"] = batch["segment_ids"].astype(jnp.int32)

    def loss(params, batch):
        x = params["table"][batch["tokens"]]
        q, k, v = ((x @ params[name]).reshape(2, -1, 2, 8) for name in "qkv")
        decay = -jax.nn.softplus(params["decay"])
        out = sharded_linear_attention(q, k, v, decay=decay, segment_ids=batch["segment_ids"], sharding=AXES)
        logits = (x + out.reshape(x.shape)) @ params["table"].T
        return cross_entropy(logits, batch["targets"], jnp.ones((2, x.shape[1]))).loss_sum / 64

    errors = assert_context_parallel_equal(loss, params, batch, degrees=(1, 4), sharding=AXES)
    assert set(errors[4]) == {"loss", "gradient norm", *(f"gradient of {name}" for name in params)}


# What is sent.

SIZE_OF = {"f32": 4, "bf16": 2, "s32": 4, "i32": 4, "i1": 1, "pred": 1}


def lowered(
    layout, degree, *, length=LENGTH, decay="scalar", delta_rule=False, packed=True, is_learned=True, with_states=False,
    **options,
):  # fmt: skip
    """The forward and backward pass of one layer."""
    mesh = make_mesh(MeshConfig(context_inner=degree), jax.devices()[:degree])
    spec = jax.NamedSharding(mesh, jax.P(None, ("context_outer", "context_inner")))

    def struct(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=spec)

    q = struct("bfloat16", ROWS, length, 2, KEY_DIM)
    v = struct("bfloat16", ROWS, length, HEADS, VALUE_DIM)
    dims = {"fixed": (HEADS,), "scalar": (ROWS, length, HEADS), "vector": (ROWS, length, HEADS, KEY_DIM)}[decay]
    decay = jax.ShapeDtypeStruct(dims, "float32") if len(dims) == 1 else struct("float32", *dims)
    beta = struct("float32", ROWS, length, HEADS) if delta_rule else None
    ids = struct("int32", ROWS, length) if packed else None
    sharding = AttentionSharding(layout=LAYOUTS[layout])

    state = jax.ShapeDtypeStruct((ROWS, HEADS, KEY_DIM, VALUE_DIM), "float32") if with_states else None

    def step(q, k, v, dout, decay, beta, ids, state):
        def attend(q, k, v, state, learned):
            given = dict(
                decay=decay if learned is None else learned, beta=beta, segment_ids=ids, initial_state=state
            )  # fmt: skip
            return sharded_linear_attention(q, k, v, **given, return_state=with_states, sharding=sharding, **options)

        results, vjp = jax.vjp(attend, q, k, v, state, decay if is_learned else None)
        return results, vjp((dout, state) if with_states else dout)

    with jax.set_mesh(mesh):
        return jax.jit(step).lower(q, q, v, v, decay, beta, ids, state)


def stated(layout, degree, **options):
    counts = collections.Counter()
    sharding = AttentionSharding(layout=LAYOUTS[layout])
    sizes = dict(rows=ROWS, num_heads=HEADS, key_dim=KEY_DIM, value_dim=VALUE_DIM)
    for transfer in state_passing.transfers(sharding, **sizes, degree=degree, **options):
        counts[transfer.kind, transfer.num_bytes] += transfer.count
    return counts


STATE_BYTES = ROWS * HEADS * (KEY_DIM * VALUE_DIM + 1) * 4


def collectives(program):
    """Numbers of a compiled program's collectives by kind and bytes of the result."""
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
    found = collections.Counter()
    for result, kind in re.findall(rf"= (\S.*?) ({kinds})(?:-start)?\(", program):
        shapes = re.findall(r"(\w+)\[([\d,]*)\]", result)
        found[kind, sum(SIZE_OF[t] * int(np.prod([int(n) for n in dims.split(",") if n])) for t, dims in shapes)] += 1
    return found


def before_compiling(lowered):
    """Numbers of a program's collectives by kind and bytes of the result, with the dtypes that it was written in."""
    program, found = lowered.as_text(), collections.Counter()
    kinds = "collective_permute|all_gather|all_to_all|reduce_scatter|all_reduce|collective_broadcast"
    for kind, body in re.findall(rf"stablehlo\.({kinds})\"?\(.*?-> tensor<([\w]+)>", program, flags=re.DOTALL):
        *dims, element = body.split("x")
        found[kind.replace("_", "-"), SIZE_OF[element] * int(np.prod([int(n) for n in dims]))] += 1
    return found


@pytest.mark.parametrize(
    ("layout", "degree", "permutes"),
    [("zigzag", 4, 4), *(pytest.param("contiguous", p, n, marks=pytest.mark.slow) for p, n in ((8, 3), (3, 2)))],
)
def test_the_compiled_program_sends_states_whose_bytes_do_not_grow(layout, degree, permutes):
    """ceil(log2 P) permutes each way for each run of a device, and where documents begin: an id a row and run."""
    lowered_at = {length: lowered(layout, degree, length=length) for length in (768, 3072)}
    program = lowered_at[768].compile().as_text()
    found = collectives(program)
    assert found.pop(("collective-permute", ROWS * 4)) == {"contiguous": 1, "zigzag": 2}[layout]
    assert found == {("collective-permute", STATE_BYTES): 2 * permutes} == stated(layout, degree)
    assert not re.search(r"\[[\d,]*\b768\b", program), "an array that holds the whole sequence"
    assert not any(f"{own},{own}" in program for own in (768, 768 // degree, 768 // degree // 2))
    assert before_compiling(lowered_at[768]) == before_compiling(lowered_at[3072])


@pytest.mark.parametrize(
    ("layout", "degree", "decay", "options"),
    [
        ("contiguous", 2, "scalar", {}),
        ("contiguous", 5, "scalar", {}),
        ("zigzag", 8, "vector", {}),
        ("zigzag", 3, "scalar", {"normalize": True}),
        ("zigzag", 4, "scalar", {"delta_rule": True}),
    ],
)
def test_transfers_are_the_collectives_of_the_program(layout, degree, decay, options):
    """Of the program before it is compiled; what is sent is float32, whatever the inputs are."""
    found = before_compiling(lowered(layout, degree, length=240, decay=decay, packed=False, **options))
    assert found == stated(layout, degree, vector_decay=decay == "vector", **options)


def test_states_before_and_after_a_row_are_known_to_all_its_devices():
    found = before_compiling(lowered("zigzag", 4, packed=False, with_states=True))
    states = {("all-reduce", ROWS * HEADS * KEY_DIM * VALUE_DIM * 4): 2}
    assert found == stated("zigzag", 4) | collections.Counter(states)


@pytest.mark.parametrize("is_learned", [True, False])
def test_only_a_learned_decay_of_a_head_is_summed_over_devices(is_learned):
    found = before_compiling(lowered("contiguous", 4, decay="fixed", packed=False, is_learned=is_learned))
    summed = {("all-reduce", HEADS * 4): 1} if is_learned else {}
    assert found == stated("contiguous", 4) | collections.Counter(summed)


def test_the_bytes_of_the_guide():
    """16 heads of 128 x 128: about 1 MiB a permute, three of them over eight devices."""
    (forward, backward) = state_passing.transfers(
        AttentionSharding(), rows=1, num_heads=16, key_dim=128, value_dim=128, degree=8
    )
    assert (forward.phase, forward.count, forward.num_bytes) == ("forward", 3, 16 * (128 * 128 + 1) * 4)
    assert (backward.phase, backward.count, backward.num_bytes) == ("backward", 3, forward.num_bytes)
    assert state_passing.transfers(AttentionSharding(), rows=1, num_heads=1, key_dim=8, value_dim=8, degree=1) == ()


# What is refused.

REFUSALS = [
    (
        dict(layout="striped"),
        r"got layout=striped; choose layout=contiguous or zigzag, or bring the tokens into runs \(.*Relayout\)$",
    ),
    (dict(heads_split=3), "splits 4 heads over 3 devices, wanted a multiple of 3; change the heads or the mesh$"),
    (
        dict(num_heads=12, num_key_heads=6, heads_split=4),
        "splits 6 query and key heads over 4 devices, wanted a multiple or a divisor of 4; change those heads",
    ),
    (dict(seq_len=92), "splits 92 tokens over 4 devices, wanted a multiple of 8 for layout=zigzag; pad the rows, or"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSALS)
def test_what_is_not_served_is_refused_in_a_sentence(fields, message):
    fields = dict(num_heads=HEADS, num_key_heads=2, seq_len=LENGTH, degree=4, layout="zigzag") | fields
    sharding = AttentionSharding(layout=LAYOUTS[fields.pop("layout")])
    reason = state_passing.refusal(sharding, **fields)
    assert reason is not None and re.search(message, reason) and "\n" not in reason, reason


def test_what_is_served_is_not_refused():
    sizes = dict(num_heads=HEADS, num_key_heads=1, seq_len=LENGTH)
    assert state_passing.refusal(AttentionSharding(layout=LAYOUTS["zigzag"]), **sizes, degree=4, heads_split=4) is None
    assert state_passing.refusal(AttentionSharding(), **sizes, degree=4) is None
    whole = AttentionSharding(layout=LAYOUTS["striped"])
    assert state_passing.refusal(whole, **sizes, degree=1) is None


def test_a_refusal_is_raised_where_the_call_is_made():
    arrays = inputs(with_states=False, num_key_heads=2)
    q, k, v = (arrays[name] for name in ("q", "k", "v"))
    op = "sharded_linear_attention: state passing"
    with jax.set_mesh(make_mesh(MeshConfig(context_inner=4, tensor=2))):
        with pytest.raises(NotImplementedError, match=f"{op} needs devices that hold runs of neighbouring tokens"):
            sharded_linear_attention(q, k, v, sharding=AttentionSharding(layout=LAYOUTS["striped"]))
        with pytest.raises(ValueError, match=f"{op} splits 90 tokens over 4 devices, wanted a multiple of 4"):
            sharded_linear_attention(*(x[:, :90] for x in (q, k, v)))
        with pytest.raises(
            ValueError, match=r"sharded_linear_attention: decay is float32\[3\], wanted floats of shape"
        ):
            sharded_linear_attention(q, k, v, decay=jnp.zeros(3))
    with pytest.raises(ValueError, match="sequence axis 'sp' is not of the mesh in scope"):
        sharded_linear_attention(q, k, v, sharding=AXES)
