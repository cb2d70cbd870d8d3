"""The bias-free linear maps that the layers are made of."""

from collections.abc import Sequence

import jax
from flax import nnx
from jaxtyping import DTypeLike


def projection(
    in_dims: int | Sequence[int],
    out_dims: int | Sequence[int],
    *,
    logical_axes: tuple[str | None, ...],
    dtype: DTypeLike,
    param_dtype: DTypeLike,
    rngs: nnx.Rngs,
    init_scale: float = 1.0,
) -> nnx.LinearGeneral:
    """A linear map from the last dims of x, without bias, computed in `dtype`.

    The kernel starts truncated normal with standard deviation init_scale / sqrt(fan_in).

    Args:
      in_dims: The trailing dims of x that are summed over.
      out_dims: The dims that replace them.
      logical_axes: One name for each dim of the kernel, inputs first; `longctx.sharding` maps them to the mesh, None to
        no axis.
      dtype: Compute dtype: x and the kernel are cast to it.
      param_dtype: Dtype of the kernel.
      rngs: Source of the kernel's initial values.
      init_scale: Multiplies the initial standard deviation.
    """
    num_in_dims = 1 if isinstance(in_dims, int) else len(in_dims)
    return nnx.LinearGeneral(
        in_dims,
        out_dims,
        axis=tuple(range(-num_in_dims, 0)),
        use_bias=False,
        dtype=dtype,
        param_dtype=param_dtype,
        kernel_init=jax.nn.initializers.variance_scaling(init_scale**2, "fan_in", "truncated_normal"),
        kernel_metadata={"logical_axes": logical_axes},
        rngs=rngs,
    )
