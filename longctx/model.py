"""The decoder-only language model: embeddings and blocks repeated in periods."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32

from longctx.arguments import check_ids, check_names, check_soft_cap, check_tokens
from longctx.attention import RandomSource, key_of
from longctx.block import Block
from longctx.context_parallel import (
    AnySchedule,
    AttentionSharding,
    PrefillPlan,
    Relayout,
    cache_degree,
    prefill_schedule,
    sharded_schedule,
)
from longctx.context_parallel.relayout import sharding_of_runs
from longctx.lora import LoraConfig, add_adapters, check_targets
from longctx.mixers.registry import MixerConfig
from longctx.norms import RMSNorm
from longctx.remat import MLP_HIDDEN, Remat, check_remat, rematerialised
from longctx.sharding import constrain
from longctx.unembedding import logits_of
from pallas_kernels import BlockSizes, Mask, Tokens

FloatDType = Literal["float32", "bfloat16", "float16"]

_TABLE_GAIN = 0.64  # times 1 / sqrt(dim), it makes the customary 0.02 at dim 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape and numerics of a TransformerLM. Hashable; `mixers` is copied, and must not be changed afterwards."""

    vocab_size: int | None = None
    """Number of token ids; null takes the tokenizer's."""
    dim: int
    """Model dim: size of the residual stream."""
    num_layers: int
    """Number of blocks."""
    mlp_dim: int
    """Hidden dim of the gated MLP."""
    mixers: Mapping[str, MixerConfig]
    """Sequence mixers by a name of your choice, for `pattern` to refer to."""
    pattern: tuple[str, ...]
    """Names of mixers, one a layer, repeated over the layers; the last repetition may be cut short."""
    edge_layers: int = 0
    """Layers at either end, the first and the last so many, that have edge_mixer; the pattern repeats between them."""
    edge_mixer: str | None = None
    """Name of the mixer of those layers: full attention in the place of sparse, say. Null if there are none."""
    tie_embeddings: bool = True
    """Whether the output projection is the embedding table."""
    logits_soft_cap: float | None = None
    """Final logits become cap * tanh(logits / cap); null leaves them."""
    norm_eps: float = 1e-6
    """Epsilon of every RMSNorm."""
    dtype: FloatDType = "bfloat16"
    """Compute dtype of activations and matmuls; statistics and logits are float32 regardless."""
    param_dtype: FloatDType = "float32"
    """Dtype that parameters are stored in."""
    scan_layers: bool = True
    """Whether a loop runs over the repetitions of the pattern, so that compile time does not grow with depth. Without,
    nothing is copied into and out of what a loop keeps of each layer: faster, most where much is kept."""
    lora: LoraConfig | None = None
    """Low-rank adapters, to train in the place of all that the model had before: that then stays as it is, in
    param_dtype, and adapters are float32. Null trains everything."""
    mlp_tile: int | None = None
    """Tokens on each device for which a layer's MLP, with its norm, is computed at a time, in the backward pass once
    more, so that its hidden dim is never held for all tokens; null computes all at once. Exact, whatever `remat` is."""
    remat: Remat = "none"
    """What the backward pass recomputes. `none`: nothing. `dots`: norms, activations and attention, keeping the outputs
    of the projections and of the MLP's matmuls. `full`: everything, keeping each layer's input. Each uses less memory
    and more time than the one before. Or save, offload (to the host's memory) or recompute by the name of a tensor:
    residual, qkv, attention, mixer_output, mlp_hidden (docs/long_sequences.md); names that are left out are as in
    `full`."""

    def __post_init__(self):
        object.__setattr__(self, "mixers", dict(self.mixers))
        check_names("pattern", self.pattern)
        object.__setattr__(self, "pattern", tuple(self.pattern))
        for name in ("dim", "num_layers", "mlp_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, wanted a number >= 1")
        if self.mlp_tile is not None and self.mlp_tile < 1:
            raise ValueError(f"mlp_tile: got {self.mlp_tile}, wanted null or a number of tokens >= 1")
        if self.vocab_size is not None and self.vocab_size < 1:
            raise ValueError(f"vocab_size: got {self.vocab_size}, wanted null or a number >= 1")
        if not self.pattern:
            raise ValueError("pattern: got no names, wanted at least one; name a mixer")
        known = ", ".join(self.mixers)
        for name in self.pattern:
            if name not in self.mixers:
                raise ValueError(f"pattern: got {name!r}, wanted names of mixers ({known}); define it under mixers")
        self._check_edges()
        if isinstance(self.remat, Mapping):
            object.__setattr__(self, "remat", dict(self.remat))
        check_remat(self.remat, {name: mixer.tensor_names for name, mixer in self.mixers.items()})
        of_hidden = "recompute" if isinstance(self.remat, str) else self.remat.get(MLP_HIDDEN, "recompute")
        if self.mlp_tile is not None and of_hidden != "recompute":
            raise ValueError(
                f"remat: got {MLP_HIDDEN}={of_hidden} with mlp_tile={self.mlp_tile}, which never holds it for all "
                "tokens, wanted recompute; leave one of them out"
            )
        for name in self.mixers:
            if name not in (*self.pattern, self.edge_mixer):
                raise ValueError(
                    f"mixers: {name!r} is not in pattern {self.pattern}, so no layer would use it; remove it"
                )
        check_soft_cap("logits_soft_cap", self.logits_soft_cap)
        if not self.norm_eps > 0:
            raise ValueError(f"norm_eps: got {self.norm_eps}, wanted a number > 0; 1e-6 is customary")

    def _check_edges(self):
        if self.edge_layers < 0:
            raise ValueError(f"edge_layers: got {self.edge_layers}, wanted a number of layers >= 0")
        if (self.edge_layers == 0) != (self.edge_mixer is None):
            raise ValueError(
                f"edge_mixer: got {self.edge_mixer!r} with edge_layers={self.edge_layers}, wanted a mixer and layers "
                "for it, or neither; set both"
            )
        if self.edge_mixer is not None and self.edge_mixer not in self.mixers:
            raise ValueError(
                f"edge_mixer: got {self.edge_mixer!r}, wanted a name of a mixer ({', '.join(self.mixers)}); define it "
                "under mixers"
            )
        if self.edge_layers and 2 * self.edge_layers >= self.num_layers:
            raise ValueError(
                f"edge_layers: got {self.edge_layers} at either end of num_layers={self.num_layers}, which leaves none "
                "for the pattern; take fewer"
            )

    def __hash__(self):
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        return hash(tuple(frozenset(value.items()) if isinstance(value, dict) else value for value in values))

    @property
    def is_stochastic(self) -> bool:
        """Whether a layer draws random numbers in training."""
        return any(mixer.is_stochastic for mixer in self.mixers.values())

    @property
    def leading(self) -> tuple[str, ...]:
        """The names of the layers before the first repetition of the pattern."""
        return (self.edge_mixer,) * self.edge_layers

    @property
    def num_periods(self) -> int:
        """Whole repetitions of the pattern."""
        return (self.num_layers - 2 * self.edge_layers) // len(self.pattern)

    @property
    def remainder(self) -> tuple[str, ...]:
        """The names of the layers after the last whole repetition."""
        return self.pattern[: (self.num_layers - 2 * self.edge_layers) % len(self.pattern)] + self.leading

    @property
    def layers(self) -> tuple[str, ...]:
        """The name of each layer's mixer."""
        return self.leading + self.pattern * self.num_periods + self.remainder

    @property
    def periods_in_runs(self) -> bool:
        """Whether tokens go into and come out of a repetition of the pattern in runs, if the layout has none: where it
        begins and ends with layers that need them."""
        return bool(self.num_periods) and all(self.mixers[self.pattern[place]].needs_runs for place in (0, -1))

    @property
    def num_relayouts(self) -> int:
        """How often tokens change their order in a forward pass, in a layout that has no runs."""

        def changes(names, held: bool, left: bool) -> int:
            orders = [held, *(self.mixers[name].needs_runs for name in names), left]
            return sum(before != after for before, after in itertools.pairwise(orders))

        inside = self.periods_in_runs
        return (
            changes(self.leading, False, inside)
            + self.num_periods * changes(self.pattern, inside, inside)
            + changes(self.remainder, inside, False)
        )

    @property
    def first_of_remainder(self) -> int:
        """The number of the layer after the last whole repetition."""
        return self.num_layers - len(self.remainder)


