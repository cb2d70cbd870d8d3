"""Runs attention on each device's shard of a mesh: the one place that wraps a strategy in shard_map.

Kernels cannot be cut up by XLA's partitioner, and loops whose bounds depend on the rows of a batch should not be: each
device runs the op on its own rows and heads, which need nothing from the others, and where the sequence is split too, a
strategy says how queries meet the keys of other devices.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import AbstractMesh, PartitionSpec

from longctx.context_parallel.config import AttentionSharding
from longctx.context_parallel.strategy import Residuals, SavedResults, Setting, ShardedSchedule, Strategy
from longctx.sharding import ACTIVATION_AXES, own_mesh_in_scope
from pallas_kernels import (
    Bias,
    BlockSizes,
    Dropout,
    Mask,
    Schedule,
    Tokens,
    blockwise_attention,
    blockwise_attention_backward,
    blockwise_attention_forward,
    make_schedule,
    sinks_gradient,
)
from pallas_kernels.blockwise.api import check_call
from pallas_kernels.perturbed import is_perturbed, values_of
from pallas_kernels.saved import as_attention

AnySchedule = Schedule | ShardedSchedule
HOP_SCOPE = "context_parallel"  # names, in a compiled program, the collectives that a strategy sends for each layer

_OWN_AXES = {axis: ACTIVATION_AXES[axis] for axis in ("batch", "heads", "sequence")}


def sharded_schedule(
    mask: Mask,
    tokens: Tokens,
    *,
    batch_size: int,
    q_len: int,
    kv_len: int,
    block_sizes: BlockSizes | None = None,
    sharding: AttentionSharding | None = None,
) -> AnySchedule:
    """The schedule that `sharded_attention` takes; to be built once a step per distinct mask, for all layers.

    Args:
      mask, block_sizes: As `pallas_kernels.make_schedule`.
      tokens: Global, as for `sharded_attention`.
      batch_size, q_len, kv_len: Global.
      sharding: As for `sharded_attention`.
    Raises: ValueError where an axis is not of the mesh, or the sequence axes do not divide the lengths, or the layout
        is another than that of the tokens; NotImplementedError where the strategy does not serve the mask or lengths.
    """
    split = AttentionSplit.of(sharding, batch_size)
    if split is None or not split.sequence:
        return make_schedule(mask, tokens, q_len=q_len, kv_len=kv_len, block_sizes=block_sizes)
    setting = split.setting(mask, tokens, q_len=q_len, kv_len=kv_len)
    tokens = split.filled(tokens, q_len, kv_len)

    def shard(tokens):
        return split.strategy(mask).schedule(setting, tokens, block_sizes=block_sizes)

    return jax.shard_map(
        shard,
        in_specs=(split.rows(tokens),),
        out_specs=split.schedule_spec(mask, tokens.q_positions.shape[0]),
        check_vma=False,
    )(tokens)


def sharded_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: Mask,
    tokens: Tokens,
    schedule: AnySchedule | None = None,
    sharding: AttentionSharding | None = None,
    sinks: jax.Array | None = None,
    dropout: Dropout | None = None,
    bias: Bias | None = None,
    deterministic: bool = True,
    **options,
) -> jax.Array:
    """`blockwise_attention` over the mesh in scope.

    Args:
      q, k, v: `[B, T, N, H]`, `[B, S, K, H]`, `[B, S, K, V]`, global.
      mask, deterministic, **options: As `blockwise_attention`; of the options return_lse, block_maxima and
        skip_softmax_threshold on one device alone.
      tokens: Global; where the sequence is split and permuted (layout.py), its positions are those of the permuted
        tokens.
      schedule: From `sharded_schedule` with the same mask, tokens and sharding; None builds it here.
      sharding: The mesh axes to split over; None means those of `longctx.make_mesh` where such a mesh is in scope,
        and otherwise calls the op directly.
      sinks: `[N]`, global; split as the heads are.
      dropout: Global; its seeds are split as rows and heads are, and since they are drawn with by positions and segment
        ids, the result does not depend on the split.
      bias: Global; its parameters are split as the heads are, and it is of positions, so the result does not depend on
        the split.
    Returns: out `[B, T, N, V]`, split as q.
    Raises: ValueError where an axis is not of the mesh, or its size does not divide the kv heads or the lengths, or the
        layout is another than that of the tokens; NotImplementedError where the strategy does not serve the call, or
        the heads are split and the mask differs between them.
    Cost: what the strategy states (the head of its file); nothing moves where the sequence is not split, but for the
      gradients of sinks and of a bias' parameters, N float32 or a few times as many that are summed over the devices
      that split rows and tokens. A batch that the batch axes do not divide is computed by each of their devices in
      full.
    """
    split = AttentionSplit.of(sharding, q.shape[0])
    if split is None:
        return blockwise_attention(
            q, k, v, mask=mask, tokens=tokens, schedule=schedule, sinks=sinks, dropout=dropout,
            bias=bias, deterministic=deterministic, **options,
        )  # fmt: skip
    op = "sharded_attention"
    for name in ("return_lse", "block_maxima", "skip_softmax_threshold"):
        if options.pop(name, None):
            raise NotImplementedError(
                f"{op}: {name} is not served where a mesh splits the call; leave it out, or call blockwise_attention "
                "on one device"
            )
    dropout, bias = check_call(
        op, q, k, v, mask=mask, tokens=tokens, sinks=sinks, bias=bias, dropout=dropout,
        **{name: value for name, value in options.items() if name != "implementation"},
    )  # fmt: skip
    split.check_heads(mask, k.shape[2])
    setting = None
    if split.sequence:
        lengths = dict(q_len=q.shape[1], kv_len=k.shape[1])
        setting = split.setting(mask, tokens, **lengths, num_heads=q.shape[2], num_kv_heads=k.shape[2])
        if schedule is None:
            schedule = sharded_schedule(
                mask,
                tokens,
                batch_size=q.shape[0],
                **lengths,
                block_sizes=options.get("block_sizes"),
                sharding=sharding,
            )
        tokens = split.filled(tokens, **lengths)
    call = _Call(split=split, setting=setting, deterministic=deterministic, options=(("mask", mask), *options.items()))
    return _attention(call, q, k, v, tokens, schedule, sinks, dropout, bias)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshSplit:
    """How one call is split over the mesh in scope; hashable."""

    sharding: AttentionSharding
    batch_size: int
    batch: tuple[str, ...]
    heads: tuple[str, ...]
    heads_size: int
    sequence: tuple[str, ...]
    degree: int
    inner_degree: int | None

    @classmethod
    def of(cls, sharding: AttentionSharding | None, batch_size: int) -> "MeshSplit | None":
        """None where there is nothing to split over."""
        sharding = with_axes(sharding)
        if sharding is None:
            return None
        mesh = jax.sharding.get_abstract_mesh()
        divides = batch_size % axes_size("batch", sharding.batch, mesh) == 0
        degree = axes_size("sequence", sharding.sequence, mesh)
        return cls(
            sharding=sharding,
            batch_size=batch_size,
            batch=sharding.batch if divides else (),
            heads=sharding.heads,
            heads_size=axes_size("heads", sharding.heads, mesh),
            sequence=sharding.sequence if degree > 1 else (),
            degree=degree,
            inner_degree=mesh.shape[sharding.sequence[-1]] if len(sharding.sequence) > 1 else None,
        )

    def batch_of(self, num_rows: int) -> tuple[str, ...]:
        """The axes of arrays of so many rows, which may be one for all."""
        return self.batch if num_rows == self.batch_size else ()


class AttentionSplit(MeshSplit):
    """The same, of softmax attention. `op` names the call in errors."""

    def strategy(self, mask: Mask) -> Strategy:
        return self.sharding.strategy_for(mask)

    def setting(
        self,
        mask: Mask,
        tokens: Tokens,
        *,
        q_len: int,
        kv_len: int,
        num_heads: int | None = None,
        num_kv_heads: int | None = None,
        op: str = "sharded_attention",
    ) -> Setting:
        """The setting of a call, whose strategy must serve it; numbers of heads are global."""
        layout = self.sharding.layout
        given = [x is not None for x in (tokens.q_positions, tokens.kv_positions)]
        if layout is not None and layout.name != "contiguous" and not all(given):
            raise ValueError(
                f"{op}: got positions=None with layout={layout.name}, wanted those of the permuted "
                "tokens; permute them as the tokens, or leave the layout out"
            )
        if layout is not None and layout.is_of_rows and q_len != kv_len:
            raise NotImplementedError(
                f"{op}: got T={q_len} and S={kv_len} with layout={layout.name}, which orders queries and keys alike, "
                "wanted one length; choose another layout"
            )
        multiple = self.degree if layout is None else layout.multiple(self.degree)
        for name, length in (("T", q_len), ("S", kv_len)):
            if length % multiple:
                raise ValueError(
                    f"{op}: {name}={length} does not split over the {self.degree} devices of mesh axes "
                    f"{self.sequence}, which takes a multiple of {multiple}; pad it to a multiple"
                )
        setting = self.sharding.setting(
            mask,
            degree=self.degree,
            axes=self.sequence,
            inner_degree=self.inner_degree,
            q_len=q_len,
            kv_len=kv_len,
            num_heads=num_heads and num_heads // self.heads_size,
            num_kv_heads=num_kv_heads and num_kv_heads // self.heads_size,
            has_positions=any(given),
            has_segments=tokens.q_segment_ids is not None or tokens.kv_segment_ids is not None,
        )
        reason = self.strategy(mask).refusal(setting)
        if reason is not None:
            raise NotImplementedError(f"{op}: {reason}")
        return setting

    def check_heads(self, mask: Mask, num_kv_heads: int, *, op: str = "sharded_attention") -> None:
        if self.heads_size > 1 and mask.head_groups > 1:
            # Every device runs one program, and which of the masks are its heads' would have to be known when that is
            # compiled.
            raise NotImplementedError(
                f"{op}: the mask {mask} differs between heads, and the heads are split over the "
                f"{self.heads_size} devices of mesh axes {self.heads}; keep the heads whole (tensor=1), or use one "
                "mask for all heads"
            )
        if num_kv_heads % self.heads_size:
            raise ValueError(
                f"{op}: {num_kv_heads} kv heads do not split over the {self.heads_size} devices of mesh "
                f"axes {self.heads}; make those axes smaller or num_kv_heads a multiple"
            )

    def filled(self, tokens: Tokens, q_len: int, kv_len: int) -> Tokens:
        """The tokens with nothing None and one number of rows: a shard cannot know its place in the sequence."""
        sides = (*tokens.queries(q_len), *tokens.keys(kv_len))
        num_rows = max(x.shape[0] for x in sides)
        q_positions, q_segment_ids, kv_positions, kv_segment_ids = (
            jnp.broadcast_to(x, (num_rows, x.shape[1])) for x in sides
        )
        return Tokens(
            q_positions=q_positions,
            q_segment_ids=q_segment_ids,
            kv_positions=kv_positions,
            kv_segment_ids=kv_segment_ids,
        )

    @property
    def heads_spec(self) -> PartitionSpec:
        """Of `[B, T, N, H]` arrays."""
        return PartitionSpec(self.batch, self.sequence, self.heads)

    @property
    def lse_spec(self) -> PartitionSpec:
        """Of `[B, N, T]` arrays."""
        return PartitionSpec(self.batch, self.heads, self.sequence)

    def rows(self, tree: Any) -> Any:
        """Of a tree of tokens, or of schedules where the sequence is whole: `[B or 1, ...]`."""
        return jax.tree.map(lambda x: PartitionSpec(self.batch_of(x.shape[0]), self.sequence), tree)

    def sinks_spec(self, sinks: jax.Array | None) -> PartitionSpec | None:
        """Of `[N]` arrays."""
        return None if sinks is None else PartitionSpec(self.heads)

    def bias_spec(self, bias: Bias | None) -> Any:
        """Of its parameters, `[N, ...]`."""
        return jax.tree.map(lambda _: PartitionSpec(self.heads), bias)

    def dropout_spec(self, dropout: Dropout | None) -> Any:
        """Of its seeds, `[B or 1, N]`."""
        return jax.tree.map(lambda seeds: PartitionSpec(self.batch_of(seeds.shape[0]), self.heads), dropout)

    def schedule_spec(self, mask: Mask, num_rows: int) -> PartitionSpec:
        """Of every array of a schedule of the mask's strategy, made of tokens with that many rows."""
        before = (None,) * self.strategy(mask).schedule_dims
        return PartitionSpec(*before, self.batch_of(num_rows), self.sequence)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Call:
    """What is static of a call; hashable. `options` go to both passes, `deterministic` to the backward alone.

    `setting` is None where the sequence is whole.
    """

    split: AttentionSplit
    setting: Setting | None
    deterministic: bool
    options: tuple[tuple[str, Any], ...]

    @property
    def strategy(self) -> Strategy:
        return self.split.strategy(self.setting.mask)

    @property
    def residual_specs(self) -> Residuals:
        split = self.split
        if self.setting is None:
            return Residuals(*(split.heads_spec,) * 4, split.lse_spec)
        return Residuals(*self.strategy.residual_specs(split.batch, split.sequence, split.heads))

    def specs(self, tokens: Tokens, schedule: AnySchedule | None, sinks, dropout, bias) -> tuple:
        split = self.split
        if self.setting is None:
            of_schedule = split.rows(schedule)
        else:
            of_schedule = split.schedule_spec(self.setting.mask, tokens.q_positions.shape[0])
        of_heads = split.sinks_spec(sinks), split.dropout_spec(dropout), split.bias_spec(bias)
        return split.rows(tokens), of_schedule, *of_heads

    def of_own_heads(self, tree: Any, *, axis: int = 0) -> Any:
        """Arrays that have this shard's heads along `axis`, as those that this device is given; per shard."""
        if self.setting is None:
            return tree
        return jax.tree.map(
            lambda x: jnp.moveaxis(self.strategy.own_heads(self.setting, jnp.moveaxis(x, axis, 0)), 0, axis), tree
        )

    def of_heads(self, sinks, dropout, bias) -> dict[str, Any]:
        """The arguments that ops take of heads; per shard."""
        return {
            "sinks": self.of_own_heads(sinks),
            "dropout": self.of_own_heads(dropout, axis=1),
            "bias": self.of_own_heads(bias),
        }

    def over_devices(self, own: Any, like: Any) -> Any:
        """Gradients of arrays `[N, ...]` of this device's heads, as those of all devices, in the dtypes of `like`."""
        axes = *self.split.batch, *self.split.sequence

        def total(own, like):
            if self.setting is not None:
                own = self.strategy.in_all_heads(self.setting, own, len(like))
            return jax.lax.psum(own, axes).astype(like.dtype)

        return jax.tree.map(total, own, like)

    def dsinks(self, sinks: jax.Array | None, residuals: Residuals, dout) -> jax.Array | None:
        """Over all rows and tokens; per shard. dout is split as the residuals are."""
        if sinks is None:
            return None
        own = sinks_gradient(self.of_own_heads(sinks), residuals.out, residuals.lse, dout, None)
        return self.over_devices(own, sinks)


