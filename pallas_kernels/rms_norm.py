"""RMSNorm of a residual stream on Hopper GPUs, with the sum before it, and its gradient: one pass over the tokens each.

XLA ends a kernel at a reduction, so what a norm and its gradient read they read twice: first for sums over channels,
then for what these are needed for. Here a token's channels stay in registers in between.

Grid: blocks of one warpgroup, several a multiprocessor, so that some wait for memory while others compute; each takes
every so many-th group of tokens. A thread has pieces of up to 8 neighbouring channels (16 bytes) of each token, so that
a warp reads 512 bytes in a row; sums over channels go through shared memory. The gradient of the gain stays in
registers over all tokens of a block, and XLA sums it over blocks: the same bits each time.

Floor: bytes. At 16 bits a norm moves 4 a value, a sum and its norm 8, the gradient of a norm added to that of the
stream 8. Measured (H200, 32,768 x 2048 in bfloat16): 67, 137 and 154 us, 3.5 to 4 TB/s; by XLA 73, 167 and 220. Asking
for the next group's values before working on a group takes so many registers that fewer blocks have room.

Reference: Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv:1910.07467, equation 4.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, DTypeLike, Float, Float32

from pallas_kernels import dispatch
from pallas_kernels.mosaic_gpu import WARPGROUP, hopper_cores, refuse, store_registers

_BLOCKS_A_CORE = {"forward": 8, "backward": 4}
"""What registers have room for, and memory is kept busy by."""
_VALUES = 16
"""Of a thread, of each array of a group of tokens, where a token has no more."""
_MOST_VALUES = 64
_LEAST_TOKENS = 1024
"""Fewer keep no more than a few multiprocessors busy, and are no work for XLA either."""


def normalised(x: Float[Array, "*batch D"], scale_D: Float[Array, " D"], *, eps: float) -> Float[Array, "*batch D"]:
    """scale x / sqrt(mean(x^2) + eps), computed in float32 and returned in x's dtype: the formula, for XLA."""
    x_f32 = x.astype(jnp.float32)
    inverse_rms = lax.rsqrt(jnp.mean(x_f32 * x_f32, axis=-1, keepdims=True) + eps)
    return (x_f32 * inverse_rms * scale_D.astype(jnp.float32)).astype(x.dtype)


def serves(num_tokens: int, dim: int, dtype: DTypeLike) -> bool:
    """Whether the kernels take such arrays on the device that a program is being traced for."""
    try:
        _Tokens.of((num_tokens, dim), dtype, "forward", None)
    except NotImplementedError:
        return False
    return True


def add_and_normalise(
    x_TD: Float[Array, "T D"],
    delta_TD: Float[Array, "T D"] | None,
    scale_D: Float[Array, " D"],
    *,
    eps: float,
    interpret: Any = None,
) -> tuple[Float[Array, "T D"], Float[Array, "T D"]]:
    """x + delta, and that `normalised`, both of x's dtype, as XLA rounds them.

    It has no derivative: `gradients` is what a custom_vjp needs.

    Args:
      x_TD: Tokens.
      delta_TD: Of x's dtype; None for zero, and then the first result is x itself.
      scale_D: Gain.
      eps: Added to the mean square.

    Raises: NotImplementedError where there is no Hopper GPU, or the kernel does not take such arrays.
    """
    tokens, adds = _Tokens.of(x_TD.shape, x_TD.dtype, "forward", interpret), delta_TD is not None

    def body(block, x_ref, *refs):
        *delta_ref, scale_ref = refs[: 1 + adds]
        *sum_ref, normed_ref = refs[1 + adds :]
        gain = tokens.gain(scale_ref)

        def one_group(at, _):
            x = tokens.load(x_ref, at)
            if adds:
                total = (x + tokens.load(delta_ref[0], at)).astype(x_TD.dtype)
                store_registers(sum_ref[0].at[at], total)
                x = total.astype(jnp.float32)
            normed = x * lax.rsqrt(tokens.mean(x * x) + eps) * gain
            store_registers(normed_ref.at[at], normed.astype(x_TD.dtype))

        tokens.for_each_group(block, one_group, None)

    arrays = (x_TD, *((delta_TD,) if adds else ()), scale_D.astype(jnp.float32))
    out = jax.ShapeDtypeStruct(x_TD.shape, x_TD.dtype)
    *total_TD, normed_TD = dispatch.run(
        "rms_norm", {"mosaic_gpu": tokens.run}, "mosaic_gpu", body, arrays, [out] * (1 + adds)
    )
    return total_TD[0] if adds else x_TD, normed_TD


