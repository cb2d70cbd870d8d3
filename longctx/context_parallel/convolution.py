"""Short causal convolutions over a mesh: a token reads itself and the W - 1 before it, so only so many travel.

A device keeps one or two runs of neighbouring tokens, and receives the last W - 1 before each: those at the end of the
run that comes before it (chain.py), of all arrays that are convolved together in one message. In the backward pass what
the convolution gives these goes back to their owners in float32, and is rounded with theirs.

Traffic, per device and layer, in bytes, C the channels of a device, b the size of their dtype; at most, as the ends of
the sequence send less:
  forward   R permutes of B (W - 1) C b; R is 1, or 2 for zigzag
  backward  R permutes of B (W - 1) C 4
With segment ids, R more of 4 (W - 1) bytes a row in the forward pass. In the backward pass the gradient of the kernels
is summed over the devices of rows and tokens: an all-reduce of W C 4.

Preconditions: those of state_passing.py, and runs of at least W - 1 tokens.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, DTypeLike, Float, Int32

from longctx.context_parallel.api import HOP_SCOPE, MeshSplit
from longctx.context_parallel.chain import Chain
from longctx.context_parallel.config import AttentionSharding
from longctx.context_parallel.inference import CacheSplit, PrefillPlan
from longctx.context_parallel.layout import Layout
from longctx.context_parallel.strategy import num_bytes
from longctx.context_parallel.traffic import Transfer

_OP = "sharded_short_convolution"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvolutionShape:
    """The sizes of convolutions of one layer, global.

    Attributes:
      width: Tokens that a token reads, itself among them, W.
      heads: Of each array, its heads and their dims, every dim with a kernel of its own.
    """

    width: int
    heads: tuple[tuple[int, int], ...]

    @property
    def flops(self) -> float:
        """Floating-point operations a token."""
        return 2.0 * self.width * sum(math.prod(of) for of in self.heads)

    def channels(self, heads_split: int) -> int:
        """Channels of a device; heads that do not divide are whole on each."""
        return sum(num * dim // (heads_split if num % heads_split == 0 else 1) for num, dim in self.heads)


def sharded_short_convolution(
    xs: Sequence[Float[Array, "B T _ _"]],
    kernels: Sequence[Float[Array, "W _ _"]],
    *,
    segment_ids: Int32[Array, "#B T"] | None = None,
    sharding: AttentionSharding | None = None,
) -> tuple[Float[Array, "B T _ _"], ...]:
    """Causal convolutions along T of each dim of each head, over the mesh in scope; within documents.

    y[t] = sum_j kernel[W - 1 - j] x[t - j],  j = 0 ... W - 1,  of those x[t - j] that are of t's document

    Args:
      xs: Arrays of heads, global, in the order of the sharding's layout.
      kernels: Of each, the weights, of one W; the last is that of the token itself.
      segment_ids: Document of each token, as of `linear_attention`; all padding is one document.
      sharding: As for `sharded_linear_attention`.
    Returns: the y, in the dtypes of the xs, computed in float32.
    Raises: ValueError, saying why, where the tokens cannot be split as they are: `refusal`.
    Cost: O(B T C W); what is sent is at the head of this file.
    """
    width, (batch_size, length) = kernels[0].shape[0], xs[0].shape[:2]
    split = MeshSplit.of(sharding, batch_size)
    if split is None or not split.sequence or width == 1:
        return _of_whole_rows(xs, kernels, segment_ids)
    layout = split.sharding.layout or Layout()
    reason = refusal(split.sharding, width=width, seq_len=length, degree=split.degree)
    if reason is not None:
        raise ValueError(f"{_OP}: {reason}")
    heads = tuple(split.heads if x.shape[2] % split.heads_size == 0 else () for x in xs)
    call = _Call(split=split, chain=Chain.of(layout, split.degree, split.sequence), heads=heads)
    return _sharded(call, tuple(xs), tuple(kernels), segment_ids)


def continued_convolution(
    xs: Sequence[Float[Array, "B T _ _"]],
    kernels: Sequence[Float[Array, "W _ _"]],
    recent: Sequence[Float[Array, "B w _ _"]],
    *,
    sharding: AttentionSharding | None = None,
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """The same of the next T tokens of one document a row, given the last W - 1 before them.

    Returns: the y, and the last W - 1 tokens now. Nothing is sent, but for new tokens that come in split along T.
    """
    ys, after = [], []
    for x, kernel, before in zip(xs, kernels, recent, strict=True):
        x = _whole(x, sharding)
        ys.append(_convolved(x[:, None], before[:, None], kernel, None)[:, 0].astype(x.dtype))
        seen = jnp.concatenate([before, x], axis=1)
        after.append(_whole(seen[:, x.shape[1] :], sharding))
    return tuple(ys), tuple(after)


def convolution_of_context(
    xs: Sequence[Float[Array, "B T _ _"]],
    kernels: Sequence[Float[Array, "W _ _"]],
    *,
    plan: PrefillPlan,
    sharding: AttentionSharding | None = None,
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """The same of a context that is split over devices, one document a row, and its last W - 1 tokens.

    A context so short that a device's run is shorter than that is brought to every device.

    Args:
      xs: Of `plan.places`.
    Returns: the y, of the same places, and what `continued_convolution` takes, zeros where the context is shorter.
    """
    width, num_places = kernels[0].shape[0], len(plan.places)
    split = plan.sharding(sharding)
    to_sequence = np.argsort(split.layout.order(num_places, plan.degree))
    if refusal(split, width=width, seq_len=num_places, degree=plan.degree) is None:
        ys = sharded_short_convolution(xs, kernels, sharding=split)
    else:
        rows = [_whole(x, sharding)[:, to_sequence] for x in xs]
        ys = tuple(y[:, np.argsort(to_sequence)] for y in _of_whole_rows(rows, kernels, None))
    missing = max(0, width - 1 - plan.length)
    last = to_sequence[plan.length - (width - 1 - missing) : plan.length]
    padding = (0, 0), (missing, 0), (0, 0), (0, 0)
    return ys, tuple(_whole(jnp.pad(x[:, last], padding), sharding) for x in xs)


def empty_recent(
    shape: ConvolutionShape, *, batch_size: int, dtype: DTypeLike, sharding: AttentionSharding | None = None
) -> tuple[jax.Array, ...]:
    """What a cache holds before the first token: `[B, W - 1, heads, dims]` of zeros."""

    def zeros():
        return tuple(jnp.zeros((batch_size, shape.width - 1, *of), dtype) for of in shape.heads)

    specs = tuple(_whole_spec(batch_size, num_heads, sharding) for num_heads, _ in shape.heads)
    return zeros() if None in specs else jax.jit(zeros, out_shardings=specs)()


def refusal(sharding: AttentionSharding, *, width: int, seq_len: int, degree: int) -> str | None:
    """Why a convolution cannot be split this way, in one sentence with a remedy; None if it can."""
    layout = sharding.layout or Layout()
    runs, multiple = layout.runs(degree), layout.multiple(degree)
    if degree == 1:
        return None
    if runs is None:
        return (
            f"a convolution needs devices that hold runs of neighbouring tokens, got layout={layout.name}; choose "
            "layout=contiguous or zigzag"
        )
    if seq_len % multiple:
        return (
            f"a convolution over {degree} devices takes a multiple of {multiple} tokens, got {seq_len}; pad the rows, "
            "or change the layout or the mesh"
        )
    run = seq_len // degree // runs.shape[1]
    if run < width - 1:
        return (
            f"a convolution of {width} tokens reads {width - 1} before a device's own, got runs of {run} "
            f"({seq_len} tokens over {degree} devices, layout={layout.name}); make rows longer, or conv_size smaller"
        )
    return None


def transfers(
    sharding: AttentionSharding,
    *,
    rows: int,
    shape: ConvolutionShape,
    degree: int,
    heads_split: int,
    dtype: DTypeLike,
    segment_ids: bool,
) -> tuple[Transfer, ...]:
    """What one device sends for one layer, but for the gradient of the kernels, as the head of this file states it.

    Args: as `state_passing.transfers`, `shape` in the place of a state's.
    """
    if degree == 1 or shape.width == 1:
        return ()
    num_runs = Chain.of(sharding.layout or Layout(), degree).num_runs
    tokens = rows, shape.width - 1
    of_channels = (*tokens, shape.channels(heads_split))
    sizes = [("forward", num_bytes(dtype, *of_channels)), ("backward", num_bytes(jnp.float32, *of_channels))]
    sizes += [("forward", num_bytes(jnp.int32, *tokens))] * segment_ids
    return tuple(
        Transfer(kind="collective-permute", phase=phase, count=num_runs, num_bytes=size, before_attention=True)
        for phase, size in sizes
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Call:
    """What is static of a call; hashable. `heads` are the axes of each array's heads."""

    split: MeshSplit
    chain: Chain
    heads: tuple[tuple[str, ...], ...]

    def specs(self) -> tuple[PartitionSpec, ...]:
        """Of the arrays of tokens, and of the tokens before their runs, `[B, P R, w, ...]`."""
        return tuple(PartitionSpec(self.split.batch, self.split.sequence, heads) for heads in self.heads)

    def specs_before(self) -> tuple[PartitionSpec, ...]:
        return tuple(PartitionSpec(self.split.batch, self.split.sequence, None, heads) for heads in self.heads)

    def specs_of_kernels(self) -> tuple[PartitionSpec, ...]:
        return tuple(PartitionSpec(None, heads) for heads in self.heads)

    def spec_of_ids(self, ids: jax.Array | None) -> PartitionSpec | None:
        return None if ids is None else PartitionSpec(self.split.batch_of(ids.shape[0]), self.split.sequence)

    def runs(self, x: jax.Array) -> jax.Array:
        """Of `[B, R L, ...]` `[B, R, L, ...]`; per shard."""
        return x.reshape(x.shape[0], self.chain.num_runs, -1, *x.shape[2:])


