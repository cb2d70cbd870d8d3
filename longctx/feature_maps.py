"""Feature maps of linear attention: what queries and keys become before their products are taken as weights."""

import abc
import dataclasses
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int32

from longctx.arguments import check_choice

Function = Literal["identity", "elu1", "relu", "swish"]

_TAYLOR_MULTIPLE = 64


class FeatureMap(abc.ABC):
    """What the queries and keys of a linear attention become, each head by itself; the same map for both."""

    @property
    @abc.abstractmethod
    def is_positive(self) -> bool:
        """Whether no weight, a product of two of its features, is ever negative: then weights can be normalised."""

    @property
    def max_length(self) -> int | None:
        """Most tokens of a row, where it serves no more."""
        return None

    def num_features(self, head_dim: int) -> int:
        """Dims of what it makes of a head of head_dim."""
        return head_dim

    @abc.abstractmethod
    def __call__(
        self, x_BTKH: Float[Array, "B T K H"], positions_BT: Int32[Array, "#B T"]
    ) -> Float[Array, "B T K features"]:
        """The features, computed in float32, in x's dtype."""


@dataclasses.dataclass(frozen=True)
class Pointwise(FeatureMap):
    """A function of each dim.

    identity  x
    elu1      elu(x) + 1 = exp(x) if x < 0 else x + 1
    relu      max(x, 0)
    swish     x sigmoid(x)

    Reference: elu1: Katharopoulos et al., Transformers are RNNs, arXiv:2006.16236, equation 7. swish: Qin et al.,
      TransNormerLLM, arXiv:2307.14995, section 3.1.
    """

    function: Function

    def __post_init__(self):
        check_choice("function", self.function, get_args(Function))

    @property
    def is_positive(self) -> bool:
        return self.function in ("elu1", "relu")

    def __call__(self, x_BTKH, positions_BT):
        x = x_BTKH.astype(jnp.float32)
        match self.function:
            case "identity":
                return x_BTKH
            case "elu1":
                features = jax.nn.elu(x) + 1
            case "relu":
                features = jax.nn.relu(x)
            case "swish":
                features = jax.nn.silu(x)
        return features.astype(x_BTKH.dtype)


@dataclasses.dataclass(frozen=True)
class CosineReweighted(FeatureMap):
    """cosFormer: the weight of a pair falls with the distance of its tokens, as a cosine.

    phi(x)[t] = [relu(x) cos(a), relu(x) sin(a)],  a = pi t / (2 horizon)
    phi(q)[t]^T phi(k)[s] = relu(q)^T relu(k) cos(pi (t - s) / (2 horizon))

    Attributes:
      horizon: Tokens over which it falls to 0, M in the paper. Beyond it weights would be negative: rows may not be
        longer, and a position that is, in decoding, makes NaN.

    Reference: Qin et al., cosFormer, arXiv:2202.08791, section 3.
    """

    horizon: int

    @property
    def is_positive(self) -> bool:
        return True

    @property
    def max_length(self) -> int | None:
        return self.horizon

    def num_features(self, head_dim: int) -> int:
        return 2 * head_dim

    def __call__(self, x_BTKH, positions_BT):
        angles = (math.pi / 2 / self.horizon) * positions_BT.astype(jnp.float32)
        angles = jnp.where(positions_BT < self.horizon, angles, jnp.nan)[:, :, None, None]
        return _turned(jax.nn.relu(x_BTKH.astype(jnp.float32)), angles).astype(x_BTKH.dtype)