# Differentiated here and not inside the shard_map, whose transpose would add a reduction over every axis that its
# inputs are not split over; and a strategy's backward pass is not the derivative of its forward pass.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(call: _Call, q, k, v, tokens, schedule, sinks, dropout, bias):
    return _forward(call, q, k, v, tokens, schedule, sinks, dropout, bias)[0]


def _forward(call: _Call, q, k, v, tokens, schedule, sinks, dropout, bias) -> tuple[jax.Array, Residuals]:
    options, heads = dict(call.options), call.split.heads_spec
    saved = SavedResults()

    def shard(q, k, v, tokens, schedule, *of_heads):
        extras = call.of_heads(*of_heads)
        if call.setting is not None:
            with jax.named_scope(HOP_SCOPE):
                out, residuals = call.strategy.forward(call.setting, q, k, v, tokens, schedule, **extras, **options)
        else:
            out, lse = blockwise_attention_forward(q, k, v, tokens=tokens, schedule=schedule, **extras, **options)
            residuals = Residuals(q, k, v, out, lse)
        return out, saved.inside((q, k, v, out), residuals)

    out, residuals = jax.shard_map(
        shard,
        in_specs=(heads, heads, heads, *call.specs(tokens, schedule, sinks, dropout, bias)),
        out_specs=(heads, call.residual_specs),
        check_vma=False,  # the op's loops start from constants, which that check would have to be told of
    )(q, k, v, tokens, schedule, sinks, dropout, bias)
    out = as_attention(out)
    return out, saved.outside((q, k, v, out), residuals)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Saved:
    """What the backward pass takes from the forward pass, and whether anything asks for the gradient of the bias."""

    residuals: Residuals
    others: tuple
    bias_gradient: bool = dataclasses.field(metadata={"static": True})