class _ScheduleKey(NamedTuple):
    mask: Mask
    block_sizes: BlockSizes | None


class DecodeCache(NamedTuple):
    """The mixers' caches, in the layout of the layers: one for each layer before the pattern, one stacked over the
    periods for each position of it, and one for each remaining layer."""

    leading: tuple[Any, ...]
    periods: tuple[Any, ...]
    remainder: tuple[Any, ...]


class TransformerLM(nnx.Module):
    """Decoder-only transformer.

    x = E[tokens];  x = block_i(x) for every layer;  logits = soft_cap(norm(x) U^T),  U = E if tied

    The layers of one position in the pattern are one Block whose parameters have a leading dim over the periods; a scan
    runs over whole periods, so compile time does not grow with depth; the remaining layers follow one by one, and those
    before the pattern, where there are any, stand one by one in front.

    Matrices start truncated normal with standard deviation 1 / sqrt(fan_in), the two of each block that write into the
    residual another 1 / sqrt(2 num_layers) smaller, E and U with 0.64 / sqrt(dim): much more, and with tied embeddings
    a token starts out predicting itself. Gains start at one.

    Args:
      config: Its vocab_size must be set.
      sharding: How layers are split over a mesh where their tokens are; None means a ring over the axes of
        `longctx.make_mesh`, where such a mesh is in scope.
      rngs: Source of the initial values, stream `params`.

    Raises: ValueError if config.vocab_size is None.
    Memory: a backward pass keeps, a layer, what `config.remat` says: at least its input, O(B T dim).
    """

    def __init__(self, config: ModelConfig, *, sharding: AttentionSharding | None = None, rngs: nnx.Rngs):
        if config.vocab_size is None:
            raise ValueError("vocab_size: got None, wanted the number of token ids; set it with dataclasses.replace")
        self.config, self.sharding = config, sharding
        param_dtype = jnp.dtype(config.param_dtype)
        # JAX's own truncated_normal takes the deviation before truncation, which leaves 0.88 of it.
        table_init = jax.nn.initializers.variance_scaling(
            _TABLE_GAIN**2, "fan_in", "truncated_normal", in_axis=1, out_axis=0
        )

        def table():
            values = table_init(rngs.params(), (config.vocab_size, config.dim), param_dtype)
            return nnx.Param(values, logical_axes=("vocab", "embed"))

        self.embedding = table()
        self.leading = nnx.List(_block(config, name, sharding, rngs) for name in config.leading)
        self.periods = nnx.List(
            _stacked_block(config, name, sharding, rngs) for name in (config.pattern if config.num_periods else ())
        )
        self.remainder = nnx.List(_block(config, name, sharding, rngs) for name in config.remainder)
        self.final_norm = RMSNorm(config.dim, eps=config.norm_eps, param_dtype=param_dtype)
        self.unembedding = None if config.tie_embeddings else table()
        if config.lora is not None:
            check_targets(config.lora, self)

    def __call__(
        self,
        tokens_BT: Int32[Array, "B T"],
        *,
        positions: Int32[Array, "#B T"] | None = None,
        segment_ids: Int32[Array, "#B T"] | None = None,
        rngs: RandomSource | None = None,
    ) -> Float32[Array, "B T V"]:
        """Scores of the token after each token.

        Args: As of `hidden`.
        Returns: logits, float32. Training takes `hidden` and `fused_cross_entropy`, which need no logits.
        Raises: ValueError in training without rngs, where there is something to draw.
        """
        return self._logits(self.hidden(tokens_BT, positions=positions, segment_ids=segment_ids, rngs=rngs))

    def hidden(
        self,
        tokens_BT: Int32[Array, "B T"],
        *,
        positions: Int32[Array, "#B T"] | None = None,
        segment_ids: Int32[Array, "#B T"] | None = None,
        rngs: RandomSource | None = None,
    ) -> Float[Array, "B T D"]:
        """What the logits are made of: the last layer's output after the final norm, in the compute dtype.

        logits = soft_cap(hidden output_table^T)

        Args:
          tokens_BT: Token ids; an id outside the vocabulary, negative or too large, gives NaN. Those of padding are not
            read.
          positions: Position of each token in its document; default 0, 1, 2, ... along the row.
          segment_ids: Document of each token, negative for padding; nothing crosses documents. Default: one a row.
          rngs: What a config that `is_stochastic` draws from in training, one key for the whole call or one a row; each
            layer's is that with the number of the layer folded in. None after `eval()`.

        Raises: ValueError in training without rngs, where there is something to draw, and where the arrays do not fit.
        """
        check_ids("TransformerLM", tokens_BT)
        check_tokens("TransformerLM", tokens_BT.shape, positions=positions, segment_ids=segment_ids)
        config, schedules = self.config, self._schedules(tokens_BT.shape, positions, segment_ids)
        relayout = None
        if any(mixer.needs_runs for mixer in config.mixers.values()):
            relayout = Relayout.of(
                self.sharding, batch_size=tokens_BT.shape[0], positions=positions, segment_ids=segment_ids
            )
        # One for all layers, since a stream could not be advanced inside the scan over them.
        key = key_of(rngs) if config.is_stochastic and rngs is not None else None

        def layer(block: Block, name: str, x_BTD: jax.Array, index, *, prevent_cse: bool) -> jax.Array:
            of_tokens = dict(positions=positions, segment_ids=segment_ids)
            if relayout is not None and config.mixers[name].needs_runs:
                of_tokens = dict(positions=relayout.positions, segment_ids=relayout.segment_ids)

            def run(block, x_BTD, index):
                schedule = schedules.get(_schedule_key(config.mixers[name]))
                draws = key is not None and config.mixers[name].is_stochastic
                with jax.named_scope(f"layer.{name}"):
                    return block(
                        x_BTD, **of_tokens, schedule=schedule,
                        rngs=_folded(key, index) if draws else None, depth=self._depth(name, index),
                    )  # fmt: skip

            return rematerialised(run, config.remat, prevent_cse=prevent_cse)(block, x_BTD, index)

        def in_order(x_BTD, held_in_runs: bool, wanted_in_runs: bool) -> jax.Array:
            if relayout is None or held_in_runs == wanted_in_runs:
                return x_BTD
            x_BTD = relayout.in_runs(x_BTD) if wanted_in_runs else relayout.in_layout(x_BTD)
            return constrain(x_BTD, "batch", "sequence", None)

        def along(x_BTD, blocks, names, numbers, *, held_in_runs: bool, left_in_runs: bool, prevent_cse: bool):
            """Layers one after the other; those that need runs of tokens between two changes of their order."""
            for block, name, number in zip(blocks, names, numbers, strict=True):
                needs_runs = config.mixers[name].needs_runs
                x_BTD = in_order(x_BTD, held_in_runs, needs_runs)
                x_BTD = layer(block, name, x_BTD, number, prevent_cse=prevent_cse)
                held_in_runs = needs_runs
            return in_order(x_BTD, held_in_runs, left_in_runs)

        def period(x_BTD, blocks_and_number):
            blocks, number = blocks_and_number
            numbers = [self._number(number, place) for place in range(len(blocks))]
            # A loop already keeps XLA from merging the recomputation with the forward pass.
            order = dict(held_in_runs=config.periods_in_runs, left_in_runs=config.periods_in_runs)
            return along(x_BTD, blocks, config.pattern, numbers, **order, prevent_cse=not config.scan_layers), None

        order = dict(held_in_runs=False, left_in_runs=config.periods_in_runs)
        x_BTD = self._embed(tokens_BT, segment_ids)
        x_BTD = along(x_BTD, self.leading, config.leading, range(len(self.leading)), **order, prevent_cse=True)
        if self.periods:
            x_BTD, _ = jax.lax.scan(
                period, x_BTD, (tuple(self.periods), jnp.arange(config.num_periods)), unroll=not config.scan_layers
            )
        order = dict(held_in_runs=config.periods_in_runs, left_in_runs=False)
        numbers = range(config.first_of_remainder, config.num_layers)
        x_BTD = along(x_BTD, self.remainder, config.remainder, numbers, **order, prevent_cse=True)
        with jax.named_scope("logits"):
            return self.final_norm.of_sum(x_BTD)[1]

    @property
    def output_table(self) -> Float[Array, "V D"]:
        """What `hidden` is multiplied with: the output projection or, tied, the embedding, in its own dtype."""
        return (self.embedding if self.unembedding is None else self.unembedding)[...]

    def init_cache(self, batch_size: int, max_length: int) -> DecodeCache:
        """Empty caches with room for `max_length` tokens a row.

        Memory: O(num_layers batch_size max_length K H / P) a device for attention layers, with or without a window,
          where the mesh in scope splits sequences over P devices; for linear attention O(num_layers batch_size N H V),
          whatever max_length is.
        """
        num_periods = self.config.num_periods

        def stacked(cache):
            return jax.tree.map(lambda x: jnp.broadcast_to(x, (num_periods, *x.shape)), cache)

        return DecodeCache(
            leading=tuple(block.init_cache(batch_size, max_length) for block in self.leading),
            periods=tuple(stacked(block.init_cache(batch_size, max_length)) for block in self.periods),
            remainder=tuple(block.init_cache(batch_size, max_length) for block in self.remainder),
        )

    def decode(self, tokens_BT: Int32[Array, "B T"], cache: DecodeCache) -> tuple[Float32[Array, "B T V"], DecodeCache]:
        """Scores after each of the next T tokens of one document a row; T > 1 to prefill, 1 to generate.

        Step by step this equals one call on all tokens.

        Args:
          tokens_BT: Token ids.
          cache: From `init_cache`, `prefill` or the previous call; jit with it donated to update it in place.

        Returns: logits and the cache after these tokens; logits are NaN once the cache overflows.
        Raises: ValueError where the tokens are no integers [batch, length], or have other rows than the cache.
        """
        check_ids("TransformerLM", tokens_BT)
        config = self.config

        def period(x_BTD, blocks_caches_and_number):
            blocks, caches, number = blocks_caches_and_number
            new_caches = []
            for place, (block, name, cache) in enumerate(zip(blocks, config.pattern, caches, strict=True)):
                depth = self._depth(name, self._number(number, place))
                x_BTD, cache = block.decode(x_BTD, cache, depth=depth)
                new_caches.append(cache)
            return x_BTD, tuple(new_caches)

        def one_by_one(x_BTD, blocks, names, caches, first):
            new_caches = []
            for place, (block, name, cache) in enumerate(zip(blocks, names, caches, strict=True)):
                x_BTD, cache = block.decode(x_BTD, cache, depth=self._depth(name, first + place))
                new_caches.append(cache)
            return x_BTD, tuple(new_caches)

        x_BTD, leading_caches = one_by_one(self._embed(tokens_BT), self.leading, config.leading, cache.leading, 0)
        period_caches = ()
        if self.periods:
            along = tuple(self.periods), cache.periods, jnp.arange(config.num_periods)
            x_BTD, period_caches = jax.lax.scan(period, x_BTD, along)
        x_BTD, remainder_caches = one_by_one(
            x_BTD, self.remainder, config.remainder, cache.remainder, config.first_of_remainder
        )
        return self._logits(self.final_norm(x_BTD)), DecodeCache(leading_caches, period_caches, remainder_caches)

    def prefill(self, tokens_BT: Int32[Array, "B T"], max_length: int, *, star_block: int | None = None) -> DecodeCache:
        """Caches that hold a context, which is split over the devices of the mesh in scope, one document a row.

        Each device works on a run of the context and keeps it. Then `decode` goes on: with the last token of the
        context, if it was held back for its scores, or with a question about it.

        Without star_block this is exact: the caches hold what `decode` would have put into them.

        With star_block = b it is star attention, an approximation that is made for questions about long contexts: the
        context is cut into blocks of b tokens, and in every layer a token sees, of what the layer's mask lets it see,
        its own block and the first alone. Each device works on whole blocks and on a copy of the first in front of
        them, and sends nothing. Tokens keep their positions. Exact where the context is one block.

        Args:
          tokens_BT: The context; every device has all of it.
          max_length: Tokens of a row to have room for, the context's among them.
          star_block: Tokens of a block of star attention; of one block a device, a P-th of the context.

        Returns: the caches.
        Raises: NotImplementedError where a mixer has no prefill; ValueError where the context is no integers
          [batch, length], has no tokens, or more than max_length, or star_block is not positive.
        Cost: the layers on T / P tokens a device, of star attention on b more, and what attention sends. Parameters
          that are split over the context axes are gathered, as in training.
        Reference: Acharya, Jia and Ginsburg, Star Attention, arXiv:2411.17116, section 2.1.
        """
        check_ids("TransformerLM", tokens_BT, may_be_empty=True)  # the plan refuses that, with what to do instead
        plan = PrefillPlan(length=tokens_BT.shape[1], degree=cache_degree(self.sharding), star_block=star_block)
        pattern = zip(self.config.pattern if self.periods else (), self.periods, strict=True)
        ends = zip(self.config.leading + self.config.remainder, (*self.leading, *self.remainder), strict=True)
        for name, block in (*pattern, *ends):
            if not hasattr(block.mixer, "prefill"):
                raise NotImplementedError(
                    f"prefill: mixer {name!r} of kind {self.config.mixers[name].kind!r} has none; pass the context to "
                    "decode instead"
                )
        schedules = {
            key: prefill_schedule(
                key.mask,
                plan,
                batch_size=tokens_BT.shape[0],
                block_sizes=key.block_sizes,
                sharding=self.sharding,
            )
            for key in self._schedule_keys()
        }

        config = self.config

        def layer(block: Block, name: str, x_BTD: jax.Array, index) -> tuple[jax.Array, Any]:
            schedule = schedules.get(_schedule_key(config.mixers[name]))
            return block.prefill(x_BTD, plan, max_length, schedule=schedule, depth=self._depth(name, index))

        def period(x_BTD, blocks_and_number):
            blocks, number = blocks_and_number
            caches = []
            for place, (block, name) in enumerate(zip(blocks, config.pattern, strict=True)):
                x_BTD, cache = layer(block, name, x_BTD, self._number(number, place))
                caches.append(cache)
            return x_BTD, tuple(caches)

        def one_by_one(x_BTD, blocks, names, first):
            caches = []
            for place, (block, name) in enumerate(zip(blocks, names, strict=True)):
                x_BTD, cache = layer(block, name, x_BTD, first + place)
                caches.append(cache)
            return x_BTD, tuple(caches)

        x_BTD = self._embed(jnp.take(tokens_BT, jnp.asarray(plan.places), axis=1, mode="clip"))
        x_BTD, leading_caches = one_by_one(x_BTD, self.leading, config.leading, 0)
        period_caches = ()
        if self.periods:
            along = tuple(self.periods), jnp.arange(config.num_periods)
            x_BTD, period_caches = jax.lax.scan(period, x_BTD, along)
        _, remainder_caches = one_by_one(x_BTD, self.remainder, config.remainder, config.first_of_remainder)
        return DecodeCache(leading_caches, period_caches, remainder_caches)

    def _number(self, period: jax.Array, place: int) -> jax.Array:
        """The number of the layer at a place of the pattern in one of its repetitions."""
        return len(self.config.leading) + period * len(self.config.pattern) + place

    def _depth(self, name: str, index: jax.typing.ArrayLike) -> jax.Array | None:
        """Where a layer of this mixer and number stands, 0 the first and 1 the last; None where it does not matter."""
        if not self.config.mixers[name].uses_depth:
            return None
        return jnp.asarray(index, jnp.float32) / max(self.config.num_layers - 1, 1)

    def _schedule_keys(self) -> set[_ScheduleKey]:
        return {_schedule_key(mixer) for mixer in self.config.mixers.values()} - {None}

    def _schedules(
        self, shape: tuple[int, int], positions: jax.Array | None, segment_ids: jax.Array | None
    ) -> dict[_ScheduleKey, AnySchedule]:
        """One schedule for each distinct mask, shared by all layers that have it."""
        batch_size, length = shape
        return {
            key: sharded_schedule(
                key.mask,
                Tokens.self_attention(positions, segment_ids),
                batch_size=batch_size,
                q_len=length,
                kv_len=length,
                block_sizes=key.block_sizes,
                sharding=self.sharding,
            )
            for key in self._schedule_keys()
        }

    def _embed(self, tokens_BT: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        # Cast after the lookup, so that the gradients of a frequent token add up in the parameters' dtype.
        with jax.named_scope("embedding"):
            if segment_ids is not None:
                # Attention multiplies padding by 0, which leaves the NaN of an id outside the vocabulary as it is.
                tokens_BT = jnp.where(segment_ids < 0, 0, tokens_BT)
            rows = self.embedding[...].at[tokens_BT]
            x_BTD = rows.get(mode="fill", wrap_negative_indices=False).astype(self.config.dtype)
        return constrain(x_BTD, "batch", "sequence", None)

    def _logits(self, hidden_BTD: jax.Array) -> jax.Array:
        with jax.named_scope("logits"):
            return logits_of(hidden_BTD, self.output_table, soft_cap=self.config.logits_soft_cap)


def _schedule_key(mixer: MixerConfig) -> _ScheduleKey | None:
    return None if mixer.mask is None else _ScheduleKey(mixer.mask, mixer.block_sizes)


def _block(config: ModelConfig, name: str, sharding: AttentionSharding | None, rngs: nnx.Rngs) -> Block:
    try:
        return _built(config, name, sharding, rngs)
    except (ValueError, NotImplementedError) as error:
        raise type(error)(f"mixers.{name}: {error}") from error


def _built(config: ModelConfig, name: str, sharding: AttentionSharding | None, rngs: nnx.Rngs) -> Block:
    block = Block(
        config.dim,
        mixer=config.mixers[name],
        mlp_dim=config.mlp_dim,
        norm_eps=config.norm_eps,
        mlp_tile=config.mlp_tile,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        out_init_scale=(2 * config.num_layers) ** -0.5,
        prevent_cse=config.remat == "none" and not config.scan_layers,
        sharding=sharding_of_runs(sharding) if config.mixers[name].needs_runs else sharding,
        rngs=rngs,
    )
    if config.lora is not None:
        add_adapters(block, config.lora, rngs)
    return block


def _stacked_block(config: ModelConfig, name: str, sharding: AttentionSharding | None, rngs: nnx.Rngs) -> Block:
    """A Block whose every parameter has a leading dim over the periods, each period with its own initial values."""

    @nnx.split_rngs(splits=config.num_periods)
    @nnx.vmap
    def build(rngs):
        return _block(config, name, sharding, rngs)

    block = build(rngs)
    for _, param in nnx.iter_graph(block):
        if isinstance(param, nnx.Param):
            param.set_metadata(logical_axes=("layers", *param.get_metadata("logical_axes")))
    return block


def _folded(key: jax.Array, index: jax.typing.ArrayLike) -> jax.Array:
    """The key, or the key of each row, with the number of a layer folded in."""
    return jax.random.fold_in(key, index) if key.ndim == 0 else jax.vmap(jax.random.fold_in, (0, None))(key, index)
