"""Linear attention as a layer: projections, feature maps, norm and gate around `linear_attention`, and its state."""

import abc
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int, Int32

from longctx.arguments import check_choice, check_next_tokens, check_positive, check_sequence, check_tokens
from longctx.attention import causal_pairs, check_heads
from longctx.context_parallel import (
    AnySchedule,
    AttentionSharding,
    ConvolutionShape,
    LinearCache,
    PrefillPlan,
    continued_convolution,
    convolution_of_context,
    empty_linear_cache,
    empty_recent,
    sharded_linear_attention,
    sharded_linear_decode,
    sharded_linear_prefill,
    sharded_short_convolution,
)
from longctx.context_parallel.inference import plan_tokens
from longctx.feature_maps import LRPE, FeatureMap, Pointwise
from longctx.norms import GroupNorm, SimpleRMSNorm
from longctx.projections import projection
from longctx.remat import QKV, named
from longctx.rotary import RotaryConfig, apply_rotary
from longctx.sharding import constrain
from pallas_kernels import Implementation

Gate = Literal["identity", "sigmoid", "swish"]
"""What is done to a projection of x before it multiplies a layer's output."""

OutputNorm = Literal["rms", "group"]
"""`rms`: SimpleRMSNorm over the dims of all heads together. `group`: GroupNorm, each head a group."""

Depth = float | Float[Array, ""]
"""Where a layer stands in its model: 0 the first, 1 the last."""

Convolve = Callable[[Sequence[jax.Array], Sequence[jax.Array]], tuple[jax.Array, ...]]
"""(arrays `[B, T, heads, dims]`, kernels `[W, heads, dims]`) -> the arrays, convolved along T with what came before."""

