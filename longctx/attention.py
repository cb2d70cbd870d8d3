"""Softmax attention as a layer: projections, rotary positions and a KV cache around `blockwise_attention`."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int32

from longctx import masks
from longctx.arguments import check_next_tokens, check_positive, check_sequence, check_soft_cap
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
from longctx.position_bias import BiasConfig, PositionBias
from longctx.projections import projection
from longctx.remat import QKV, named
from longctx.rotary import RotaryConfig, apply_rotary
from longctx.sharding import constrain
from pallas_kernels import Bias, BlockSizes, Dropout, Implementation, Mask, Tokens
from pallas_kernels.dropout import check_rate

RandomSource = nnx.Rngs | nnx.RngStream | jax.Array
"""Where a call draws from, as Flax's layers take it: streams, of which it takes `dropout`; a stream; or a typed random
key. Also a key for each row of the batch, `[B]`: then a row's draws do not depend on what other rows are in it."""

_CAUSAL = masks.causal()
_ROTARY = RotaryConfig()


def key_of(rngs: RandomSource) -> jax.Array:
    """The next key of a random source.

    Raises: ValueError where it is an array that is no typed key.
    """
    if isinstance(rngs, nnx.Rngs):
        rngs = rngs.dropout
    if isinstance(rngs, nnx.RngStream):
        return rngs()
    if not jnp.issubdtype(rngs.dtype, jax.dtypes.prng_key):
        raise ValueError(f"rngs: got {rngs.dtype}{list(rngs.shape)}, wanted a typed key; make it with jax.random.key")
    return rngs


class AttentionDropout(nnx.Module):
    """Whether and how much an attention layer drops: a module of its own, for Flax's `train()` and `eval()` to reach.

    Args:
      rate: The share of attention probabilities that is dropped in training, 0 <= rate < 1.
      deterministic: As in `flax.nnx.Dropout`: nothing is dropped. `train()` makes it false, `eval()` true.
    """

    def __init__(self, rate: float, *, deterministic: bool = False):
        check_rate("dropout_rate", rate)
        self.rate, self.deterministic = rate, deterministic

    def __call__(self, rngs: RandomSource | None, *, batch_size: int, num_heads: int) -> Dropout | None:
        """What the op is to drop; None in evaluation.

        Raises: ValueError in training without a random source.
        """
        if self.deterministic:
            return None
        if rngs is None:
            raise ValueError(
                f"rngs: got None in training, wanted a random source for dropout_rate={self.rate}; pass "
                "rngs=nnx.Rngs(dropout=seed) to the call, or call eval() on the module to drop nothing"
            )
        return Dropout.of_key(self.rate, key_of(rngs), batch_size=batch_size, num_heads=num_heads)