@dataclasses.dataclass(frozen=True)
class Taylor2(FeatureMap):
    """Based: the exponential up to its second order, whose features are the products of all pairs of dims.

    phi(x) = [1, u, (u u^T) / sqrt(2), 0, ...],  u = x / H^(1/4)
    phi(q)^T phi(k) = 1 + w + w^2 / 2,  w = q^T k / sqrt(H)

    1 + H + H^2 features, with zeros up to a multiple of 64: 320 for a head of 16, which is what Based takes.

    Reference: Arora et al., Simple linear attention language models balance the recall-throughput tradeoff (Based),
      arXiv:2402.18668.
    """

    @property
    def is_positive(self) -> bool:
        return True

    def num_features(self, head_dim: int) -> int:
        return -(-(1 + head_dim + head_dim**2) // _TAYLOR_MULTIPLE) * _TAYLOR_MULTIPLE

    def __call__(self, x_BTKH, positions_BT):
        head_dim = x_BTKH.shape[-1]
        u = x_BTKH.astype(jnp.float32) * head_dim**-0.25
        pairs = (u[..., :, None] * u[..., None, :]).reshape(*u.shape[:-1], head_dim**2) * 2**-0.5
        missing = self.num_features(head_dim) - (1 + head_dim + head_dim**2)
        zeros = jnp.zeros((*u.shape[:-1], missing), jnp.float32)
        return jnp.concatenate([jnp.ones_like(u[..., :1]), u, pairs, zeros], axis=-1).astype(x_BTKH.dtype)


@dataclasses.dataclass(frozen=True)
class DPFP(FeatureMap):
    """Deterministic parameter-free projection: products of dims of r that stand near each other, sparse and positive.

    phi(x) = [r * roll(r, 1), ..., r * roll(r, order)],  r = [relu(x), relu(-x)]

    2 H order features; roll(r, i)[j] = r[j - i], around.

    Attributes:
      order: How far apart multiplied dims may stand, nu in the paper.

    Reference: Schlag et al., Linear Transformers Are Secretly Fast Weight Programmers, arXiv:2102.11174, equation 37
      (section 5.3).
    """

    order: int = 1

    @property
    def is_positive(self) -> bool:
        return True

    def num_features(self, head_dim: int) -> int:
        return 2 * head_dim * self.order

    def __call__(self, x_BTKH, positions_BT):
        x = x_BTKH.astype(jnp.float32)
        r = jax.nn.relu(jnp.concatenate([x, -x], axis=-1))
        products = [r * jnp.roll(r, i, axis=-1) for i in range(1, self.order + 1)]
        return jnp.concatenate(products, axis=-1).astype(x_BTKH.dtype)


@dataclasses.dataclass(frozen=True)
class NormalizedExponential(FeatureMap):
    """After ReGLA: the exponential relative to a head's greatest dim, so that no feature is above 1.

    phi(x) = exp(x - max_i x_i)

    Reference: Lu et al., ReGLA: Refining Gated Linear Attention, arXiv:2502.01578.
    """

    @property
    def is_positive(self) -> bool:
        return True

    def __call__(self, x_BTKH, positions_BT):
        x = x_BTKH.astype(jnp.float32)
        return jnp.exp(x - jnp.max(x, axis=-1, keepdims=True)).astype(x_BTKH.dtype)


class LRPE(nnx.Module):
    """Linearized relative positional encoding: each dim of a head turns with the position, at a learned speed.

    x[t] -> [x cos(t theta), x sin(t theta)],  so that  q[t]^T k[s] -> sum_i q_i k_i cos((t - s) theta_i)

    theta starts at 10000^(-i / H), i = 0 ... H - 1. Angles are float32, off by up to 6e-8 t theta radians: near 0.1 for
    the fastest dim at position 1M. A learned speed cannot be reduced by whole turns beforehand, as that of
    `apply_rotary` is.

    Args:
      num_heads: Heads of the queries and keys, each with speeds of its own.
      head_dim: Dims of a head, H; it doubles.
      param_dtype: Dtype of theta.
    Reference: Qin et al., Linearized Relative Positional Encoding, arXiv:2307.09270; Qin et al., TransNormerLLM,
      arXiv:2307.14995, section 3.1.
    """

    def __init__(self, num_heads: int, head_dim: int, *, param_dtype: DTypeLike = jnp.float32):
        speeds = 10_000.0 ** (-jnp.arange(head_dim, dtype=jnp.float32) / head_dim)
        theta = jnp.broadcast_to(speeds, (num_heads, head_dim)).astype(param_dtype)
        self.theta = nnx.Param(theta, logical_axes=("kv_heads", "head_dim"))

    def __call__(
        self, x_BTKH: Float[Array, "B T K H"], positions_BT: Int32[Array, "#B T"]
    ) -> Float[Array, "B T K features"]:
        angles = positions_BT.astype(jnp.float32)[:, :, None, None] * self.theta[...].astype(jnp.float32)
        return _turned(x_BTKH.astype(jnp.float32), angles).astype(x_BTKH.dtype)


def _turned(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Products of two of these are those of x times the cosine of the difference of their angles."""
    return jnp.concatenate([x * jnp.cos(angles), x * jnp.sin(angles)], axis=-1)