_GATES = {"identity": lambda x: x, "sigmoid": jax.nn.sigmoid, "swish": jax.nn.silu}
_COUNTED_CHUNK = 64  # tokens, whatever the implementation takes, so that MFU compares
_ELU1 = Pointwise("elu1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateShape:
    """The sizes of a layer's state and of what reads and writes it, global.

    Attributes:
      num_qk_heads: Heads of queries and keys, K.
      num_heads: Heads of values, each with a state of its own, N.
      key_dim: Dims of a query and key as the op takes them, H.
      value_dim: Dims of a value, V.
      normalize: Whether the sums of the weights are kept too, in a column of their own.
      vector_decay: Whether each dim of the keys decays on its own.
      delta_rule: Whether what is written is what the state does not say yet.
    """

    num_qk_heads: int
    num_heads: int
    key_dim: int
    value_dim: int
    normalize: bool = False
    vector_decay: bool = False
    delta_rule: bool = False

    @property
    def columns(self) -> int:
        """Columns of a head's state."""
        return self.value_dim + self.normalize

    def flops(self, document_lengths: Int[np.ndarray, " documents"]) -> float:
        """Floating-point operations of the op on documents of these lengths, in chunks of 64 tokens.

        4 N H V a token, which writes a state and reads it, and 2 N (H + V) for each pair of tokens of one chunk of
        which one may read the other; chunks start with a document. For the delta rule 6 N H V, as keys read the state
        too, and 4 N (H + V), as keys are multiplied by keys and a triangular system of V columns is solved.
        """
        pairs = causal_pairs(document_lengths.astype(np.float64), _COUNTED_CHUNK)
        tokens = float(document_lengths.sum(dtype=np.float64))
        times_of_state, times_of_pairs = (6, 4) if self.delta_rule else (4, 2)
        of_states = times_of_state * tokens * self.key_dim * self.columns
        return self.num_heads * float(of_states + times_of_pairs * pairs * (self.key_dim + self.columns))


class LinearInputs(NamedTuple):
    """What the op reads: queries and keys `[B, T, K, H]`, values `[B, T, N, V]`, and the decay and write strengths, if
    any; and what else a layer makes of the tokens that its output needs."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    decay: jax.Array | None = None
    beta: jax.Array | None = None
    skipped: jax.Array | None = None


class RecurrentLayer(nnx.Module):
    """A layer whose tokens are mixed by `linear_attention` alone: what such layers have in common.

    A subclass says what the op reads (`_inputs`), which must depend on a token and its position alone, but for short
    convolutions, and what is made of the result (`_output`). Then a call, decoding and prefill follow.

    Args:
      dim: Model dim of x and y.
      state: The sizes of its state.
      scale: Multiplies the queries.
      convolution: The sizes of its short convolutions, if it has any.
      max_length: Most tokens of a row; None for any number.
      by_depth: Whether calls must say the depth of the layer.
      dtype: Compute dtype and dtype of y; the state is float32 regardless.
      implementation: Passed to `linear_attention`; None lets it choose.
      sharding: Names the axes of your own mesh that the layer is split over (inside `jax.set_mesh`); None splits it
        over those of `longctx.make_mesh` where such a mesh is in scope.
    """

    def __init__(
        self,
        dim: int,
        *,
        state: StateShape,
        scale: float,
        convolution: ConvolutionShape | None = None,
        max_length: int | None = None,
        by_depth: bool = False,
        dtype: DTypeLike,
        implementation: Implementation | None,
        sharding: AttentionSharding | None,
    ):
        self.dim, self.state, self.scale, self.max_length, self.by_depth = dim, state, scale, max_length, by_depth
        self.convolution = convolution
        self.dtype, self.implementation, self.sharding = jnp.dtype(dtype), implementation, sharding

    @abc.abstractmethod
    def _inputs(
        self, x_BTD: jax.Array, positions_BT: jax.Array, depth: Depth | None, convolve: Convolve
    ) -> LinearInputs:
        """What the op reads of the tokens. `convolve` is to be called once where the layer has convolutions, with the
        arrays that `convolution` says, else never."""

    @abc.abstractmethod
    def _output(self, attended_BTNV: jax.Array, x_BTD: jax.Array, inputs: LinearInputs) -> jax.Array:
        """y, of what the op returned."""

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        *,
        positions: Int32[Array, "#B T"] | None = None,
        segment_ids: Int32[Array, "#B T"] | None = None,
        schedule: AnySchedule | None = None,
        depth: Depth | None = None,
    ) -> Float[Array, "B T D"]:
        """Mixes the tokens of each document of x, each with those before it in its row.

        Args:
          x_BTD: The tokens.
          positions: Position of each token, for encodings of it alone: what a token reads is what stands before it.
            Default 0, 1, 2, ...
          segment_ids: Document of each token, negative for padding; the tokens of a document stand together.
          schedule: None: there is nothing to schedule.
          depth: Depth of the layer, of one that goes by it.

        Returns: y in the layer's dtype; zero for padding.
        Raises: ValueError on an x of another dim, a row of more than max_length tokens, a schedule, and a depth that is
          missing or not wanted.
        Cost: O(T) in time and memory.
        """
        if schedule is not None:
            raise ValueError("schedule: got one, wanted None; linear attention visits no blocks of keys, leave it out")
        self._check(x_BTD, x_BTD.shape[1] if x_BTD.ndim > 1 else 0, depth)
        check_tokens(type(self).__name__, x_BTD.shape[:2], positions=positions, segment_ids=segment_ids)
        length = x_BTD.shape[1]
        if positions is None:
            positions = jnp.arange(length, dtype=jnp.int32)[None]
        convolve = functools.partial(sharded_short_convolution, segment_ids=segment_ids, sharding=self.sharding)
        inputs = self._inputs(x_BTD, positions, depth, convolve)
        if inputs.skipped is not None and segment_ids is not None:
            # The op is zero at padding; what goes past it must be too, and this is fused with its use.
            skipped = jnp.where((segment_ids < 0)[:, :, None, None], 0, inputs.skipped)
            inputs = inputs._replace(skipped=skipped)
        attended = sharded_linear_attention(
            inputs.q,
            inputs.k,
            inputs.v,
            decay=inputs.decay,
            beta=inputs.beta,
            segment_ids=segment_ids,
            scale=self.scale,
            normalize=self.state.normalize,
            sharding=self.sharding,
            implementation=self.implementation,
        )
        return self._output(constrain(attended, "batch", "sequence", "heads", None), x_BTD, inputs)

    def init_cache(self, batch_size: int, max_length: int) -> LinearCache:
        """The state of no tokens, float32, which has room for any number; of convolutions, zeros in the layer's dtype.

        Memory: O(batch_size N H V), whatever max_length is. Over a mesh rows and heads are split as those of a KV cache
          are, and the devices of the context axes all have all of it.
        Raises: ValueError where the layer serves fewer than max_length tokens.
        """
        self._check_length(max_length)
        cache = empty_linear_cache(
            batch_size=batch_size,
            num_heads=self.state.num_heads,
            key_dim=self.state.key_dim,
            state_columns=self.state.columns,
            sharding=self.sharding,
        )
        if self.convolution is None:
            return cache
        recent = empty_recent(self.convolution, batch_size=batch_size, dtype=self.dtype, sharding=self.sharding)
        return cache._replace(recent=recent)

    def decode(
        self, x_BTD: Float[Array, "B T D"], cache: LinearCache, *, depth: Depth | None = None
    ) -> tuple[Float[Array, "B T D"], LinearCache]:
        """Mixes the next T tokens of one document a row with those before them and each other.

        Step by step this equals one call on all tokens.

        Args:
          x_BTD: T = 1 to generate, T > 1 to prefill.
          cache: From `init_cache`, `prefill` or the previous call.
          depth: As in a call.

        Returns: y and the cache with T more tokens.
        Raises: as a call, T alone against max_length, y is NaN behind it; and where x has other rows than the cache.
        Cost: one pass over the state a step, however many tokens it holds; nothing is sent.
        """
        check_next_tokens(type(self).__name__, x_BTD, self.dim, cache_rows=cache.state.shape[0])
        self._check(x_BTD, x_BTD.shape[1], depth)
        positions = (cache.length + jnp.arange(x_BTD.shape[1], dtype=jnp.int32))[None]
        recent = ()

        def convolve(arrays, kernels):
            nonlocal recent
            convolved, recent = continued_convolution(arrays, kernels, cache.recent, sharding=self.sharding)
            return convolved

        inputs = self._inputs(x_BTD, positions, depth, convolve)
        attended, cache = sharded_linear_decode(
            inputs.q,
            inputs.k,
            inputs.v,
            cache._replace(recent=recent),
            decay=inputs.decay,
            beta=inputs.beta,
            scale=self.scale,
            normalize=self.state.normalize,
            sharding=self.sharding,
            implementation=self.implementation,
        )
        return self._output(attended, x_BTD, inputs), cache

    def prefill(
        self,
        x_BTD: Float[Array, "B T D"],
        plan: PrefillPlan,
        max_length: int,
        *,
        schedule: AnySchedule | None = None,
        depth: Depth | None = None,
    ) -> tuple[Float[Array, "B T D"], LinearCache]:
        """Mixes the tokens of a context that is split over devices, one document a row, and keeps the state after it.

        Args:
          x_BTD: The tokens of `plan.places`, of which some are padding.
          plan: How the context is split; exact, without star_block.
          max_length: Tokens of a row to have room for, the context's among them.
          schedule, depth: As in a call.

        Returns: y, of the same places, and the cache.
        Raises: NotImplementedError for star attention; ValueError where the context is longer than max_length, and as a
          call.
        """
        if schedule is not None:
            raise ValueError("schedule: got one, wanted None; linear attention visits no blocks of keys, leave it out")
        plan.num_slots(max_length)  # refuses a context that does not fit
        self._check_length(max_length)
        self._check(x_BTD, plan.length, depth)
        recent = ()

        def convolve(arrays, kernels):
            nonlocal recent
            convolved, recent = convolution_of_context(arrays, kernels, plan=plan, sharding=self.sharding)
            return convolved

        inputs = self._inputs(x_BTD, plan_tokens(plan).q_positions, depth, convolve)
        attended, cache = sharded_linear_prefill(
            inputs.q,
            inputs.k,
            inputs.v,
            plan=plan,
            decay=inputs.decay,
            beta=inputs.beta,
            scale=self.scale,
            normalize=self.state.normalize,
            sharding=self.sharding,
            implementation=self.implementation,
        )
        y = self._output(constrain(attended, "batch", "sequence", "heads", None), x_BTD, inputs)
        return y, cache._replace(recent=recent)

    def _check(self, x_BTD: jax.Array, length: int, depth: Depth | None) -> None:
        check_sequence(type(self).__name__, x_BTD, self.dim)
        if self.by_depth and depth is None:
            raise ValueError(
                "depth: got None, wanted 0.0 for the first layer to 1.0 for the last, since decays go by it; pass "
                "depth, or build the layer with decay_by_depth=False"
            )
        if not self.by_depth and depth is not None:
            raise ValueError(f"depth: got {depth} for a layer that does not go by it, wanted None; leave it out")
        self._check_length(length)

    def _check_length(self, length: int) -> None:
        if self.max_length is not None and length > self.max_length:
            raise ValueError(
                f"horizon: got {self.max_length} with rows of {length} tokens, wanted at least as many, since weights "
                "of tokens farther apart would be negative; raise horizon"
            )


class LinearAttention(RecurrentLayer):
    """Multi-head linear attention, of which many published layers are settings.

    q, k, v = map(x W_q), map(x W_k), x W_v      (q and k then rotated if rotary, or turned if lrpe)
    o = linear_attention(q, k, v, decay)
    y = (gate(x W_g) * norm(o)) W_o              (without W_g where there is no gate)

    Args:
      dim: Model dim of x and y.
      num_heads: Heads of values, N, each with a state of its own.
      num_qk_heads: Heads of queries and keys, K, a divisor of N; head n reads q and k of head n // (N / K). Default N.
      head_dim: Dims of a query and key before the map. Default dim / N.
      value_dim: Dims of a value. Default dim / N.
      feature_map: What q and k become.
      rotary: Rotary position embedding of the features; None leaves it out.
      lrpe: Whether the features are turned with the position at learned speeds, which doubles them.
      log_decay: Log of the factor by which each head's state decays a token, N numbers <= 0; None does not decay.
      decay_by_depth: Whether log_decay is that of the first layer, to be multiplied by 1 - depth: calls must then say
        the depth, a float32 scalar.
      normalize: Whether to divide by the sum of the weights. Default: where no weight can be negative, so a positive
        map without rotary or lrpe.
      output_norm: Norm of the op's result, without a gain; None leaves it.
      gate: What is done to x W_g before it multiplies; None leaves out the gate.
      dtype: Compute dtype and dtype of y; the state is float32 regardless.
      param_dtype: Dtype of the parameters.
      norm_eps: Epsilon of output_norm.
      out_init_scale: Multiplies the initial standard deviation of W_o.
      implementation, sharding: As of `RecurrentLayer`. Kernels serve few sizes of features: others fall to XLA.
      rngs: Source of the initial values (truncated normal, standard deviation 1 / sqrt(fan_in)).

    Raises: ValueError where the numbers of heads and dims do not divide, or the options contradict each other.
    Memory: O(B T (N + K) H) for a call, in the backward pass too; a state is B N H V.
    Reference: Katharopoulos et al., Transformers are RNNs, arXiv:2006.16236, equations 4 - 10.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        num_qk_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        feature_map: FeatureMap = _ELU1,
        rotary: RotaryConfig | None = None,
        lrpe: bool = False,
        log_decay: tuple[float, ...] | None = None,
        decay_by_depth: bool = False,
        normalize: bool | None = None,
        output_norm: OutputNorm | None = None,
        gate: Gate | None = None,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        norm_eps: float = 1e-6,
        out_init_scale: float = 1.0,
        implementation: Implementation | None = None,
        sharding: AttentionSharding | None = None,
        rngs: nnx.Rngs,
    ):
        num_qk_heads = num_heads if num_qk_heads is None else num_qk_heads
        if output_norm is not None:
            check_choice("output_norm", output_norm, get_args(OutputNorm))
        check_gate(gate)
        check_positive(value_dim=value_dim)
        check_qk_heads(num_heads, num_qk_heads)
        check_heads(num_heads, num_heads, head_dim, dim=dim, rotary=rotary is not None)
        check_heads(num_heads, num_heads, value_dim, dim=dim, rotary=False)
        head_dim = dim // num_heads if head_dim is None else head_dim
        value_dim = dim // num_heads if value_dim is None else value_dim
        is_positive = feature_map.is_positive and rotary is None and not lrpe
        normalize = is_positive if normalize is None else normalize
        if normalize and not is_positive:
            raise ValueError(
                "normalize: got True although weights may be negative, and so their sum near zero; wanted False, or a "
                "positive feature map without rotary and lrpe"
            )
        if rotary is not None and lrpe:
            raise ValueError("lrpe: got True with rotary, wanted one encoding of positions; leave one out")
        if log_decay is not None and (len(log_decay) != num_heads or max(log_decay) > 0):
            raise ValueError(f"log_decay: got {log_decay}, wanted num_heads={num_heads} numbers <= 0, or None")
        if decay_by_depth and log_decay is None:
            raise ValueError("decay_by_depth: got True without log_decay, wanted one to scale; give log_decay")
        key_dim = feature_map.num_features(head_dim) * (2 if lrpe else 1)
        super().__init__(
            dim,
            state=StateShape(
                num_qk_heads=num_qk_heads,
                num_heads=num_heads,
                key_dim=key_dim,
                value_dim=value_dim,
                normalize=normalize,
            ),
            scale=1.0 if normalize else head_dim**-0.5,
            max_length=feature_map.max_length,
            by_depth=decay_by_depth,
            dtype=dtype,
            implementation=implementation,
            sharding=sharding,
        )
        self.feature_map, self.rotary, self.log_decay, self.gate_name = feature_map, rotary, log_decay, gate

        kwargs = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        qk_axes, v_axes = ("embed", "kv_heads", "head_dim"), ("embed", "heads", "head_dim")
        self.q = projection(dim, (num_qk_heads, head_dim), logical_axes=qk_axes, **kwargs)
        self.k = projection(dim, (num_qk_heads, head_dim), logical_axes=qk_axes, **kwargs)
        self.v = projection(dim, (num_heads, value_dim), logical_axes=v_axes, **kwargs)
        self.gate = None if gate is None else projection(dim, (num_heads, value_dim), logical_axes=v_axes, **kwargs)
        self.out = projection(
            (num_heads, value_dim),
            dim,
            logical_axes=("heads", "head_dim", "embed"),
            init_scale=out_init_scale,
            **kwargs,
        )
        self.lrpe = LRPE(num_qk_heads, head_dim, param_dtype=param_dtype) if lrpe else None
        self.output_norm = make_output_norm(output_norm, norm_eps)

    def _inputs(self, x_BTD, positions_BT, depth, convolve):
        def features(x_BTKH):
            x_BTKH = self.feature_map(named(x_BTKH, QKV), positions_BT)
            if self.rotary is not None:
                x_BTKH = apply_rotary(x_BTKH, positions_BT, self.rotary)
            if self.lrpe is not None:
                x_BTKH = self.lrpe(x_BTKH, positions_BT)
            return constrain(x_BTKH, "batch", "sequence", "kv_heads", None)

        decay = None
        if self.log_decay is not None:
            decay = jnp.asarray(self.log_decay, jnp.float32)
            decay = decay if depth is None else decay * (1 - jnp.asarray(depth, jnp.float32))
        v_BTNV = constrain(named(self.v(x_BTD), QKV), "batch", "sequence", "heads", None)
        return LinearInputs(features(self.q(x_BTD)), features(self.k(x_BTD)), v_BTNV, decay)

    def _output(self, attended_BTNV, x_BTD, inputs):
        if self.output_norm is not None:
            attended_BTNV = self.output_norm(attended_BTNV)
        if self.gate is not None:
            attended_BTNV = _GATES[self.gate_name](self.gate(x_BTD)) * attended_BTNV
        return self.out(attended_BTNV)


