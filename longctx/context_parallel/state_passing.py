"""Linear attention over a mesh by state passing: what devices send each other are states, whose size knows no T.

Each device makes, in one pass over its keys and values, the map of what its tokens do to a state; a scan of these maps
over the devices (chain.py) gives it the state before its tokens; and the forward pass starts from that, as it does from
the state before each chunk: queries read it by the matmul that is there anyway, and nothing is added to a rounded
output. In the backward pass cotangents of states go the other way: one pass over queries and the cotangent of the
output, the scan, and the backward pass from the cotangent of the state after the device's tokens. A document that
begins inside a run makes the decay of its map zero; one that begins exactly where two runs meet is found by comparing
the segment ids on both sides.

The map of the delta rule has a matrix, `after = M before + N`: (M, N) and, on the way back, (M^T, the cotangent that
the outputs give). The ops make them of forward passes (`linear_attention_states`), so that kernels which serve the
layer serve its maps.

Traffic, per device and layer, in bytes, all states in float32, value and decay in one buffer; D is 1, H for decays of
each dim, or H^2 for the delta rule; at most, as the ends of the sequence send less:
  forward   R ceil(log2 P) permutes of B N (H V + D) 4, one after the other; R is 1, or 2 for zigzag
  backward  the same
With normalize, as many again of B N (H + D) 4. `transfers` says the same in numbers. Beside them:
  forward   with segment ids, R permutes of 4 bytes a row; with return_state an all-reduce of B N H V 4
  backward  with an initial_state that is differentiated in an all-reduce of B N H V 4; with such a decay of a head [N]
            one of N 4 over the devices of rows and tokens
LASP-2's all-gather sends (P - 1) B N H V 4, and each device then holds the states of all.

Preconditions: P divides T, for zigzag 2 P; a layout of runs, contiguous (where none is named) or zigzag.

Reference: Sun et al. 2024, LASP, arXiv:2404.02882, whose states go from device to device in P - 1 steps; Sun et al.
  2025, LASP-2, arXiv:2502.07563; the scan: Hillis and Steele 1986, Data Parallel Algorithms; the delta rule as a
  product of matrices: Yang et al. 2024, arXiv:2406.06484, section 3.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec

from longctx.context_parallel.api import HOP_SCOPE, MeshSplit
from longctx.context_parallel.chain import Chain
from longctx.context_parallel.config import AttentionSharding
from longctx.context_parallel.layout import Layout
from longctx.context_parallel.strategy import num_bytes
from longctx.context_parallel.traffic import PHASES, Transfer
from pallas_kernels import Implementation
from pallas_kernels.linear.api import (
    check_call,
    linear_attention,
    linear_attention_backward,
    linear_attention_forward,
    linear_attention_state_cotangents,
    linear_attention_states,
    normalized,
)
from pallas_kernels.linear.state import total
from pallas_kernels.perturbed import is_perturbed, values_of
from pallas_kernels.saved import as_attention

_LAYOUTS = ("contiguous", "zigzag")


def sharded_linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    decay: jax.Array | None = None,
    beta: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    return_state: bool = False,
    scale: float | None = None,
    normalize: bool = False,
    sharding: AttentionSharding | None = None,
    implementation: Implementation | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """`linear_attention` over the mesh in scope.

    Args:
      q, k, v, decay, beta, segment_ids: As `linear_attention`, global, in the order of the sharding's layout.
      initial_state, return_state: As `linear_attention`: before and after the whole row; split as rows and heads are,
        the same on all devices that share a row.
      scale, normalize, implementation: As `linear_attention`.
      sharding: The mesh axes to split over, and the layout, None for contiguous; its strategies are those of softmax
        attention. None means the axes of `longctx.make_mesh` where such a mesh is in scope, and otherwise calls the op
        directly.
    Returns: out `[B, T, N, V]`, split as v; with return_state also the state after the row.
    Raises: as `linear_attention`; ValueError where an axis is not of the mesh, or its size does not divide the heads or
      the tokens; NotImplementedError where the tokens are split and the layout has no runs.
    Cost: as `linear_attention` of a device's tokens, where they are split with another pass over k and v, one over q
      and the cotangent of out, and what is sent (the head of this file). With beta the former is two forward passes,
      the latter one. Query and key heads that the devices of the heads do not divide are repeated until they do. A
      batch that the batch axes do not divide is computed by each of their devices in full.
    """
    op = "sharded_linear_attention"
    arrays = dict(decay=decay, beta=beta, initial_state=initial_state, segment_ids=segment_ids)
    check_call(op, q, k, v, **arrays, scale=scale, normalize=normalize)
    (batch_size, length, num_heads, _), num_key_heads = v.shape, q.shape[2]
    split = _Split.of(sharding, batch_size)
    if split is None:
        return linear_attention(
            q, k, v, **arrays, return_state=return_state, scale=scale, normalize=normalize,
            implementation=implementation,
        )  # fmt: skip
    split.check(op, num_heads=num_heads, num_key_heads=num_key_heads, length=length)
    if num_key_heads % split.heads_size:
        q, k = (jnp.repeat(x, split.heads_size // num_key_heads, axis=2) for x in (q, k))

    def attend(q, k, v, initial_state, implementation=implementation):
        call = _Call(split=split, return_state=return_state, scale=scale, implementation=implementation)
        return _attention(call, q, k, v, decay, beta, initial_state, segment_ids)

    out, state = normalized(attend, q, k, v, initial_state) if normalize else attend(q, k, v, initial_state)
    return (out, state) if return_state else out


def refusal(
    sharding: AttentionSharding,
    *,
    num_heads: int,
    num_key_heads: int,
    seq_len: int,
    degree: int,
    heads_split: int = 1,
) -> str | None:
    """Why linear attention cannot be split this way, in one sentence with a remedy; None if it can.

    Args:
      sharding: Names the layout.
      num_heads, num_key_heads: Of the layer: value heads, and query and key heads.
      seq_len: Tokens of a whole row.
      degree: Devices that share the tokens of a row.
      heads_split: Devices that share the heads of a row.
    """
    layout = sharding.layout or Layout()
    sizes = dict(num_heads=num_heads, num_key_heads=num_key_heads, seq_len=seq_len)
    return _not_served(layout, degree) or _not_divided(layout, **sizes, degree=degree, heads_split=heads_split)


def transfers(
    sharding: AttentionSharding,
    *,
    rows: int,
    num_heads: int,
    key_dim: int,
    value_dim: int,
    degree: int,
    heads_split: int = 1,
    vector_decay: bool = False,
    delta_rule: bool = False,
    normalize: bool = False,
    segment_ids: bool = False,
) -> tuple[Transfer, ...]:
    """What one device sends for one layer, as the head of this file states it; the same for every T and dtype.

    Args:
      sharding, degree, heads_split: As `refusal`, which has let them pass.
      rows: Rows of a device, B.
      num_heads: Value heads of the layer.
      key_dim, value_dim: Dims of a head, H and V.
      vector_decay: Whether each dim of the keys has a decay of its own.
      delta_rule: Whether there is a beta.
      normalize: As `sharded_linear_attention`.
      segment_ids: Whether there are any, for each row.
    """
    if degree == 1:
        return ()
    chain = Chain.of(sharding.layout or Layout(), degree)
    count = chain.num_permutes
    decays = key_dim**2 if delta_rule else key_dim if vector_decay else 1
    of_ids = Transfer(
        kind="collective-permute", phase="forward", count=chain.num_runs, num_bytes=num_bytes(jnp.int32, rows)
    )
    of_states = tuple(
        Transfer(
            kind="collective-permute",
            phase=phase,
            count=count,
            num_bytes=num_bytes(jnp.float32, rows, num_heads // heads_split, key_dim * columns + decays),
        )
        for phase in PHASES
        for columns in (value_dim, *((1,) if normalize else ()))
    )
    return (*of_states, of_ids) if segment_ids else of_states


def _not_served(layout: Layout, degree: int) -> str | None:
    if degree == 1 or layout.name in _LAYOUTS:
        return None
    return (
        f"state passing needs devices that hold runs of neighbouring tokens, got layout={layout.name}; choose "
        "layout=contiguous or zigzag, or bring the tokens into runs (context_parallel.Relayout)"
    )


def _not_divided(
    layout: Layout, *, num_heads: int, num_key_heads: int, seq_len: int, degree: int, heads_split: int
) -> str | None:
    if num_heads % heads_split:
        return (
            f"linear attention splits {num_heads} heads over {heads_split} devices, wanted a multiple of "
            f"{heads_split}; change the heads or the mesh"
        )
    if num_key_heads % heads_split and heads_split % num_key_heads:
        return (
            f"linear attention splits {num_key_heads} query and key heads over {heads_split} devices, wanted a "
            f"multiple or a divisor of {heads_split}; change those heads or the mesh"
        )
    multiple = layout.multiple(degree)
    if seq_len % multiple:
        return (
            f"state passing splits {seq_len} tokens over {degree} devices, wanted a multiple of {multiple} for "
            f"layout={layout.name}; pad the rows, or change the layout or the mesh"
        )
    return None


class _Split(MeshSplit):
    """How one call is split over the mesh in scope; hashable."""

    @property
    def layout(self) -> Layout:
        return self.sharding.layout or Layout()

    def check(self, op: str, *, num_heads: int, num_key_heads: int, length: int) -> None:
        """Raises: ValueError where something does not divide, NotImplementedError where the call is not served."""
        sizes = dict(num_heads=num_heads, num_key_heads=num_key_heads, seq_len=length)
        wrong = _not_divided(self.layout, **sizes, degree=self.degree, heads_split=self.heads_size)
        if wrong is not None:
            raise ValueError(f"{op}: {wrong}")
        reason = _not_served(self.layout, self.degree)
        if reason is not None:
            raise NotImplementedError(f"{op}: {reason}")

    @property
    def chain(self) -> Chain | None:
        """The runs of a row over the devices; None where the sequence is whole."""
        return Chain.of(self.layout, self.degree, self.sequence) if self.sequence else None

    @property
    def tokens_spec(self) -> PartitionSpec:
        """Of `[B, T, N, ...]` arrays, and of the states before all parts of a row, `[B, parts, N, H, V]`."""
        return PartitionSpec(self.batch, self.sequence, self.heads)

    def decay_spec(self, decay: jax.Array | None) -> PartitionSpec | None:
        """Of `[N]`, or as `tokens_spec`."""
        if decay is None:
            return None
        return PartitionSpec(self.heads) if decay.ndim == 1 else self.tokens_spec

    @property
    def states_spec(self) -> PartitionSpec:
        """Of `[B, N, H, V]` arrays, the same on all devices that share a row."""
        return PartitionSpec(self.batch, self.heads)

    def rows_spec(self, x: jax.Array | None) -> PartitionSpec | None:
        """Of `[B or 1, ...]` arrays that differ along the sequence."""
        if x is None:
            return None
        return PartitionSpec(self.batch_of(x.shape[0]), self.sequence)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Call:
    """What is static of a call; hashable."""

    split: _Split
    return_state: bool
    scale: float | None
    implementation: Implementation | None

    @property
    def options(self) -> dict[str, Any]:
        return {"scale": self.scale, "implementation": self.implementation}

    @property
    def num_runs(self) -> int:
        """Runs of neighbouring tokens that a device holds of a row; ops take each as a row of its own."""
        return 1 if self.split.chain is None else self.split.chain.num_runs

    def by_run(self, x: jax.Array | None, num_rows: int | None = None) -> jax.Array | None:
        """Of `[B, R L, ...]` `[B R, L, ...]`; what has no tokens as it is. Per shard.

        Args:
          num_rows: B R, where x may have one row for all.
        """
        if x is None or x.ndim == 1 or self.num_runs == 1:
            return x
        if num_rows is not None:
            x = jnp.broadcast_to(x, (num_rows // self.num_runs, *x.shape[1:]))
        return x.reshape(x.shape[0] * self.num_runs, -1, *x.shape[2:])

    def by_row(self, x: jax.Array | None) -> jax.Array | None:
        """The inverse of `by_run`."""
        if x is None or x.ndim == 1 or self.num_runs == 1:
            return x
        return x.reshape(x.shape[0] // self.num_runs, -1, *x.shape[2:])

    def runs[T](self, states: T) -> T:
        """Of arrays `[B R, ...]` `[B, R, ...]`."""
        return jax.tree.map(lambda x: x.reshape(-1, self.num_runs, *x.shape[1:]), states)

    def flat(self, states: jax.Array) -> jax.Array:
        """The inverse of `runs`."""
        return states.reshape(-1, *states.shape[2:])


class _Residuals(NamedTuple):
    """What the backward pass needs of the forward pass; `starts` are the states before the parts of all runs."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    decay: jax.Array | None
    beta: jax.Array | None
    segment_ids: jax.Array | None
    reached: jax.Array | None
    starts: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Saved:
    """The residuals, and of which of the inputs that are often constants a gradient is asked for."""

    residuals: _Residuals
    decay_gradient: bool = dataclasses.field(metadata={"static": True})
    initial_state_gradient: bool = dataclasses.field(metadata={"static": True})


