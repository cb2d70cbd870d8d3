"""Hops of a ring by the TPU kernels: each computes the attention of a hop and sends what the next one needs.

Arrays stay in the kernels' own layout from hop to hop (pallas_mosaic_tpu_tiles.py). Which kernel sends what:
  forward   the hop's kernel sends the keys and values on
  backward  the kernel of dq sends the gradients of the keys that were here a hop ago, float32, on to where these keys
            are now; that of dk and dv adds to those that have come, and sends keys and values on
so each holds one dtype on its links and there are as many matmuls as can be beside either.

Reference: see pallas_mosaic_tpu_send.py for how they send, and longctx/context_parallel/ring_dma.py for the ring.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.bias import Bias
from pallas_kernels.block_sizes import BlockSizes
from pallas_kernels.blockwise import pallas_mosaic_tpu_backward as backward_kernel
from pallas_kernels.blockwise import pallas_mosaic_tpu_forward as forward_kernel
from pallas_kernels.blockwise.options import Options
from pallas_kernels.blockwise.pallas_mosaic_tpu import (
    Call,
    carry_by_head,
    check_call,
    rows_of_backward,
    whole_blocks,
)
from pallas_kernels.blockwise.pallas_mosaic_tpu_send import Kernel, Send
from pallas_kernels.blockwise.pallas_mosaic_tpu_tiles import by_head, by_token
from pallas_kernels.dropout import Dropout
from pallas_kernels.online_softmax import SoftmaxCarry
from pallas_kernels.schedule import Schedule
from pallas_kernels.tokens import Tokens

Pair = tuple[jax.Array, jax.Array]
"""Keys and values, or their gradients, `[B, K, S, H]` and `[B, K, S, V]` in whole blocks."""


class RingKernels:
    """The hops of one device's queries, whose keys come one hop after the other.

    Args:
      q, k, v: This device's, as `blockwise_attention`.
      options: Of the call.
      block_sizes: Of the schedules of all hops.
      dropout, bias: Refused.
    Raises: NotImplementedError where the kernels do not serve the call.
    """

    def __init__(
        self,
        q,
        k,
        v,
        *,
        options: Options,
        block_sizes: BlockSizes,
        dropout: Dropout | None = None,
        bias: Bias | None = None,
    ):
        check_call(q, v, dropout, None, bias)
        self.arrays = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v))
        self._options = options
        self.block_q, self.block_kv = whole_blocks(block_sizes, q.shape[1], k.shape[1])
        self.q = by_head(q, self.block_q)

    def keys(self, k: jax.Array, v: jax.Array) -> Pair:
        """This device's own, to start with."""
        return by_head(k, self.block_kv), by_head(v, self.block_kv)

    def carry(self, carry: SoftmaxCarry) -> SoftmaxCarry:
        """What a softmax starts from."""
        return carry_by_head(carry, self.block_q)

    def attend(
        self, keys: Pair, carry: SoftmaxCarry, schedule: Schedule, tokens: Tokens, send: Send
    ) -> tuple[Pair, SoftmaxCarry]:
        """The keys of the next hop, and the running softmax after this one."""

        def hop():
            inputs, config = self._forward(keys, carry, schedule, tokens)
            kernel = forward_kernel.kernel(inputs, config, return_carry=True)
            return kernel.and_send(inputs, config, send, keys)

        after, arrived = _dispatched("blockwise_attention_forward", hop)
        return arrived, SoftmaxCarry(**after)

    def finish(self, keys: Pair, carry: SoftmaxCarry, schedule: Schedule, tokens: Tokens) -> Pair:
        """out and lse, as `blockwise_attention_forward`, after the last hop."""

        def hop():
            inputs, config = self._forward(keys, carry, schedule, tokens)
            return forward_kernel.kernel(inputs, config, return_carry=False)(inputs, config)

        result = _dispatched("blockwise_attention_forward", hop)
        (_, T, _, _), V = self.arrays[0].shape, self.arrays[2].shape[3]
        return by_token(result["out"], T, V), result["lse"][:, :, 0, :T]

    def gradients(self, out, lse, dout) -> "RingGradients":
        """The hops of the backward pass, given the results over all keys, and the cotangent of out."""
        rows = rows_of_backward(out, lse, dout, None, self.block_q)
        return RingGradients(self, by_head(dout.astype(self.q.dtype), self.block_q), rows)

    def _forward(self, keys: Pair, carry: SoftmaxCarry, schedule: Schedule, tokens: Tokens):
        call = self.call(schedule, tokens)
        inputs = forward_kernel.Inputs(
            q=self.q, k=keys[0], v=keys[1], words=call.words_of_queries(), **call.token_rows(), carry=carry
        )
        return inputs, call.config_of(self.block_q, self.block_kv)

    def call(self, schedule: Schedule, tokens: Tokens) -> Call:
        return Call(*self.arrays, tokens, schedule, self._options)


