"""Mixture of Block Attention as a layer: projections, rotary positions and a cache around `moba_attention`."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int32

from longctx.arguments import check_next_tokens
from longctx.attention import GroupedQueryLayer
from longctx.context_parallel import (
    AnySchedule,
    AttentionSharding,
    MobaCache,
    empty_moba_cache,
    sharded_moba,
    sharded_moba_decode,
)
from longctx.rotary import RotaryConfig
from longctx.sharding import constrain
from pallas_kernels import Implementation, Tokens

_ROTARY = RotaryConfig()


class MobaAttention(GroupedQueryLayer):
    """Multi-head causal attention of each query to its own chunk of tokens and to the chunks that it scores highest.

    q, k, v = x W_q, x W_k, x W_v   (then normalised if qk_norm, then rotated if rotary)
    y = moba_attention(q, k, v, chunk_size, top_k) W_o

    Its parameters are those of `Attention`, which it equals where top_k covers all chunks, with the mask
    causal() & documents().

    Args:
      dim: Model dim of x and y.
      num_heads: Query heads N.
      num_kv_heads: Key and value heads K, a divisor of N; query head n reads kv head n // (N / K). Default N.
      head_dim: Dims of a head. Default dim / N.
      chunk_size: Tokens of a chunk.
      top_k: Chunks that a query attends to at most, its own among them.
      rotary: Rotary position embedding, default theta 10000; None leaves q and k as they are. Mean keys are of rotated
        ones.
      qk_norm: RMSNorm over head_dim on each head of q and k, one gain for all heads.
      dtype: Compute dtype and dtype of y; x and the kernels are cast to it.
      param_dtype: Dtype of the parameters.
      norm_eps: Epsilon of qk_norm.
      out_init_scale: Multiplies the initial standard deviation of W_o.
      implementation: Passed to `moba_attention`; None lets it choose.
      deterministic: Whether gradients must come out the same, bit by bit, each time; False may be faster.
      sharding: Names the axes of your own mesh that the layer is split over (inside `jax.set_mesh`), and the strategy,
        ring or all_gather; None splits it over those of `longctx.make_mesh` where such a mesh is in scope, by a ring.
      rngs: Source of the initial values (truncated normal, standard deviation 1 / sqrt(fan_in)).

    Raises: ValueError where the numbers of heads and dims do not divide, or chunk_size or top_k is not positive.
    Memory: O(B T N top_k H) for a call, in the backward pass too.
    Reference: Lu et al. 2025, MoBA, arXiv:2502.13189.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        chunk_size: int = 512,
        top_k: int = 4,
        rotary: RotaryConfig | None = _ROTARY,
        qk_norm: bool = False,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        norm_eps: float = 1e-6,
        out_init_scale: float = 1.0,
        implementation: Implementation | None = None,
        deterministic: bool = True,
        sharding: AttentionSharding | None = None,
        rngs: nnx.Rngs,
    ):
        check_chunks(chunk_size, top_k)
        super().__init__(
            dim,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rotary=rotary,
            qk_norm=qk_norm,
            dtype=dtype,
            param_dtype=param_dtype,
            norm_eps=norm_eps,
            out_init_scale=out_init_scale,
            implementation=implementation,
            deterministic=deterministic,
            sharding=sharding,
            rngs=rngs,
        )
        self.chunk_size, self.top_k = chunk_size, top_k

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        *,
        positions: Int32[Array, "#B T"] | None = None,
        segment_ids: Int32[Array, "#B T"] | None = None,
        schedule: AnySchedule | None = None,
    ) -> Float[Array, "B T D"]:
        """Attends within the documents of x.

        Args:
          x_BTD: The tokens.
          positions: Position of each token, for rotary and for the chunks; default 0, 1, 2, ...
          segment_ids: Document of each token, negative for padding; the tokens of a document stand together.
          schedule: None: which blocks are visited depends on the queries.

        Returns: y in the layer's dtype; zero for padding.
        Raises: ValueError on an x of another dim and on a schedule.
        """
        if schedule is not None:
            raise ValueError("schedule: got one, wanted None; queries of MoBA choose their keys, leave it out")
        q_BTNH, k_BTKH, v_BTKH = self._project(x_BTD, positions)
        attended_BTNH = sharded_moba(
            q_BTNH,
            k_BTKH,
            v_BTKH,
            chunk_size=self.chunk_size,
            top_k=self.top_k,
            tokens=Tokens.self_attention(positions, segment_ids),
            sharding=self.sharding,
            implementation=self.implementation,
            deterministic=self.deterministic_gradients,
        )
        return self.out(constrain(attended_BTNH, "batch", "sequence", "heads", None))

    def init_cache(self, batch_size: int, max_length: int) -> MobaCache:
        """An empty cache with room for `max_length` tokens a row, rounded up to whole chunks.

        Memory: O(batch_size max_length K H). Over a mesh rows and heads are split as those of a KV cache are, and the
          devices of the context axes all have all of it.
        """
        return empty_moba_cache(
            batch_size=batch_size,
            max_length=max_length,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            chunk_size=self.chunk_size,
            dtype=self.dtype,
            sharding=self.sharding,
        )

    def decode(self, x_BTD: Float[Array, "B T D"], cache: MobaCache) -> tuple[Float[Array, "B T D"], MobaCache]:
        """Attends from the next T tokens of one document a row to those before them and to each other.

        Step by step this equals one call on all tokens, to rounding of the mean keys.

        Args:
          x_BTD: T = 1 to generate, T > 1 to prefill.
          cache: From `init_cache` or the previous call.

        Returns: y and the cache with T more tokens. Where they did not fit, y is NaN, since a traced length cannot
          raise.
        Raises: ValueError if T alone exceeds the room of the cache, or x has other rows than it.
        Cost: a token at a time, the scores of all chunks and attention to top_k of them; nothing is sent.
        """
        check_next_tokens("MobaAttention", x_BTD, self.dim, cache_rows=cache.k.shape[0])
        positions = (cache.length + jnp.arange(x_BTD.shape[1], dtype=jnp.int32))[None]
        q_BTNH, k_BTKH, v_BTKH = self._project(x_BTD, positions)
        attended_BTNH, cache = sharded_moba_decode(
            q_BTNH, k_BTKH, v_BTKH, cache, top_k=self.top_k, sharding=self.sharding
        )
        y_BTD = self.out(attended_BTNH)
        return jnp.where(cache.length <= cache.k.shape[1], y_BTD, jnp.nan), cache


def check_chunks(chunk_size: int, top_k: int) -> None:
    """Raises ValueError, naming the option, unless there are chunks for a query to choose."""
    if chunk_size < 1:
        raise ValueError(f"chunk_size: got {chunk_size}, wanted a number of tokens >= 1")
    if top_k < 1:
        raise ValueError(f"top_k: got {top_k}, wanted a number of chunks >= 1, a token's own among them")