def make_output_norm(name: OutputNorm | None, eps: float) -> SimpleRMSNorm | GroupNorm | None:
    """The norm of heads `[B, T, N, V]` of this name."""
    match name:
        case None:
            return None
        case "rms":
            return SimpleRMSNorm(eps=eps, num_dims=2)
        case "group":
            return GroupNorm(eps=eps)


def check_gate(gate: str | None) -> None:
    """Raises ValueError unless it is None or known."""
    if gate is not None:
        check_choice("gate", gate, get_args(Gate))


def dims_of_head(name: str, value: int | None, dim: int, parts: int) -> int:
    """The dims of a head, by default those of x over so many parts.

    Raises: ValueError, naming the option, where it is not positive or these do not divide.
    """
    check_positive(**{name: value})
    if value is None and dim % parts:
        raise ValueError(f"{name}: dim={dim} is not a multiple of {parts}; set {name}")
    return dim // parts if value is None else value


def check_qk_heads(
    num_heads: int,
    num_qk_heads: int,
    *,
    name: str = "num_qk_heads",
    reason: str = "each query and key head serves the same number of value heads",
) -> None:
    """Raises ValueError, naming the argument, unless each query and key head serves as many value heads.

    Args:
      name: What num_qk_heads is called.
      reason: Why it must divide.
    """
    check_positive(**{"num_heads": num_heads, name: num_qk_heads})
    if num_heads % num_qk_heads:
        raise ValueError(f"{name}: got {num_qk_heads}, wanted a divisor of num_heads={num_heads}; {reason}")
