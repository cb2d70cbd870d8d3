"""The maximum of each row and the sum of its exponentials, in one pass over the rows.

XLA makes two kernels of them, since the second waits for the first, and reads the rows twice. Here a row is cut into
pieces of 128 that stay in registers between a piece's maximum and its sum; putting the pieces together reads a 64th.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32

from pallas_kernels import dispatch
from pallas_kernels.mosaic_gpu import hopper_cores, refuse

_PIECE = 128
_ROWS = 64
_SLOTS = 3
_BLOCKS_A_CORE = 2
_LAYOUT = plgpu.Layout.WGMMA
_TRANSFORMS = plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128)


def softmax_statistics(
    x_CV: Float[Array, "C V"], *, implementation: dispatch.Implementation | None = None
) -> tuple[Float32[Array, " C"], Float32[Array, " C"]]:
    """m[c] = max over v of x[c, v], and the sum over v of exp(x[c, v] - m[c]).

    Args:
      x_CV: Rows, finite.
      implementation: None takes the fastest that serves the call.

    Returns: maximum and sum; no gradients pass.
    Raises: ValueError where x is no float32 matrix; NotImplementedError where the implementation asked for does not
      serve it.
    Cost: mosaic_gpu reads x once, xla twice.
    """
    if x_CV.ndim != 2 or x_CV.dtype != jnp.float32 or 0 in x_CV.shape:
        raise ValueError(
            f"softmax_statistics: x is {x_CV.dtype}{list(x_CV.shape)}, wanted float32 [rows, columns], none of 0"
        )
    implementations = {"mosaic_gpu": by_pieces, "xla": _by_xla}
    return dispatch.run("softmax_statistics", implementations, implementation, x_CV)


def _by_xla(x_CV: jax.Array) -> tuple[jax.Array, jax.Array]:
    greatest_C = jnp.max(x_CV, axis=1)
    return greatest_C, jnp.sum(jnp.exp(x_CV - greatest_C[:, None]), axis=1)


def by_pieces(x_CV: jax.Array, *, interpret: Any = None) -> tuple[jax.Array, jax.Array]:
    """The Hopper kernel's.

    Raises: NotImplementedError where there is no Hopper GPU, or the matrix cannot be cut into its pieces.
    """
    C, V = x_CV.shape
    num_cores = hopper_cores(interpret)
    if V % _PIECE or C * (V // _PIECE) % _ROWS:
        refuse(f"x has shape {[C, V]}, it takes columns in multiples of {_PIECE} and {_ROWS} pieces of them, or more")
    greatest, sums = _of_pieces(x_CV.reshape(-1, _PIECE), num_cores, interpret)
    greatest, sums = greatest.reshape(C, -1), sums.reshape(C, -1)
    greatest_C = jnp.max(greatest, axis=1)
    return greatest_C, jnp.sum(sums * jnp.exp(greatest - greatest_C[:, None]), axis=1)


def _of_pieces(x_RP: jax.Array, num_cores: int, interpret: Any) -> tuple[jax.Array, jax.Array]:
    """Maximum and sum of each row, which is a piece."""
    num_pieces = x_RP.shape[0]
    num_tiles = num_pieces // _ROWS
    num_blocks = min(num_cores * _BLOCKS_A_CORE, num_tiles)

    def body(x, greatest, sums):
        first = lax.axis_index("block")

        def place(i):
            return first + i * num_blocks

        def one_tile(indices, x_smem):
            rows = pl.ds(place(indices[0]) * _ROWS, _ROWS)
            tile = plgpu.load(x_smem, layout=_LAYOUT)
            of_rows = jnp.max(tile, axis=1)
            greatest[rows] = of_rows
            sums[rows] = jnp.sum(jnp.exp(tile - lax.broadcast_in_dim(of_rows, tile.shape, [0])), axis=1)

        plgpu.emit_pipeline(
            one_tile,
            grid=(lax.div(num_tiles - first + num_blocks - 1, num_blocks),),
            in_specs=[plgpu.BlockSpec((_ROWS, _PIECE), lambda i: (place(i), 0), transforms=_TRANSFORMS)],
            max_concurrent_steps=_SLOTS,
        )(x)

    out = jax.ShapeDtypeStruct((num_pieces,), jnp.float32)
    greatest, sums = plgpu.kernel(
        body,
        out_type=[out, out],
        grid=(num_blocks,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(x_RP)
    return greatest, sums
