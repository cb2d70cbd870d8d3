"""The primitives of sweeps.py on TPU: one kernel, which reads rows in either direction and carries their states.

Grid: (rows, groups of heads, blocks of tokens), the last in order. A step holds a few chunks of a group of heads
in VMEM and goes through them chunk by chunk; heads are independent, so while the matrix units do one, the vector units
do another. The states of the group stay in VMEM for the whole row, in the block that becomes its end state. With H = V
= C = 128 a chunk and head is four matmuls of 128^3.

Layout: heads stand before tokens, [B, N, T, H], so that a head's chunk is whole tiles of (8, 128) and one contiguous
copy. In a layer the transposition costs nothing: XLA lets what makes q, k and v write them so. Where they come in the
public layout it is a pass over each. The other way, blocks of 8 heads of [B, T, N, H], costs more in any case: picking
a head out of packed tiles makes the kernel take 3 times as long (634 cycles a chunk and head for 203 on v5p, in the
compiler's schedule).

What depends on decays and documents is not read as factors of tokens but as one or three rows of numbers: 4 or 16 bytes
a token and head, of which q, k, v and out have 1024 in bfloat16 at H = V = 128. A factor of a token scales lanes of a
sublane; to get it there is a transposition, which takes as long as an eighth of a matmul, so the kernel makes both
factors of a token from one of them.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.linear.chunks import Chunks
from pallas_kernels.linear.state import LinearState
from pallas_kernels.linear.sweeps import Swept
from pallas_kernels.mosaic_tpu import dot

CHUNK = 128
BLOCK_CHUNKS = 4
"""Chunks of a grid step."""

SNAPSHOT_CHUNKS = 1
"""A snapshot a chunk: the gradient of the decays is summed up from one to the next, and pairs of tokens in there cancel
out. Within a chunk they do to float32, being one matrix read in two ways, but not by way of the states."""

MAX_HEADS = 4
"""Of a group: more are more code, and no faster."""

VMEM_BYTES = 14 * 2**20
"""What a kernel may take of the 16 MiB that XLA leaves to one by default on every generation."""

_LANES = 128
# The rows of numbers a token: its log decay, of float32 inputs, or the sum from the chunk's start to it; of documents,
# how many began in the chunk at or before it, as -1 - that for padding, and what the chunk keeps of the state before
# it. With one that holds nothing they are whole tiles.
_DECAY, _DOCUMENT, _KEEPS, _NONE = 0, 1, 2, 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """How a sweep is cut into grid steps.

    Attributes:
      heads: Heads of a group, which a step takes together.
      chunks: Chunks of a step.
      vmem_bytes: What it holds in VMEM, of arrays and of the matrices of a chunk.
    """

    heads: int
    chunks: int
    vmem_bytes: int


def grid_of(
    num_heads: int, dims: Mapping[str, tuple[int, int]], length: int, itemsize: int
) -> Grid:  # fmt: skip
    """The grid for arrays of so many heads and dims by name: k, v and, of a sweep with outputs, q; and dot_with.

    It takes the largest group whose blocks fit, of whole groups of heads that share one or of parts of such a group.
    """
    chunks = min(BLOCK_CHUNKS, -(-length // CHUNK))

    def fits_shared(heads):
        shared = [num_heads // of_its_own for of_its_own, _ in dims.values()]
        return num_heads % heads == 0 and all(heads % x == 0 or x % heads == 0 for x in shared)

    def vmem(heads):
        tokens = chunks * CHUNK
        lanes = [-(-dim // _LANES) * _LANES for _, dim in dims.values()]
        (_, H), (_, V) = dims["k"], dims["v"]
        out = -(-V // _LANES) * _LANES if "q" in dims else 0
        state = 4 * H * -(-V // _LANES) * _LANES
        blocks = tokens * (itemsize * (sum(lanes) + out) + 4 * (4 + 1)) + 2 * state
        blocks += chunks * state * itemsize // 4 if "dot_with" in dims else 0
        # Blocks are held twice, one being copied; beside them a head's scores, weights and outputs in float32.
        return heads * (2 * blocks + 4 * CHUNK * (3 * CHUNK + 2 * max(lanes)) + state)

    sizes = [x for x in range(min(num_heads, MAX_HEADS), 0, -1) if fits_shared(x)]
    heads = next((x for x in sizes if vmem(x) <= VMEM_BYTES), 1)
    return Grid(heads=heads, chunks=chunks, vmem_bytes=vmem(heads))


def sweep(
    q, k, v, chunks: Chunks, before, *, scale: float, reverse: bool, dot_with, snapshots: bool
) -> Swept:  # fmt: skip
    """As `sweeps.Primitives.sweep`, of rows that are one part."""
    results = _call(
        {"q": q, "k": k, "v": v} | ({} if dot_with is None else {"dot_with": dot_with}),
        chunks, before[:, 0], num_heads=chunks.reads.shape[1], scale=scale, reverse=reverse, snapshots=snapshots,
    )  # fmt: skip
    dots = results.get("dots")
    if dots is not None:
        dots = dots.reshape(*dots.shape[:2], -1)[..., : chunks.reads.shape[2]]
    return Swept(
        out=jnp.moveaxis(results["out"], 1, 2), end=results["end"], dots=dots, snapshots=results.get("snapshots")
    )


def maps(
    k, v, chunks: Chunks, *, num_heads: int, num_parts: int, wanted: slice, reverse: bool
) -> LinearState:  # fmt: skip
    """As `sweeps.Primitives.maps`, of rows that are one part."""
    del num_parts, wanted
    results = _call(
        {"k": k, "v": v}, chunks, None, num_heads=num_heads, scale=1.0, reverse=reverse, snapshots=False
    )  # fmt: skip
    return LinearState(value=results["end"][:, None], decay=jnp.prod(chunks.keeps, axis=2)[:, None])


def _call(
    arrays: dict, chunks: Chunks, before, *, num_heads: int, scale: float, reverse: bool, snapshots: bool
) -> dict:  # fmt: skip
    """What the kernel gives: "end", and where there is q "out", [B, N, T, V], "dots" and "snapshots"."""
    k, v = arrays["k"], arrays["v"]
    (B, T, _, H), V, N = k.shape, v.shape[3], num_heads
    dims = {name: (x.shape[2], x.shape[3]) for name, x in arrays.items()}
    grid = grid_of(N, dims, T, v.dtype.itemsize)
    G, tokens = grid.heads, grid.chunks * CHUNK
    steps = -(-T // tokens)

    def at(step):
        return steps - 1 - step if reverse else step

    def by_token(num, dim):
        # A block of heads that others share, or one head that several groups share.
        shared = N // num
        if shared <= G:
            return pl.BlockSpec((1, G // shared, tokens, dim), lambda b, n, s: (b, n, at(s), 0))
        return pl.BlockSpec((1, 1, tokens, dim), lambda b, n, s: (b, jax.lax.div(n, shared // G), at(s), 0))

    whole = pl.BlockSpec((1, G, H, V), lambda b, n, s: (b, n, 0, 0))
    inputs = {name: jnp.moveaxis(x, 2, 1) for name, x in arrays.items()}
    specs = {name: by_token(*dims[name]) for name in arrays}
    inputs["factors"] = _factors(chunks, steps * grid.chunks, sums=v.dtype != jnp.float32)
    specs["factors"] = pl.BlockSpec(
        (1, G, grid.chunks, inputs["factors"].shape[3], CHUNK), lambda b, n, s: (b, n, at(s), 0, 0)
    )
    if before is not None:
        inputs["before"], specs["before"] = before, whole
    shapes, out_specs = {"end": jax.ShapeDtypeStruct((B, N, H, V), jnp.float32)}, {"end": whole}
    if "q" in arrays:
        shapes["out"], out_specs["out"] = jax.ShapeDtypeStruct((B, N, T, V), v.dtype), by_token(N, V)
    if "dot_with" in arrays:
        shapes["dots"] = jax.ShapeDtypeStruct((B, N, steps * grid.chunks, 1, CHUNK), jnp.float32)
        out_specs["dots"] = pl.BlockSpec((1, G, grid.chunks, 1, CHUNK), lambda b, n, s: (b, n, at(s), 0, 0))
    if snapshots:
        shapes["snapshots"] = jax.ShapeDtypeStruct((B, N, chunks.keeps.shape[2], H, V), v.dtype)
        out_specs["snapshots"] = pl.BlockSpec((1, G, grid.chunks, H, V), lambda b, n, s: (b, n, at(s), 0, 0))
    return pl.pallas_call(
        functools.partial(_kernel, length=T, scale=scale, reverse=reverse),
        grid=(B, N // G, steps),
        in_specs=(specs,),
        out_specs=out_specs,
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=_cost(inputs, shapes, N, "q" in arrays),
        name=f"linear_attention_{'sweep' if 'q' in arrays else 'maps'}{'_reverse' if reverse else ''}",
    )(inputs)


def _factors(chunks: Chunks, num_chunks: int, *, sums: bool) -> jax.Array:
    """The rows of numbers of each chunk, float32 [B, N, num_chunks, 1 or 4, C]; chunks past the row change nothing."""
    B, N, num = chunks.keeps.shape
    rows = {_DECAY: (chunks.cumulative if sums else chunks.log).reshape(B, N, num, CHUNK)}
    if chunks.document is not None:
        run, document = (x.reshape(B, num, CHUNK) for x in (chunks.run, chunks.document))
        last = run[..., -1:]
        before = jnp.concatenate([jnp.zeros_like(last[:, :1]), last[:, :-1]], axis=1)
        # Counted from the document before the chunk, which float32 holds exactly however many there are.
        run = run - before
        document = jnp.where(document < 0, -1 - run, run).astype(jnp.float32)
        rows[_DOCUMENT] = jnp.broadcast_to(document[:, None], (B, N, num, CHUNK))
        rows[_KEEPS] = jnp.broadcast_to(chunks.keeps[..., None], (B, N, num, CHUNK))
        rows[_NONE] = jnp.zeros((B, N, num, CHUNK))
    factors = jnp.stack([rows[i] for i in range(len(rows))], axis=3)
    if num == num_chunks:
        return factors
    past = jnp.zeros((B, N, num_chunks - num, len(rows), CHUNK))
    if chunks.document is not None:
        past = past.at[..., _DOCUMENT, :].set(-1.0).at[..., _KEEPS, :].set(1.0)
    return jnp.concatenate([factors, past], axis=2)


def _kernel(inputs, outputs, *, length: int, scale: float, reverse: bool):
    state = outputs["end"]
    _, num_heads, num_chunks, _, _ = inputs["factors"].shape
    step = pl.program_id(2)
    block = pl.num_programs(2) - 1 - step if reverse else step

    @pl.when(step == 0)
    def _():
        state[...] = inputs["before"][...] if "before" in inputs else jnp.zeros_like(state)

    @pl.loop(0, num_chunks)
    def _(i):
        chunk = num_chunks - 1 - i if reverse else i
        left = length - (block * num_chunks + chunk) * CHUNK
        tokens = functools.partial(_tokens, inputs, chunk, num_heads, left if length % (num_chunks * CHUNK) else None)
        for head in range(num_heads):
            factors = inputs["factors"][0, head, chunk]
            _one_chunk(tokens, factors, state, outputs, head, chunk, scale=scale, reverse=reverse)


def _tokens(inputs, chunk, num_heads: int, left, name: str, head: int) -> jax.Array:
    """A chunk of an array for a head, [C, H]; `left` tokens are there, behind which memory holds anything."""
    ref = inputs[name]
    x = ref[0, head * ref.shape[1] // num_heads, pl.ds(pl.multiple_of(chunk * CHUNK, CHUNK), CHUNK), :]
    if left is None:
        return x
    return jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) < left, x, jnp.zeros_like(x))


def _one_chunk(tokens, factors, state, outputs, head: int, chunk, *, scale: float, reverse: bool):
    """Reads and writes of a chunk of a head."""
    k, v = tokens("k", head), tokens("v", head)
    before = state[0, head]  # [H, V]
    decays = _decays(factors[_DECAY : _DECAY + 1], v.dtype, reverse=reverse)
    from_start, to_end, keeps = decays.from_start, decays.to_end, decays.keeps
    if factors.shape[0] > 1:
        document = factors[_DOCUMENT : _DOCUMENT + 1]
        own_document = _column(document)
        last = document[:, CHUNK - 1 :]
        from_start = jnp.where(own_document == 0, from_start, 0.0)
        to_end = jnp.where(own_document == jnp.maximum(last, -1 - last), to_end, 0.0)
        keeps = factors[_KEEPS : _KEEPS + 1, :1]
    reads, writes = (to_end, from_start) if reverse else (from_start, to_end)
    if "out" in outputs:
        q = tokens("q", head)
        seen = _seen(reverse, strictly="dots" in outputs)
        if factors.shape[0] > 1:
            seen &= (own_document == document) & (document >= 0)
        weights = dot(q, k, (1, 1)) * jnp.exp(jnp.where(seen, decays.apart, -jnp.inf))
        out = dot(weights.astype(v.dtype), v, (1, 0))
        out += _lanes(reads, out.shape[1]) * dot(q, before.astype(v.dtype), (1, 0))
        if "dots" in outputs:
            # A token reads itself undecayed: strong decays' gradient would drown in it.
            products = out * tokens("dot_with", head).astype(jnp.float32)
            outputs["dots"][0, head, chunk] = scale * jnp.sum(products.T, axis=0, keepdims=True)
            itself = jnp.sum(q.astype(jnp.float32) * k.astype(jnp.float32), axis=1, keepdims=True)
            if factors.shape[0] > 1:
                itself = jnp.where(own_document[:, :1] >= 0, itself, 0.0)
            out += itself * v.astype(jnp.float32)
        rows = pl.ds(pl.multiple_of(chunk * CHUNK, CHUNK), CHUNK)
        outputs["out"][0, head, rows, :] = (scale * out).astype(outputs["out"].dtype)
    written = (_lanes(writes, v.shape[1]) * v.astype(jnp.float32)).astype(v.dtype)
    after = keeps * before + dot(k, written, (0, 0))
    state[0, head] = after
    if "snapshots" in outputs:
        snapshot = before if reverse else after
        outputs["snapshots"][0, head, chunk] = snapshot.astype(outputs["snapshots"].dtype)


class _Decays(NamedTuple):
    """Factors of a chunk.

    Attributes:
      from_start, to_end: exp of the log decay from the chunk's start to a token, its own included, and from it to the
        end; [C, C], the same in all lanes.
      keeps: That of the chunk, [1, 1].
      apart: Log decay between reader and writer, [C, C], where the one reads the other.
    """

    from_start: jax.Array
    to_end: jax.Array
    keeps: jax.Array
    apart: jax.Array


def _decays(row: jax.Array, dtype, *, reverse: bool) -> _Decays:
    """Those of the numbers of a chunk, [1, C]."""
    if dtype != jnp.float32:
        column, last = _column(row), row[:, CHUNK - 1 :]
        apart = row - column if reverse else column - row
        return _Decays(jnp.exp(column), jnp.exp(last - column), jnp.exp(last), apart)
    # A difference of sums has their rounding, so what lies between is added up: over u, after one and not the other.
    token, u = _reader_and_writer()
    until, after = jnp.where(u <= token, row, 0.0), jnp.where(u > token, row, 0.0)
    behind = (token <= u) if reverse else (token > u)
    apart = dot(after if reverse else until, behind.astype(jnp.float32), (1, 0))
    from_start, to_end = (
        jnp.broadcast_to(jnp.exp(jnp.sum(x, axis=1, keepdims=True)), (CHUNK, CHUNK)) for x in (until, after)
    )
    return _Decays(from_start, to_end, jnp.exp(jnp.sum(row, axis=1, keepdims=True)), apart)


def _seen(reverse: bool, *, strictly: bool) -> jax.Array:
    """Which token of a chunk reads which, [C, C]: those before it, or after, and unless `strictly` itself."""
    reader, writer = _reader_and_writer()
    first, second = (reader, writer) if reverse else (writer, reader)
    return first < second if strictly else first <= second


def _reader_and_writer() -> tuple[jax.Array, jax.Array]:
    return tuple(jax.lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), dim) for dim in (0, 1))


def _column(row: jax.Array) -> jax.Array:
    """A number for each token, [1, C], the same in all lanes of its sublane, [C, C]."""
    return jnp.broadcast_to(row, (CHUNK, CHUNK)).T


def _lanes(x: jax.Array, num: int) -> jax.Array:
    """The same of `num` lanes, of the C of each sublane, which are equal."""
    return jnp.concatenate([x] * -(-num // CHUNK), axis=1)[:, :num]


def _cost(inputs, shapes, num_heads: int, with_out: bool) -> pl.CostEstimate:
    """For XLA, which knows nothing of a kernel but this."""
    B, _, T, H = inputs["k"].shape
    V = inputs["v"].shape[3]
    matmuls = CHUNK * (H + V) + 2 * H * V if with_out else H * V
    return pl.CostEstimate(
        flops=2 * B * num_heads * T * matmuls,
        transcendentals=B * num_heads * T * CHUNK if with_out else 0,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*inputs.values(), *shapes.values())),
    )
