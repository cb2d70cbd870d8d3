"""Text from a model: prefill, then one token at a time, in one jitted call."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from train.data import Tokenizer


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """The continuation that is sampled at the end of a run and by `python -m train.generate`."""

    prompt: str = ""
    """Text to continue; empty starts a new document."""
    num_tokens: int = 200
    """Tokens to sample at most; the end of the document ends the text earlier. 0: no sample at the end of a
    run."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the likeliest token each time."""
    top_k: int | None = None
    """Sample only among this many of the likeliest tokens. Default: no limit."""
    top_p: float | None = None
    """Sample only among the likeliest tokens that together have this probability. Default: no limit."""
    seed: int = 0
    """Seed of the sampling."""

    def __post_init__(self):
        for name in ("num_tokens", "temperature"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, wanted 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k: got {self.top_k}, wanted 1 or more, or null for no limit")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: got {self.top_p}, wanted 0 < top_p <= 1, or null for no limit")


def limited(logits: jax.Array, *, top_k: int | None, top_p: float | None) -> jax.Array:
    """Logits with -inf for what top_k and top_p rule out; the likeliest token always stays.

    Args:
      logits: float32 [..., V].
      top_k: Keep this many of the largest.
      top_p: Keep the fewest of the largest whose probability reaches this.
    Reference: Holtzman et al., The Curious Case of Neural Text Degeneration, arXiv:1904.09751, section 3.1.
    """
    descending = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
    smallest = descending[..., -1:]
    if top_k is not None and top_k < logits.shape[-1]:
        smallest = descending[..., top_k - 1 : top_k]
    if top_p is not None:
        probabilities = jax.nn.softmax(jnp.where(descending >= smallest, descending, -jnp.inf), axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        kept = jnp.where(before < top_p, descending, jnp.inf)
        smallest = jnp.maximum(smallest, jnp.min(kept, axis=-1, keepdims=True))
    return jnp.where(logits >= smallest, logits, -jnp.inf)


@functools.partial(jax.jit, static_argnums=(0, 4))
def sample_tokens(
    graphdef: nnx.GraphDef, params: Any, prompt_BT: jax.Array, key: jax.Array, config: SampleConfig
) -> jax.Array:
    """Continues each row of a prompt by config.num_tokens tokens: int32 [B, num_tokens].

    Args:
      graphdef: Static half of a model with init_cache and decode, as TransformerLM has them.
      params: Its parameters.
      prompt_BT: int32 token ids, T >= 1.
      key: Random key.
      config: How to sample; its prompt and seed are not used here.
    Memory: one cache of T + num_tokens tokens a row.
    """
    model = nnx.merge(graphdef, params)
    batch_size, length = prompt_BT.shape
    logits_BTV, cache = model.decode(prompt_BT, model.init_cache(batch_size, length + config.num_tokens))

    def choose(logits_BV, key):
        if config.temperature == 0:
            return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        logits_BV = limited(logits_BV / config.temperature, top_k=config.top_k, top_p=config.top_p)
        return jax.random.categorical(key, logits_BV, axis=-1).astype(jnp.int32)

    def body(carry, key):
        logits_BV, cache = carry
        token_B = choose(logits_BV, key)
        logits_BTV, cache = model.decode(token_B[:, None], cache)
        return (logits_BTV[:, -1], cache), token_B

    keys = jax.random.split(key, config.num_tokens)
    _, tokens_TB = jax.lax.scan(body, (logits_BTV[:, -1], cache), keys)
    return tokens_TB.T


def sample_text(graphdef: nnx.GraphDef, params: Any, tokenizer: Tokenizer, config: SampleConfig) -> str:
    """The continuation of config.prompt, without the prompt, up to the end of the document."""
    prompt = np.concatenate([[tokenizer.end_id], tokenizer.encode(config.prompt)]).astype(np.int32)
    sampled = sample_tokens(graphdef, params, prompt[None], jax.random.key(config.seed), config)
    tokens = multihost_utils.process_allgather(sampled, tiled=True)[0]
    ends = np.flatnonzero(tokens == tokenizer.end_id)
    return tokenizer.decode(tokens[: ends[0]] if len(ends) else tokens)
