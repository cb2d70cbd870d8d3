"""What the TPU kernels of blockwise attention share: the sizes of a call, its tokens, and the logits of a tile.

Layout: heads stand before tokens, so that a block of a head is one run of whole tiles in memory; lengths are padded
with zeros to whole blocks and head dims to whole lanes, as a TPU's memory holds them anyway.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mask import Mask
from pallas_kernels.mosaic_tpu import LANES, lanes
from pallas_kernels.online_softmax import MASK_VALUE
from pallas_kernels.pair_tests import tests_of
from pallas_kernels.tokens import TokenAxis

_FLOAT32 = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What is static of a call.

    Attributes:
      block_q, block_kv: Tokens a block of the schedule holds, multiples of 128.
      chunk: Of a visited block, tokens computed at a time.
      kv_len: Number of keys, without padding.
      num_heads: Query heads, N.
      num_kv_heads: K.
      scale, soft_cap: Of logits; soft_cap None for none.
      tested: The mask, where visited blocks may hold pairs that may not attend, beside keys that are not there.
      vmem_bytes: What the kernel may hold in VMEM.
      num_pairs: How many pairs of tokens a head visits, or at most visits where that is not known before it is run.
    """

    block_q: int
    block_kv: int
    chunk: int
    kv_len: int
    num_heads: int
    num_kv_heads: int
    scale: float
    soft_cap: float | None
    tested: Mask | None
    vmem_bytes: int
    num_pairs: int

    def cost(self, inputs, outputs, *, dims: int) -> pl.CostEstimate:
        """For XLA, which knows nothing of a kernel but this: of matmuls over so many dims in all."""
        arrays = jax.tree.leaves((inputs, outputs))
        num_pairs = inputs.q.shape[0] * self.num_heads * self.num_pairs
        return pl.CostEstimate(
            flops=2 * num_pairs * dims,
            transcendentals=num_pairs,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays),
        )

    @property
    def is_masked(self) -> bool:
        """Whether any visited block may hold a pair that may not attend."""
        return self.tested is not None or self.kv_len % self.block_kv != 0

    def compiler_params(self) -> pltpu.CompilerParams:
        """A row's visits, and rows, follow one another: they share the buffers of the walk."""
        return pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=self.vmem_bytes
        )

    def visiting(self, block: int, one_tile: Callable[..., None]) -> Callable[..., None]:
        """What `walk` is given to visit a block of so many tokens: its chunks one after the other, as
        `one_tile(buffer, at, start, masked)`, with the pair test only where it is needed."""

        def visit(buffer, at, is_full):
            def chunks(masked: bool):
                if block == self.chunk:
                    one_tile(buffer, at, 0, masked)
                    return

                # Unrolled they would have memory each.
                @pl.loop(0, block // self.chunk)
                def _(i):
                    one_tile(buffer, at, pl.multiple_of(i * self.chunk, self.chunk), masked)

            if not self.is_masked:
                chunks(False)
                return
            pl.when(is_full)(functools.partial(chunks, False))
            pl.when(jnp.logical_not(is_full))(functools.partial(chunks, True))

        return visit

    def logits(self, q: jax.Array, k: jax.Array, product: Callable) -> tuple[jax.Array, jax.Array | None]:
        """Of a tile, before the mask, and the slope of the soft cap where there is one."""
        s = product(q, k) * self.scale
        if self.soft_cap is None:
            return s, None
        squashed = jnp.tanh(s / self.soft_cap)
        return self.soft_cap * squashed, 1 - squashed * squashed

    def mask(self, s: jax.Array, head, q: "Side", kv: "Side") -> jax.Array:
        """The logits of a tile, those of pairs that may not attend replaced."""
        allowed = None
        if self.tested is not None:
            pair = q.positions(s.shape), kv.positions(s.shape), q.segment_ids(s.shape), kv.segment_ids(s.shape)
            allowed = self._allowed(head, *pair)
        if self.kv_len % self.block_kv:
            is_key = kv.slots(s.shape) < self.kv_len
            allowed = is_key if allowed is None else allowed & is_key
        return s if allowed is None else jnp.where(allowed, s, MASK_VALUE)

    def _allowed(self, head, *pair: jax.Array) -> jax.Array:
        """Which pairs of a tile may attend in one query head; where heads differ all of their tests are computed."""
        tests, test_of_group, _ = tests_of(self.tested, pair[0].shape)
        if len(tests) == 1:
            return tests[0](*pair)
        group, number = jax.lax.div(head * len(test_of_group), self.num_heads), jnp.int32(0)
        for i, test in enumerate(test_of_group):
            number = jnp.where(group == i, test, number)
        numbers = jnp.full(pair[0].shape, number)
        allowed = (numbers == 0) & tests[0](*pair)
        for i, test in enumerate(tests[1:], start=1):
            allowed |= (numbers == i) & test(*pair)
        return allowed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Side:
    """The tokens of one side of a tile.

    Attributes:
      dim: Of the tile's two dims, that along which they lie.
      first: The slot of the first of them.
      known: Positions and, where the mask asks for them, segment ids: each a row `[1, tokens]` where they lie along
        dim 1, and the same in all lanes, `[tokens, 128]`, along dim 0. None where positions are slots.
    """

    dim: int
    first: jax.Array
    known: tuple[jax.Array, ...] | None

    def slots(self, shape: tuple[int, int]) -> jax.Array:
        return self.first + jax.lax.broadcasted_iota(jnp.int32, shape, self.dim)

    def positions(self, shape: tuple[int, int]) -> jax.Array:
        return self.slots(shape) if self.known is None else self._spread(self.known[0], shape)

    def segment_ids(self, shape: tuple[int, int]) -> jax.Array:
        if self.known is None or len(self.known) == 1:
            return jnp.zeros(shape, jnp.int32)
        return self._spread(self.known[1], shape)

    def _spread(self, x: jax.Array, shape: tuple[int, int]) -> jax.Array:
        return jnp.broadcast_to(x, shape) if self.dim == 1 else lanes(x, shape[1])


def held_bytes(row: int, visited: int, chunk: int, dims: int, itemsize: int) -> int:
    """What a kernel holds in VMEM at most, whichever of the three it is.

    Args:
      row, visited: Tokens of a block of the side that the grid goes through, and of the one that is visited.
      chunk: Of the visited block, tokens computed at a time.
      dims: Head dims of keys and of values, together.
      itemsize: Of an element of q, k and v.
    """
    # Blocks that come and go by the grid, twice each: two operands, and gradients of which some were running.
    windows = 2 * row * dims * (itemsize + 2 * _FLOAT32)
    accumulators = row * (dims * _FLOAT32 + 4 * LANES * _FLOAT32)
    buffers = 2 * visited * (dims * itemsize + 2 * 8 * _FLOAT32)
    # Logits, probabilities, their gradients and casts; of float32 matmuls the parts of operands too.
    matrices = 6 if itemsize < _FLOAT32 else 12
    return windows + accumulators + buffers + matrices * row * chunk * _FLOAT32


def by_head(x_BLNH: jax.Array, block: int) -> jax.Array:
    """`[B, L, N, H]` to `[B, N, L, H]`, padded with zeros to whole blocks of tokens and whole lanes."""
    x = jnp.moveaxis(x_BLNH, 2, 1)
    return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % block), (0, -x.shape[3] % LANES)))


