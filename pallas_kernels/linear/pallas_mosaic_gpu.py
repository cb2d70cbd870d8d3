"""Linear attention by Mosaic GPU kernels on NVIDIA Hopper: which calls they serve, and how a call reaches them.

No decay and decays of a head or a token are sweeps (pallas_mosaic_gpu_sweep.py); decays of each dim of the keys and
delta rules are chunks made ready and a chain of states (pallas_mosaic_gpu_prepared.py)."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.linear import pallas_mosaic_gpu_prepared as prepared
from pallas_kernels.linear import pallas_mosaic_gpu_sweep as kernel
from pallas_kernels.linear.chunks import Chunks
from pallas_kernels.linear.options import Options, kind_of
from pallas_kernels.linear.pallas_mosaic_gpu_sweep import CHUNK, SNAPSHOT_CHUNKS
from pallas_kernels.linear.state import LinearState
from pallas_kernels.linear.sweeps import Primitives, Swept, part_chunks
from pallas_kernels.mosaic_gpu import hopper_cores, refuse
from pallas_kernels.wgmma import TILE_ROWS

HEAD_DIMS = (64, 128)

_PART_OVERHEAD = 3
"""What it takes to begin and to end a part, its states read and written, in chunks."""

_LEAST_CHUNKS = 4
"""Of a part, about."""

_NEAR_LEAST = 1.05
"""Up to how much more than the least time fewer parts may take: a few idle multiprocessors leave memory to others."""

_NOTHING = 2.0**-64
"""What is left of a chunk's writes that need not be read: with 24 bits of the rest they are rounded away, unless they
are 10^12 times as large."""


def forward(q, k, v, *, decay, beta, initial_state, segment_ids, parts, options: Options, interpret=None):
    """`linear_attention_forward` on a Hopper GPU; with `interpret` on a CPU, for tests."""
    num_cores = _checked_cores(k, v, decay, beta, interpret)
    call = {"decay": decay, "initial_state": initial_state, "segment_ids": segment_ids, "options": options}
    if _is_swept(decay, beta):
        return _primitives(k, v, decay, segment_ids, num_cores, interpret).forward(q, k, v, parts=parts, **call)
    return prepared.forward(q, k, v, beta=beta, num_cores=num_cores, interpret=interpret, **call)


def backward(
    q, k, v, dout, dstate, *, decay, beta, initial_state, segment_ids, starts, among, parts, options: Options,
    interpret=None,
):  # fmt: skip
    """`linear_attention_backward` on a Hopper GPU; with `interpret` on a CPU, for tests."""
    num_cores = _checked_cores(k, v, decay, beta, interpret)
    call = {
        "decay": decay, "initial_state": initial_state, "segment_ids": segment_ids, "options": options, "starts": starts
    }  # fmt: skip
    arrays = q, k, v, dout.astype(v.dtype), dstate
    if _is_swept(decay, beta):
        return _primitives(k, v, decay, segment_ids, num_cores, interpret).backward(*arrays, parts=parts, **call)
    return prepared.backward(*arrays, beta=beta, among=among, num_cores=num_cores, interpret=interpret, **call)


def states(k, v, *, decay, segment_ids, options: Options, interpret=None) -> LinearState:
    """`linear_attention_states` on a Hopper GPU; with `interpret` on a CPU, for tests."""
    num_cores = _checked_cores(k, v, decay, None, interpret)
    if _is_swept(decay, None):
        call = {"decay": decay, "segment_ids": segment_ids}
        return _primitives(k, v, decay, segment_ids, num_cores, interpret).states(k, v, **call)
    return prepared.states(k, v, decay=decay, segment_ids=segment_ids, reverse=False, interpret=interpret)


def state_cotangents(q, dout, *, decay, segment_ids, options: Options, interpret=None) -> LinearState:
    """`linear_attention_state_cotangents` on a Hopper GPU; with `interpret` on a CPU, for tests."""
    num_cores = _checked_cores(q, dout, decay, None, interpret)
    dout = dout.astype(q.dtype)
    if _is_swept(decay, None):
        return _primitives(q, dout, decay, segment_ids, num_cores, interpret).state_cotangents(
            q, dout, decay=decay, segment_ids=segment_ids, options=options
        )
    parts = prepared.states(q, dout, decay=decay, segment_ids=segment_ids, reverse=True, interpret=interpret)
    return LinearState(value=options.scale * parts.value, decay=parts.decay)


def num_parts(batch_size: int, num_heads: int, length: int, *, num_blocks: int) -> int:
    """In how many parts to sweep a row, so that it takes the least time.

    More parts keep more multiprocessors at work, until there are as many blocks of threads as run at once or a multiple
    of that; but all but one of the parts are read once more, half of what a sweep moves, for the states before them.

    Args:
      num_blocks: Items that run at once.
    """
    chunks = -(-length // CHUNK)
    intervals = -(-chunks // SNAPSHOT_CHUNKS)
    rows = batch_size * num_heads

    def cost(parts: int) -> float:
        one = part_chunks(chunks, parts, SNAPSHOT_CHUNKS) + _PART_OVERHEAD
        rounds = -(-rows * parts // num_blocks)
        rounds_of_maps = -(-rows * (parts - 1) // num_blocks)
        return (rounds + rounds_of_maps / 2) * one

    # As many as there are whole lengths for: none may be empty.
    most = max(1, min(chunks // _LEAST_CHUNKS, 4 * num_blocks))
    possible = {-(-intervals // -(-intervals // parts)) for parts in range(1, most + 1)}
    least = min(map(cost, possible))
    return min(parts for parts in possible if cost(parts) <= _NEAR_LEAST * least)


def _is_swept(decay, beta) -> bool:
    return beta is None and kind_of(decay) != "vector"


def _checked_cores(k, v, decay, beta, interpret) -> int:
    """Multiprocessors of the GPU.

    Raises: NotImplementedError with the reason where the kernels do not serve the call.
    """
    num_cores = hopper_cores(interpret, interpreted=4)
    if v.dtype == jnp.float16:
        refuse("v is float16, it takes bfloat16: states of sums that do not decay overflow float16")
    if v.dtype != jnp.bfloat16:
        refuse(f"v is {v.dtype}, it takes bfloat16")
    for name, dim in (("keys", k.shape[3]), ("values", v.shape[3])):
        if dim not in HEAD_DIMS:
            refuse(f"{name} have head dim {dim}, it takes {' and '.join(map(str, HEAD_DIMS))}")
    if beta is not None and kind_of(decay) == "vector":
        refuse("it has no delta rule with a decay for each dim of the keys, it takes one for each head or token")
    return num_cores


def _primitives(k, v, decay, segment_ids, num_cores: int, interpret) -> Primitives:
    given = {
        "with_decay": decay is not None, "with_documents": segment_ids is not None, "interpret": interpret
    }  # fmt: skip
    # Every sweep of a call has the same parts: as many as suit the one of the fewest columns.
    num_blocks = num_cores * kernel.items_of_block(min(k.shape[3], v.shape[3]))
    return Primitives(
        chunk=CHUNK,
        snapshot_chunks=SNAPSHOT_CHUNKS,
        num_parts=functools.partial(num_parts, num_blocks=num_blocks),
        maps=functools.partial(_maps, **given),
        sweep=functools.partial(_sweep, **given),
    )


def _maps(
    k, v, chunks: Chunks, *, num_heads: int, num_parts: int, wanted: slice, reverse: bool, with_decay: bool,
    with_documents: bool, interpret,
) -> LinearState:  # fmt: skip
    length, num_chunks = v.shape[1], chunks.keeps.shape[2]
    of_part = part_chunks(num_chunks, num_parts, SNAPSHOT_CHUNKS)
    padding = (0, 0), (0, 0), (0, num_parts * of_part - num_chunks)
    keeps = jnp.pad(chunks.keeps, padding, constant_values=1.0).reshape(*chunks.keeps.shape[:2], num_parts, of_part)
    writes = left = read = None
    if with_decay or with_documents:
        # What is left at the end of a part of what its chunks wrote.
        left = _products_behind(keeps, reverse=not reverse)
        there = jnp.arange(num_parts * of_part).reshape(num_parts, of_part) < num_chunks
        read = jnp.sum((left >= _NOTHING) & there, axis=3, dtype=jnp.int32)
        left = left.reshape(*left.shape[:2], -1)
        writes = chunks.reads if reverse else chunks.writes
    outputs = kernel.sweep(
        kernel.Inputs(
            q=None,
            k=_whole_tiles(k, interpret),
            v=_whole_tiles(v, interpret),
            dot_with=None,
            before=None,
            rows=kernel.Rows(writes=writes),
            keeps=left,
            num_chunks=read,
        ),
        num_heads=num_heads,
        length=length,
        config=kernel.Config(
            num_parts=num_parts, wanted=range(wanted.start, wanted.stop), reverse=reverse, interpret=interpret
        ),
    )
    return LinearState(value=outputs.end, decay=jnp.moveaxis(jnp.prod(keeps, axis=3), 2, 1)[:, wanted])


def _products_behind(x: jax.Array, *, reverse: bool) -> jax.Array:
    """Of each in a row of the last dim the product of those before it, in reverse of those after it."""
    one = (0, 1) if reverse else (1, 0)
    shifted = jnp.pad(x, ((0, 0), (0, 0), (0, 0), one), constant_values=1.0)
    shifted = shifted[..., 1:] if reverse else shifted[..., :-1]
    return jax.lax.cumprod(shifted, axis=3, reverse=reverse)


def _sweep(
    q, k, v, chunks: Chunks, before, *, scale: float, reverse: bool, dot_with, snapshots: bool, with_decay: bool,
    with_documents: bool, interpret,
) -> Swept:  # fmt: skip
    length, num_parts = v.shape[1], before.shape[1]
    reads, writes = (chunks.writes, chunks.reads) if reverse else (chunks.reads, chunks.writes)
    is_scaled = with_decay or with_documents
    rows = kernel.Rows(
        cumulative=chunks.cumulative if with_decay else None,
        reads=reads if is_scaled else None,
        writes=writes if is_scaled else None,
        document=chunks.document if with_documents else None,
    )
    outputs = kernel.sweep(
        kernel.Inputs(
            q=_whole_tiles(q, interpret),
            k=_whole_tiles(k, interpret),
            v=_whole_tiles(v, interpret),
            dot_with=None if dot_with is None else _whole_tiles(dot_with, interpret),
            before=before,
            rows=rows,
            keeps=chunks.keeps if is_scaled else None,
        ),
        num_heads=chunks.reads.shape[1],
        length=length,
        config=kernel.Config(
            num_parts=num_parts, wanted=range(num_parts), reverse=reverse, scale=scale, snapshots=snapshots,
            interpret=interpret,
        ),
    )  # fmt: skip
    return Swept(
        out=outputs.out[:, :length],
        end=outputs.end[:, 0],
        dots=None if outputs.dots is None else jnp.sum(outputs.dots, axis=0),
        snapshots=outputs.snapshots,
    )


def _whole_tiles(x: jax.Array, interpret) -> jax.Array:
    """The same, its length padded with zeros to what shared memory is tiled by.

    A copy reads zeros behind the end, and leaves out what it would write there; the interpreter needs whole chunks.
    """
    padding = -x.shape[1] % (TILE_ROWS if interpret is None else CHUNK)
    return jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) if padding else x
