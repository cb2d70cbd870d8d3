"""The parity kit: this library's model, a function on a mesh of its own, and what must not pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from longctx import AttentionConfig, MeshConfig, ModelConfig, TransformerLM, cross_entropy, make_mesh, masks
from longctx.context_parallel import AttentionSharding, Layout, sharded_attention
from longctx.testing import assert_context_parallel_equal
from pallas_kernels import BlockSizes, Tokens

LENGTH, ROWS, DIM = 32, 2, 8
SP = AttentionSharding(sequence=("sp",), layout=Layout(name="zigzag"))
ZIGZAG = AttentionSharding(layout=Layout(name="zigzag"))
SIZES = BlockSizes(block_q=4, block_kv=4)


def batch_of(vocab_size=19):
    rng = np.random.default_rng(0)
    return {
        "tokens": jnp.asarray(rng.integers(0, vocab_size, (ROWS, LENGTH)), jnp.int32),
        "targets": jnp.asarray(rng.integers(0, vocab_size, (ROWS, LENGTH)), jnp.int32),
        # Few at the end, so that no two devices have as many.
        "weights": jnp.asarray(np.arange(LENGTH)[None] < [[9], [25]], jnp.float32),
        "positions": jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), (ROWS, LENGTH)),
    }


def random_params(vocab_size=19):
    rng = np.random.default_rng(1)
    shapes = {"table": (vocab_size, 2 * DIM), **dict.fromkeys(("q", "k", "v", "o"), (2 * DIM, 2 * DIM))}
    return {name: jnp.asarray(0.3 * rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}


def scores(params, batch, sharding, *, positions=True):
    """One layer of anybody's, over `sharded_attention`."""
    x = params["table"][batch["tokens"]]
    q, k, v = ((x @ params[name]).reshape(ROWS, -1, 2, DIM) for name in "qkv")
    of = batch["positions"] if positions else jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), (ROWS, LENGTH))
    out = sharded_attention(
        q, k, v, mask=masks.causal(), tokens=Tokens.self_attention(of, None), sharding=sharding, block_sizes=SIZES
    )
    return (x + out.reshape(x.shape) @ params["o"]) @ params["table"].T


def sums(params, batch, **options):
    logits = scores(params, batch, SP, **options)
    return cross_entropy(logits, batch["targets"], batch["weights"])


def mean_loss(params, batch, **options):
    return sums(params, batch, **options).loss_sum / batch["weights"].sum()


@pytest.mark.slow
def test_a_function_over_a_mesh_of_its_own():
    def evaluate(params, batch):
        return {"weighted": (params["table"][batch["tokens"]].sum(-1) * batch["weights"]).sum()}

    errors = assert_context_parallel_equal(
        mean_loss, random_params(), batch_of(), degrees=(1, 2), sharding=SP, evaluate=evaluate
    )
    assert set(errors) == {2}
    wanted = {"loss", "gradient norm", "evaluation weighted", *(f"gradient of {name}" for name in random_params())}
    assert set(errors[2]) == wanted


MIXERS = {
    "local": AttentionConfig(num_heads=2, window=5, block_q=4, block_kv=4),
    "global": AttentionConfig(num_heads=2, num_kv_heads=1, block_q=4, block_kv=4),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "degrees"),
    [(("global",), (2,)), pytest.param(("local", "global"), (1, 2, 4, 8), marks=pytest.mark.slow)],
)
def test_a_model(pattern, degrees):
    config = ModelConfig(
        vocab_size=19, dim=16, num_layers=len(pattern), mlp_dim=24, dtype="float32", pattern=pattern,
        mixers={name: MIXERS[name] for name in pattern},
    )  # fmt: skip
    rng = np.random.default_rng(2)
    model = nnx.eval_shape(lambda: TransformerLM(config, sharding=ZIGZAG, rngs=nnx.Rngs(0)))
    model = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype), model)

    def loss(model, batch):
        logits = model(batch["tokens"], positions=batch["positions"])
        return cross_entropy(logits, batch["targets"], batch["weights"]).loss_sum / batch["weights"].sum()

    errors = assert_context_parallel_equal(loss, model, batch_of(), degrees=degrees, sharding=ZIGZAG)
    assert set(errors) == set(degrees) - {1}
    for of_degree in errors.values():
        assert len(of_degree) == 2 + len(jax.tree.leaves(model)) and max(of_degree.values()) < 1e-5


def by_device(reduce, params, batch):
    """A loss of each token alone, each device's share of which `reduce` puts together."""

    def shard(params, tokens, targets, weights):
        logits = jnp.tanh(params["table"][tokens] @ params["q"]) @ params["table"].T
        losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
        return reduce((losses * weights).sum(), weights.sum())

    along = P(None, "sp")
    call = jax.shard_map(shard, in_specs=(P(), along, along, along), out_specs=P(), check_vma=False)
    return call(params, batch["tokens"], batch["targets"], batch["weights"])