def gradients(
    x_TD: Float[Array, "T D"],
    scale_D: Float[Array, " D"],
    dnormed: Sequence[Float[Array, "T D"]],
    dx_TD: Float[Array, "T D"] | None,
    *,
    eps: float,
    interpret: Any = None,
) -> tuple[Float[Array, "T D"], Float32[Array, " D"]]:
    """dx plus the gradient of x by way of the norm, in x's dtype, and the gradient of the gain, float32.

    Args:
      x_TD: What was normalised: the first result of `add_and_normalise`.
      dnormed: What the cotangent of the second is the sum of, of x's dtype: one of each use.
      dx_TD: Cotangent of the first, of x's dtype; None for zero.

    Raises: NotImplementedError where there is no Hopper GPU, or the kernel does not take such arrays.
    """
    tokens, adds = _Tokens.of(x_TD.shape, x_TD.dtype, "backward", interpret), dx_TD is not None

    def body(block, scale_ref, *refs):
        x_ref, *refs, out_ref, dscale_ref = refs
        dnormed_refs, dx_ref = refs[: len(dnormed)], refs[len(dnormed) :]
        gain = tokens.gain(scale_ref)

        def one_group(at, dscale):
            x = tokens.load(x_ref, at)
            of_norm = functools.reduce(operator.add, (tokens.load(ref, at) for ref in dnormed_refs))
            inverse_rms = lax.rsqrt(tokens.mean(x * x) + eps)
            unit = x * inverse_rms
            dscale = dscale + of_norm * unit
            dunit = of_norm * gain
            dx = (dunit - unit * tokens.mean(dunit * unit)) * inverse_rms
            if adds:
                # Rounded first, as where the two are summed outside.
                dx = dx.astype(x_TD.dtype).astype(jnp.float32) + tokens.load(dx_ref[0], at)
            store_registers(out_ref.at[at], dx.astype(x_TD.dtype))
            return dscale

        nothing = plgpu.layout_cast(jnp.zeros((tokens.group, tokens.dim), jnp.float32), tokens.layout)
        dscale = tokens.for_each_group(block, one_group, nothing)
        store_registers(dscale_ref.at[pl.ds(block * tokens.group, tokens.group)], dscale)

    arrays = (scale_D.astype(jnp.float32), x_TD, *dnormed, *((dx_TD,) if adds else ()))
    out_types = [
        jax.ShapeDtypeStruct(x_TD.shape, x_TD.dtype),
        jax.ShapeDtypeStruct((tokens.num_blocks * tokens.group, tokens.dim), jnp.float32),
    ]
    dx_TD, dscale_GD = dispatch.run(
        "rms_norm_gradients", {"mosaic_gpu": tokens.run}, "mosaic_gpu", body, arrays, out_types
    )
    return dx_TD, jnp.sum(dscale_GD, axis=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Tokens:
    """How the blocks of a kernel go over tokens.

    Attributes:
      dim: Channels.
      piece: Neighbouring channels that a thread has.
      group: Tokens that a block works on at a time.
      num_groups: Of all tokens.
      num_blocks: Of the grid.
      interpret: As of a kernel.
    """

    dim: int
    piece: int
    group: int
    num_groups: int
    num_blocks: int
    interpret: Any

    @classmethod
    def of(cls, shape: tuple[int, int], dtype: DTypeLike, phase: str, interpret: Any) -> "_Tokens":
        """Raises: NotImplementedError where the kernels do not take such arrays."""
        num_cores = hopper_cores(interpret, interpreted=1)
        num_tokens, dim = shape
        if dtype not in (jnp.bfloat16, jnp.float16):
            refuse(f"x is {dtype}, it takes bfloat16 and float16")
        piece = next((n for n in (8, 4, 2) if dim % (n * WARPGROUP) == 0), None)
        if piece is None or dim > _MOST_VALUES * WARPGROUP:
            refuse(f"x has {dim} channels, it takes multiples of {2 * WARPGROUP} up to {_MOST_VALUES * WARPGROUP}")
        group = max(1, _VALUES * WARPGROUP // dim)
        if num_tokens % group or (interpret is None and num_tokens < _LEAST_TOKENS):
            refuse(f"x has {num_tokens} tokens, it takes multiples of {group}, and {_LEAST_TOKENS} or more")
        num_blocks = min(num_cores * _BLOCKS_A_CORE[phase], num_tokens // group)
        return cls(
            dim=dim,
            piece=piece,
            group=group,
            num_groups=num_tokens // group,
            num_blocks=num_blocks,
            interpret=interpret,
        )

    @property
    def layout(self):
        """Of a group of tokens in registers: a token is shared by all threads, piece by piece."""
        tiling = plgpu.Tiling(((1, WARPGROUP * self.piece), (32 * self.piece,), (self.piece,)))
        return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)

    def run(self, body: Callable, arrays: Sequence[jax.Array], out_types: Sequence[jax.ShapeDtypeStruct]):
        """The kernel whose blocks run `body(block's number, *arrays, *outputs)`."""
        return plgpu.kernel(
            lambda *refs: body(lax.axis_index("block"), *refs),
            out_type=out_types,
            grid=(self.num_blocks,),
            grid_names=("block",),
            interpret=self.interpret,
        )(*arrays)

    def for_each_group(self, block, body: Callable, state):
        """state = body(where a group's tokens are, state), for the block's groups."""
        number = lax.div(self.num_groups - block + self.num_blocks - 1, self.num_blocks)

        def one_group(i, state):
            return body(pl.ds((block + i * self.num_blocks) * self.group, self.group), state)

        return lax.fori_loop(0, number, one_group, state)

    def load(self, ref, at) -> jax.Array:
        """Of a group of tokens, float32."""
        return plgpu.load(ref.at[at], layout=self.layout, optimized=False).astype(jnp.float32)

    def gain(self, ref) -> jax.Array:
        scale_D = plgpu.load(ref, layout=self.layout.reduce(0), optimized=False)
        return lax.broadcast_in_dim(scale_D, (self.group, self.dim), [1])

    def mean(self, x_GD: jax.Array) -> jax.Array:
        """Over channels, as an array of x's shape."""
        return lax.broadcast_in_dim(jnp.sum(x_GD, axis=1) * (1 / self.dim), x_GD.shape, [0])