# Differentiated here and not inside the shard_map, as softmax attention is (api.py): the transpose of a shard_map would
# add reductions, and the backward pass has a scan of its own.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(call: _Call, q, k, v, decay, beta, initial_state, segment_ids):
    return _forward(call, q, k, v, decay, beta, initial_state, segment_ids)[0]


def _forward(call: _Call, q, k, v, decay, beta, initial_state, segment_ids):
    split, chain = call.split, call.split.chain

    def shard(q, k, v, decay, beta, before, segment_ids):
        reached = parts = None
        if chain is not None and segment_ids is not None:
            reached = chain.reached(segment_ids)
        q, k, v, beta, decay = (call.by_run(x) for x in (q, k, v, beta, decay))
        tokens = {"decay": decay, "segment_ids": call.by_run(segment_ids, q.shape[0])}
        if chain is not None:
            parts = linear_attention_states(k, v, **tokens, beta=beta, implementation=call.implementation)
            before = call.flat(chain.states_before(call.runs(total(parts)), reached, before))
        out, after, starts = linear_attention_forward(
            q, k, v, **tokens, beta=beta, initial_state=before, parts=parts, **call.options
        )
        if not call.return_state:
            after = None
        elif chain is not None:
            after = chain.of_last_run(call.runs(after))
        return call.by_row(out), after, reached, call.by_row(starts)

    tokens, states, rows = split.tokens_spec, split.states_spec, split.rows_spec(segment_ids)
    out, state, reached, starts = jax.shard_map(
        _in_scope(shard),
        in_specs=(tokens, tokens, tokens, split.decay_spec(decay), tokens, states, rows),
        out_specs=(tokens, states, rows, tokens),
        check_vma=False,  # the ops' loops start from constants, which that check would have to be told of
    )(q, k, v, decay, beta, initial_state, segment_ids)
    out, state, reached, starts = as_attention((out, state, reached, starts))
    return (out, state), _Residuals(q, k, v, decay, beta, segment_ids, reached, starts)


