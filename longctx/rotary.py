"""Rotary position embedding by explicit positions."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from longctx.arguments import check_tokens
from longctx.rope_scaling import RopeScaling

_LOW_BITS = 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class RotaryConfig:
    """How fast the pairs of a head's dims turn with position."""

    theta: float = 10_000.0
    """Base of the frequencies: pair i of a head of H dims turns by theta ** (-2 i / H) radians a token."""
    scaling: RopeScaling | None = None
    """How the frequencies are made slower for longer contexts; None leaves them."""

    def __post_init__(self):
        if not self.theta > 1:
            raise ValueError(f"theta: got {self.theta}, wanted a number > 1; 10000 is customary")

    def frequencies(self, head_dim: int) -> Float[np.ndarray, " half"]:
        """Radians that each pair of a head turns a token, float64."""
        frequencies = self.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        return frequencies if self.scaling is None else self.scaling.scaled(frequencies, theta=self.theta)

    @property
    def amplitude(self) -> float:
        """What the rotated heads are multiplied with."""
        return 1.0 if self.scaling is None else self.scaling.amplitude


def rotary_angles(
    positions: Int32[Array, "*batch T"], head_dim: int, config: RotaryConfig
) -> Float32[Array, "*batch T half"]:
    """The angle of each pair at each position, float32 radians, up to whole turns.

    angle[t, i] = t * theta ** (-2 i / head_dim)  (mod 2 pi), or t times what config.scaling makes of the frequency

    One float32 product would be off by up to half a radian at position 10M. Splitting the position into its low 12 bits
    and the rest, with both step angles reduced mod 2 pi in float64 beforehand, keeps the error near 1e-3 there and
    below 3e-4 up to 1M.
    """
    frequencies = config.frequencies(head_dim)
    high_step = np.remainder(frequencies * 2**_LOW_BITS + np.pi, 2 * np.pi) - np.pi
    low = (positions & (2**_LOW_BITS - 1)).astype(jnp.float32)[..., None]
    high = (positions >> _LOW_BITS).astype(jnp.float32)[..., None]
    return low * jnp.asarray(frequencies, jnp.float32) + high * jnp.asarray(high_step, jnp.float32)


def apply_rotary(
    x_BTNH: Float[Array, "B T N H"], positions_BT: Int32[Array, "#B T"], config: RotaryConfig
) -> Float[Array, "B T N H"]:
    """Turns each pair of dims of each head by an angle proportional to the token's position.

    (x[i], x[i + H/2]) -> (x[i] cos a - x[i + H/2] sin a, x[i] sin a + x[i + H/2] cos a),  a = angle[t, i]

    With config.scaling, whose amplitude may be another than 1, the result is multiplied with that.
    Pairs are half-split, as in GPT-NeoX and the Hugging Face Llama weights, not interleaved. Angles, sines and the
    rotation are float32; the result has x's dtype.

    Raises: ValueError if H is odd, or the shapes or dtypes do not fit.
    Reference: Su et al., RoFormer, arXiv:2104.09864, equation 34.
    """
    if x_BTNH.ndim != 4 or not jnp.issubdtype(x_BTNH.dtype, jnp.floating):
        raise ValueError(
            f"apply_rotary: x is {x_BTNH.dtype}{list(x_BTNH.shape)}, wanted floats [batch, length, heads, head dim]"
        )
    check_tokens("apply_rotary", x_BTNH.shape[:2], positions=positions_BT)
    head_dim = x_BTNH.shape[-1]
    if head_dim % 2:
        raise ValueError(f"apply_rotary: head_dim={head_dim} is odd, wanted an even number of dims; pad the heads")
    angles = rotary_angles(positions_BT, head_dim, config)[:, :, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if config.amplitude != 1:
        cos, sin = cos * config.amplitude, sin * config.amplitude
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)
    return rotated.astype(x_BTNH.dtype)
