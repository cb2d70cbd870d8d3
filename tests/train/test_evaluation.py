import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx.sharding import MeshConfig, make_mesh
from train.evaluation import EvaluationConfig, evaluate, make_eval_step
from train.placement import BatchPlacement
from train.state import abstract_model


def test_equals_a_direct_computation_over_all_tokens(stand_in, make_batch):
    model = stand_in(nnx.Rngs(4))
    params = nnx.to_pure_dict(nnx.split(model)[1])
    batches = [make_batch(seed, rows=4) for seed in range(3)]
    for name, array in batches[-1].items():  # two rows that only fill up the last batch
        array[2:] = -1 if name == "segment_ids" else 0
    mesh = make_mesh(MeshConfig(data=2), jax.devices()[:2])
    with jax.set_mesh(mesh):
        placement = BatchPlacement(mesh, batch_size=4, order=np.arange(6))
        values = evaluate(make_eval_step(abstract_model(stand_in)[0]), params, batches, placement)

    together = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    logits = model(together["tokens"], positions=together["positions"], segment_ids=together["segment_ids"])
    log_probabilities = np.asarray(jax.nn.log_softmax(logits), np.float64)
    picked = np.take_along_axis(log_probabilities, together["targets"][..., None], axis=-1)[..., 0]
    nats = -np.sum(picked * together["loss_weights"])
    np.testing.assert_allclose(values["eval/loss"], nats / together["loss_weights"].sum(), rtol=1e-5)
    np.testing.assert_allclose(
        values["eval/bits_per_byte"], nats / (math.log(2) * together["num_bytes"].sum()), rtol=1e-5
    )
    np.testing.assert_allclose(values["eval/tokens"], together["loss_weights"].sum(), rtol=1e-6)


def test_eval_step_leaves_the_parameters_in_place(stand_in, make_batch):
    params = nnx.to_pure_dict(nnx.split(stand_in(nnx.Rngs(4)))[1])
    make_eval_step(abstract_model(stand_in)[0])(params, jax.tree.map(jnp.asarray, make_batch(0)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("name", ["every", "max_batches"])
def test_refused_settings(name):
    with pytest.raises(ValueError, match=f"{name}: got 0, wanted 1 or more, or null"):
        EvaluationConfig(**{name: 0})
