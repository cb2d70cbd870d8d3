"""From the order of the layout to runs of neighbouring tokens and back, where layers of both kinds meet.

A recurrence wants each device to hold runs of neighbouring tokens: contiguous and zigzag do, so there a model of both
kinds of layers needs nothing. In striped and balanced layouts a device holds as many tokens of each P-th of the
sequence, in their order, so one all-to-all of equal parts brings each device its P-th, which it then sorts: statically
by stripes, or by the documents of the row (`Layout.chunk_order`). The inverse brings them back. What is between, norms
and MLPs too, works on tokens one by one and does not care.

Traffic, per device, of tokens of D dims in b bytes:
  each way  forward one all-to-all of (P - 1) / P times B (T / P) D b, backward the same
Once a step, of positions and segment ids: two such of 4 bytes a token; and for balanced, 32 bytes a row and device are
gathered to find out whether rows are as they must be, each document in neighbouring slots and segment ids never
decreasing. A row that is not becomes NaN.

Preconditions: P^2 stripes or chunks divide T.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import DTypeLike

from longctx.context_parallel.api import MeshSplit
from longctx.context_parallel.config import AttentionSharding
from longctx.context_parallel.layout import Layout
from longctx.context_parallel.reach import documents_in_turn, where_it_holds
from longctx.context_parallel.strategy import num_bytes
from longctx.context_parallel.traffic import PHASES, Transfer
from pallas_kernels.tokens import Leaf

RELAYOUT_SCOPE = "relayout"  # names these collectives in a compiled program

_RUNS = Layout(name="contiguous")


def has_runs(layout: Layout | None) -> bool:
    """Whether devices hold runs of neighbouring tokens."""
    return layout is None or layout.name in ("contiguous", "zigzag")


def sharding_of_runs(sharding: AttentionSharding | None) -> AttentionSharding | None:
    """What layers are told that work between `in_runs` and `in_layout`; the same where the layout has runs."""
    if sharding is None or has_runs(sharding.layout):
        return sharding
    return dataclasses.replace(sharding, layout=_RUNS)


def refusal(layout: Layout | None, *, seq_len: int, degree: int) -> str | None:
    """Why rows cannot be brought into runs, in one sentence with a remedy; None if they can, or are."""
    if degree == 1 or has_runs(layout) or seq_len % _multiple(layout, degree) == 0:
        return None
    return (
        f"layers of a state need runs of neighbouring tokens, which {seq_len} tokens in layout={layout.name} over "
        f"{degree} devices are brought into by equal parts if they are a multiple of {_multiple(layout, degree)}; pad "
        "the rows, make stripes or chunks smaller, or choose layout=zigzag"
    )


def transfers(
    layout: Layout | None, *, rows: int, seq_len: int, dim: int, degree: int, dtype: DTypeLike
) -> tuple[Transfer, ...]:
    """What one device sends each time that tokens change their order, as the head of this file states it.

    Args:
      layout: Of the rows.
      rows: Of this device, B.
      seq_len: Tokens of a whole row, T.
      dim: D.
      degree: Devices that share a row, P.
      dtype: Of the tokens.
    """
    if degree == 1 or has_runs(layout):
        return ()
    sent = num_bytes(dtype, rows, seq_len // degree, dim) * (degree - 1) // degree
    return tuple(Transfer(kind="all-to-all", phase=phase, count=1, num_bytes=sent) for phase in PHASES)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Relayout:
    """Brings tokens of a step into runs and back.

    Attributes:
      positions, segment_ids: In runs, `[B or 1, T]`.
    """

    positions: Leaf
    segment_ids: Leaf
    _chunks: Leaf  # of each device's run, [B or 1, T / chunk_size]; None for striped
    _holds: Leaf  # [B or 1, P]; None for striped
    _split: MeshSplit = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(
        cls,
        sharding: AttentionSharding | None,
        *,
        batch_size: int,
        positions: jax.Array | None,
        segment_ids: jax.Array | None,
    ) -> "Relayout | None":
        """None where tokens are in runs already, or are not split.

        Args:
          sharding: Of the model.
          batch_size: Rows, global.
          positions, segment_ids: Of the rows in the layout's order, `[B or 1, T]`, global.
        Raises: ValueError without positions, and where T does not split.
        """
        split = None if sharding is None or has_runs(sharding.layout) else MeshSplit.of(sharding, batch_size)
        if split is None or not split.sequence:
            return None
        layout = split.sharding.layout
        if positions is None:
            raise ValueError(
                f"Relayout: got positions=None with layout={layout.name}, wanted those of the permuted tokens; permute "
                "them as the tokens"
            )
        reason = refusal(layout, seq_len=positions.shape[1], degree=split.degree)
        if reason is not None:
            raise ValueError(f"Relayout: {reason}")
        given = segment_ids is not None
        segment_ids = segment_ids if given else jnp.zeros_like(positions)
        num_rows = max(positions.shape[0], segment_ids.shape[0])
        tokens = [jnp.broadcast_to(x, (num_rows, x.shape[1])) for x in (positions, segment_ids)]

        def shard(*tokens):
            tokens = [_exchanged(split, x) for x in tokens]
            chunks = layout.chunk_order(*tokens)
            tokens = [layout.in_sequence(x, split.degree, chunks=chunks) for x in tokens]
            holds = None
            if chunks is not None:
                holds = documents_in_turn(_RUNS, split.degree, split.sequence, *tokens)
            return *tokens, chunks, holds

        spec = PartitionSpec(split.batch_of(num_rows), split.sequence)
        with jax.named_scope(RELAYOUT_SCOPE):
            positions, segment_ids, chunks, holds = jax.shard_map(
                shard, in_specs=spec, out_specs=spec, check_vma=False
            )(*tokens)
        return cls(
            positions=positions,
            segment_ids=segment_ids if given else None,
            _chunks=chunks,
            _holds=holds,
            _split=split,
        )

    def in_runs(self, x: jax.Array) -> jax.Array:
        """`[B, T, ...]` with its tokens in the order of the sequence, each device's one run of it."""
        return _moved(self._split, True, x, self._chunks, self._holds)

    def in_layout(self, x: jax.Array) -> jax.Array:
        """The inverse of `in_runs`."""
        return _moved(self._split, False, x, self._chunks, self._holds)


