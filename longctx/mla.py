"""Multi-head latent attention as a layer: keys and values of all heads out of one low-rank latent a token."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int32

from longctx import masks
from longctx.arguments import check_next_tokens, check_positive, check_sequence
from longctx.context_parallel import (
    AnySchedule,
    AttentionSharding,
    KVCache,
    PrefillPlan,
    empty_cache,
    sharded_attention,
    sharded_decode,
    sharded_prefill,
)
from longctx.context_parallel.inference import plan_tokens
from longctx.norms import RMSNorm
from longctx.projections import projection
from longctx.remat import QKV, named
from longctx.rotary import RotaryConfig, apply_rotary
from longctx.sharding import constrain
from pallas_kernels import Implementation, Mask, Tokens

_CAUSAL = masks.causal()
_ROTARY = RotaryConfig()


class MlaAttention(nnx.Module):
    """Multi-head softmax attention whose keys and values are linear in a latent of few dims (MLA).

    c = RMSNorm(x W_c);  k_rope = rotated(x W_kr), one for all heads
    q = x W_q, or with q_rank  RMSNorm(x W_qc) W_q;  of each head q = (q_nope, rotated(q_rope))
    k_n = (c W_k_n, k_rope),  v_n = c W_v_n
    y = softmax(q k^T / sqrt(head_dim + rope_dim)) v W_o

    In decoding a cache holds c and k_rope alone, kv_rank + rope_dim numbers a token, and W_k and W_v go to the side of
    the queries: q_n . k_n = (q_nope_n W_k_n^T) . c + q_rope_n . k_rope, and out_n = (sum_s P c) W_v_n. All heads then
    attend to one kv head of kv_rank + rope_dim dims, whose values are its first kv_rank.

    Args:
      dim: Model dim of x and y.
      num_heads: Heads N.
      kv_rank: Dims of the latent c of keys and values.
      q_rank: Dims of the latent of queries; None projects them from x.
      head_dim: Dims of a head's queries and keys without position.
      rope_dim: Dims of its queries and keys that are rotated; even. The keys' are shared by all heads.
      value_dim: Dims of a head's values.
      mask: Which pairs of tokens may attend. `& documents()` makes it read segment ids.
      rotary: How fast rotated dims turn.
      dtype: Compute dtype and dtype of y; x and the kernels are cast to it.
      param_dtype: Dtype of the parameters.
      norm_eps: Epsilon of the norms of the latents.
      out_init_scale: Multiplies the initial standard deviation of W_o.
      implementation: Passed to `blockwise_attention`; None lets it choose.
      deterministic: Whether gradients must come out the same, bit by bit, each time; False may be faster.
      sharding: Names the axes of your own mesh that attention is split over (inside `jax.set_mesh`); None splits it
        over those of `longctx.make_mesh` where such a mesh is in scope.
      rngs: Source of the initial values (truncated normal, standard deviation 1 / sqrt(fan_in)).

    Raises: ValueError where a number is not positive, or rope_dim is odd.
    Memory: O(B T N (head_dim + rope_dim + value_dim)) for a call, in the backward pass too.
    Reference: DeepSeek-AI 2024, DeepSeek-V2, arXiv:2405.04434, section 2.1 and appendix C.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        kv_rank: int = 512,
        q_rank: int | None = None,
        head_dim: int = 128,
        rope_dim: int = 64,
        value_dim: int = 128,
        mask: Mask = _CAUSAL,
        rotary: RotaryConfig = _ROTARY,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        norm_eps: float = 1e-6,
        out_init_scale: float = 1.0,
        implementation: Implementation | None = None,
        deterministic: bool = True,
        sharding: AttentionSharding | None = None,
        rngs: nnx.Rngs,
    ):
        check_dims(num_heads, kv_rank, q_rank, head_dim, rope_dim, value_dim)
        self.dim, self.kv_rank, self.head_dim, self.rope_dim = dim, kv_rank, head_dim, rope_dim
        self.mask, self.rotary = mask, rotary
        self.dtype, self.implementation, self.sharding = jnp.dtype(dtype), implementation, sharding
        # Not called `deterministic`, which Flax's train() and eval() would overwrite.
        self.deterministic_gradients = deterministic

        kwargs = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        latent, heads = ("embed", None), ("embed", "heads", "head_dim")
        norm = dict(eps=norm_eps, param_dtype=param_dtype)
        self.q_latent = None if q_rank is None else projection(dim, q_rank, logical_axes=latent, **kwargs)
        self.q_norm = None if q_rank is None else RMSNorm(q_rank, **norm)
        self.q = projection(q_rank or dim, (num_heads, head_dim + rope_dim), logical_axes=heads, **kwargs)
        self.kv_latent = projection(dim, kv_rank, logical_axes=latent, **kwargs)
        self.kv_norm = RMSNorm(kv_rank, **norm)
        self.k_rope = projection(dim, rope_dim, logical_axes=latent, **kwargs)
        self.k = projection(kv_rank, (num_heads, head_dim), logical_axes=heads, **kwargs)
        self.v = projection(kv_rank, (num_heads, value_dim), logical_axes=heads, **kwargs)
        self.out = projection(
            (num_heads, value_dim),
            dim,
            logical_axes=("heads", "head_dim", "embed"),
            init_scale=out_init_scale,
            **kwargs,
        )

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        *,
        positions: Int32[Array, "#B T"] | None = None,
        segment_ids: Int32[Array, "#B T"] | None = None,
        schedule: AnySchedule | None = None,
    ) -> Float[Array, "B T D"]:
        """Attends within x.

        Args:
          x_BTD: The tokens.
          positions: Position of each token, for rotary and for the mask; default 0, 1, 2, ...
          segment_ids: Document of each token, negative for padding; the mask must read them.
          schedule: `sharded_schedule` of this layer's mask and these tokens, where the caller shares it between layers.

        Returns: y in the layer's dtype; zero where a token may attend to nothing.
        Raises: ValueError on segment_ids that the mask would ignore, and on an x of another dim.
        """
        if segment_ids is not None and not self.mask.uses_segments:
            raise ValueError(
                f"segment_ids: passed to an MlaAttention whose mask {self.mask} does not read them; "
                "build it with mask & documents()"
            )
        q_BTNH, latent_BTC = self._project(x_BTD, positions)
        attended_BTNV = sharded_attention(
            q_BTNH,
            *self._keys_and_values(latent_BTC),
            mask=self.mask,
            tokens=Tokens.self_attention(positions, segment_ids),
            schedule=schedule,
            sharding=self.sharding,
            implementation=self.implementation,
            deterministic=self.deterministic_gradients,
        )
        return self.out(constrain(attended_BTNV, "batch", "sequence", "heads", None))

    def init_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache with room for `max_length` tokens a row, of latents in place of keys, and of no values.

        Where the mesh in scope splits sequences over P devices, each holds every P-th token of a row, and room is for a
        multiple of P. Memory O(batch_size max_length (kv_rank + rope_dim) / P) a device.
        """
        return empty_cache(
            batch_size=batch_size,
            max_length=max_length,
            num_kv_heads=1,
            head_dim=self.kv_rank + self.rope_dim,
            values=False,
            dtype=self.dtype,
            mask=self.mask,
            sharding=self.sharding,
        )

    def decode(self, x_BTD: Float[Array, "B T D"], cache: KVCache) -> tuple[Float[Array, "B T D"], KVCache]:
        """Attends from the next T tokens of one document a row to those before them and to each other.

        Step by step this equals one call on all tokens for every mask that lets no token see a later one, to rounding:
        queries are taken to the latents, and not latents to keys. The implementation is left to the dispatch.

        Args:
          x_BTD: T = 1 to generate, T > 1 to prefill.
          cache: From `init_cache`, `prefill` or the previous call.

        Returns: y and the cache with T more tokens. Where they did not fit, y is NaN, since a traced length cannot
          raise.
        Raises: ValueError if T alone exceeds the room of the cache, or x has other rows than it.
        Cost: 2 N (2 kv_rank + rope_dim) a pair of tokens. Over a mesh that splits the cache, tree attention
          (context_parallel/tree.py): the cache stays where it is, and what is sent does not depend on its length.
          Devices that share the heads of a row each work on all of them, since their keys are one head.
        """
        check_next_tokens("MlaAttention", x_BTD, self.dim, cache_rows=cache.k.shape[0])
        positions = (cache.length + jnp.arange(x_BTD.shape[1], dtype=jnp.int32))[None]
        q_BTNH, latent_BTC = self._project(x_BTD, positions)
        q_nope_BTNH, q_rope_BTNR = jnp.split(q_BTNH, [self.head_dim], axis=-1)
        q_nope_BTNC = jnp.einsum("btnh,cnh->btnc", q_nope_BTNH, self.k.matrix(self.dtype))
        attended_BTNC, cache = sharded_decode(
            jnp.concatenate([q_nope_BTNC, q_rope_BTNR], axis=-1),
            latent_BTC[:, :, None],
            None,
            cache,
            value_dim=self.kv_rank,
            mask=self.mask,
            sharding=self.sharding,
            scale=(self.head_dim + self.rope_dim) ** -0.5,
            deterministic=self.deterministic_gradients,
        )
        attended_BTNV = jnp.einsum("btnc,cnv->btnv", attended_BTNC, self.v.matrix(self.dtype))
        return jnp.where(cache.length <= cache.room, self.out(attended_BTNV), jnp.nan), cache

    def prefill(
        self,
        x_BTD: Float[Array, "B T D"],
        plan: PrefillPlan,
        max_length: int,
        *,
        schedule: AnySchedule | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Attends within a context that is split over devices, one document a row; a new cache keeps its latents.

        Args:
          x_BTD: The tokens of `plan.places`, of which some stand more than once and some are padding.
          plan: How the context is split, and whether attention is exact or star attention.
          max_length: Tokens of a row to have room for, the context's among them.
          schedule: `prefill_schedule` of this layer's mask and this plan, where the caller shares it between layers.

        Returns: y, of the same places, and the cache.
        Raises: ValueError where the context is longer than max_length.
        Cost: of exact attention, that of a call; of star attention, nothing is sent.
        """
        tokens = plan_tokens(plan)
        q_BTNH, latent_BTC = self._project(x_BTD, tokens.q_positions)
        attended_BTNV, cache = sharded_prefill(
            q_BTNH,
            *self._keys_and_values(latent_BTC),
            kept=(latent_BTC[:, :, None], None),
            plan=plan,
            num_slots=plan.num_slots(max_length),
            mask=self.mask,
            schedule=schedule,
            sharding=self.sharding,
            implementation=self.implementation,
            deterministic=self.deterministic_gradients,
        )
        return self.out(constrain(attended_BTNV, "batch", "sequence", "heads", None)), cache

    def _project(self, x_BTD, positions):
        """Queries, their last rope_dim dims rotated, and what a cache keeps of a token: c and then k_rope."""
        check_sequence("MlaAttention", x_BTD, self.dim, positions=positions)
        if positions is None:
            positions = jnp.arange(x_BTD.shape[1], dtype=jnp.int32)[None]
        q_BTNH = named(self.q(x_BTD if self.q_latent is None else self.q_norm(self.q_latent(x_BTD))), QKV)
        q_nope_BTNH, q_rope_BTNR = jnp.split(q_BTNH, [self.head_dim], axis=-1)
        q_BTNH = jnp.concatenate([q_nope_BTNH, apply_rotary(q_rope_BTNR, positions, self.rotary)], axis=-1)
        k_rope_BTR = apply_rotary(self.k_rope(x_BTD)[:, :, None], positions, self.rotary)[:, :, 0]
        latent_BTC = jnp.concatenate([self.kv_norm(self.kv_latent(x_BTD)), k_rope_BTR], axis=-1)
        return constrain(q_BTNH, "batch", "sequence", "heads", None), constrain(latent_BTC, "batch", "sequence", None)

    def _keys_and_values(self, latent_BTC):
        """Of every head."""
        c_BTC, k_rope_BTR = jnp.split(latent_BTC, [self.kv_rank], axis=-1)
        k_BTNH, v_BTNV = (named(project(c_BTC), QKV) for project in (self.k, self.v))
        k_rope_BTNR = jnp.broadcast_to(k_rope_BTR[:, :, None], (*k_BTNH.shape[:3], self.rope_dim))
        k_BTNH = jnp.concatenate([k_BTNH, k_rope_BTNR], axis=-1)
        return tuple(constrain(x, "batch", "sequence", "heads", None) for x in (k_BTNH, v_BTNV))


def check_dims(num_heads: int, kv_rank: int, q_rank: int | None, head_dim: int, rope_dim: int, value_dim: int) -> None:
    """Raises ValueError, naming the argument, unless these make a latent attention."""
    check_positive(
        num_heads=num_heads, kv_rank=kv_rank, q_rank=q_rank, head_dim=head_dim, rope_dim=rope_dim, value_dim=value_dim
    )
    if rope_dim % 2:
        raise ValueError(f"rope_dim: got {rope_dim}, wanted an even number for rotary positions; use {rope_dim + 1}")
