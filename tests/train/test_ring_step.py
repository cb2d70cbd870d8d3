"""The compiled training step with ring attention sends the permutes that ring.py states, and nothing of size [T, S]."""

import re

import jax
import jax.numpy as jnp

from longctx import AttentionConfig, MeshConfig, ModelConfig, TransformerLM, make_mesh
from longctx.sharding import batch_sharding
from train.optimizer import OptimizerConfig, make_optimizer, make_schedule
from train.state import abstract_model, abstract_state
from train.step import TrainingConfig, make_train_step

DEGREE, ROWS, LENGTH, KV_HEADS, HEAD_DIM = 4, 2, 4096, 1, 8


def compiled_step() -> str:
    mesh = make_mesh(MeshConfig(context_inner=DEGREE), jax.devices()[:DEGREE])
    config = ModelConfig(
        vocab_size=32,
        dim=16,
        num_layers=2,
        mlp_dim=24,
        mixers={"attention": AttentionConfig(num_heads=2, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM)},
        pattern=("attention",),
        dtype="float32",
    )

    def build(rngs):
        return TransformerLM(config, rngs=rngs)

    schedule = make_schedule(OptimizerConfig(), total_steps=4)
    optimizer = make_optimizer(OptimizerConfig(), schedule=schedule)
    state = abstract_state(build, optimizer, mesh)
    training = TrainingConfig(steps=4, batch_size=ROWS)
    step = make_train_step(abstract_model(build)[0], state, optimizer, schedule, training, mesh)

    def struct(*shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh, len(shape)))

    batch = {
        name: struct(ROWS, LENGTH, dtype=jnp.int32) for name in ("tokens", "targets", "positions", "segment_ids")
    } | {
        "loss_weights": struct(ROWS, LENGTH, dtype=jnp.float32),
        "num_bytes": struct(ROWS, dtype=jnp.float32),
    }
    with jax.set_mesh(mesh):
        return step.lower(state, batch, None).compile().as_text()


def test_collectives_of_a_training_step():
    program = compiled_step()
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    found = re.findall(rf"= (\(?\w+\[.*?) ({kinds})(?:-start)?\(", program)

    # The two layers are one loop: P - 1 permutes of keys and values forward, P - 1 backward, and P of their gradients.
    permutes = [re.sub(r"\{.*", "", result) for result, kind in found if kind == "collective-permute"]
    assert permutes == [f"f32[{ROWS},{LENGTH // DEGREE},{KV_HEADS},{2 * HEAD_DIM}]"] * (3 * DEGREE - 2)

    # Of the tokens' arrays only positions and segment ids are gathered; the rest are parameters and their gradients.
    of_tokens = [
        (kind, result) for result, kind in found if kind != "collective-permute" and str(LENGTH // DEGREE) in result
    ]
    assert [(kind, result[:3]) for kind, result in of_tokens] == [("all-gather", "s32")] * 2
    assert not re.search(rf"\[[\d,]*\b{LENGTH},{LENGTH}\b", program)
    assert not re.search(rf"f32\[[\d,]*\b{LENGTH}\b", program), "a float array that holds the whole sequence"
