"""The loss over tiles of tokens equals the loss of the model's logits, on any mesh, without holding them."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from longctx import MeshConfig, cross_entropy, fused_cross_entropy, logits_of, make_mesh, token_scores
from longctx.fused_loss import default_tile
from longctx.losses import LossSums

SIZES = dict(rows=3, length=13, dim=10, vocab_size=37)
MESHES = {
    "fsdp x context x tensor": MeshConfig(fsdp=2, context_inner=2, tensor=2),
    "data x context_outer x tensor": MeshConfig(data=2, context_outer=2, tensor=2),
    "fsdp x both context": MeshConfig(fsdp=2, context_outer=2, context_inner=2),
}


def inputs_of(rows, length, dim, vocab_size, *, dtype=jnp.float32, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    hidden = (2 * jax.random.normal(keys[0], (rows, length, dim))).astype(dtype)
    table = jax.random.normal(keys[1], (vocab_size, dim))
    targets = jax.random.randint(keys[2], (rows, length), 0, vocab_size, jnp.int32)
    weights = jax.random.uniform(keys[3], (rows, length)) * jnp.where(jnp.arange(length) % 4 == 1, 0.0, 1.0)
    return hidden, table, targets, weights


def plain(hidden, table, targets, weights, *, z_loss=0.0, soft_cap=None):
    return cross_entropy(logits_of(hidden, table, soft_cap=soft_cap), targets, weights, z_loss=z_loss)


def sums_and_gradients(loss, hidden, table, targets, weights, *, cotangent=0.7):
    """Of every sum, and of cotangent x loss_sum for everything that has a gradient, by name."""

    def scaled(floats):
        sums = loss(floats["hidden"], floats["table"], targets, floats["weights"])
        return cotangent * sums.loss_sum, sums

    floats = {"hidden": hidden, "table": table, "weights": weights}
    (_, sums), gradients = jax.value_and_grad(scaled, has_aux=True)(floats)
    return sums._asdict() | {f"gradient of {name}": gradient for name, gradient in gradients.items()}


def assert_same(got, want, *, rtol=2e-5):
    assert got.keys() == want.keys()
    for name in want:
        x, y = np.asarray(got[name], np.float64), np.asarray(want[name], np.float64)
        assert got[name].dtype == want[name].dtype and x.shape == y.shape, name
        assert np.linalg.norm(x - y) <= rtol * np.linalg.norm(y), name


@pytest.mark.parametrize("options", [{}, dict(z_loss=0.1), dict(soft_cap=3.0), dict(z_loss=0.1, soft_cap=3.0)], ids=str)
@pytest.mark.parametrize("tile", [1, 7, 13, 39, 100])
def test_equals_the_loss_of_the_logits(tile, options):
    inputs = inputs_of(**SIZES)
    got = sums_and_gradients(functools.partial(fused_cross_entropy, tile=tile, **options), *inputs)
    assert_same(got, sums_and_gradients(functools.partial(plain, **options), *inputs))


def test_sums_without_gradients_are_the_same():
    inputs = inputs_of(**SIZES)
    got = fused_cross_entropy(*inputs, z_loss=0.1, tile=8)
    assert_same(got._asdict(), plain(*inputs, z_loss=0.1)._asdict())


def test_the_gradient_of_nll_sum():
    hidden, table, targets, weights = inputs_of(**SIZES)

    def mean(loss, hidden):
        sums = loss(hidden, table, targets, weights)
        return (sums.nll_sum + 0.5 * sums.loss_sum) / sums.weight_sum

    got = jax.grad(functools.partial(mean, functools.partial(fused_cross_entropy, tile=8)))(hidden)
    np.testing.assert_allclose(got, jax.grad(functools.partial(mean, plain))(hidden), rtol=1e-4, atol=1e-6)
    with pytest.raises(NotImplementedError, match=r"nll_sum was asked for with z_loss=0.1.*differentiate loss_sum"):
        jax.grad(functools.partial(mean, functools.partial(fused_cross_entropy, z_loss=0.1)))(hidden)


def test_low_precision_is_that_of_the_plain_loss():
    """bfloat16 hidden states and table: errors against float32 are no larger than those of the plain loss."""
    hidden, table, targets, weights = inputs_of(4, 64, 32, 101, dtype=jnp.bfloat16)
    table = table.astype(jnp.bfloat16)
    compare = functools.partial(sums_and_gradients, cotangent=1.0)
    got = compare(functools.partial(fused_cross_entropy, tile=32), hidden, table, targets, weights)
    low = compare(plain, hidden, table, targets, weights)
    exact = compare(plain, hidden.astype(jnp.float32), table.astype(jnp.float32), targets, weights)
    for name in got:
        want = np.asarray(exact[name], np.float64)
        errors = [np.linalg.norm(np.asarray(x[name], np.float64) - want) for x in (got, low)]
        assert got[name].dtype == low[name].dtype
        assert errors[0] <= 1.1 * errors[1] + 1e-6 * np.linalg.norm(want), name


def test_targets_that_are_no_ids():
    hidden, table, targets, weights = inputs_of(**SIZES)
    arbitrary = jnp.where(weights == 0, jnp.int32(10**6), targets)
    got = sums_and_gradients(
        functools.partial(fused_cross_entropy, z_loss=0.1, tile=8), hidden, table, arbitrary, weights
    )
    want = sums_and_gradients(functools.partial(plain, z_loss=0.1), hidden, table, targets, weights)
    for name in ("gradient of hidden", "gradient of table", "loss_sum", "nll_sum", "weight_sum"):
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-5)
    for wrong in (-1, 37):
        outside = targets.at[0, 0].set(wrong)
        got, want = (
            sums_and_gradients(loss, hidden, table, outside, weights)
            for loss in (functools.partial(fused_cross_entropy, tile=8), plain)
        )
        assert np.isnan(got["loss_sum"]) and np.isnan(want["loss_sum"])
        np.testing.assert_allclose(got["gradient of table"], want["gradient of table"], rtol=1e-4, atol=1e-5)


def test_huge_logits_stay_finite():
    hidden, table, targets, weights = inputs_of(**SIZES)
    got = sums_and_gradients(functools.partial(fused_cross_entropy, tile=8), 1e4 * hidden, table, targets, weights)
    assert all(np.all(np.isfinite(x)) for x in got.values())


def test_scores_are_those_of_the_logits():
    hidden, table, targets, _ = inputs_of(**SIZES)
    table = table.at[11].set(table[5])  # equals: the first of them counts
    logits = logits_of(hidden, table, soft_cap=20.0)
    scores = token_scores(hidden, table, targets, soft_cap=20.0, tile=8)
    np.testing.assert_array_equal(scores.predictions_BT, jnp.argmax(logits, axis=-1))
    np.testing.assert_allclose(scores.log_normaliser_BT, jax.nn.logsumexp(logits, axis=-1), rtol=1e-5)
    wanted = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(scores.nll_BT, wanted, rtol=1e-4, atol=1e-4)
    assert np.isnan(token_scores(hidden, table, targets.at[1, 2].set(99)).nll_BT[1, 2])


# --- over a mesh ---

DIVISIBLE = dict(rows=4, length=24, dim=16, vocab_size=38)


def placed(inputs, mesh):
    specs = (("data", "fsdp"), ("context_outer", "context_inner"))
    places = (
        PartitionSpec(*specs, None),
        PartitionSpec("tensor", ("fsdp", "context_outer", "context_inner")),
        *(PartitionSpec(*specs),) * 2,
    )
    return [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(inputs, places, strict=True)]


@pytest.mark.parametrize(
    "name", ["fsdp x context x tensor", *(pytest.param(x, marks=pytest.mark.slow) for x in list(MESHES)[1:])]
)
def test_equals_one_device(name):
    inputs = inputs_of(**DIVISIBLE)
    options = dict(z_loss=0.1, soft_cap=5.0)
    with jax.set_mesh(mesh := make_mesh(MESHES[name])):
        got = jax.jit(functools.partial(sums_and_gradients, functools.partial(fused_cross_entropy, tile=5, **options)))(
            *placed(inputs, mesh)
        )
        for got_name, placed_input in zip(("hidden", "table"), placed(inputs, mesh), strict=False):
            got_sharding = got[f"gradient of {got_name}"].sharding
            assert got_sharding.is_equivalent_to(placed_input.sharding, placed_input.ndim)
        scores = jax.jit(functools.partial(token_scores, tile=5, soft_cap=5.0))(*placed(inputs, mesh)[:3])
    want = sums_and_gradients(functools.partial(plain, **options), *inputs)
    assert_same(got, want)
    logits = logits_of(*inputs[:2], soft_cap=5.0)
    np.testing.assert_array_equal(scores.predictions_BT, jnp.argmax(logits, axis=-1))
    np.testing.assert_allclose(scores.log_normaliser_BT, jax.nn.logsumexp(logits, axis=-1), rtol=1e-5)


@pytest.mark.parametrize(
    "sizes",
    [
        *(
            pytest.param(sizes, marks=pytest.mark.slow)
            for sizes in (
                dict(rows=3, length=24, dim=16, vocab_size=38),  # rows on every device of fsdp
                dict(rows=4, length=23, dim=16, vocab_size=38),  # tokens on every device of context
                dict(rows=4, length=24, dim=10, vocab_size=37),  # the table on every device of tensor, in part of fsdp
            )
        ),
        dict(rows=1, length=7, dim=15, vocab_size=37),
    ],
    ids=str,
)
def test_dims_that_do_not_divide(sizes):
    inputs = inputs_of(**sizes)
    with jax.set_mesh(make_mesh(MESHES["fsdp x context x tensor"])):
        got = jax.jit(
            functools.partial(sums_and_gradients, functools.partial(fused_cross_entropy, z_loss=0.1, tile=5))
        )(*inputs)
    assert_same(got, sums_and_gradients(functools.partial(plain, z_loss=0.1), *inputs))


def compiled_on(mesh, *, tile, wanted=("hidden", "table"), sizes=DIVISIBLE, dtype=jnp.float32):
    """The compiled loss with its gradients for what is wanted."""
    hidden, table, targets, weights = inputs_of(**sizes, dtype=dtype)
    if mesh is not None:
        hidden, table, targets, weights = placed((hidden, table, targets, weights), mesh)

    def loss(floats, others, targets, weights):
        given = floats | others
        return fused_cross_entropy(given["hidden"], given["table"], targets, weights, tile=tile).loss_sum

    arrays = {"hidden": hidden, "table": table}
    floats = {name: arrays.pop(name) for name in wanted}
    program = jax.value_and_grad(loss) if wanted else loss
    return jax.jit(program).lower(floats, arrays, targets, weights).compile()


def collectives(compiled):
    """Opcodes of the program's collectives with the shapes of their results, inside loops and outside."""
    inside, outside = [], []
    text = compiled.as_text()
    bodies = set(re.findall(r"body=%([\w.\-]+)", text))
    computation = None
    for line in text.splitlines():
        if found := re.match(r"(?:ENTRY )?%([\w.\-]+) .*\{$", line):
            computation = found[1]
        found = re.search(r" = (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)\(", line)
        if found:
            (inside if computation in bodies else outside).append((found[2], re.sub(r"\{[^}]*\}", "", found[1])))
    return sorted(inside), sorted(outside)


