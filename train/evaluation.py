"""Held-out loss and bits per byte."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longctx.losses import cross_entropy
from train.placement import BatchPlacement
from train.step import Batch, bits_per_byte


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


def make_eval_step(graphdef: nnx.GraphDef) -> Callable[[Any, Batch], tuple[jax.Array, jax.Array, jax.Array]]:
    """Builds the jitted step(params, batch) -> float32 sums of weighted nll (nats), weights and source bytes.

    Nothing is dropped in it.
    """

    def step(params, batch):
        model = nnx.merge(graphdef, params)
        model.eval()
        logits_BTV = model(batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"])
        sums = cross_entropy(logits_BTV, batch["targets"], batch["loss_weights"])
        return sums.nll_sum, sums.weight_sum, jnp.sum(batch["num_bytes"])

    return jax.jit(step)


def evaluate(
    eval_step: Callable[[Any, Batch], tuple[jax.Array, jax.Array, jax.Array]],
    params: Any,
    batches: Iterable[Mapping[str, np.ndarray]],
    placement: BatchPlacement,
) -> dict[str, float]:
    """The loss over all batches together: sums are divided once, so that how rows are batched does not matter.

    Args:
      eval_step: From make_eval_step.
      params: The model's parameters.
      batches: This process's part of the held-out batches; rows that only fill up the last one have weight 0.
      placement: Places them.
    Returns: eval/loss (nats a token), eval/tokens (total weight), and eval/bits_per_byte = nats / (ln 2 x source
      bytes) unless the sources hold bare ids, which have no bytes.
    """
    nll, weight, num_bytes = sum(
        (np.array(jax.device_get(eval_step(params, placement.place(batch))), np.float64) for batch in batches),
        start=np.zeros(3),
    )
    results = {"eval/loss": float(nll / weight), "eval/tokens": float(weight)}
    if num_bytes:
        results["eval/bits_per_byte"] = float(bits_per_byte(nll, num_bytes))
    return results