class _Ids(NamedTuple):
    """The documents of runs of tokens `[B or 1, R, L]`, and of the W - 1 before them."""

    own: jax.Array
    before: jax.Array

    def same(self, distance: int) -> jax.Array:
        """Whether a token is of the document of the one so far before it."""
        length = self.own.shape[2]
        ids = jnp.maximum(jnp.concatenate([self.before, self.own], axis=2), -1)
        start = ids.shape[2] - length - distance
        return ids[:, :, start : start + length] == ids[:, :, -length:]


def _of_whole_rows(xs, kernels, segment_ids: jax.Array | None) -> tuple[jax.Array, ...]:
    """Where the tokens of a row are together: left to the partitioner."""
    width = kernels[0].shape[0]
    ids = None
    if segment_ids is not None:
        ids = _Ids(segment_ids[:, None], _zeros_before(segment_ids[:, None], width))
    return tuple(
        _convolved(x[:, None], _zeros_before(x[:, None], width), kernel, ids)[:, 0].astype(x.dtype)
        for x, kernel in zip(xs, kernels, strict=True)
    )


class _Residuals(NamedTuple):
    xs: tuple[jax.Array, ...]
    halos: tuple[jax.Array, ...]
    kernels: tuple[jax.Array, ...]
    segment_ids: jax.Array | None
    ids_before: jax.Array | None


