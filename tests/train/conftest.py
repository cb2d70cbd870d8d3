"""A stand-in language model and random batches, for tests of the trainer alone."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx import MeshConfig, make_mesh
from train.optimizer import OptimizerConfig, make_optimizer, make_schedule
from train.placement import BatchPlacement
from train.state import abstract_model, abstract_state, create_state
from train.step import TrainingConfig, make_train_step

VOCAB_SIZE = 16
DIM = 8


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.kernel = nnx.Param(0.3 * jax.random.normal(rngs.params(), (DIM, DIM)), logical_axes=("embed", "mlp"))
        self.scale = nnx.Param(jnp.ones(DIM), logical_axes=("embed",))

    def __call__(self, x_BTD):
        return x_BTD + jnp.tanh(x_BTD @ self.kernel[...].astype(x_BTD.dtype)) * self.scale[...].astype(x_BTD.dtype)


class StandIn(nnx.Module):
    """What the trainer calls of TransformerLM; each token sees itself and its position only."""

    config = SimpleNamespace(logits_soft_cap=None)

    def __init__(self, rngs, *, param_dtype=jnp.float32):
        table = 0.3 * jax.random.normal(rngs.params(), (VOCAB_SIZE, DIM))
        self.embedding = nnx.Param(table.astype(param_dtype), logical_axes=("vocab", "embed"))
        self.layers = nnx.List([Layer(rngs), Layer(rngs)])

    def hidden(self, tokens_BT, *, positions=None, segment_ids=None):
        x_BTD = self.output_table[tokens_BT] + jnp.sin(positions.astype(jnp.float32))[..., None]
        for layer in self.layers:
            x_BTD = layer(x_BTD)
        return x_BTD

    @property
    def output_table(self):
        return self.embedding[...].astype(jnp.float32)

    def __call__(self, tokens_BT, **of_tokens):
        return self.hidden(tokens_BT, **of_tokens) @ self.output_table.T


@pytest.fixture
def stand_in():
    return StandIn


@pytest.fixture
def losses_of_training(make_batch):
    """losses_of_training(build): the losses of a few steps over the same packed documents, all of them finite."""

    def train(build):
        mesh, config = make_mesh(MeshConfig(), jax.devices()[:1]), TrainingConfig(steps=8, batch_size=4)
        schedule = make_schedule(OptimizerConfig(learning_rate=0.02, schedule="constant"), total_steps=config.steps)
        optimizer = make_optimizer(OptimizerConfig(learning_rate=0.02), schedule=schedule)
        with jax.set_mesh(mesh):
            state = create_state(build, optimizer, mesh, seed=3)
            step = make_train_step(
                abstract_model(build)[0], abstract_state(build, optimizer, mesh), optimizer, schedule, config, mesh
            )
            batch = make_batch(0, rows=4, length=12)
            placed = BatchPlacement(mesh, batch_size=4, order=np.arange(12)).place(batch)
            losses = []
            for _ in range(config.steps):
                state, metrics = step(state, placed, None)
                assert metrics["finite"]
                losses.append(float(metrics["loss"]))
        return losses

    return train


@pytest.fixture
def make_batch():
    """make_batch(seed, rows, length): a random batch with unequal weights, several documents a row and
    padding."""

    def make(seed, rows=8, length=6):
        rng = np.random.default_rng(seed)
        segment_ids = np.sort(rng.integers(0, 3, (rows, length), dtype=np.int32), axis=1)
        segment_ids[:, -1] = np.where(rng.random(rows) < 0.5, -1, segment_ids[:, -1])
        weights = rng.random((rows, length), dtype=np.float32) * (segment_ids >= 0)
        weights[: rows // 2] *= 0.1
        return {
            "tokens": rng.integers(0, VOCAB_SIZE, (rows, length), dtype=np.int32),
            "targets": rng.integers(0, VOCAB_SIZE, (rows, length), dtype=np.int32),
            "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
            "segment_ids": segment_ids,
            "loss_weights": weights,
            "num_bytes": rng.integers(1, 20, rows).astype(np.float32),
        }

    return make