def by_token(x_BNLH: jax.Array, length: int, dim: int) -> jax.Array:
    """The inverse of `by_head`."""
    return jnp.moveaxis(x_BNLH[:, :, :length, :dim], 1, 2)


def rows_of(x_BNT: jax.Array, block: int, fill: float = 0.0) -> jax.Array:
    """`[B, N, T]` to `[B, N, 1, T]`, padded to whole blocks."""
    return jnp.pad(x_BNT, ((0, 0), (0, 0), (0, -x_BNT.shape[2] % block)), constant_values=fill)[:, :, None]


def token_rows(axis: TokenAxis, block: int, *, with_segments: bool) -> jax.Array:
    """Positions, and segment ids, as int32 `[B or 1, 1 or 2, L]`; behind the end the last token is repeated."""
    rows = jnp.broadcast_arrays(*(axis if with_segments else axis[:1]))
    padding = (0, -rows[0].shape[1] % block)
    return jnp.stack([jnp.pad(x, ((0, 0), padding), mode="edge") for x in rows], axis=1)


def block_at(at, block: int):
    """The tokens of a block."""
    return pl.ds(pl.multiple_of(at * block, block), block)


def copies_into(scratch: dict, buffer, sources: dict) -> list:
    """Copies into the buffers of the same names."""
    return [
        pltpu.make_async_copy(source, scratch[name].at[buffer], scratch["arrived"].at[buffer, i])
        for i, (name, source) in enumerate(sources.items())
    ]


def row_of_batch(x, b):
    """The index of a row of the batch in an array that may hold one for all."""
    return b if x.shape[0] > 1 else 0


def words_spec(words: jax.Array, num_groups: int) -> pl.BlockSpec:
    """The words of a grid step, of `pallas_mosaic_tpu_walk.words_of`."""
    groups = words.shape[1]
    return pl.BlockSpec(
        (1, 1, 1, 1, 1, words.shape[5]),
        lambda b, g, i, m: (row_of_batch(words, b), jax.lax.div(g * groups, num_groups), i, m, 0, 0),
        memory_space=pltpu.SMEM,
    )
