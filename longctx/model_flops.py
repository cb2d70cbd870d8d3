"""What a model costs, in FLOPs."""

import numpy as np
from jaxtyping import Int

from longctx.model import ModelConfig


def forward_flops(config: ModelConfig, document_lengths: Int[np.ndarray, " documents"]) -> float:
    """Floating-point operations of a forward pass over documents of these lengths: the sum of `flops_by_part`.

    A training step is customarily three times this.
    """
    return sum(flops_by_part(config, document_lengths).values())


def flops_by_part(config: ModelConfig, document_lengths: Int[np.ndarray, " documents"]) -> dict[str, float]:
    """Floating-point operations of a forward pass over documents of these lengths, by the part that spends them.

    NAME.PART  a part of the mixer called NAME, over all layers of that mixer
    mlp        6 tokens dim mlp_dim num_layers
    logits     2 tokens dim vocab_size

    Matmuls count 2 m n k; norms, activations, the embedding lookup and pairs that a mask forbids count nothing.

    Args:
      config: Its vocab_size must be set.
      document_lengths: Tokens of each document, padding left out.

    Raises: ValueError if config.vocab_size is None.
    """
    if config.vocab_size is None:
        raise ValueError("vocab_size: got None, wanted the number of token ids; set it with dataclasses.replace")
    num_tokens = float(np.sum(document_lengths, dtype=np.float64))
    flops = {
        f"{name}.{part}": config.layers.count(name) * of_a_layer
        for name, mixer in config.mixers.items()
        for part, of_a_layer in mixer.flops_by_part(config.dim, document_lengths).items()
    }
    flops["mlp"] = 6 * num_tokens * config.dim * config.mlp_dim * config.num_layers
    flops["logits"] = 2 * num_tokens * config.dim * config.vocab_size
    return flops