class RingGradients:
    """The hops of a backward pass; from `RingKernels.gradients`."""

    def __init__(self, ring: RingKernels, dout: jax.Array, rows: jax.Array):
        self._ring, self._dout, self._rows = ring, dout, rows

    def zeros(self, keys: Pair) -> tuple[jax.Array, Pair]:
        """What dq and the gradients of keys start from."""
        dq, dk, dv = (jnp.zeros(x.shape, jnp.float32) for x in (self._ring.q, *keys))
        return dq, (dk, dv)

    def differentiate(
        self,
        keys: Pair,
        dq: jax.Array,
        gathered: Pair,
        schedule: Schedule,
        tokens: Tokens,
        *,
        send_gathered: Send | None,
        send_keys: Send | None,
    ) -> tuple[Pair, jax.Array, Pair]:
        """One hop.

        Args:
          keys: Of this hop.
          dq: Running.
          gathered: Gradients, of the keys of this hop if they are not sent, or else of those of the hop before.
          schedule, tokens: Of this hop.
          send_gathered: To where their keys are now; None where they are with them.
          send_keys: To the next hop; None in the last.
        Returns: the keys of the next hop (of this one, if they are not sent), dq, and gradients of this hop's keys.
        """

        def hop():
            call = self._ring.call(schedule, tokens)
            block_q, block_kv = self._ring.block_q, self._ring.block_kv
            inputs = backward_kernel.Inputs(
                q=self._ring.q, k=keys[0], v=keys[1], dout=self._dout, rows=self._rows,
                words=call.words_of_queries(), **call.token_rows(), running=(dq,),
            )  # fmt: skip
            config = call.config_of(block_q, block_kv)
            after, arrived = _launched(
                backward_kernel.kernel_of_queries(inputs, config), inputs, config, send_gathered, gathered
            )
            inputs = dataclasses.replace(inputs, words=call.words_of_keys(), running=arrived)
            config = call.config_of(block_kv, block_q)
            dkv, next_keys = _launched(backward_kernel.kernel_of_keys(inputs, config), inputs, config, send_keys, keys)
            return next_keys, after, dkv

        return _dispatched("blockwise_attention_backward", hop)

    def of_queries(self, dq: jax.Array) -> jax.Array:
        """dq as `[B, T, N, H]`."""
        _, T, _, H = self._ring.arrays[0].shape
        return by_token(dq, T, H)

    def of_keys(self, gathered: Pair) -> Pair:
        """dk and dv as `[B, S, K, H]` and `[B, S, K, V]`."""
        return tuple(by_token(x, *like.shape[1::2]) for x, like in zip(gathered, self._ring.arrays[1:], strict=True))


def _dispatched[R](op: str, hop: Callable[[], R]) -> R:
    """Through dispatch, which names it in the program and records it."""
    return dispatch.run(op, {"mosaic_tpu": hop}, "mosaic_tpu")


def _launched(kernel: Kernel, inputs, config, send: Send | None, parcel: Pair) -> tuple[object, Pair]:
    """The kernel's outputs, and the parcel of the device behind, or one's own where nothing is sent."""
    if send is None:
        return kernel(inputs, config), parcel
    return kernel.and_send(inputs, config, send, parcel)