class GroupedQueryLayer(nnx.Module):
    """What layers of grouped-query attention have in common: the projections, their norms and rotary positions.

    q, k, v = x W_q, x W_k, x W_v   (then normalised if qk_norm, then rotated if rotary)

    Args:
      As of `Attention`.

    Raises: ValueError where the numbers of heads and dims do not divide.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        num_kv_heads: int | None,
        head_dim: int | None,
        rotary: RotaryConfig | None,
        qk_norm: bool,
        qkv_bias: bool = False,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        norm_eps: float,
        out_init_scale: float,
        implementation: Implementation | None,
        deterministic: bool,
        sharding: AttentionSharding | None,
        rngs: nnx.Rngs,
    ):
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_heads(num_heads, num_kv_heads, head_dim, dim=dim, rotary=rotary is not None)
        head_dim = dim // num_heads if head_dim is None else head_dim
        self.dim, self.num_kv_heads, self.head_dim, self.rotary = dim, num_kv_heads, head_dim, rotary
        self.dtype, self.implementation, self.sharding = jnp.dtype(dtype), implementation, sharding
        # Not called `deterministic`, which Flax's train() and eval() would overwrite.
        self.deterministic_gradients = deterministic

        kwargs = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        q_axes, kv_axes = ("embed", "heads", "head_dim"), ("embed", "kv_heads", "head_dim")
        self.q = projection(dim, (num_heads, head_dim), logical_axes=q_axes, use_bias=qkv_bias, **kwargs)
        self.k = projection(dim, (num_kv_heads, head_dim), logical_axes=kv_axes, use_bias=qkv_bias, **kwargs)
        self.v = projection(dim, (num_kv_heads, head_dim), logical_axes=kv_axes, use_bias=qkv_bias, **kwargs)
        self.out = projection(
            (num_heads, head_dim),
            dim,
            logical_axes=("heads", "head_dim", "embed"),
            init_scale=out_init_scale,
            **kwargs,
        )
        self.q_norm = RMSNorm(head_dim, eps=norm_eps, param_dtype=param_dtype) if qk_norm else None
        self.k_norm = RMSNorm(head_dim, eps=norm_eps, param_dtype=param_dtype) if qk_norm else None

    def _project(self, x_BTD, positions):
        """q, k and v of tokens at these positions; None is 0, 1, 2, ..."""
        q_BTNH, positions = self._queries(x_BTD, positions)
        k_BTKH = self._placed_keys(self.k(x_BTD), positions, self.k_norm)
        return q_BTNH, k_BTKH, constrain(named(self.v(x_BTD), QKV), "batch", "sequence", "kv_heads", None)

    def _queries(self, x_BTD, positions):
        """q of tokens at these positions, and the positions; None is 0, 1, 2, ..."""
        check_sequence(type(self).__name__, x_BTD, self.dim, positions=positions)
        if positions is None:
            positions = jnp.arange(x_BTD.shape[1], dtype=jnp.int32)[None]
        q_BTNH = self._placed(self.q(x_BTD), positions, self.q_norm)
        return constrain(q_BTNH, "batch", "sequence", "heads", None), positions

    def _placed_keys(self, k_BTKH, positions, norm: RMSNorm | None):
        return constrain(self._placed(k_BTKH, positions, norm), "batch", "sequence", "kv_heads", None)

    def _placed(self, x_BTNH, positions, norm: RMSNorm | None):
        """Queries or keys, normalised and rotated."""
        x_BTNH = named(x_BTNH, QKV)
        x_BTNH = x_BTNH if norm is None else norm(x_BTNH)
        return x_BTNH if self.rotary is None else apply_rotary(x_BTNH, positions, self.rotary)


class Attention(GroupedQueryLayer):
    """Multi-head softmax attention with grouped queries.

    q, k, v = x W_q, x W_k, x W_v   (plus biases if qkv_bias, then normalised if qk_norm, then rotated if rotary)
    y = blockwise_attention(q, k, v, mask) W_o

    Args:
      dim: Model dim of x and y.
      num_heads: Query heads N.
      num_kv_heads: Key and value heads K, a divisor of N; query head n reads kv head n // (N / K). Default N.
      head_dim: Dims of a head. Default dim / N.
      mask: Which pairs of tokens may attend. `& documents()` makes it read segment ids.
      rotary: Rotary position embedding, default theta 10000; None leaves q and k as they are.
      qk_norm: RMSNorm over head_dim on each head of q and k, one gain for all heads.
      qkv_bias: Whether learned vectors, which start at zero, are added to q, k and v.
      logits_soft_cap: Logits become cap * tanh(logits / cap); None leaves them.
      bias: What is added to the logits for the distance of a pair of tokens, after the cap; its models have no rotary
        positions, `rotary=None`.
      sinks: Whether each query head has a learned logit that takes part in the softmax and has no value, so that a
        token may attend to nothing. They start at 0, a softmax with 1 more in its denominator.
      dropout_rate: The share of attention probabilities that is dropped in training, 0 <= rate < 1. Follows `train()`,
        which is how a layer starts out, and `eval()`; decoding drops nothing.
      dtype: Compute dtype and dtype of y; x and the kernels are cast to it.
      param_dtype: Dtype of the parameters.
      norm_eps: Epsilon of qk_norm.
      out_init_scale: Multiplies the initial standard deviation of W_o.
      implementation: Passed to `blockwise_attention`; None lets it choose.
      block_sizes: Passed to `blockwise_attention`; None takes its table.
      deterministic: Whether gradients must come out the same, bit by bit, each time; False may be faster. It has
        nothing to do with the option of that name of Flax's layers, which switches dropout off, as `eval()` does here.
      sharding: Names the axes of your own mesh that attention is split over (inside `jax.set_mesh`); None splits it
        over those of `longctx.make_mesh` where such a mesh is in scope.
      rngs: Source of the initial values (truncated normal, standard deviation 1 / sqrt(fan_in)).

    Raises: ValueError where the numbers of heads and dims do not divide, or logits_soft_cap is not positive.
    Memory: O(B T (N + K) H) for a call, in the backward pass too.
    Reference: Ainslie et al., GQA, arXiv:2305.13245. Sinks: Agarwal et al. 2025, gpt-oss, arXiv:2508.10925; that they
      start at 0: Miller 2023, Attention is off by one. Biases: pallas_kernels/bias.py.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        mask: Mask = _CAUSAL,
        rotary: RotaryConfig | None = _ROTARY,
        qk_norm: bool = False,
        qkv_bias: bool = False,
        logits_soft_cap: float | None = None,
        bias: BiasConfig | None = None,
        sinks: bool = False,
        dropout_rate: float = 0.0,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        norm_eps: float = 1e-6,
        out_init_scale: float = 1.0,
        implementation: Implementation | None = None,
        block_sizes: BlockSizes | None = None,
        deterministic: bool = True,
        sharding: AttentionSharding | None = None,
        rngs: nnx.Rngs,
    ):
        check_soft_cap("logits_soft_cap", logits_soft_cap)
        super().__init__(
            dim,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rotary=rotary,
            qk_norm=qk_norm,
            qkv_bias=qkv_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            norm_eps=norm_eps,
            out_init_scale=out_init_scale,
            implementation=implementation,
            deterministic=deterministic,
            sharding=sharding,
            rngs=rngs,
        )
        self.mask, self.logits_soft_cap, self.block_sizes = mask, logits_soft_cap, block_sizes
        kwargs = dict(param_dtype=param_dtype, rngs=rngs)
        self.bias = None if bias is None else PositionBias(bias, dim, num_heads, **kwargs)
        self.sinks = nnx.Param(jnp.zeros((num_heads,), param_dtype), logical_axes=("heads",)) if sinks else None
        self.dropout = AttentionDropout(dropout_rate) if dropout_rate else None

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        *,
        positions: Int32[Array, "#B T"] | None = None,
        segment_ids: Int32[Array, "#B T"] | None = None,
        schedule: AnySchedule | None = None,
        rngs: RandomSource | None = None,
    ) -> Float[Array, "B T D"]:
        """Attends within x.

        Args:
          x_BTD: The tokens.
          positions: Position of each token, for rotary and for the mask; default 0, 1, 2, ...
          segment_ids: Document of each token, negative for padding; the mask must read them.
          schedule: `sharded_schedule` of this layer's mask and these tokens, where the caller shares it between layers.
          rngs: What dropout draws from; the layer keeps no random state. None where nothing is dropped.

        Returns: y in the layer's dtype; zero where a token may attend to nothing.
        Raises: ValueError on segment_ids that the mask would ignore, on an x of another dim, and where there is
          something to drop and no rngs.
        """
        if segment_ids is not None and not self.mask.uses_segments:
            raise ValueError(
                f"segment_ids: passed to an Attention whose mask {self.mask} does not read them; "
                "build it with mask & documents()"
            )
        q_BTNH, k_BTKH, v_BTKH = self._project(x_BTD, positions)
        dropout = None
        if self.dropout is not None:
            dropout = self.dropout(rngs, batch_size=q_BTNH.shape[0], num_heads=q_BTNH.shape[2])
        attended_BTNH = sharded_attention(
            q_BTNH,
            k_BTKH,
            v_BTKH,
            mask=self.mask,
            tokens=Tokens.self_attention(positions, segment_ids),
            schedule=schedule,
            sharding=self.sharding,
            sinks=self._sinks(),
            bias=self._bias(),
            dropout=dropout,
            logits_soft_cap=self.logits_soft_cap,
            block_sizes=self.block_sizes,
            implementation=self.implementation,
            deterministic=self.deterministic_gradients,
        )
        return self.out(constrain(attended_BTNH, "batch", "sequence", "heads", None))

    def init_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache with room for `max_length` tokens a row.

        Where the mesh in scope splits sequences over P devices, each holds every P-th token of a row, and room is for a
        multiple of P. Memory O(batch_size max_length K H / P) a device.
        """
        return empty_cache(
            batch_size=batch_size,
            max_length=max_length,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
            mask=self.mask,
            sharding=self.sharding,
        )

    def decode(self, x_BTD: Float[Array, "B T D"], cache: KVCache) -> tuple[Float[Array, "B T D"], KVCache]:
        """Attends from the next T tokens of one document a row to those before them and to each other.

        Step by step this equals one call on all tokens for every mask that lets no token see a later one. The
        implementation is left to the dispatch, since not all that serve training serve single queries.

        Args:
          x_BTD: T = 1 to generate, T > 1 to prefill.
          cache: From `init_cache`, `prefill` or the previous call.

        Returns: y and the cache with T more tokens. Where they did not fit, y is NaN, since a traced length cannot
          raise.
        Raises: ValueError if T alone exceeds the room of the cache, or x has other rows than it.
        Cost: over a mesh that splits the cache, tree attention (context_parallel/tree.py): the cache stays where it is,
          and what is sent does not depend on its length.
        """
        check_next_tokens("Attention", x_BTD, self.dim, cache_rows=cache.k.shape[0])
        positions = (cache.length + jnp.arange(x_BTD.shape[1], dtype=jnp.int32))[None]
        q_BTNH, k_BTKH, v_BTKH = self._project(x_BTD, positions)
        attended_BTNH, cache = sharded_decode(
            q_BTNH,
            k_BTKH,
            v_BTKH,
            cache,
            mask=self.mask,
            sharding=self.sharding,
            sinks=self._sinks(),
            bias=self._bias(),
            logits_soft_cap=self.logits_soft_cap,
            deterministic=self.deterministic_gradients,
        )
        y_BTD = self.out(attended_BTNH)
        return jnp.where(cache.length <= cache.room, y_BTD, jnp.nan), cache

    def prefill(
        self,
        x_BTD: Float[Array, "B T D"],
        plan: PrefillPlan,
        max_length: int,
        *,
        schedule: AnySchedule | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Attends within a context that is split over devices, one document a row, and keeps it in a new cache.

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
        q_BTNH, k_BTKH, v_BTKH = self._project(x_BTD, tokens.q_positions)
        attended_BTNH, cache = sharded_prefill(
            q_BTNH,
            k_BTKH,
            v_BTKH,
            plan=plan,
            num_slots=plan.num_slots(max_length),
            mask=self.mask,
            schedule=schedule,
            sharding=self.sharding,
            sinks=self._sinks(),
            bias=self._bias(),
            logits_soft_cap=self.logits_soft_cap,
            block_sizes=self.block_sizes,
            implementation=self.implementation,
            deterministic=self.deterministic_gradients,
        )
        return self.out(constrain(attended_BTNH, "batch", "sequence", "heads", None)), cache

    def _bias(self) -> Bias | None:
        return None if self.bias is None else self.bias()

    def _sinks(self) -> jax.Array | None:
        return None if self.sinks is None else self.sinks[...]


def causal_pairs(lengths: Float[np.ndarray, " documents"], chunk: int) -> float:
    """Pairs of a token and one before it, or itself, in documents of these lengths that are cut into chunks."""
    whole, rest = np.divmod(lengths, chunk)
    return float((whole * chunk * (chunk + 1) / 2 + rest * (rest + 1) / 2).sum())


def window_pairs(lengths: Float[np.ndarray, " documents"], window: int | None) -> float:
    """Pairs of a token and one of the last `window`, itself among them; None means all before it."""
    seen = lengths if window is None else np.minimum(lengths, window)
    return float((seen * (seen + 1) / 2 + (lengths - seen) * seen).sum())


def earlier_chunks(
    lengths: Float[np.ndarray, " documents"], chunk: int, most: Float[np.ndarray, " documents"] | float
) -> float:
    """Chunks before its own, over all tokens, where a token sees so many of them, or all if they are fewer."""
    num_whole, rest = np.divmod(lengths, chunk)
    fewer = np.minimum(num_whole, most)
    of_whole = fewer * (fewer - 1) / 2 + (num_whole - fewer) * most
    return float((chunk * of_whole + rest * fewer).sum())


def check_heads(
    num_heads: int, num_kv_heads: int, head_dim: int | None, *, dim: int | None = None, rotary: bool
) -> None:
    """Raises ValueError, naming the argument, unless these make a grouped-query attention.

    A head_dim of None stands for dim / num_heads, which is checked where `dim` is known.
    """
    check_positive(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)
    if num_heads % num_kv_heads:
        raise ValueError(
            f"num_kv_heads: got {num_kv_heads}, wanted a divisor of num_heads={num_heads}; "
            "each kv head serves the same number of query heads"
        )
    if head_dim is None and dim is not None:
        if dim % num_heads:
            raise ValueError(f"head_dim: dim={dim} is not a multiple of num_heads={num_heads}; set head_dim")
        head_dim = dim // num_heads
    if rotary and head_dim is not None and head_dim % 2:
        raise ValueError(f"head_dim: got {head_dim}, wanted an even number for rotary positions; use {head_dim + 1}")
