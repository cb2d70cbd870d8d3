"""Linear attention on NVIDIA Hopper where the rows of a state decay each by itself, or a delta rule corrects it: what a
chunk's tokens make of each other (prepared.py), then the states of the row (pallas_mosaic_gpu_chain.py).
"""

import jax
import jax.numpy as jnp

from pallas_kernels.linear import pallas_mosaic_gpu_chain as chain
from pallas_kernels.linear import pallas_mosaic_gpu_delta_gradients as of_delta
from pallas_kernels.linear import pallas_mosaic_gpu_levels as levels
from pallas_kernels.linear import pallas_mosaic_gpu_vector_gradients as of_vectors
from pallas_kernels.linear.chunks import Chunks, sum_groups
from pallas_kernels.linear.options import Options
from pallas_kernels.linear.pallas_mosaic_gpu_chain import CHUNK
from pallas_kernels.linear.pallas_mosaic_gpu_solve import Inputs, scores_and_solve
from pallas_kernels.linear.pallas_mosaic_gpu_solve import Outputs as Solved
from pallas_kernels.linear.prepared import (
    Prepared,
    factors_of,
    tiles,
    to_states,
    untile,
    without_starts,
)
from pallas_kernels.linear.state import LinearState, Passed, before_each
from pallas_kernels.wgmma import TILE_ROWS


def forward(q, k, v, *, decay, beta, initial_state, segment_ids, options: Options, num_cores: int, interpret):
    """As `api.linear_attention_forward`, except for parts of runs."""
    chunks = factors_of(v, decay, segment_ids)
    prepared = _prepare(q, k, v, chunks, decay=decay, beta=beta, scale=options.scale, interpret=interpret)
    T, (of_part, in_parts) = v.shape[1], parts_of(v, beta, num_cores)
    inputs = _inputs(prepared, v, _first(initial_state), interpret)
    if in_parts:
        inputs = _in_parts(inputs, T, of_part, scale=options.scale, reverse=False, interpret=interpret)
    config = chain.Config(
        reverse=False, scale=options.scale, part_chunks=of_part, starts=not in_parts, interpret=interpret
    )
    swept = chain.sweep(inputs, num_heads=v.shape[2], length=T, config=config)
    starts = inputs.before if swept.starts is None else swept.starts
    among = None if beta is None else (prepared.scores, prepared.solve)
    return Passed(swept.out[:, :T], swept.end[:, -1].mT, starts.mT, among)


