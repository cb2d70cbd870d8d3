"""Additive biases of attention logits as a layer: which kind, and its parameters."""

import dataclasses
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import DTypeLike

from longctx.arguments import check_choice
from pallas_kernels import Alibi, Bias, KerpleLog, KerplePower, T5Buckets
from pallas_kernels.bias import check_buckets

BiasKind = Literal["alibi", "alibi_learned", "t5", "kerple_log", "kerple_power"]

_LEAST = 0.01  # of what starts out between 0 and a bound


@dataclasses.dataclass(frozen=True, kw_only=True)
class BiasConfig:
    """What is added to attention logits for the positions of a pair of tokens."""

    kind: BiasKind
    """alibi: -slope |i - j|, with the slopes of the paper; alibi_learned: these to start with; t5: a learned number for
    each bucket of distances; kerple_log, kerple_power: -r1 log(1 + r2 |i - j|) and -r1 |i - j|^r2, r1 and r2 learned.
    All of them of each query head."""
    buckets: int = 32
    """Buckets of t5, of both directions together."""
    max_distance: int = 128
    """From this distance on t5 has one bucket."""
    bidirectional: bool = False
    """Whether t5 has buckets for keys behind the query: half of them."""

    def __post_init__(self):
        check_choice("kind", self.kind, get_args(BiasKind))
        check_buckets("bias", self.buckets, self.max_distance, bidirectional=self.bidirectional)
        for field in dataclasses.fields(self)[1:]:
            if self.kind != "t5" and (value := getattr(self, field.name)) != field.default:
                raise ValueError(f"{field.name}: got {value}, which is of kind t5, with kind {self.kind}; leave it out")


class PositionBias(nnx.Module):
    """The parameters of a bias; called without arguments it is the `Bias` that the op takes.

    Slopes start as ALiBi's, the table normal with standard deviation 1 / sqrt(dim), as T5's; r1 and r2 of the
    logarithmic kernel uniform in (0, 2) and (0, 1), of the power one in (0, 1) and (0, 2), as KERPLE's. What must be
    positive is so: r = softplus(parameter), and the power 2 sigmoid(parameter).

    Args:
      config: Which.
      dim: Model dim.
      num_heads: Query heads, N.
      param_dtype: Of the parameters; the bias is computed in float32.
      rngs: Source of the initial values.
    """

    def __init__(self, config: BiasConfig, dim: int, num_heads: int, *, param_dtype: DTypeLike, rngs: nnx.Rngs):
        self.config, self.num_heads = config, num_heads

        def parameter(value: jax.Array) -> nnx.Param:
            axes = "heads", *(None,) * (value.ndim - 1)
            return nnx.Param(value.astype(param_dtype), logical_axes=axes)

        def uniform(greatest: float) -> jax.Array:
            return jax.random.uniform(rngs.params(), (num_heads,), minval=_LEAST, maxval=greatest - _LEAST)

        if config.kind == "alibi_learned":
            self.slopes = parameter(jnp.asarray(Alibi.geometric(num_heads).slopes))
        elif config.kind == "t5":
            self.table = parameter(jax.random.normal(rngs.params(), (num_heads, config.buckets)) / math.sqrt(dim))
        elif config.kind == "kerple_log":
            self.r1, self.r2 = (parameter(_inverse_softplus(uniform(greatest))) for greatest in (2.0, 1.0))
        elif config.kind == "kerple_power":
            self.r1 = parameter(_inverse_softplus(uniform(1.0)))
            power = uniform(2.0) / 2
            self.r2 = parameter(jnp.log(power / (1 - power)))

    def __call__(self) -> Bias:
        config = self.config
        match config.kind:
            case "alibi":
                return Alibi.geometric(self.num_heads)
            case "alibi_learned":
                return Alibi(slopes=self.slopes[...])
            case "t5":
                options = {"max_distance": config.max_distance, "bidirectional": config.bidirectional}
                return T5Buckets(table=self.table[...], **options)
        r1, r2 = (x[...].astype(jnp.float32) for x in (self.r1, self.r2))
        if config.kind == "kerple_log":
            return KerpleLog(r1=jax.nn.softplus(r1), r2=jax.nn.softplus(r2))
        return KerplePower(r1=jax.nn.softplus(r1), r2=2 * jax.nn.sigmoid(r2))


def _inverse_softplus(x: jax.Array) -> jax.Array:
    return x + jnp.log(-jnp.expm1(-x))
