"""Native Sparse Attention as a layer: projections of each branch, the compression of blocks, gates and a cache."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int32

from longctx.arguments import check_next_tokens, check_positive, check_tokens
from longctx.attention import GroupedQueryLayer
from longctx.context_parallel import (
    AnySchedule,
    AttentionSharding,
    NsaCache,
    empty_nsa_cache,
    new_nsa_blocks,
    sharded_nsa,
    sharded_nsa_blocks,
    sharded_nsa_decode,
)
from longctx.norms import RMSNorm
from longctx.projections import projection
from longctx.remat import QKV, named
from longctx.rotary import RotaryConfig
from longctx.sharding import constrain
from pallas_kernels import Implementation, Tokens
from pallas_kernels.sparse.nsa import BranchKeys
from pallas_kernels.sparse.nsa_blocks import NsaSizes

_ROTARY = RotaryConfig()
_SIZES = NsaSizes()
_KV_AXES = ("embed", "kv_heads", "head_dim")
NUM_BRANCHES = 3


def compress_hidden_dim(head_dim: int) -> int:
    """Hidden dim of the MLP that compresses a block, unless a layer is told another."""
    return 4 * head_dim


class BlockCompression(nnx.Module):
    """A learned map from the tokens of a block to one, the same for all heads.

    y = W_out gelu(W_in vec(x + e)),  e a learned vector a place in the block

    Args:
      block: Tokens of a block.
      head_dim: Dims of a head.
      hidden_dim: Dim between the maps.
      dtype: Compute dtype and dtype of y.
      param_dtype: Dtype of the parameters.
      rngs: Source of the initial values; e starts normal, with standard deviation 0.02.

    Reference: Yuan et al. 2025, Native Sparse Attention, arXiv:2502.11089, equation 7.
    """

    def __init__(
        self, block: int, head_dim: int, hidden_dim: int, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ):
        self.dtype = jnp.dtype(dtype)
        kwargs = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        places = 0.02 * jax.random.normal(rngs.params(), (block, head_dim), param_dtype)
        self.places = nnx.Param(places, logical_axes=("norm", "head_dim"))
        self.hidden = projection((block, head_dim), hidden_dim, logical_axes=("norm", "head_dim", "embed"), **kwargs)
        self.out = projection(hidden_dim, head_dim, logical_axes=("embed", "head_dim"), **kwargs)

    def __call__(self, x: Float[Array, "B M block K H"]) -> Float[Array, "B M K H"]:
        placed = x.astype(self.dtype) + self.places[...].astype(self.dtype)[:, None]
        return self.out(jax.nn.gelu(self.hidden(placed.swapaxes(2, 3))))


class NsaAttention(GroupedQueryLayer):
    """Multi-head causal attention to compressed blocks, to blocks that each group of heads selects, and to a window.

    q = x W_q;  k_c, v_c = x W_k_c, x W_v_c for each branch c   (then normalised if qk_norm, then rotated if rotary)
    compressed: k_c, v_c of each block through an MLP (`BlockCompression`), one for keys and one for values
    gates = sigmoid(x W_gates), one a token, head and branch
    y = nsa_attention(q, compressed, selected, sliding, gates) W_o

    Keys of a block are compressed before they are normalised and rotated; the compressed key is rotated to the position
    of the block's last token. `k` and `v` are the projections of the selected branch.

    Args:
      dim: Model dim of x and y.
      num_heads: Query heads N.
      num_kv_heads: Key and value heads K, a divisor of N; the query heads of a kv head select the same blocks. Default
        N.
      head_dim: Dims of a head. Default dim / N.
      sizes: How much each branch sees.
      compress_dim: Hidden dim of the MLPs; default 4 head_dim.
      rotary: Rotary position embedding, default theta 10000; None leaves q and k as they are.
      qk_norm: RMSNorm over head_dim on each head of q and of each branch's k, one gain for all heads of each.
      dtype: Compute dtype and dtype of y; x and the kernels are cast to it.
      param_dtype: Dtype of the parameters.
      norm_eps: Epsilon of qk_norm.
      out_init_scale: Multiplies the initial standard deviation of W_o.
      implementation: Passed to `nsa_attention`; None lets it choose.
      deterministic: Whether gradients must come out the same, bit by bit, each time; False may be faster.
      sharding: Names the axes of your own mesh that the layer is split over (inside `jax.set_mesh`), and the strategy
        of the sliding branch; None splits it over those of `longctx.make_mesh` where such a mesh is in scope.
      rngs: Source of the initial values (truncated normal, standard deviation 1 / sqrt(fan_in)).

    Raises: ValueError where the numbers of heads and dims do not divide, or compress_dim is not positive.
    Memory: O(B T (N + K) H) for a call, in the backward pass too.
    Reference: Yuan et al. 2025, Native Sparse Attention, arXiv:2502.11089.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        sizes: NsaSizes = _SIZES,
        compress_dim: int | None = None,
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
        check_positive(compress_dim=compress_dim)
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
        self.sizes = sizes
        kwargs = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)

        def keys():
            return projection(dim, (self.num_kv_heads, self.head_dim), logical_axes=_KV_AXES, **kwargs)

        def norm():
            return RMSNorm(self.head_dim, eps=norm_eps, param_dtype=param_dtype) if qk_norm else None

        def compression():
            hidden_dim = compress_hidden_dim(self.head_dim) if compress_dim is None else compress_dim
            return BlockCompression(sizes.compress_block, self.head_dim, hidden_dim, **kwargs)

        self.compressed_k, self.compressed_v, self.sliding_k, self.sliding_v = (keys() for _ in range(4))
        self.compressed_k_norm, self.sliding_k_norm = norm(), norm()
        self.compress_k, self.compress_v = compression(), compression()
        self.gates = projection(dim, (num_heads, NUM_BRANCHES), logical_axes=("embed", "heads", "norm"), **kwargs)

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
          positions: Position of each token, for rotary; default 0, 1, 2, ... They count up by one in each document.
          segment_ids: Document of each token, negative for padding; the tokens of a document stand together.
          schedule: None: which blocks are visited depends on the queries.

        Returns: y in the layer's dtype; zero for padding.
        Raises: ValueError on an x of another dim and on a schedule.
        """
        if schedule is not None:
            raise ValueError("schedule: got one, wanted None; queries of NSA choose their keys, leave it out")
        given = positions
        q_BTNH, positions = self._queries(x_BTD, positions)
        check_tokens("NsaAttention", x_BTD.shape[:2], segment_ids=segment_ids)
        blocks, last = sharded_nsa_blocks(
            self._uncompressed(x_BTD), sizes=self.sizes, segment_ids=segment_ids, positions=given,
            sharding=self.sharding,
        )  # fmt: skip
        attended_BTNH = sharded_nsa(
            q_BTNH,
            self._compressed(blocks, last),
            *self._selected_and_sliding(x_BTD, positions),
            self._gates(x_BTD),
            sizes=self.sizes,
            tokens=Tokens.self_attention(given, segment_ids),
            sharding=self.sharding,
            implementation=self.implementation,
            deterministic=self.deterministic_gradients,
        )
        return self.out(constrain(attended_BTNH, "batch", "sequence", "heads", None))

    def init_cache(self, batch_size: int, max_length: int) -> NsaCache:
        """An empty cache with room for `max_length` tokens a row.

        Memory: O(batch_size max_length K H), 1 + 1 / compress_stride times that of attention. Over a mesh rows and
          heads are split as those of a KV cache are, and the devices of the context axes all have all of it.
        """
        return empty_nsa_cache(
            batch_size=batch_size,
            max_length=max_length,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            sizes=self.sizes,
            dtype=self.dtype,
            sharding=self.sharding,
        )

    def decode(self, x_BTD: Float[Array, "B T D"], cache: NsaCache) -> tuple[Float[Array, "B T D"], NsaCache]:
        """Attends from the next T tokens of one document a row to those before them and to each other.

        Step by step this equals one call on all tokens. The implementation is left to the dispatch, since kernels made
        for training refuse single queries.

        Args:
          x_BTD: T = 1 to generate, T > 1 to prefill.
          cache: From `init_cache` or the previous call.

        Returns: y and the cache with T more tokens. Where they did not fit, y is NaN, since a traced length cannot
          raise.
        Raises: ValueError if T alone exceeds the room of the cache, or x has other rows than it.
        Cost: a token at a time, attention to compressed keys, to num_blocks blocks and to a window; nothing is sent.
        """
        check_next_tokens("NsaAttention", x_BTD, self.dim, cache_rows=cache.selected.shape[0])
        positions = (cache.length + jnp.arange(x_BTD.shape[1], dtype=jnp.int32))[None]
        q_BTNH, _ = self._queries(x_BTD, positions)
        uncompressed = self._uncompressed(x_BTD)
        blocks = new_nsa_blocks(cache, uncompressed, sizes=self.sizes)
        compressed, selected, sliding = (
            jnp.concatenate(x, axis=-1)
            for x in (self._compressed(blocks.tokens, blocks.last), *self._selected_and_sliding(x_BTD, positions))
        )
        attended_BTNH, cache = sharded_nsa_decode(
            q_BTNH, uncompressed, compressed, blocks.number, selected, sliding, self._gates(x_BTD), cache,
            sizes=self.sizes, sharding=self.sharding,
        )  # fmt: skip
        y_BTD = self.out(attended_BTNH)
        return jnp.where(cache.length <= cache.selected.shape[1], y_BTD, jnp.nan), cache

    def _uncompressed(self, x_BTD) -> jax.Array:
        """Keys and values of the compressed branch, side by side, not placed yet."""
        kv = jnp.concatenate(
            [named(project(x_BTD), QKV) for project in (self.compressed_k, self.compressed_v)], axis=-1
        )
        return constrain(kv, "batch", "sequence", "kv_heads", None)

    def _compressed(self, blocks, last) -> BranchKeys:
        """One key and value a block `[B, M, compress_block, K, 2 H]`, whose last tokens have these positions."""
        k, v = jnp.split(blocks, 2, axis=-1)
        return BranchKeys(self._placed_keys(self.compress_k(k), last, self.compressed_k_norm), self.compress_v(v))

    def _selected_and_sliding(self, x_BTD, positions) -> tuple[BranchKeys, BranchKeys]:
        def branch(k, v, norm):
            values = constrain(named(v(x_BTD), QKV), "batch", "sequence", "kv_heads", None)
            return BranchKeys(self._placed_keys(k(x_BTD), positions, norm), values)

        return branch(self.k, self.v, self.k_norm), branch(self.sliding_k, self.sliding_v, self.sliding_k_norm)

    def _gates(self, x_BTD) -> jax.Array:
        """`[B, T, N, branches]`, float32."""
        return jax.nn.sigmoid(self.gates(x_BTD).astype(jnp.float32))
