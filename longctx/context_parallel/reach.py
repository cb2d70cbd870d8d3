"""How far queries see, in slots of the sequence: what a strategy may leave out when the program is traced.

A mask speaks of positions, and a device knows its slots. Where every document lies in neighbouring slots and its
positions count up one by one, no pair of slots is farther apart than its positions, so a window of W positions needs
W - 1 slots. That is true of rows of packed documents, and it cannot be known when the program is traced: `holds` finds
out once a step, from the tokens, and what was computed of rows of which it is not true becomes NaN.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from longctx.context_parallel.layout import Layout
from longctx.context_parallel.strategy import Setting
from pallas_kernels import Tokens
from pallas_kernels.mask import Span


def slot_span(setting: Setting) -> Span:
    """How far apart in the sequence, in slots, a query and a key that it may attend to can be; None is no bound.

    That of the mask, and of the longest document where that is bounded, the mask keeps to documents and positions are
    passed, by which documents can be measured. Nothing is bounded where slots and positions need not agree: for T != S,
    and for a mask that crosses documents while positions are passed, which may start anew in each.
    """
    unbounded = Span(None, None)
    if setting.layout is None or setting.layout.runs(setting.degree) is None or setting.q_len != setting.kv_len:
        return unbounded
    if not setting.mask.within_documents:
        return unbounded if setting.has_positions else setting.mask.span
    if setting.max_document_length is None or not setting.has_positions:
        return setting.mask.span
    longest = setting.max_document_length - 1
    return Span(*(longest if bound is None else min(bound, longest) for bound in setting.mask.span))


def hops_needed(setting: Setting) -> tuple[int, ...]:
    """The hops of a ring at which some device may have work: at hop h device d has the keys of device d - h.

    Hop 0, a device's own keys, is always one of them.
    """
    span = slot_span(setting)
    if span == (None, None):
        return tuple(range(setting.degree))
    return _hops(setting.layout, setting.degree, setting.kv_len, span)


@functools.lru_cache(maxsize=64)
def _hops(layout: Layout, degree: int, length: int, span: Span) -> tuple[int, ...]:
    if span.is_bounded and span.left + span.right < 0:
        return (0,)  # no pair is allowed
    runs = layout.runs(degree)
    chunk, num_chunks = length // runs.size, runs.size
    holder = np.argsort(runs.reshape(-1)) // runs.shape[1]
    # Tokens of chunks that are k apart, k > 0 where the keys come first, are (k - 1) chunk + 1 to (k + 1) chunk - 1
    # apart.
    most = num_chunks - 1 if span.left is None else min(num_chunks - 1, (span.left - 1) // chunk + 1)
    least = 1 - num_chunks if span.right is None else max(1 - num_chunks, -((span.right - 1) // chunk + 1))
    hops = {0}
    for k in range(least, most + 1):
        queries = np.arange(max(k, 0), num_chunks + min(k, 0))
        hops |= set(np.unique((holder[queries] - holder[queries - k]) % degree).tolist())
    return tuple(sorted(hops))


def holds(setting: Setting, tokens: Tokens) -> jax.Array | None:
    """Whether slots and positions agree as `slot_span` assumes, in each row, bool `[B or 1, 1]`; None if it needs not.

    Queries and keys are the same tokens. Along a row segment ids, padding left out, never decrease, and positions of a
    document grow as the slots do; they are below `max_document_length`, where that bounds anything.

    Per shard. Cost: O(S / P), and one all-gather of 32 bytes a row and run of tokens.
    """
    if slot_span(setting) == (None, None) or not setting.has_positions:
        return None
    positions, segment_ids = tokens.kv_positions, tokens.kv_segment_ids
    same = (tokens.q_positions == positions) & (tokens.q_segment_ids == segment_ids)
    if setting.max_document_length is not None:
        same &= (segment_ids < 0) | ((positions >= 0) & (positions < setting.max_document_length))
    return documents_in_turn(setting.layout, setting.degree, setting.axes, positions, segment_ids, same)


def documents_in_turn(
    layout: Layout,
    degree: int,
    axes: tuple[str, ...],
    positions: jax.Array,
    segment_ids: jax.Array,
    also: jax.Array | None = None,
) -> jax.Array:
    """Whether along each row, bool `[B or 1, 1]`, segment ids never decrease and positions grow as slots do.

    Within a document, and padding left out. Per shard.

    Args:
      layout: One of runs.
      degree, axes: Devices that share a row, and the mesh axes that they are on.
      positions, segment_ids: Of this device's tokens, `[B or 1, T / P]`.
      also: What else must be true of each.
    """
    runs = layout.runs(degree)
    rank, (num_rows, length) = jax.lax.axis_index(axes), positions.shape
    chunk = length // runs.shape[1]
    first_slots = jnp.asarray(runs * chunk, jnp.int32)[rank]
    segments = segment_ids.reshape(num_rows, -1, chunk)
    starts = positions.reshape(segments.shape) - first_slots[:, None] - jnp.arange(chunk, dtype=jnp.int32)
    agrees = jnp.all(_in_turn(segments, starts), axis=1)
    if also is not None:
        agrees &= jnp.all(also, axis=1)

    ends = _ends(segments, starts)
    summary = jnp.concatenate(
        [ends, jnp.broadcast_to(agrees.astype(jnp.int32)[:, None, None, None], (*ends.shape[:3], 1))], axis=3
    )
    # [devices, rows, runs, first and last, values] to [rows, first and last of all runs, values].
    summaries = jax.lax.all_gather(summary, axes).transpose(1, 0, 2, 3, 4)
    summaries = summaries.reshape(num_rows, runs.size, 2, 3)[:, np.argsort(runs.reshape(-1))]
    segment, start, agrees = jnp.unstack(summaries.reshape(num_rows, -1, 3), axis=2)
    return (jnp.all(agrees == 1, axis=1) & _in_turn(segment, start))[:, None]


def where_it_holds(holds: jax.Array | None, x: jax.Array) -> jax.Array:
    """`x`, `[B, ...]`, with NaN in the rows where `holds`, `[B or 1, 1]`, is not true."""
    if holds is None:
        return x
    return jnp.where(holds.reshape(-1, *(1,) * (x.ndim - 1)), x, jnp.asarray(jnp.nan, x.dtype))


def _in_turn(segment_ids: jax.Array, starts: jax.Array) -> jax.Array:
    """Whether, along the last dim, documents come one after the other, each with one start; padding has none."""
    places = jnp.arange(segment_ids.shape[-1], dtype=jnp.int32)
    is_token = segment_ids >= 0
    last = jax.lax.cummax(jnp.where(is_token, places, -1), axis=segment_ids.ndim - 1)
    before = jnp.concatenate([jnp.full_like(last[..., :1], -1), last[..., :-1]], axis=-1)
    segment_before, start_before = (jnp.take_along_axis(x, before, axis=-1, mode="clip") for x in (segment_ids, starts))
    follows = (segment_ids > segment_before) | ((segment_ids == segment_before) & (starts == start_before))
    return jnp.all(~is_token | (before < 0) | follows, axis=-1)


def _ends(segment_ids: jax.Array, starts: jax.Array) -> jax.Array:
    """Segment id and start of the first and the last token along the last dim, `[..., 2, 2]`; padding's if none is."""
    is_token = segment_ids >= 0
    first = jnp.argmax(is_token, axis=-1)
    last = segment_ids.shape[-1] - 1 - jnp.argmax(is_token[..., ::-1], axis=-1)
    places = jnp.stack([first, last], axis=-1)
    return jnp.stack([jnp.take_along_axis(x, places, axis=-1) for x in (segment_ids, starts)], axis=-1)