def test_the_table_is_gathered_and_its_gradient_scattered_once():
    found = {}
    for tile in (3, 6, 12):
        with jax.set_mesh(mesh := make_mesh(MESHES["fsdp x context x tensor"])):
            found[tile] = collectives(compiled_on(mesh, tile=tile))
        inside, outside = found[tile]
        # Of each token the greatest logit, then two sums, over the devices of the vocabulary.
        assert inside == sorted([("all-reduce", f"f32[2,{tile}]"), ("all-reduce", f"f32[{tile}]")])
        assert outside == [
            ("all-gather", "f32[19,16]"),
            ("all-reduce", "f32[2,12,16]"),  # the gradient of hidden, over tensor
            ("all-reduce", "f32[3]"),
            ("reduce-scatter", "f32[19,4]"),
        ]


def test_nothing_is_sent_inside_the_loop_where_the_vocabulary_is_whole():
    with jax.set_mesh(mesh := make_mesh(MESHES["fsdp x both context"])):
        inside, outside = collectives(compiled_on(mesh, tile=3))
    assert inside == []
    assert [kind for kind, _ in outside] == ["all-gather", "all-reduce", "reduce-scatter"]


def matmuls(compiled):
    return len(re.findall(r"= \S+ dot\(", compiled.as_text()))