# The inverse of a permutation is its transpose; that of the shard_map would add a reduction over every axis that its
# inputs are not split over.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _moved(split: MeshSplit, to_runs: bool, x, chunks, holds):
    layout = split.sharding.layout

    def shard(x, chunks, holds):
        if to_runs:
            x = layout.in_sequence(_exchanged(split, x), split.degree, chunks=chunks)
        else:
            x = _exchanged(split, layout.in_layout(x, split.degree, chunks=chunks))
        return where_it_holds(holds, x)

    tokens = PartitionSpec(split.batch, split.sequence)
    of_rows = None if chunks is None else PartitionSpec(split.batch_of(chunks.shape[0]), split.sequence)
    with jax.named_scope(RELAYOUT_SCOPE):
        return jax.shard_map(shard, in_specs=(tokens, of_rows, of_rows), out_specs=tokens, check_vma=False)(
            x, chunks, holds
        )


def _moved_fwd(split: MeshSplit, to_runs: bool, x, chunks, holds):
    return _moved(split, to_runs, x, chunks, holds), (chunks, holds)


def _moved_bwd(split: MeshSplit, to_runs: bool, saved, dx):
    return _moved(split, not to_runs, dx, *saved), None, None


_moved.defvjp(_moved_fwd, _moved_bwd)


def _exchanged(split: MeshSplit, x: jax.Array) -> jax.Array:
    """Of `[B, T / P, ...]` the i-th of P parts to device i: its own inverse; per shard."""
    return jax.lax.all_to_all(x, split.sequence, split_axis=1, concat_axis=1, tiled=True)


def _multiple(layout: Layout, degree: int) -> int:
    return degree**2 * (layout.chunk_size if layout.is_of_rows else layout.stripe_size)
