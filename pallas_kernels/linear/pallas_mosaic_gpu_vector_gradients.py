"""The gradients of decays of each dim of the keys within their chunks on Hopper GPUs (Mosaic GPU): dq, dk and ddecay,
from the states before and their cotangents after each chunk. See prepared.py for the maths.

Grid: a warpgroup for 64 columns of the keys of a chunk of a head, which do not need the others; two fit on a
multiprocessor, of which one loads while the other computes. Everything is in tiles of 64 x 64. Decays between tokens
are made by the tensor cores too: what a level adds up of log decays is a matrix of zeros and ones times those, which
are in shared memory as sums of two numbers of 16 bits, so that their sums are off by less than 2^-16 of themselves. The
sums of derivatives from a token on, where terms cancel, are products of three such parts, which is all of float32."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.linear.pallas_mosaic_gpu_chain import CHUNK
from pallas_kernels.linear.pallas_mosaic_gpu_tiles import matmul, spread, weighted
from pallas_kernels.linear.prepared import LEVELS
from pallas_kernels.mosaic_gpu import do_not_unroll
from pallas_kernels.wgmma import MATRIX, ROW, TILE_ROWS, TRANSFORMS

_COLUMN = plgpu.Layout.WGMMA.reduce(0)
_LOG2_E = math.log2(math.e)
_FLOAT_TRANSFORMS = plgpu.TilingTransform((TILE_ROWS, 32)), plgpu.SwizzleTransform(128)


class Inputs(NamedTuple):
    """What the kernel reads.

    Attributes:
      q, k: 16 bits `[B, T, K, H]`.
      v, dout: 16 bits `[B, T, N, V]`.
      decay: Its log, float32 `[B, T, N, H]`.
      states, dstates: Before and after each chunk, 16 bits `[B, N, n, V, H]`.
      keeps: float32 `[B, N, n, H]`.
      reads, writes: float32 `[B, N, T']`, of documents alone; None for one document.
      document: int32 `[B, T']`; None for one document.
    """

    q: Any
    k: Any
    v: Any
    dout: Any
    decay: Any
    states: Any
    dstates: Any
    keeps: Any
    reads: Any
    writes: Any
    document: Any


class Outputs(NamedTuple):
    """16 bits `[B, T, N, H]`, and ddecay float32."""

    dq: Any
    dk: Any
    ddecay: Any


class _Shared(NamedTuple):
    """Shared memory: tiles `[64, 64]`, of which those of v, dout and the states are written to once they are read, and
    the barrier that says when they are full."""

    q: Any
    k: Any
    v: Any
    dout: Any
    decay: Any
    states: Any
    dstates: Any
    at_end: Any
    full: Any


def gradients(inputs: Inputs, *, num_heads: int, scale: float, interpret) -> Outputs:
    """Runs the kernel."""
    (B, T, _, H), (N, num_chunks, V), dtype = inputs.q.shape, inputs.states.shape[1:4], inputs.q.dtype
    outputs = Outputs(
        dq=jax.ShapeDtypeStruct((B, T, N, H), dtype),
        dk=jax.ShapeDtypeStruct((B, T, N, H), dtype),
        ddecay=jax.ShapeDtypeStruct((B, T, N, H), jnp.float32),
    )

    def tiles(*num):
        return plgpu.SMEM((*num, CHUNK, CHUNK), dtype, transforms=TRANSFORMS)

    keys, values = H // CHUNK, V // CHUNK
    shared = _Shared(
        q=tiles(),
        k=tiles(),
        v=tiles(values),
        dout=tiles(values),
        decay=plgpu.SMEM((CHUNK, CHUNK), jnp.float32, transforms=_FLOAT_TRANSFORMS),
        states=tiles(values),
        dstates=tiles(values),
        at_end=plgpu.SMEM((CHUNK,), jnp.float32),
        full=plgpu.Barrier(num_arrivals=3 + 4 * values),
    )
    trees = [jax.tree.flatten(x) for x in (inputs, outputs, shared)]

    def body(*refs):
        refs = iter(refs)
        given = (jax.tree.unflatten(tree, [next(refs) for _ in range(tree.num_leaves)]) for _, tree in trees)
        _Columns(*given, num_heads=num_heads, num_chunks=num_chunks, scale=scale, interpret=interpret).run()

    results = plgpu.kernel(
        body,
        out_type=trees[1][0],
        grid=(B * N * num_chunks * keys,),
        grid_names=("block",),
        scratch_types=trees[2][0],
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=interpret,
    )(*trees[0][0])
    return jax.tree.unflatten(trees[1][1], results)


class _Columns:
    """What one block of threads does."""

    def __init__(
        self, inputs: Inputs, outputs: Outputs, shared: _Shared, *, num_heads: int, num_chunks: int, scale: float,
        interpret,
    ):  # fmt: skip
        self.inputs, self.outputs, self.shared = inputs, outputs, shared
        self.num_heads, self.scale, self.interpret = num_heads, scale, interpret
        # Those of a chunk side by side, for the values that they share.
        number, keys = lax.axis_index("block"), inputs.q.shape[3] // CHUNK
        side, number = lax.rem(number, keys), lax.div(number, keys)
        self.head, number = lax.rem(number, num_heads), lax.div(number, num_heads)
        self.chunk, self.batch = lax.rem(number, num_chunks), lax.div(number, num_chunks)
        self.tokens, self.columns = (pl.ds(i * CHUNK, CHUNK) for i in (self.chunk, side))

    def run(self) -> None:
        self.load()
        shared = self.shared
        dscores = self.dscores()
        dq, dk = self.from_states(shared.dout, shared.states), self.from_states(shared.v, shared.dstates)
        at_end = self.of_states()
        log = plgpu.load(shared.decay, layout=MATRIX) * _LOG2_E
        self.dlog = shared.decay
        self.logs = shared.states.at[0], shared.dstates.at[0]
        plgpu.commit_smem()  # a warp may be ahead of another's matmul
        self.dscores_tile = shared.dout.at[0]
        self.dscores_tile[...] = dscores
        self.put_parts(self.logs, log)
        row, column = _positions()
        dq *= self.by_tokens(self.inputs.reads, self.exponentials(row >= column)) * self.scale
        of_log = self.tile(shared.q) * dq
        dk *= self.by_tokens(self.inputs.writes, self.exponentials(row < column))
        to_end = self.tile(shared.k) * dk
        self.dlog[...] = of_log - to_end  # in registers it would be one thing too many
        shared.at_end[...] = at_end + to_end.sum(axis=0)
        itself = self.dscores_where(row == column)
        dq = self.weighted(itself, [shared.k], acc=dq)
        dk = self.weighted(itself, [shared.q], acc=dk)
        # A loop, as the code of six levels would not stay in the cache of instructions.
        dq, dk = lax.fori_loop(0, len(LEVELS), lambda i, of_keys: self.level(LEVELS[0] >> i, *of_keys), (dq, dk))
        parts = (*self.logs, shared.dout.at[0])
        self.put_parts(parts, plgpu.load(shared.decay, layout=MATRIX))
        ddecay = self.weighted(self.ones(row <= column), parts)
        ddecay += spread(plgpu.load(shared.at_end, layout=_COLUMN, optimized=False), 1)
        for x, staged in ((dq, shared.q), (dk, shared.k), (ddecay, shared.decay)):
            staged[...] = x.astype(staged.dtype)
        plgpu.commit_smem()
        for staged, target in zip((shared.q, shared.k, shared.decay), self.outputs, strict=True):
            plgpu.copy_smem_to_gmem(staged, target.at[self.batch, self.tokens, self.head, self.columns])
        plgpu.wait_smem_to_gmem(0)

    def load(self) -> None:
        shared, inputs = self.shared, self.inputs

        def copy(source, target) -> None:
            plgpu.copy_gmem_to_smem(source, target, shared.full)

        def of_tokens(source, columns):
            head = lax.div(self.head, self.num_heads // source.shape[2])
            return source.at[self.batch, self.tokens, head, columns]

        for i in range(shared.v.shape[0]):
            columns = pl.ds(i * CHUNK, CHUNK)
            copy(of_tokens(inputs.dout, columns), shared.dout.at[i])
            copy(of_tokens(inputs.v, columns), shared.v.at[i])
            for source, target in ((inputs.states, shared.states), (inputs.dstates, shared.dstates)):
                copy(source.at[self.batch, self.head, self.chunk, columns, self.columns], target.at[i])
        for name in ("decay", "q", "k"):
            copy(of_tokens(getattr(inputs, name), self.columns), getattr(shared, name))
        plgpu.barrier_wait(shared.full)

    def dscores(self):
        """The cotangent of the scores below the diagonal, its transpose above: 16 bits `[64, 64]`."""
        v, dout = ([x.at[i] for i in range(x.shape[0])] for x in (self.shared.v, self.shared.dout))
        (row, column), of_row = _positions(), self.document(ROW)
        below = self.matmul([(*both, False, True) for both in zip(dout, v, strict=True)])
        above = self.matmul([(*both, False, True) for both in zip(v, dout, strict=True)])
        dscores = jnp.where(row >= column, below, above) * self.scale
        if of_row is not None:
            rows, columns = spread(of_row, 0), spread(self.document(_COLUMN), 1)
            dscores = jnp.where((rows == columns) & (rows >= 0), dscores, 0.0)
        return dscores.astype(self.shared.q.dtype)

    def dscores_where(self, where):
        dscores = plgpu.load(self.dscores_tile, layout=MATRIX)
        return jnp.where(where, dscores, jnp.zeros((), dscores.dtype))

    def document(self, layout):
        if self.inputs.document is None:
            return None
        return plgpu.load(self.inputs.document.at[self.batch, self.tokens], layout=layout, optimized=False)

    def from_states(self, values, states):
        """Of the values' columns and a state the keys' columns."""
        return self.matmul([(values.at[i], states.at[i], False, False) for i in range(values.shape[0])])

    def of_states(self):
        """What the state and its cotangent add to the derivative by the log decay up to the chunk's end, `[64]`."""
        kept = None
        for i in range(self.shared.states.shape[0]):
            state, dstate = (self.tile(x.at[i]) for x in (self.shared.states, self.shared.dstates))
            kept = state * dstate if kept is None else kept + state * dstate
        keeps = self.inputs.keeps.at[self.batch, self.head, self.chunk, self.columns]
        return kept.sum(axis=0) * plgpu.load(keeps, layout=_COLUMN, optimized=False)

    def level(self, size, dq, dk):
        """The gradients and what a level adds to them."""
        if not self.interpret:
            do_not_unroll()
        shared, (row, column) = self.shared, _positions()
        operand = shared.v.at[0]
        later, halves = (row & size) != 0, (row & -size, column & -size)
        within = jnp.where(later, row >= column, row < column)
        decay = self.exponentials(within & (halves[0] == halves[1]))
        x = decay * jnp.where(later, self.tile(shared.q), self.tile(shared.k))
        plgpu.commit_smem()  # a warp may be ahead of another's matmul
        operand[...] = x.astype(operand.dtype)
        plgpu.commit_smem()
        pairs = self.dscores_where(halves[0] ^ size == halves[1])
        back = self.weighted(pairs, [operand])
        of_log = self.tile(operand) * back
        self.dlog[...] = plgpu.load(self.dlog, layout=MATRIX) + jnp.where(later, of_log, -of_log)
        back = decay * back
        return dq + jnp.where(later, back, 0.0), dk + jnp.where(later, 0.0, back)

    # Sums by matmuls.

    def put_parts(self, tiles, x) -> None:
        """Puts float32 into tiles of 16 bits of which it is the sum, as far as they go."""
        plgpu.commit_smem()  # a warp may be ahead of another's matmul
        for tile in tiles:
            part = x.astype(tile.dtype)
            tile[...] = part
            x = x - part.astype(jnp.float32)
        plgpu.commit_smem()

    def exponentials(self, within):
        """exp of the sums of log decays, of each token over those `within` its row."""
        return jnp.exp2(self.weighted(self.ones(within), self.logs))

    def ones(self, where):
        """16 bits, as the left operand of a matmul."""
        return jnp.where(where, 1.0, 0.0).astype(self.shared.q.dtype)

    def by_tokens(self, factors, x):
        """x times the factor of each token."""
        if factors is None:
            return x
        at = factors.at[self.batch, self.head, self.tokens]
        return x * spread(plgpu.load(at, layout=ROW, optimized=False), 0)

    def tile(self, tile):
        return plgpu.load(tile, layout=MATRIX).astype(jnp.float32)

    def matmul(self, factors):
        """`tiles.matmul` by this warpgroup."""
        return matmul(factors, interpret=self.interpret)

    def weighted(self, weights, tiles, **options):
        """`tiles.weighted` by this warpgroup."""
        return weighted(weights, tiles, interpret=self.interpret, **options)


def _positions() -> tuple[jax.Array, jax.Array]:
    """The row and the column of each element."""
    row, column = (plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), i, layout=MATRIX) for i in (0, 1))
    return row, column
