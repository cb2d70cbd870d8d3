"""The decay of Mamba-2, one for each head and token, which other layers took over."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Float32

from longctx.projections import projection
from longctx.sharding import constrain

_RATES = 1.0, 16.0  # what -a is drawn from, uniformly


class StepDecay(nnx.Module):
    """dt = softplus(x W_dt + bias);  log decay = dt a,  a = -exp(A_log): how far a token steps, and what that forgets.

    Args:
      dim: Model dim of x.
      num_heads: Heads, N.
      dt_range: dt of a token of zeros at the start, drawn between these, uniformly in its logarithm.
      dtype: Compute dtype of the projection; the rest is float32.
      param_dtype: Dtype of the parameters.
      rngs: Source of the initial values; -a starts uniform in 1 to 16.

    Raises: ValueError unless 0 < dt_min <= dt_max, of dt_range.
    Reference: Dao and Gu, Transformers are SSMs, arXiv:2405.21060, section 7.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        dt_range: tuple[float, float],
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        check_dt_range(*dt_range)
        self.dt = projection(
            dim, num_heads, logical_axes=("embed", "heads"), dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )

        def of_heads(values):
            return nnx.Param(values.astype(param_dtype), logical_axes=("heads",))

        low, high = (math.log(dt) for dt in dt_range)
        dt = jnp.exp(jax.random.uniform(rngs.params(), (num_heads,), minval=low, maxval=high))
        self.dt_bias = of_heads(dt + jnp.log(-jnp.expm1(-dt)))  # softplus of it is dt
        rates = jax.random.uniform(rngs.params(), (num_heads,), minval=_RATES[0], maxval=_RATES[1])
        self.a_log = of_heads(jnp.log(rates))

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> tuple[Float32[Array, "B T N"], Float32[Array, "B T N"]]:
        """dt and the log decay."""
        dt_BTN = jax.nn.softplus(self.dt(x_BTD).astype(jnp.float32) + self.dt_bias[...].astype(jnp.float32))
        dt_BTN = constrain(dt_BTN, "batch", "sequence", "heads")
        return dt_BTN, -jnp.exp(self.a_log[...].astype(jnp.float32)) * dt_BTN


def check_dt_range(dt_min: float, dt_max: float) -> None:
    """Raises ValueError, naming the option, unless steps can be drawn between these."""
    if not 0 < dt_min <= dt_max:
        raise ValueError(
            f"dt_min: got {dt_min} with dt_max={dt_max}, wanted 0 < dt_min <= dt_max; 0.001 and 0.1 are customary"
        )
