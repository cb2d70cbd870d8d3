"""The linear maps that the layers are made of."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float


class Projection(nnx.LinearGeneral):
    """A linear map over the last dims of x, with or without a low-rank adapter beside it (longctx/lora.py).

    Args:
      As of `flax.nnx.LinearGeneral`, without bias unless asked for.
    """

    # Of the class, for Flax to know them as parameters once they are.
    lora_a: nnx.LoRAParam | None = None
    lora_b: nnx.LoRAParam | None = None
    lora_scale = 0.0

    def __init__(self, in_dims, out_dims, *, use_bias: bool = False, **options):
        super().__init__(in_dims, out_dims, use_bias=use_bias, **options)

    def adapt(self, *, rank: int, scale: float, key: jax.Array) -> None:
        """Adds an adapter of this rank, whose part of the result is scaled: A drawn, B zero, float32."""
        kernel, num_in = self.kernel, len(self.in_features)
        axes, shape = kernel.get_metadata("logical_axes"), kernel.shape
        draw = jax.nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", in_axis=range(num_in))
        a = draw(key, (*shape[:num_in], rank), jnp.float32)
        self.lora_a = nnx.LoRAParam(a, logical_axes=(*axes[:num_in], None))
        self.lora_b = nnx.LoRAParam(jnp.zeros((rank, *shape[num_in:])), logical_axes=(None, *axes[num_in:]))
        self.lora_scale = scale

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        y = super().__call__(x)
        if self.lora_a is None:
            return y
        num_in = len(self.in_features)
        a, b = (param[...].astype(y.dtype) for param in (self.lora_a, self.lora_b))
        narrow = jnp.tensordot(x.astype(y.dtype), a, axes=num_in)
        return y + jnp.asarray(self.lora_scale, y.dtype) * jnp.tensordot(narrow, b, axes=1)

    def matrix(self, dtype: DTypeLike) -> Float[Array, "..."]:
        """The map, one without bias, as one array like the kernel, its adapter added: for what takes the place of a
        call."""
        kernel = self.kernel[...]
        if self.lora_a is not None:
            a, b = (param[...].astype(jnp.float32) for param in (self.lora_a, self.lora_b))
            kernel = kernel.astype(jnp.float32) + self.lora_scale * jnp.tensordot(a, b, axes=1)
        return kernel.astype(dtype)


def projection(
    in_dims: int | Sequence[int],
    out_dims: int | Sequence[int],
    *,
    logical_axes: tuple[str | None, ...],
    dtype: DTypeLike,
    param_dtype: DTypeLike,
    rngs: nnx.Rngs,
    init_scale: float = 1.0,
    use_bias: bool = False,
) -> Projection:
    """A linear map from the last dims of x, computed in `dtype`.

    The kernel starts truncated normal with standard deviation init_scale / sqrt(fan_in), a bias at zero.

    Args:
      in_dims: The trailing dims of x that are summed over.
      out_dims: The dims that replace them.
      logical_axes: One name for each dim of the kernel, inputs first; `longctx.sharding` maps them to the mesh, None to
        no axis.
      dtype: Compute dtype: x and the kernel are cast to it.
      param_dtype: Dtype of the kernel.
      rngs: Source of the kernel's initial values.
      init_scale: Multiplies the initial standard deviation.
      use_bias: Whether a learned vector is added, of the dims that come out.
    """
    num_in_dims = 1 if isinstance(in_dims, int) else len(in_dims)
    return Projection(
        in_dims,
        out_dims,
        axis=tuple(range(-num_in_dims, 0)),
        dtype=dtype,
        param_dtype=param_dtype,
        kernel_init=jax.nn.initializers.variance_scaling(init_scale**2, "fan_in", "truncated_normal"),
        use_bias=use_bias,
        kernel_metadata={"logical_axes": logical_axes},
        bias_metadata={"logical_axes": logical_axes[num_in_dims:]},
        rngs=rngs,
    )