def _attention_fwd(call: _Call, *arguments):
    q, k, v, *others = values_of(arguments)
    out, residuals = _forward(call, q, k, v, *others)
    return out, _Saved(residuals=residuals, others=tuple(others), bias_gradient=is_perturbed(arguments[-1]))


def _attention_bwd(call: _Call, saved: _Saved, dout):
    residuals, (tokens, schedule, sinks, dropout, bias) = saved.residuals, saved.others
    if isinstance(dout, SymbolicZero):
        dout = jnp.zeros(dout.shape, dout.dtype)
    split, options = call.split, dict(call.options) | {"deterministic": call.deterministic}
    if saved.bias_gradient:
        options["bias_gradient"] = True

    # Only out is returned, so lse has no cotangent: None says so to implementations that could not take one.
    def shard(residuals, dout, tokens, schedule, sinks, dropout, bias):
        extras = call.of_heads(None, dropout, bias)
        del extras["sinks"]
        if call.setting is not None:
            with jax.named_scope(HOP_SCOPE):
                dout = call.strategy.like_residuals(call.setting, dout, schedule)
                dq, dk, dv, *dbias = call.strategy.backward(
                    call.setting, residuals, dout, tokens, schedule, **extras, **options
                )
        else:
            dq, dk, dv, *dbias = blockwise_attention_backward(
                *residuals, dout, None, tokens=tokens, schedule=schedule, **extras, **options
            )
        dbias = call.over_devices(dbias[0], bias) if dbias else None
        return dq, dk, dv, call.dsinks(sinks, residuals, dout), dbias

    heads = split.heads_spec
    dq, dk, dv, dsinks, dbias = jax.shard_map(
        shard,
        in_specs=(call.residual_specs, heads, *call.specs(tokens, schedule, sinks, dropout, bias)),
        out_specs=(
            *(heads, heads, heads, split.sinks_spec(sinks)),
            split.bias_spec(bias) if saved.bias_gradient else None,
        ),
        check_vma=False,  # as in the forward
    )(residuals, dout, tokens, schedule, sinks, dropout, bias)
    return dq, dk, dv, None, None, dsinks, None, dbias


_attention.defvjp(_attention_fwd, _attention_bwd, symbolic_zeros=True)


def with_axes(sharding: AttentionSharding | None) -> AttentionSharding | None:
    """The same with axes named, those of `longctx.make_mesh` if it names none; None where there is no such mesh."""
    sharding = sharding or AttentionSharding()
    if sharding.batch or sharding.heads or sharding.sequence:
        return sharding
    return None if own_mesh_in_scope() is None else dataclasses.replace(sharding, **_OWN_AXES)


def axes_size(name: str, axes: tuple[str, ...], mesh: AbstractMesh) -> int:
    """Devices along these axes.

    Raises: ValueError where one is not of the mesh.
    """
    for axis in axes:
        if axis not in mesh.shape:
            raise ValueError(
                f"AttentionSharding: {name} axis {axis!r} is not of the mesh in scope, whose axes are "
                f"{mesh.axis_names}; name one of those, inside jax.set_mesh"
            )
    return math.prod(mesh.shape[axis] for axis in axes)
