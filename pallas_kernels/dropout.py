"""Dropout of attention probabilities, drawn from what a pair of tokens is and never from where it lies.

out = (P Z) v, after the softmax: lse is without dropout. Z is 1 / (1 - rate) for a pair that is kept, else 0. Whether a
pair is kept is a function of a seed of the row and query head, of the query's position and segment id, and of the
key's. So any block size, order of the tokens, sharding and implementation draws the same Z, and the backward pass draws
it again instead of keeping it.

  c = mix(mix(s_k) + p_k)                                                        a word a key
  w = mix(mix(seed + mix(s_q)) + p_q) ^ the same of ~seed                        a word a query and head
  keep iff  h >= rate 2^32,  h = w' c' modulo 2^32                               a multiplication and a comparison

s are segment ids, p positions, mix is the finalizer below, and x' is x with its last bit set. What is costly is done to
tokens, and two instructions are left to a pair. Odd numbers have inverses modulo 2^32, so that h is spread as evenly
over the keys of a query, and over the queries of a key, as words are: and those are as good as random. The draws of two
queries w and v are related only where i w' = j v' modulo 2^32 with small i and j, and likewise those of two keys: of
2^31 pairs of them, some.

Reference: Srivastava et al. 2014, Dropout: a simple way to prevent neural networks from overfitting, JMLR 15. Counters
instead of a state: Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3. The finalizer and its avalanche:
Wellons 2018, Prospecting for hash functions, `lowbias32`. Hashing by an odd factor, of which the highest bits are read:
Dietzfelbinger et al. 1997, A reliable randomized algorithm for the closest-pair problem, section 2.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from pallas_kernels.tokens import Leaf, TokenAxis, Tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Dropout:
    """Which attention probabilities to drop; a pytree whose seeds are sharded as rows and heads are.

    Attributes:
      rate: The share of pairs that is dropped, 0 <= rate < 1; static.
      seeds: One for each row of the batch and query head, uint32 `[B or 1, N]`; rows that share a seed drop alike.
    """

    rate: float = dataclasses.field(metadata={"static": True})
    seeds: Leaf

    def __post_init__(self):
        check_rate("Dropout: rate", self.rate)

    @classmethod
    def of_key(cls, rate: float, key: jax.Array, *, batch_size: int, num_heads: int) -> "Dropout":
        """Dropout with a seed for each row and head.

        Args:
          rate: The share of pairs that is dropped, 0 <= rate < 1.
          key: A typed random key (`jax.random.key`), or one for each row, `[B]`: then a row's draws do not depend on
            what other rows are in the batch.
          batch_size: Rows, B.
          num_heads: Query heads, N.

        Raises: ValueError where the rate is out of range, or the key is neither.
        """
        if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.shape not in ((), (batch_size,)):
            raise ValueError(
                f"Dropout.of_key: key is {key.dtype}{list(key.shape)}, wanted a typed key of shape [] or "
                f"[{batch_size}]; make it with jax.random.key, and one for each row with jax.random.split"
            )
        if key.ndim == 0:
            return cls(rate=rate, seeds=jax.random.bits(key, (batch_size, num_heads), jnp.uint32))
        return cls(rate=rate, seeds=jax.vmap(lambda key: jax.random.bits(key, (num_heads,), jnp.uint32))(key))

    def query_words(self, queries: TokenAxis) -> jax.Array:
        """The word of each query, odd: uint32 `[B or 1, N, T]`, of tokens `[B or 1, T]`."""
        segments, positions = (x[:, None, :].astype(jnp.uint32) for x in (queries.segment_ids, queries.positions))
        halves = (_mix(_mix(seeds[:, :, None] + _mix(segments)) + positions) for seeds in (self.seeds, ~self.seeds))
        return functools.reduce(jnp.bitwise_xor, halves) | np.uint32(1)

    def multipliers(self, query_words: jax.Array, kv_words: jax.Array) -> jax.Array:
        """Z: float32, 0 or 1 / (1 - rate), of words that broadcast against each other."""
        kept = is_kept(self.rate, query_words, kv_words)
        return jnp.where(kept, np.float32(1 / (1 - self.rate)), np.float32(0))

    def dense(self, tokens: Tokens | None, q_len: int, kv_len: int) -> jax.Array:
        """Z of all pairs, float32 `[B or 1, N, T, S]`: for references and tests."""
        tokens = tokens or Tokens()
        query_words = self.query_words(tokens.queries(q_len))[..., None]
        return self.multipliers(query_words, key_words(tokens.keys(kv_len))[:, None, None, :])


def key_words(keys: TokenAxis) -> UInt32[Array, "B S"]:
    """The word of each key, for all seeds, odd."""
    return _mix(_mix(keys.segment_ids.astype(jnp.uint32)) + keys.positions.astype(jnp.uint32)) | np.uint32(1)


def is_kept(rate: float, query_words: jax.Array, kv_words: jax.Array) -> jax.Array:
    """Whether pairs are kept, of words that broadcast against each other; also inside kernels."""
    return query_words * kv_words >= np.uint32(min(round(rate * 2**32), 2**32 - 1))


def check_rate(name: str, rate: float) -> None:
    """Raises ValueError, naming it, unless 0 <= rate < 1."""
    if not 0 <= rate < 1:
        raise ValueError(f"{name}={rate}, wanted 0 <= rate < 1; 0 drops nothing")


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of uint32 whose every output bit depends on every input bit."""
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x7FEB352D)
    x = x ^ (x >> np.uint32(15))
    x = x * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))