def backward(
    q,
    k,
    v,
    dout,
    dstate,
    *,
    decay,
    beta,
    initial_state,
    segment_ids,
    starts,
    among,
    options: Options,
    num_cores: int,
    interpret,
):
    """As `api.linear_attention_backward`, except for parts of runs."""
    T, N = v.shape[1:3]
    chunks = factors_of(v, decay, segment_ids)
    prepared = _prepare(
        q, k, v, chunks, decay=decay, beta=beta, among=among, scale=options.scale, interpret=interpret
    )  # fmt: skip
    of_part, in_parts = parts_of(v, beta, num_cores)
    num_chunks = -(-T // CHUNK)
    num_parts = -(-num_chunks // of_part)
    if starts is None or starts.shape[1] != num_parts:
        starts, of_part, in_parts = _first(initial_state), num_chunks, False
    else:
        starts = starts.mT
    sizes = {"num_heads": N, "length": T}
    before = chain.sweep(
        _inputs(prepared, v, starts, interpret)._replace(q=None, scores=None),
        config=chain.Config(
            reverse=False, scale=options.scale, part_chunks=of_part, snapshots=True, interpret=interpret
        ),
        **sizes,
    )  # fmt: skip
    inputs = _inputs(prepared, dout, _first(dstate), interpret)
    if in_parts:
        inputs = _in_parts(inputs, T, of_part, scale=options.scale, reverse=True, interpret=interpret)
    config = chain.Config(
        reverse=True, scale=options.scale, part_chunks=of_part if in_parts else num_chunks, snapshots=True,
        interpret=interpret,
    )  # fmt: skip
    after = chain.sweep(inputs, config=config, **sizes)
    call = {
        "decay": decay if options.decay_gradient else None,
        "segment_ids": segment_ids,
        "scale": options.scale,
        "with_initial_state": initial_state is not None,
    }
    dv, dbeta = after.out[:, :T], None
    if beta is None:
        call["decay"] = decay
        dq, dk, ddecay = _vector_gradients(
            q, k, v, dout, before, after, chunks, prepared, **call, interpret=interpret
        )  # fmt: skip
        ddecay = ddecay if options.decay_gradient else None
    else:
        dq, dk, ddecay, dbeta = _delta_gradients(
            q, k, v, dout, dv, before, after, chunks, prepared, **call, interpret=interpret
        )  # fmt: skip
        if decay is not None and decay.ndim == 1 and ddecay is not None:
            ddecay = jnp.sum(ddecay, axis=(0, 1))
    dq, dk = (sum_groups(x, q.shape[2]).astype(q.dtype) for x in (dq, dk))
    return dq, dk, dv, ddecay, dbeta, after.end[:, 0].mT


def _prepare(q, k, v, chunks: Chunks, *, decay, beta, among=None, scale: float, interpret) -> Prepared:
    """`among`: scores and solve of a delta rule, where they are there already."""
    if beta is None:
        with_documents = chunks.document is not None
        outputs = levels.to_states_and_scores(
            levels.Inputs(
                q=_whole_tiles(q, interpret),
                k=_whole_tiles(k, interpret),
                decay=_whole_tiles(decay.astype(jnp.float32), interpret),
                reads=chunks.reads if with_documents else None,
                writes=chunks.writes if with_documents else None,
                document=chunks.document,
            ),
            scale=scale,
            interpret=interpret,
        )
        keeps = outputs.keeps * chunks.keeps[..., None] if with_documents else outputs.keeps
        return Prepared(
            q=outputs.q, k=outputs.k, scores=outputs.scores, solve=None, reads=None, writes=None, keeps=keeps
        )  # fmt: skip
    with_documents, keeps = chunks.document is not None, None
    made = None
    if among is None:
        made = _solve(q, k, chunks, decay=decay, beta=beta, scale=scale, interpret=interpret)
        among = made.scores, made.solve
    reads = writes = None
    if made is not None and made.reads is not None:
        reads, writes = made.reads, made.writes
    elif decay is not None or with_documents:
        reads, writes = chunks.reads, chunks.writes
    if with_documents:  # else they are the last of reads
        keeps = jnp.broadcast_to(chunks.keeps[..., None], (*chunks.keeps.shape, q.shape[3]))
    return Prepared(q=q, k=k, scores=among[0], solve=among[1], reads=reads, writes=writes, keeps=keeps)


def _solve(q, k, chunks: Chunks, *, decay, beta, scale: float, interpret) -> Solved:
    """scores and solve of a delta rule."""
    of_tokens = beta.astype(jnp.float32)
    if decay is not None:
        decay = jnp.broadcast_to(decay.astype(jnp.float32), beta.shape)
        of_tokens = jnp.concatenate([of_tokens, decay], axis=2)
    padding = chunks.reads.shape[2] - of_tokens.shape[1]
    return scores_and_solve(
        Inputs(
            q=_whole_tiles(q, interpret),
            k=_whole_tiles(k, interpret),
            of_tokens=jnp.moveaxis(jnp.pad(of_tokens, ((0, 0), (0, padding), (0, 0))), 2, 1),
            document=chunks.document,
        ),
        num_heads=beta.shape[2],
        scale=scale,
        interpret=interpret,
    )


def _vector_gradients(
    q, k, v, dout, before: chain.Outputs, after: chain.Outputs, chunks: Chunks, prepared: Prepared, *, decay,
    segment_ids, scale: float, with_initial_state: bool, interpret,
):  # fmt: skip
    """dq, dk and ddecay."""
    T, with_documents = v.shape[1], chunks.document is not None
    arrays = {"q": q, "k": k, "v": v, "dout": dout, "decay": decay.astype(jnp.float32)}
    inputs = of_vectors.Inputs(
        **{name: _whole_tiles(x, interpret) for name, x in arrays.items()},
        states=before.snapshots,
        dstates=after.snapshots,
        keeps=prepared.keeps,
        reads=chunks.reads if with_documents else None,
        writes=chunks.writes if with_documents else None,
        document=chunks.document,
    )
    outputs = of_vectors.gradients(inputs, num_heads=v.shape[2], scale=scale, interpret=interpret)
    ddecay = without_starts(outputs.ddecay[:, :T], segment_ids, with_initial_state)
    return outputs.dq[:, :T], outputs.dk[:, :T], ddecay


def _delta_gradients(
    q, k, v, dout, dv, before: chain.Outputs, after: chain.Outputs, chunks: Chunks, prepared: Prepared, *, decay,
    segment_ids, scale: float, with_initial_state: bool, interpret,
):  # fmt: skip
    """dq, dk, ddecay and dbeta."""
    T, with_decay = v.shape[1], decay is not None
    inputs = of_delta.Inputs(
        **{name: _whole_tiles(x, interpret) for name, x in dict(q=q, k=k, v=v, dout=dout, dv=dv).items()},
        written=before.written,
        states=before.snapshots,
        dstates=after.snapshots,
        cumulative=None if prepared.reads is None else chunks.cumulative,
        reads=prepared.reads,
        writes=prepared.writes,
        document=chunks.document,
    )
    outputs = of_delta.gradients(
        inputs, num_heads=v.shape[2], scale=scale, with_decay=with_decay, interpret=interpret
    )  # fmt: skip
    sides = v.shape[3] // CHUNK, q.shape[3] // CHUNK
    dbeta = jnp.moveaxis(jnp.sum(outputs.dbeta[: sides[0]], axis=0), 1, 2)[:, :T]
    ddecay = None
    if with_decay:
        of_chunks = (*chunks.keeps.shape, CHUNK)
        dlog, to_end = (jnp.sum(x[: sides[1]], axis=0) for x in (outputs.dlog, outputs.to_end))
        dlog += jnp.sum(outputs.reading - outputs.read, axis=0)
        dlog, to_end = dlog.reshape(of_chunks), to_end.reshape(of_chunks)
        kept = jnp.sum(outputs.kept[: sides[1]], axis=(0, 4))
        at_end = jnp.sum(to_end, axis=3) + chunks.keeps * kept
        ddecay = jax.lax.cumsum(dlog, axis=3, reverse=True) + at_end[..., None]
        ddecay = jnp.moveaxis(ddecay.reshape(*ddecay.shape[:2], -1), 1, 2)[:, :T]
        ddecay = without_starts(ddecay, segment_ids, with_initial_state)
    return outputs.dq[:, :T], outputs.dk[:, :T], ddecay, dbeta


def states(k, v, *, decay, segment_ids, reverse: bool, interpret) -> LinearState:
    """The map of a row, which is one part, of decays of each dim: what its tokens write or, in reverse, what they give
    the cotangent of the state before them, without the scale."""
    B, T, N, V = v.shape
    log, chunks = tiles(decay.astype(jnp.float32), N), factors_of(v, decay, segment_ids)
    reads, writes, keeps = to_states(chunks, log)
    k = untile((reads if reverse else writes) * tiles(k, N).astype(jnp.float32)).astype(k.dtype)
    inputs = Prepared(q=None, k=k, scores=None, solve=None, reads=None, writes=None, keeps=keeps)
    swept = chain.sweep(
        _inputs(inputs, v, None, interpret),
        num_heads=N,
        length=T,
        config=chain.Config(reverse=reverse, scale=1.0, part_chunks=-(-T // CHUNK), interpret=interpret),
    )
    return LinearState(value=swept.end.mT, decay=jnp.prod(keeps, axis=2)[:, None])


_OF_MAPS, _OF_STEP = 1.25, 8
"""What a chunk takes in the pass for the maps of parts of a delta rule, and what a product of such maps takes, in
chunks of a sweep."""

_MOST_PARTS = 16


def parts_of(v, beta, num_cores: int) -> tuple[int, bool]:
    """Chunks of the parts whose states the forward pass returns, but for the last, and whether the parts of a row are
    swept side by side.

    The backward pass goes through all parts at once, to have the states again: they are as many as multiprocessors
    want. Those of a delta rule are swept side by side, after a pass for their maps, which are matrices, where that is
    faster than the row from end to end; then they are as many as take the least time.
    """
    B, T, N, V = v.shape
    chunks, rows = -(-T // CHUNK), B * N * (V // chain.COLUMNS)
    many = -(-chunks // max(1, num_cores // rows))
    if beta is None:
        return many, many < chunks

    def cost(of_part: int) -> float:
        parts = -(-chunks // of_part)
        rounds, rounds_of_maps = (-(-rows * x // num_cores) for x in (parts, parts - 1))
        return (rounds + _OF_MAPS * rounds_of_maps) * of_part + (_OF_STEP * parts if parts > 1 else 0)

    of_part = min((-(-chunks // parts) for parts in range(1, _MOST_PARTS + 1)), key=cost)
    return (many, False) if of_part == chunks else (of_part, True)


def _in_parts(
    inputs: chain.Inputs, length: int, of_part: int, *, scale: float, reverse: bool, interpret
) -> chain.Inputs:
    """The same with the state before each part in place of that before the row: by a pass over what is written."""
    (B, N, num_chunks), V = inputs.scores.shape[:3], inputs.v.shape[3]
    num_parts = -(-num_chunks // of_part)
    H = inputs.k.shape[3]
    first = jnp.zeros((B, N, H, V), jnp.float32) if inputs.before is None else inputs.before[:, 0].mT
    if inputs.solve is not None:
        of_maps = inputs._replace(before=None) if reverse else inputs._replace(q=None, scores=None, before=None)
        config = chain.Config(reverse=reverse, scale=scale, part_chunks=of_part, maps=True, interpret=interpret)
        maps = chain.sweep(of_maps, num_heads=N, length=length, config=config)
        parts = LinearState(value=maps.end.mT, decay=maps.decays.mT)
        before, last = before_each(parts, first, reverse=reverse)
        before = jnp.concatenate([last[:, None], before] if reverse else [before, last[:, None]], axis=1)
        return inputs._replace(before=before.mT)
    written = inputs._replace(q=None, k=inputs.q if reverse else inputs.k, scores=None, before=None)
    config = chain.Config(reverse=reverse, scale=1.0, part_chunks=of_part, interpret=interpret)
    swept = chain.sweep(written, num_heads=N, length=length, config=config)
    padding = (0, 0), (0, 0), (0, num_parts * of_part - num_chunks), (0, 0)
    keeps = jnp.pad(inputs.keeps, padding, constant_values=1.0).reshape(B, N, num_parts, of_part, H)
    parts = LinearState(value=swept.end.mT, decay=jnp.moveaxis(jnp.prod(keeps, axis=3), 2, 1))
    before, _ = before_each(parts, first, reverse=reverse)
    return inputs._replace(before=before.mT)


def _first(state) -> jax.Array | None:
    """The state before a row or, in reverse, its cotangent after it, as the chain takes it."""
    return None if state is None else state.mT[:, None]


def _inputs(prepared: Prepared, v, before, interpret) -> chain.Inputs:
    return chain.Inputs(
        q=_whole_tiles(prepared.q, interpret),
        k=_whole_tiles(prepared.k, interpret),
        v=_whole_tiles(v, interpret),
        scores=prepared.scores,
        solve=prepared.solve,
        reads=prepared.reads,
        writes=prepared.writes,
        keeps=prepared.keeps,
        before=before,
    )


def _whole_tiles(x, interpret):
    """The same, its length padded with zeros to what shared memory is tiled by.

    A copy reads zeros behind the end, and leaves out what it would write there; the interpreter needs whole chunks.
    """
    padding = 0 if x is None else -x.shape[1] % (TILE_ROWS if interpret is None else CHUNK)
    return jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) if padding else x
