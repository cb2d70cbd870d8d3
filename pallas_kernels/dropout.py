"""Dropout of attention probabilities, drawn from what a pair of tokens is and never from where it lies.

out = (P Z) v, after the softmax: lse is without dropout. Z is 1 / (1 - rate) for a pair that is kept, else 0. Whether a
pair is kept is a function of a seed of the row and query head, of the query's position and segment id, and of the
key's. So any block size, order of the tokens, sharding and implementation draws the same Z, and the backward pass draws
it again instead of keeping it.

  c = mix(mix(s_k) + p_k)                                          a word a key
  a = mix(mix(seed + mix(s_q)) + p_q),  b = the same of ~seed      two words a query and head
  keep iff  h >= rate 2^32,  h = mix_b(c ^ a)                      per pair: 2 multiplications and 6 cheaper operations

s are segment ids, p positions, mix is the finalizer below, and mix_b is the same with b added in its middle. What of
mix_b is linear in a and c, or a multiple of b, is done to the words and not to each pair. For one
query h is a permutation of the words of keys, which all differ within a document, and 64 bits pick that permutation:
the draws of two queries are related only where both words agree. Of billions of seeds, which have 32 bits, some agree.

Reference: Srivastava et al. 2014, Dropout: a simple way to prevent neural networks from overfitting, JMLR 15. Counters
instead of a state: Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3. The finalizer and its avalanche:
Wellons 2018, Prospecting for hash functions, `lowbias32`. Two words around a mixing: Even and Mansour 1997, A
construction of a cipher from a single pseudorandom permutation.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from pallas_kernels.tokens import Leaf, TokenAxis, Tokens

_FIRST_FACTOR, _SECOND_FACTOR = np.uint32(0x7FEB352D), np.uint32(0x846CA68B)


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

    def query_words(self, queries: TokenAxis) -> tuple[jax.Array, jax.Array]:
        """The two words of each query, as `is_kept` takes them: uint32 `[B or 1, N, T]`, of tokens `[B or 1, T]`."""
        segments, positions = (x[:, None, :].astype(jnp.uint32) for x in (queries.segment_ids, queries.positions))
        a, b = (_mix(_mix(seeds[:, :, None] + _mix(segments)) + positions) for seeds in (self.seeds, ~self.seeds))
        return _opened(a), b * _SECOND_FACTOR

    def multipliers(self, query_words: tuple[jax.Array, jax.Array], kv_words: jax.Array) -> jax.Array:
        """Z: float32, 0 or 1 / (1 - rate), of words that broadcast against each other."""
        kept = is_kept(self.rate, query_words, kv_words)
        return jnp.where(kept, np.float32(1 / (1 - self.rate)), np.float32(0))

    def dense(self, tokens: Tokens | None, q_len: int, kv_len: int) -> jax.Array:
        """Z of all pairs, float32 `[B or 1, N, T, S]`: for references and tests."""
        tokens = tokens or Tokens()
        query_words = self.query_words(tokens.queries(q_len))
        kv_words = key_words(tokens.keys(kv_len))[:, None, None, :]
        return self.multipliers(tuple(x[..., None] for x in query_words), kv_words)


def key_words(keys: TokenAxis) -> UInt32[Array, "B S"]:
    """The word of each key, for all seeds, as `is_kept` takes it."""
    return _opened(_mix(_mix(keys.segment_ids.astype(jnp.uint32)) + keys.positions.astype(jnp.uint32)))


def is_kept(rate: float, query_words: tuple[jax.Array, jax.Array], kv_words: jax.Array) -> jax.Array:
    """Whether pairs are kept, of words that broadcast against each other; also inside kernels."""
    first, second = query_words
    return _closed(first ^ kv_words, second) >= np.uint32(min(round(rate * 2**32), 2**32 - 1))


def check_rate(name: str, rate: float) -> None:
    """Raises ValueError, naming it, unless 0 <= rate < 1."""
    if not 0 <= rate < 1:
        raise ValueError(f"{name}={rate}, wanted 0 <= rate < 1; 0 drops nothing")


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of uint32 whose every output bit depends on every input bit."""
    return _closed(_opened(x), np.uint32(0))


def _opened(x: jax.Array) -> jax.Array:
    """The first step of a mix; of an exclusive or it is that of its sides."""
    return x ^ (x >> np.uint32(16))


def _closed(x: jax.Array, between: jax.Array | np.uint32) -> jax.Array:
    """The other steps; `between` is what was added in the middle, times the second factor."""
    x = x * _FIRST_FACTOR
    x = x ^ (x >> np.uint32(15))
    x = x * _SECOND_FACTOR + between
    return x ^ (x >> np.uint32(16))
