"""Halo attention: where a window bounds how far queries see, only the tokens around a device's own travel.

A device keeps one or two runs of neighbouring tokens. It receives the last L tokens before each run and the first R
after it, L and R how far a query sees back and ahead (reach.py): W - 1 and 0 for a causal window of W tokens. It
attends in one call to its own tokens and to these, and sends the gradients of these, float32, back to their owners, who
add and round them. In the backward pass the tokens are sent again, behind an optimization barrier, so that no layer
keeps them.

Contiguous: the L tokens come from the device before, or from as many as it takes, one permute each.
Zigzag: device d holds chunks d and 2 P - 1 - d of 2 P. What precedes its early run is with device d - 1, what precedes
its late one with d + 1; so two permutes, one each way, and each carries what follows the other run too.

Traffic, per device and layer, in bytes, b the size of q's dtype; at most, as the ends of the sequence send less:
  forward   B (L + R) K (H + V) b contiguous, 2 B (L + R) K (H + V) b zigzag, whatever T and P
  backward  the same, and the same with 4 in place of b (float32)
Once a step and distinct mask positions and segment ids travel the same way: 8 bytes a row and token.

Preconditions: queries and keys are the same tokens; the window is bounded on both sides; contiguous, or zigzag with L
and R at most a chunk, T / (2 P). Where positions are passed, the mask keeps to documents, each of them in neighbouring
slots with positions that count up one by one: rows of which that is not true become NaN.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from longctx.context_parallel.one_call import OneCallStrategy
from longctx.context_parallel.reach import holds, slot_span
from longctx.context_parallel.strategy import CallSchedule, Setting, num_bytes
from longctx.context_parallel.traffic import Transfer
from pallas_kernels import make_schedule
from pallas_kernels.mask import SameDocument


class Halo(OneCallStrategy):
    name = "halo"

    def refusal(self, setting):
        instead = "use ring or all_gather"
        if setting.q_len != setting.kv_len:
            lengths = f"T={setting.q_len}, S={setting.kv_len}"
            return f"halo serves queries and keys that are the same tokens, got {lengths}; {instead}"
        if setting.layout is None:
            return f"halo must know which tokens a device holds; name the layout, or {instead}"
        if setting.layout.name not in ("contiguous", "zigzag"):
            return (
                f"halo needs devices that hold runs of neighbouring tokens, got layout={setting.layout.name}; "
                f"choose contiguous or zigzag, or {instead}"
            )
        if setting.has_positions and not setting.mask.within_documents:
            return (
                "halo reads a window off positions, which may start anew in every document, and the mask "
                f"{setting.mask} crosses documents; add & documents(), leave positions out, or {instead}"
            )
        if not setting.mask.within_documents and setting.mask.uses_segments:
            return (
                f"halo serves masks that keep to documents or read no segment ids, got {setting.mask}; "
                f"add & documents(), or {instead}"
            )
        span = slot_span(setting)
        for side, bound in (("back", span.left), ("ahead", span.right)):
            if bound is None:
                return (
                    f"halo needs a window that is bounded on both sides, and {setting.mask} sees {side} without bound; "
                    f"add a window, bound the documents (max_document_length), or {instead}"
                )
        chunk = setting.kv_len // setting.degree // 2
        if setting.layout.name == "zigzag" and max(span) > chunk:
            return (
                f"halo over zigzag serves windows that see at most a chunk of {chunk} tokens far, got {max(span)}; "
                f"choose layout=contiguous, or {instead}"
            )
        return None

    def schedule(self, setting, tokens, *, block_sizes):
        if not setting.mask.within_documents:  # whose segment ids mean nothing: all tokens are of one document
            zeros = jnp.zeros_like(tokens.q_segment_ids)
            tokens = dataclasses.replace(tokens, q_segment_ids=zeros, kv_segment_ids=zeros)
        # What nobody sends arrives as zeros: one less is the segment id of padding.
        sent = jnp.stack([tokens.kv_positions, tokens.kv_segment_ids + 1], axis=-1)
        kv_positions, kv_segment_ids = jnp.unstack(_with_halo(setting, sent), axis=-1)
        found = holds(setting, tokens)
        tokens = dataclasses.replace(tokens, kv_positions=kv_positions, kv_segment_ids=kv_segment_ids - 1)
        blocks = make_schedule(
            self.call_mask(setting),
            tokens,
            q_len=setting.q_len // setting.degree,
            kv_len=kv_positions.shape[1],
            block_sizes=block_sizes,
        )
        return CallSchedule(blocks=blocks, tokens=tokens, holds=found)

    def bring(self, setting, x, schedule):
        return _with_halo(setting, x)

    def send_home(self, setting, x, schedule):
        return _to_owners(setting, x)

    def call_mask(self, setting):
        """The mask, which must keep to documents: the ends of the sequence receive padding."""
        return setting.mask if setting.mask.within_documents else setting.mask & SameDocument()

    def transfers(self, setting, *, batch_size, key_dim, value_dim, dtype):
        def permutes(phase, dtype):
            return tuple(
                Transfer(
                    kind="collective-permute",
                    phase=phase,
                    count=1,
                    num_bytes=num_bytes(
                        dtype, batch_size, message.num_tokens, setting.num_kv_heads, key_dim + value_dim
                    ),
                )
                for message in _messages(setting)
            )

        return permutes("forward", dtype) + permutes("backward", dtype) + permutes("backward", jnp.float32)


class _Piece(NamedTuple):
    """Tokens `start` to `stop` of what device d - shift holds, among the keys of device d; its own at shift 0."""

    shift: int
    start: int
    stop: int


class _Message(NamedTuple):
    """What every device sends to the one `shift` further, if there is one."""

    shift: int
    pieces: tuple[_Piece, ...]

    @property
    def num_tokens(self) -> int:
        return sum(piece.stop - piece.start for piece in self.pieces)

    def send(self, setting: Setting, x: jax.Array, *, back: bool = False) -> jax.Array:
        pairs = [(d, d + self.shift) for d in range(setting.degree) if 0 <= d + self.shift < setting.degree]
        return jax.lax.ppermute(x, setting.axes, [pair[::-1] for pair in pairs] if back else pairs)


def _pieces(setting: Setting) -> tuple[_Piece, ...]:
    """The keys of a device, those that it does not hold included, in the order of the sequence, run by run."""
    span, length = slot_span(setting), setting.kv_len // setting.degree
    back, ahead = max(0, span.left), max(0, span.right)
    if setting.layout.name == "zigzag":
        half = length // 2
        pieces = (
            _Piece(1, half - back, half),
            _Piece(0, 0, half),
            _Piece(-1, 0, ahead),
            _Piece(-1, length - back, length),
            _Piece(0, half, length),
            _Piece(1, half, half + ahead),
        )
    else:
        num_before, num_after = (min(setting.degree - 1, -(-far // length)) for far in (back, ahead))
        before = [_Piece(i, max(0, i * length - back), length) for i in range(num_before, 0, -1)]
        after = [_Piece(-i, 0, min(length, ahead - (i - 1) * length)) for i in range(1, num_after + 1)]
        pieces = (*before, _Piece(0, 0, length), *after)
    return tuple(piece for piece in pieces if piece.stop > piece.start)


def _messages(setting: Setting) -> tuple[_Message, ...]:
    pieces = _pieces(setting)
    shifts = dict.fromkeys(piece.shift for piece in pieces if piece.shift)
    return tuple(_Message(shift, tuple(piece for piece in pieces if piece.shift == shift)) for shift in shifts)


def _with_halo(setting: Setting, x: jax.Array) -> jax.Array:
    """This device's tokens, `[B, S / P, ...]`, with those around them, as `_pieces` says; zeros where nobody sends."""
    held = {piece: x[:, piece.start : piece.stop] for piece in _pieces(setting)}
    for message in _messages(setting):
        received = message.send(setting, jnp.concatenate([held[piece] for piece in message.pieces], axis=1))
        held |= zip(message.pieces, _split(received, message.pieces), strict=True)
    return jnp.concatenate(list(held.values()), axis=1)


def _to_owners(setting: Setting, x: jax.Array) -> jax.Array:
    """The transpose of `_with_halo`: the sum of what this device and others have for this device's tokens."""
    pieces = _pieces(setting)
    held = dict(zip(pieces, _split(x, pieces), strict=True))
    total = jnp.concatenate([part for piece, part in held.items() if piece.shift == 0], axis=1)
    for message in _messages(setting):
        received = message.send(setting, jnp.concatenate([held[piece] for piece in message.pieces], axis=1), back=True)
        for piece, part in zip(message.pieces, _split(received, message.pieces), strict=True):
            around = (piece.start, total.shape[1] - piece.stop)
            total += jnp.pad(part, ((0, 0), around, *((0, 0),) * (part.ndim - 2)))
    return total


def _split(x: jax.Array, pieces: tuple[_Piece, ...]) -> list[jax.Array]:
    """Along dim 1, into parts as long as the pieces."""
    ends = [piece.stop - piece.start for piece in pieces]
    return jnp.split(x, [sum(ends[: i + 1]) for i in range(len(ends) - 1)], axis=1)