def summed(loss, weight):
    loss, weight = jax.lax.psum((loss, weight), "sp")
    return loss / weight


def averaged_per_device(loss, weight):
    return jax.lax.pmean(loss / (weight + 1), "sp")


def forgotten_psum(loss, weight):
    return loss / jax.lax.psum(weight, "sp")


SMALL = dict(degrees=(4,), sharding=AttentionSharding(sequence=("sp",)))


def some_params():
    return {name: x for name, x in random_params().items() if name in ("table", "q")}


def test_a_shard_map_of_ones_own():
    assert_context_parallel_equal(functools.partial(by_device, summed), some_params(), batch_of(), **SMALL)


@pytest.mark.parametrize("reduce", [averaged_per_device, forgotten_psum])
def test_a_loss_that_is_not_reduced_fails(reduce):
    with pytest.raises(AssertionError, match=r"(?s)degree 4: .*loss: error .* wanted <= .*Look at:.*the loss itself"):
        assert_context_parallel_equal(functools.partial(by_device, reduce), some_params(), batch_of(), **SMALL)


@pytest.mark.slow
def test_positions_that_stay_behind_fail():
    with pytest.raises(AssertionError, match=r"(?s)degree 2: .*layout=zigzag they are in the batch"):
        assert_context_parallel_equal(
            functools.partial(mean_loss, positions=False), random_params(), batch_of(), degrees=(2,), sharding=SP
        )


def test_a_gradient_that_is_not_summed_fails():
    """The loss is right, so only a comparison of every gradient can tell."""

    @jax.custom_vjp
    def whole(x):
        return x

    def own_share_alone(_, dx):
        size = jax.sharding.get_abstract_mesh().shape["sp"]
        return (dx / size,)

    whole.defvjp(lambda x: (x, None), own_share_alone)

    def loss(params, batch):
        return by_device(summed, params | {"q": whole(params["q"])}, batch)

    with pytest.raises(AssertionError) as raised:
        assert_context_parallel_equal(loss, some_params(), batch_of(), **SMALL)
    message = str(raised.value)
    assert "degree 4: 2 of 4 results" in message and "gradient of q: error 0.75 of its norm" in message
    assert "gradient of q is 1/4 of the right one" in message and "the backward pass alone" in message


def test_what_is_counted_by_device_is_told():
    def evaluate(params, batch):
        del params
        size = jax.sharding.get_abstract_mesh().shape["sp"]
        return batch["weights"].sum() * size

    with pytest.raises(AssertionError, match="evaluation is 4 times too large"):
        assert_context_parallel_equal(
            functools.partial(by_device, summed), some_params(), batch_of(), evaluate=evaluate, **SMALL
        )


REFUSED = {
    "too few devices": (dict(devices=jax.devices()[:2]), r"got 4 with 2 devices.*jax_num_cpu_devices\", 4"),
    "one alone": (dict(degrees=(1,)), r"degrees: got \(1,\), wanted one above 1"),
    "no degree": (dict(degrees=(0,)), "degrees: got 0, wanted numbers of devices >= 1"),
    "another mesh": (
        dict(mesh_of=lambda degree: make_mesh(MeshConfig(context_inner=degree), jax.devices()[:degree])),
        "mesh_of: got a mesh .* wanted 1 devices along the axes",
    ),
    "no such dim": (dict(sequence_dims=2), r"sequence_dims: got 2 for a leaf of shape \(2, 32\)"),
    "not divided": (dict(degrees=(3,)), "contiguous over 3 devices"),
    "no gradient": (dict(params={"q": jnp.arange(3)}), "params: got no floating point leaf"),
    "nan": (dict(params={"table": jnp.full((19, 16), jnp.nan), "q": jnp.ones((16, 16))}), "got loss nan"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case):
    changed, message = REFUSED[case]
    arguments = dict(params=some_params(), batch=batch_of()) | SMALL | changed
    with pytest.raises(ValueError, match=message):
        assert_context_parallel_equal(functools.partial(by_device, summed), **arguments)


def test_leaves_without_tokens():
    """A key has none, and a dim other than the second is the sequence's; over a mesh of two rows of devices too."""
    rng = np.random.default_rng(3)
    batch = {"x": jnp.asarray(rng.standard_normal((LENGTH, 3)), jnp.float32), "key": jax.random.key(0)}

    def loss(params, batch):
        noise = jax.random.normal(batch["key"], ())
        return ((batch["x"] @ params) ** 2).sum() + noise

    def beside_data(degree):
        return make_mesh(MeshConfig(data=2, context_inner=degree), jax.devices()[: 2 * degree])

    for mesh_of in (None, beside_data):
        assert_context_parallel_equal(
            loss, jnp.ones((3,)), batch, degrees=(2,), sharding=ZIGZAG, sequence_dims={"x": 0, "key": None},
            mesh_of=mesh_of,
        )  # fmt: skip