# Differentiated here and not inside the shard_map, as state passing is.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sharded(call: _Call, xs, kernels, segment_ids):
    return _forward(call, xs, kernels, segment_ids)[0]


def _forward(call: _Call, xs, kernels, segment_ids):
    last = kernels[0].shape[0] - 1

    def shard(xs, kernels, segment_ids):
        runs = [call.runs(x) for x in xs]
        halos = _unpacked(call.chain.of_runs_before(_packed([run[:, :, -last:] for run in runs])), runs, last)
        ids = None
        if segment_ids is not None:
            own = call.runs(segment_ids)
            ids = _Ids(own, call.chain.of_runs_before(own[:, :, -last:]))
        ys = tuple(
            _convolved(*arrays, ids).astype(x.dtype).reshape(x.shape)
            for x, *arrays in zip(xs, runs, halos, kernels, strict=True)
        )
        return ys, halos, None if ids is None else ids.before

    of_ids = call.spec_of_ids(segment_ids)
    ys, halos, ids_before = jax.shard_map(
        _in_scope(shard),
        in_specs=(call.specs(), call.specs_of_kernels(), of_ids),
        out_specs=(call.specs(), call.specs_before(), of_ids),
        check_vma=False,  # as in state_passing.py
    )(xs, kernels, segment_ids)
    return ys, _Residuals(xs, halos, kernels, segment_ids, ids_before)