def test_three_matmuls_with_gradients_and_one_without():
    sizes = dict(rows=2, length=32, dim=64, vocab_size=512)
    assert matmuls(compiled_on(None, tile=16, sizes=sizes)) == 3
    assert matmuls(compiled_on(None, tile=16, sizes=sizes, wanted=("hidden",))) == 2
    assert matmuls(compiled_on(None, tile=16, sizes=sizes, wanted=("table",))) == 2
    assert matmuls(compiled_on(None, tile=16, sizes=sizes, wanted=())) == 1


def test_memory_does_not_grow_with_tokens_times_vocabulary():
    def temporaries(length, **kwargs):
        sizes = dict(rows=1, length=length, dim=64, vocab_size=8192)
        return compiled_on(None, tile=128, sizes=sizes, **kwargs).memory_analysis().temp_size_in_bytes

    few, many = temporaries(1024), temporaries(8192)
    logits = 4 * (8192 - 1024) * 8192
    # What grows is hidden's gradient and a few numbers a token.
    assert many - few < 0.03 * logits
    assert temporaries(8192, wanted=()) < 3 * 4 * 128 * 8192


def test_the_tile_that_is_taken():
    assert [default_tile(size) for size in (256, 32_000, 128_256, 151_936, 2**24)] == [4096, 4096, 4096, 3456, 128]


