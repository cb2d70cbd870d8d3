"""Text from a model: prefill, then one token at a time, in one jitted call."""

import functools
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from longctx.context_parallel import cache_degree
from train.data import Tokenizer
from train.schema import ConfigError


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
    prefill: Literal["decode", "context_parallel", "star"] = "decode"
    """How the prompt is read. `decode`: every device has all of its tokens, and attends from them to its part of the KV
    cache; for short prompts. `context_parallel`: its tokens are split over the context axes of the mesh, as in
    training; for long ones. Both give the same. `star`: split too, and of what is before it a token sees its own block
    and the first alone, in every layer: star attention, an approximation without communication (docs/inference.md)."""
    star_block: int | None = None
    """Tokens of a block, for `prefill: star`; null takes an equal part of the prompt a device of the context axes."""
    query_tokens: int = 1
    """Last tokens of the prompt that see all of it, for `prefill: star`: the question about a long context. Also the
    tokens that `prefill: context_parallel` leaves to the first step of decoding. Where the prompt has no others, it is
    read by `decode`."""

    def __post_init__(self):
        for name in ("star_block", "query_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: got {value}, wanted 1 or more")
        if self.star_block is not None and self.prefill != "star":
            raise ValueError(
                f"star_block: got {self.star_block} with prefill={self.prefill}, which has no blocks; leave it out or "
                "choose prefill=star"
            )
        if self.query_tokens != 1 and self.prefill == "decode":
            raise ValueError(
                f"query_tokens: got {self.query_tokens} with prefill=decode, where all tokens see the whole prompt; "
                "leave it out or choose another prefill"
            )
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
      graphdef: Static half of a model with init_cache, prefill and decode, as TransformerLM has them.
      params: Its parameters.
      prompt_BT: int32 token ids, T >= 1.
      key: Random key.
      config: How to sample; its prompt and seed are not used here.
    Memory: one cache of T + num_tokens tokens a row, split over the devices that split its tokens.
    """
    model = nnx.merge(graphdef, params)
    logits_BTV, cache = _read_prompt(model, prompt_BT, config)

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


def _read_prompt(model: nnx.Module, prompt_BT: jax.Array, config: SampleConfig) -> tuple[jax.Array, Any]:
    """Logits after the last tokens of a prompt, and caches that hold it, with room for what is sampled."""
    batch_size, length = prompt_BT.shape
    max_length = length + config.num_tokens
    context_len = 0 if config.prefill == "decode" else max(0, length - config.query_tokens)
    if context_len == 0:
        return model.decode(prompt_BT, model.init_cache(batch_size, max_length))
    star_block = None
    if config.prefill == "star":
        star_block = config.star_block or -(-context_len // cache_degree())
    cache = model.prefill(prompt_BT[:, :context_len], max_length, star_block=star_block)
    return model.decode(prompt_BT[:, context_len:], cache)


def check_sample(graphdef: nnx.GraphDef, abstract_params: Any, tokenizer: Tokenizer, config: SampleConfig) -> None:
    """Whether `sample_text` can do it, by the shapes alone.

    Raises: DataError where the tokenizer does not take the prompt; ConfigError where the model cannot read it or go on
      with it so.
    """
    prompt = _prompt(tokenizer, config)
    try:
        sample_tokens.eval_shape(graphdef, abstract_params, prompt, jax.random.key(config.seed), config)
    except (ValueError, NotImplementedError) as error:  # what a layer refuses
        raise ConfigError(
            f"sample: {error} (sample.prefill={config.prefill}, a prompt of {prompt.shape[1]} tokens; "
            "sample.num_tokens=0 samples nothing)"
        ) from error


def _prompt(tokenizer: Tokenizer, config: SampleConfig) -> np.ndarray:
    return np.concatenate([[tokenizer.end_id], tokenizer.encode(config.prompt)]).astype(np.int32)[None]


def sample_text(graphdef: nnx.GraphDef, params: Any, tokenizer: Tokenizer, config: SampleConfig) -> str:
    """The continuation of config.prompt, which `check_sample` has passed: without the prompt, up to the end of the
    document."""
    prompt = _prompt(tokenizer, config)
    sampled = sample_tokens(graphdef, params, prompt, jax.random.key(config.seed), config)
    tokens = multihost_utils.process_allgather(sampled, tiled=True)[0]
    ends = np.flatnonzero(tokens == tokenizer.end_id)
    return tokenizer.decode(tokens[: ends[0]] if len(ends) else tokens)