def _backward(call: _Call, residuals: _Residuals, dys):
    def shard(residuals, dys):
        xs, halos, kernels, segment_ids, ids_before = residuals
        ids = None if segment_ids is None else _Ids(call.runs(segment_ids), ids_before)
        dxs, dhalos, dkernels = [], [], []
        for x, before, kernel, dy in zip(xs, halos, kernels, dys, strict=True):
            arrays = (a.astype(jnp.float32) for a in (call.runs(x), before, kernel))
            _, vjp = jax.vjp(lambda x, before, kernel: _convolved(x, before, kernel, ids), *arrays)
            dx, dbefore, dkernel = vjp(call.runs(dy).astype(jnp.float32))
            dxs.append(dx)
            dhalos.append(dbefore)
            dkernels.append(jax.lax.psum(dkernel, (*call.split.batch, *call.split.sequence)).astype(kernel.dtype))
        last = halos[0].shape[2]
        from_after = _unpacked(call.chain.to_runs_before(_packed(dhalos)), dxs, last)
        dxs = tuple(
            dx.at[:, :, -last:].add(other).reshape(x.shape).astype(x.dtype)
            for x, dx, other in zip(xs, dxs, from_after, strict=True)
        )
        return dxs, tuple(dkernels)

    of_ids = call.spec_of_ids(residuals.segment_ids)
    kernels = call.specs_of_kernels()
    dxs, dkernels = jax.shard_map(
        _in_scope(shard),
        in_specs=(_Residuals(call.specs(), call.specs_before(), kernels, of_ids, of_ids), call.specs()),
        out_specs=(call.specs(), kernels),
        check_vma=False,  # as in state_passing.py
    )(residuals, dys)
    return dxs, dkernels, None


_sharded.defvjp(_forward, _backward)


def _convolved(x: jax.Array, before: jax.Array, kernel: jax.Array, ids: _Ids | None) -> jax.Array:
    """float32 `[B, R, L, N, H]`, of x in runs and the W - 1 tokens before each."""
    length, width = x.shape[2], kernel.shape[0]
    seen = jnp.concatenate([before, x], axis=2).astype(jnp.float32)
    kernel = kernel.astype(jnp.float32)
    y = jnp.zeros(x.shape, jnp.float32)
    for distance in range(width):
        start = width - 1 - distance
        read = seen[:, :, start : start + length]
        if distance and ids is not None:
            read = jnp.where(ids.same(distance)[..., None, None], read, 0.0)
        y += kernel[start] * read
    return y


def _zeros_before(x: jax.Array, width: int) -> jax.Array:
    return jnp.zeros((*x.shape[:2], width - 1, *x.shape[3:]), x.dtype)


def _packed(xs: Sequence[jax.Array]) -> jax.Array:
    """`[B, R, w, N, H]` of each in one message, `[B, R, w, channels]`."""
    return jnp.concatenate([x.reshape(*x.shape[:3], -1) for x in xs], axis=3)


def _unpacked(message: jax.Array, like: Sequence[jax.Array], num_tokens: int) -> tuple[jax.Array, ...]:
    """The inverse of `_packed`."""
    ends = np.cumsum([math.prod(x.shape[3:]) for x in like])[:-1]
    parts = jnp.split(message, ends.tolist(), axis=3)
    return tuple(part.reshape(*part.shape[:2], num_tokens, *x.shape[3:]) for part, x in zip(parts, like, strict=True))


def _whole_spec(batch_size: int, num_heads: int, sharding: AttentionSharding | None) -> PartitionSpec | None:
    split = CacheSplit.of(sharding, batch_size=batch_size, num_kv_heads=num_heads)
    return None if split is None else split.whole_spec


def _whole(x: jax.Array, sharding: AttentionSharding | None) -> jax.Array:
    """The same, all of its tokens on each device of the context axes."""
    spec = _whole_spec(x.shape[0], x.shape[2], sharding)
    return x if spec is None else jax.lax.with_sharding_constraint(x, spec)


def _in_scope(shard: Any) -> Any:
    return jax.named_scope(HOP_SCOPE)(shard)
