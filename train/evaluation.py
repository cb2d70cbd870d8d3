"""Held-out loss and bits per byte, and of tasks how many answers are right."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int32

from longctx.fused_loss import token_scores
from train.placement import BatchPlacement
from train.step import Batch, bits_per_byte, gpu_compiler_options


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """When the model is measured on held-out data."""

    every: int | None = 500
    """Steps between evaluations, beside those before the first and after the last step. Null: no
    evaluation."""
    max_batches: int | None = None
    """Evaluate on this many batches of held-out rows at most. Default: on all of them."""

    def __post_init__(self):
        for name in ("every", "max_batches"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: got {value}, wanted 1 or more, or null")


class AnswerSums(NamedTuple):
    """What became of the answers, float32: the tokens that they consist of, and whole ones by their group."""

    tokens: jax.Array
    right_tokens: jax.Array
    answers_G: jax.Array
    right_answers_G: jax.Array


class EvalSums(NamedTuple):
    """Float32 sums over tokens; those of answers where the batch has any marked."""

    nll: jax.Array
    weight: jax.Array
    num_bytes: jax.Array
    answers: AnswerSums | None


def make_eval_step(
    graphdef: nnx.GraphDef,
    *,
    num_answer_groups: int = 0,
    loss_tile: int | None = None,
    deterministic: bool = False,
) -> Callable[[Any, Batch], EvalSums]:
    """Builds the jitted step(params, batch) -> sums of weighted nll (nats), weights, source bytes and right answers.

    Nothing is dropped in it. The logits of a tile of tokens are held at a time, however training computes its loss.

    Args:
      graphdef: Static half of a model with `hidden`, `output_table` and `config.logits_soft_cap`, as TransformerLM has
        them.
      num_answer_groups: How many groups the answers in a batch are of; 0 where batches have none marked.
      loss_tile: Tokens of a tile on each device; None takes `longctx.fused_loss.default_tile`.
      deterministic: As of make_train_step.
    """

    def step(params, batch):
        model = nnx.merge(graphdef, params)
        model.eval()
        targets_BT, weights_BT = batch["targets"], batch["loss_weights"]
        hidden_BTD = model.hidden(batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"])
        scores = token_scores(
            hidden_BTD, model.output_table, targets_BT, soft_cap=model.config.logits_soft_cap, tile=loss_tile
        )
        nll_sum = jnp.sum(jnp.where(weights_BT == 0, 0.0, weights_BT * scores.nll_BT))
        answers = None
        if num_answer_groups:
            is_right_BT = scores.predictions_BT == targets_BT
            answers = count_answers(is_right_BT, batch["answers"], batch["answer_groups"], num_groups=num_answer_groups)
        return EvalSums(nll_sum, jnp.sum(weights_BT), jnp.sum(batch["num_bytes"]), answers)

    on_gpus = jax.default_backend() == "gpu"
    return jax.jit(step, compiler_options=gpu_compiler_options(deterministic=True) if deterministic and on_gpus else {})


def count_answers(
    is_right_BT: Bool[Array, "B T"],
    answers_BT: Int32[Array, "B T"],
    groups_BT: Int32[Array, "B T"],
    *,
    num_groups: int,
) -> AnswerSums:
    """Counts right tokens and right answers; where the tokens of a row stand does not matter, so any layout will do.

    Args:
      is_right_BT: Whether the target is the token that the model scores highest, given all tokens before it. An answer
        of which that is true throughout is what greedy decoding would have written.
      answers_BT: The number of the target's answer within its row, below T; -1 for none.
      groups_BT: The group of the target's answer; arbitrary where there is none.
      num_groups: Groups are below this.
    """
    length = answers_BT.shape[1]
    is_answer_BT = answers_BT >= 0
    places_BT = jnp.where(is_answer_BT, answers_BT, length)  # a place more, for what is no answer

    def by_answer(values_BT):
        return jax.vmap(lambda values, places: jax.ops.segment_sum(values, places, length + 1))(
            values_BT.astype(jnp.float32), places_BT
        )[:, :length]

    tokens_BA = by_answer(is_answer_BT)
    right_BA = by_answer(is_answer_BT & is_right_BT)
    is_group_BAG = jnp.stack(
        [by_answer(is_answer_BT & (groups_BT == group)) > 0 for group in range(num_groups)], axis=-1
    )
    is_right_BAG = is_group_BAG & (right_BA == tokens_BA)[..., None]
    return AnswerSums(
        tokens=jnp.sum(tokens_BA),
        right_tokens=jnp.sum(right_BA),
        answers_G=jnp.sum(is_group_BAG, axis=(0, 1), dtype=jnp.float32),
        right_answers_G=jnp.sum(is_right_BAG, axis=(0, 1), dtype=jnp.float32),
    )


def evaluate(
    eval_step: Callable[[Any, Batch], EvalSums],
    params: Any,
    batches: Iterable[Mapping[str, np.ndarray]],
    placement: BatchPlacement,
    *,
    answer_groups: Sequence[str] = (),
) -> dict[str, float]:
    """The loss over all batches together: sums are divided once, so that how rows are batched does not matter.

    Args:
      eval_step: From make_eval_step.
      params: The model's parameters.
      batches: This process's part of the held-out batches; rows that only fill up the last one have weight 0.
      placement: Places them.
      answer_groups: Names of the groups of answers.
    Returns: eval/loss (nats a token), eval/tokens (total weight), and eval/bits_per_byte = nats / (ln 2 x source
      bytes) unless the sources hold bare ids, which have no bytes. Where answers are marked, eval/accuracy, the share
      of their tokens that are right, and eval/exact_match, that of whole answers, also as eval/exact_match/GROUP.
    """
    total = None
    for batch in batches:
        sums = jax.tree.map(
            lambda leaf: np.asarray(leaf, np.float64), jax.device_get(eval_step(params, placement.place(batch)))
        )
        total = sums if total is None else jax.tree.map(np.add, total, sums)
    results = {"eval/loss": float(total.nll / total.weight), "eval/tokens": float(total.weight)}
    if total.num_bytes:
        results["eval/bits_per_byte"] = float(bits_per_byte(total.nll, total.num_bytes))
    return results | (_shares(total.answers, answer_groups) if answer_groups else {})


def _shares(sums: AnswerSums, groups: Sequence[str]) -> dict[str, float]:
    shares = {
        "eval/accuracy": float(sums.right_tokens / sums.tokens),
        "eval/exact_match": float(sums.right_answers_G.sum() / sums.answers_G.sum()),
    }
    for group, right, number in zip(groups, sums.right_answers_G, sums.answers_G, strict=True):
        if len(groups) > 1 and number:  # few rows may hold none of a group
            shares[f"eval/exact_match/{group}"] = float(right / number)
    return shares
