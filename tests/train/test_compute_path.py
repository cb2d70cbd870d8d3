"""What a training step does with arrays of all tokens beside matmuls and attention: casts, transposes, copies.

They are counted in the step as JAX traces it, a loop's body once and attention's op left out. XLA fuses what is
elementwise into its neighbours; a transpose or a copy it may have to carry out.
"""

import collections
from collections.abc import Iterator

import jax

from longctx.sharding import MeshConfig, make_mesh
from train.assemble import assemble
from train.config import TrainConfig
from train.planning.op_names import part_of
from train.planning.program import abstract_batch
from train.schema import parse

ROWS, LENGTH, KV_DIM = 2, 256, 32
MOVES = ("convert_element_type", "transpose", "copy", "copy_p")


def traced_step(**model):
    config = parse(
        TrainConfig,
        {
            "run_dir": "runs/none",
            "data": {"seq_len": LENGTH, "sources": [{"kind": "stdlib"}]},
            "model": {
                "dim": 64,
                "num_layers": 2,
                "mlp_dim": 160,
                "vocab_size": 512,
                "mixers": {"attention": {"kind": "attention", "num_heads": 4, "num_kv_heads": 2, "qk_norm": True}},
                "pattern": ["attention"],
                **model,
            },
            "training": {"steps": 10, "batch_size": ROWS},
            "optimizer": {"learning_rate": 1e-3},
        },
    )
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    parts = assemble(config, mesh, vocab_size=512)
    with jax.set_mesh(mesh):
        return parts.train_step.trace(parts.abstract, abstract_batch(config, mesh), None).jaxpr.jaxpr


def equations(jaxpr, scope="") -> Iterator[tuple]:
    """Every equation with the scopes around it, those of loops and calls inside included."""
    for equation in jaxpr.eqns:
        name = f"{scope}/{equation.source_info.name_stack}"
        yield equation, name
        inside = jax.tree.leaves(tuple(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr"))
        for value in inside:
            value = getattr(value, "jaxpr", value)
            if hasattr(value, "eqns"):
                yield from equations(value, name)


def moves(jaxpr):
    """How often arrays with all tokens are cast, transposed and copied, by primitive and part of the model."""
    found = collections.Counter()
    for equation, scope in equations(jaxpr):
        is_large = equation.outvars and equation.outvars[0].aval.size >= ROWS * LENGTH * KV_DIM
        if equation.primitive.name in MOVES and is_large and "blockwise_attention" not in scope:
            found[equation.primitive.name, part_of(scope)] += 1
    return found


def test_nothing_is_cast_that_need_not_be_and_nothing_transposed():
    """Norms and rotary positions read and write bfloat16 and compute in float32: two casts forward, two backward."""
    assert moves(traced_step(dtype="bfloat16")) == {
        ("convert_element_type", "embedding"): 2,
        ("convert_element_type", "attention mixer"): 4 * (1 + 2 + 2),  # its norm; q and k normalised, q and k rotated
        ("convert_element_type", "mlp"): 4,
        ("convert_element_type", "logits"): 4,  # the final norm
        ("convert_element_type", "loss"): 4,  # the table, a tile's cotangent, and two around the scale of a gradient
    }
    assert moves(traced_step(dtype="float32")) == {}


def test_a_transpose_is_counted():
    def step(x):
        with jax.named_scope("layer.attention/mlp"):
            return jax.lax.fori_loop(0, 2, lambda _, x: (x.mT @ x).mT[:LENGTH] + x, x)

    jaxpr = jax.make_jaxpr(step)(jax.numpy.ones((LENGTH, LENGTH))).jaxpr
    assert moves(jaxpr) == {("transpose", "mlp"): 2}
