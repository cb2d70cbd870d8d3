"""Position-wise feed-forward layers."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from longctx.arguments import check_sequence
from longctx.projections import Projection, projection
from longctx.remat import MLP_HIDDEN, named
from longctx.sharding import constrain


class SwiGLU(nnx.Module):
    """Gated feed-forward layer.

    y = (silu(x W_gate) * (x W_up)) W_down

    Args:
      dim: Model dim.
      hidden_dim: Dim between the projections.
      dtype: Compute dtype and dtype of the result.
      param_dtype: Dtype of the kernels.
      out_init_scale: Multiplies the initial standard deviation of W_down.
      prevent_cse: Whether to hold the gated product of the backward pass, which is computed again, apart from that of
        the forward pass, as `jax.checkpoint` does. Needless inside a loop over layers or a layer that is computed again
        as a whole; there it keeps the compiler from fetching ahead what the layer has on the host.
      rngs: Source of the initial values.

    Reference: Shazeer, GLU Variants Improve Transformer, arXiv:2002.05202, equation 6.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        out_init_scale: float = 1.0,
        prevent_cse: bool = True,
        rngs: nnx.Rngs,
    ):
        kwargs = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.dim = dim
        self.prevent_cse = prevent_cse
        self.gate = projection(dim, hidden_dim, logical_axes=("embed", "mlp"), **kwargs)
        self.up = projection(dim, hidden_dim, logical_axes=("embed", "mlp"), **kwargs)
        self.down = projection(hidden_dim, dim, logical_axes=("mlp", "embed"), init_scale=out_init_scale, **kwargs)

    def __call__(
        self, x_BTD: Float[Array, "B T D"], x_for_up_BTD: Float[Array, "B T D"] | None = None
    ) -> Float[Array, "B T D"]:
        """y of x.

        Args:
          x_for_up_BTD: x once more, for W_up: the gradients by way of the two matrices are then not added up here. None
            for x itself.
        """
        x_for_up_BTD = x_BTD if x_for_up_BTD is None else x_for_up_BTD
        check_sequence("SwiGLU", x_BTD, self.dim)
        check_sequence("SwiGLU", x_for_up_BTD, self.dim)
        gate, up = named(self.gate(x_BTD), MLP_HIDDEN), named(self.up(x_for_up_BTD), MLP_HIDDEN)
        # Cast before, or what is kept for the backward pass is a copy of the matrix as it is stored, cast once more.
        down = jax.tree.map(lambda matrix: matrix.astype(gate.dtype), self.down)
        return jax.checkpoint(_gated, prevent_cse=self.prevent_cse)(down, gate, up)


def _gated(down: Projection, gate: jax.Array, up: jax.Array) -> jax.Array:
    # Not kept for the backward pass, which reads gate and up in any case: one more result of the kernel that computes
    # their gradients.
    hidden = constrain(jax.nn.silu(gate) * up, "batch", "sequence", "mlp")
    return down(hidden)