def _attention_fwd(call: _Call, *primals):
    results, residuals = _forward(call, *values_of(primals))
    decay, initial_state = primals[3], primals[5]
    return results, _Saved(
        residuals=residuals,
        decay_gradient=is_perturbed(decay),
        initial_state_gradient=is_perturbed(initial_state),
    )


def _attention_bwd(call: _Call, saved: _Saved, cotangents):
    split, chain = call.split, call.split.chain
    residuals = saved.residuals
    decay, beta, segment_ids = residuals.decay, residuals.beta, residuals.segment_ids
    # Without a cotangent a result is one that nothing depends on.
    dout, dstate = (None if isinstance(x, SymbolicZero) else x for x in cotangents)
    dout = jnp.zeros_like(residuals.v) if dout is None else dout

    def shard(residuals, dout, after):
        q, k, v, decay, beta, segment_ids, reached, starts = residuals
        q, k, v, beta, decay, dout, starts = (call.by_run(x) for x in (q, k, v, beta, decay, dout, starts))
        tokens = {"decay": decay, "segment_ids": call.by_run(segment_ids, q.shape[0])}
        parts = None
        if chain is not None:
            parts = linear_attention_state_cotangents(q, dout, k=k, beta=beta, **tokens, **call.options)
            after = call.flat(chain.cotangents_after(call.runs(total(parts, reverse=True)), reached, after))
        dq, dk, dv, ddecay, dbeta, before = linear_attention_backward(
            q, k, v, dout, after, **tokens, beta=beta, initial_state=starts[:, 0], starts=starts, parts=parts,
            decay_gradient=saved.decay_gradient, **call.options,
        )  # fmt: skip
        if not saved.initial_state_gradient:
            before = None
        elif chain is not None:
            before = chain.of_first_run(call.runs(before))
        if ddecay is not None and ddecay.ndim == 1:
            ddecay = jax.lax.psum(ddecay, (*split.batch, *split.sequence))
        return *(call.by_row(x) for x in (dq, dk, dv, ddecay, dbeta)), before

    tokens, states, rows = split.tokens_spec, split.states_spec, split.rows_spec(segment_ids)
    of_decay = split.decay_spec(decay)
    dq, dk, dv, ddecay, dbeta, dinitial_state = jax.shard_map(
        _in_scope(shard),
        in_specs=(
            _Residuals(tokens, tokens, tokens, of_decay, tokens, rows, rows, tokens), tokens, states
        ),
        out_specs=(tokens, tokens, tokens, of_decay, tokens, states),
        check_vma=False,  # as in the forward
    )(residuals, dout, dstate)  # fmt: skip
    ddecay = None if ddecay is None else ddecay.astype(decay.dtype)
    dbeta = None if beta is None else dbeta.astype(beta.dtype)
    return dq, dk, dv, ddecay, dbeta, dinitial_state, None


_attention.defvjp(_attention_fwd, _attention_bwd, symbolic_zeros=True)


def _in_scope(shard):
    """The same in the scope that names, in a compiled program, what is sent for each layer."""
    return jax.named_scope(HOP_SCOPE)(shard)
