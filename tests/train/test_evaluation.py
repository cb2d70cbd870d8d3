import math
from types import SimpleNamespace

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


class Knowing(nnx.Module):
    """Scores the token after the next highest wherever the token is even, and the next one elsewhere."""

    config = SimpleNamespace(logits_soft_cap=None)
    output_table = jnp.eye(16)

    def hidden(self, tokens_BT, *, positions=None, segment_ids=None):
        return jax.nn.one_hot(tokens_BT + 1 + (tokens_BT + 1) % 2, 16)


def answered_batch(targets, answers, groups, *, tokens):
    shape = (len(tokens), len(tokens[0]))
    arrays = {"tokens": tokens, "targets": targets, "answers": answers, "answer_groups": groups}
    batch = {name: np.array(rows, np.int32) for name, rows in arrays.items()}
    batch |= {"positions": np.zeros(shape, np.int32), "segment_ids": np.zeros(shape, np.int32)}
    return batch | {"loss_weights": np.ones(shape, np.float32), "num_bytes": np.zeros(len(tokens), np.float32)}


# Of tokens 1 3 5 7 9 11 the model says 2 4 6 8 10 12.
@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [4, 0, 5, 2, 1, 3]], ids=["in order", "in a layout"])
def test_counts_right_tokens_and_whole_answers_by_group(order):
    batches = [
        answered_batch(
            [[2, 4, 0, 8, 10, 12], [2, 4, 6, 8, 0, 0]],
            [[-1, 0, 0, 1, 1, -1], [0, 1, 2, 2, -1, -1]],
            [[2, 0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 2]],
            tokens=[[1, 3, 5, 7, 9, 11]] * 2,
        ),
        answered_batch([[0] * 6] * 2, [[-1] * 6, [-1] * 5 + [3]], [[0] * 6] * 2, tokens=[[1] * 6] * 2),
    ]
    batches = [
        {name: array[:, order] if array.ndim == 2 else array for name, array in batch.items()} for batch in batches
    ]
    mesh = make_mesh(MeshConfig(data=2, context_inner=2), jax.devices()[:4])
    with jax.set_mesh(mesh):
        placement = BatchPlacement(mesh, batch_size=2, order=np.arange(6))
        step = make_eval_step(nnx.split(Knowing())[0], num_answer_groups=3)
        values = evaluate(step, {}, batches, placement, answer_groups=("near", "far", "none"))
    assert values["eval/accuracy"] == pytest.approx(7 / 9)
    assert values["eval/exact_match"] == pytest.approx(4 / 6)
    groups = {name: value for name, value in values.items() if name.startswith("eval/exact_match/")}
    assert groups == pytest.approx({"eval/exact_match/near": 2 / 4, "eval/exact_match/far": 2 / 2})


@pytest.mark.parametrize("name", ["every", "max_batches"])
def test_refused_settings(name):
    with pytest.raises(ValueError, match=f"{name}: got 0, wanted 1 or more, or null"):
        EvaluationConfig(**{name: 0})