@pytest.mark.parametrize("soft_cap", [0.0, -5.0])
def test_logits_refuse_a_soft_cap_that_is_not_positive(soft_cap):
    with pytest.raises(ValueError, match=f"logits_of: soft_cap is {soft_cap}, wanted None or a number > 0"):
        logits_of(jnp.ones((1, 2, 4)), jnp.ones((3, 4)), soft_cap=soft_cap)


# Shapes and dtypes are checked too, but under the hook of these tests jaxtyping refuses them first: tests/faults.
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(soft_cap=0.0), "soft_cap is 0.0, wanted None or a number > 0"),
        (dict(tile=0), "tile is 0, wanted None or a number of tokens >= 1"),
    ],
)
def test_refused_arguments(change, message):
    hidden, table, targets, weights = inputs_of(**SIZES)
    with pytest.raises(ValueError, match=f"fused_cross_entropy: {message}"):
        fused_cross_entropy(hidden, table, targets, weights, **change)
    with pytest.raises(ValueError, match=f"token_scores: {message}"):
        token_scores(hidden, table, targets, **change)
    with pytest.raises(ValueError, match="token_scores: hidden has shape .*, wanted no dimension of 0"):
        token_scores(hidden, table[:0], targets)


def test_sums_are_loss_sums():
    assert isinstance(fused_cross_entropy(*inputs_of(**SIZES)), LossSums)
