"""Additive biases of attention logits: of a pair of tokens and its head, from their positions, never a [T, S] array.

  logit = scale q.k (soft-capped) + bias(parameters of the head, position of the query, position of the key)

A bias is a pytree whose leaves, `[N, ...]`, are its parameters; they are split over devices as heads are. Positions are
those of `Tokens`, within a document, and pairs that the mask forbids do not count. A kind is one class here: what a
pair's bias is, `of_distance` for those that depend on the distance alone. Gradients of parameters are JAX's of that.
XLA evaluates the class as it is. A kernel does so for a `DistanceBias`: elementwise, or by a table of distances, where
each parameter is one number a head, and by a table of short distances where the bias has a `reach`, beyond which it is
one number on each side.

Reference: `Alibi` Press, Smith and Lewis 2022, arXiv:2108.12409; `T5Buckets` Raffel et al. 2020, arXiv:1910.10683;
`KerpleLog` and `KerplePower` Chi et al. 2022, arXiv:2205.09921.
"""

import abc
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.tokens import Leaf, Tokens


class Bias(abc.ABC):
    """What is added to the logits of pairs: parameters, leaves `[N, ...]`, and a function of one head's and a pair."""

    @abc.abstractmethod
    def pair(self, q_positions: jax.Array, kv_positions: jax.Array) -> jax.Array:
        """The bias of pairs, float32; called on a bias of one head, whose leaves have lost their first dim.

        Args:
          q_positions, kv_positions: int32, which broadcast against each other.
        """

    @property
    def num_heads(self) -> int:
        return jax.tree.leaves(self)[0].shape[0]

    def of_heads(self, q_positions: Int32[Array, "B T 1"], kv_positions: Int32[Array, "B 1 S"]) -> jax.Array:
        """The bias of pairs for every head, float32 `[B, N, T, S]`."""
        return jax.vmap(lambda head: head.pair(q_positions, kv_positions), out_axes=1)(self)

    def dense(self, tokens: Tokens | None, q_len: int, kv_len: int) -> jax.Array:
        """The bias of all pairs, float32 `[B or 1, N, T, S]`: for references and tests."""
        tokens = tokens or Tokens()
        return self.of_heads(tokens.queries(q_len).positions[:, :, None], tokens.keys(kv_len).positions[:, None, :])

    def in_float32(self) -> "Bias":
        """The same, its parameters float32."""
        return jax.tree.map(lambda x: jnp.asarray(x).astype(jnp.float32), self)


class DistanceBias(Bias):
    """A bias that depends on `distance = position of the query - position of the key` alone."""

    @abc.abstractmethod
    def of_distance(self, distance: jax.Array) -> jax.Array:
        """The bias of pairs at these distances, whole numbers in float32; of one head, as `pair`."""

    @abc.abstractmethod
    def scaled(self, factor: float) -> "DistanceBias":
        """The bias that is `factor` times this one."""

    @property
    def reach(self) -> int | None:
        """From this distance on, on each side, the bias is one number; None where it is not."""
        return None

    @property
    def is_linear(self) -> bool:
        """Whether the bias is, and its gradients are, a multiple of the absolute distance: a kernel then computes them
        anew where others take the unit for exponentials."""
        return False

    def pair(self, q_positions, kv_positions):
        return self.of_distance((q_positions - kv_positions).astype(jnp.float32))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Alibi(DistanceBias):
    """-slope |i - j|: attention with linear biases.

    Attributes:
      slopes: One a head, `[N]`. Constants unless they are differentiated: no gradient is computed where none is asked
        for.

    Reference: Press, Smith and Lewis 2022, Train short, test long, arXiv:2108.12409, section 3.
    """

    slopes: Leaf

    @classmethod
    def geometric(cls, num_heads: int) -> "Alibi":
        """The slopes of the paper: 2^(-8 n / N) of heads n = 1 ... N for powers of two; in between, those of the power
        below, and every other one of twice as many heads."""

        def of_power(number: int) -> list[float]:
            return [2.0 ** (-8.0 * n / number) for n in range(1, number + 1)]

        below = 2 ** int(math.log2(num_heads))
        slopes = of_power(below) + of_power(2 * below)[::2][: num_heads - below]
        return cls(slopes=np.array(slopes, np.float32))

    @property
    def is_linear(self):
        return True

    def of_distance(self, distance):
        return -self.slopes * jnp.abs(distance)

    def scaled(self, factor):
        return Alibi(slopes=self.slopes * np.float32(factor))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KerpleLog(DistanceBias):
    """-r1 log(1 + r2 |i - j|), r1 and r2 positive: the logarithmic kernel of KERPLE.

    Attributes:
      r1, r2: One a head, `[N]`.

    Reference: Chi et al. 2022, KERPLE, arXiv:2205.09921.
    """

    r1: Leaf
    r2: Leaf

    def of_distance(self, distance):
        return -self.r1 * jnp.log(1.0 + self.r2 * jnp.abs(distance))

    def scaled(self, factor):
        return dataclasses.replace(self, r1=self.r1 * np.float32(factor))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KerplePower(DistanceBias):
    """-r1 |i - j|^r2, r1 positive and r2 in (0, 2]: the power kernel of KERPLE.

    Attributes:
      r1, r2: One a head, `[N]`.

    Reference: Chi et al. 2022, KERPLE, arXiv:2205.09921.
    """

    r1: Leaf
    r2: Leaf

    def of_distance(self, distance):
        # At distance 0 the logarithm is left out, and so is its gradient.
        power = jnp.exp2(self.r2 * jnp.log2(jnp.maximum(jnp.abs(distance), 1.0)))
        return -self.r1 * jnp.where(distance == 0.0, 0.0, power)

    def scaled(self, factor):
        return dataclasses.replace(self, r1=self.r1 * np.float32(factor))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Buckets(DistanceBias):
    """table[bucket of i - j]: T5's relative positions.

    Half of the buckets of a direction are of one distance each, the others of ranges that grow geometrically up to
    `max_distance`, beyond which all distances share the last.

    Attributes:
      table: `[N, buckets]`.
      max_distance: From here on distances share a bucket; static.
      bidirectional: Whether keys behind the query have buckets of their own, the second half of them; else they share
        the bucket of distance 0; static.

    Raises: ValueError where the buckets are too few or odd, or max_distance leaves the logarithmic ones no room.
    Reference: Raffel et al. 2020, Exploring the limits of transfer learning, arXiv:1910.10683, section 2.1.
    """

    table: Leaf
    max_distance: int = dataclasses.field(default=128, metadata={"static": True})
    bidirectional: bool = dataclasses.field(default=False, metadata={"static": True})

    def __post_init__(self):
        shape = getattr(self.table, "shape", None)
        if shape and self.num_buckets is not None:
            check_buckets("T5Buckets", self.num_buckets, self.max_distance, bidirectional=self.bidirectional)

    @property
    def num_buckets(self) -> int:
        return self.table.shape[-1]

    @property
    def reach(self) -> int:
        return self.max_distance

    def buckets(self, distance: jax.Array) -> jax.Array:
        """The bucket of each distance, int32."""
        return jnp.asarray(self._bucket_of)[self.slots(distance)]

    def slots(self, distance: jax.Array) -> jax.Array:
        """Where each distance is in an array of those from -reach to reach, int32."""
        return jnp.clip(distance, -self.reach, self.reach).astype(jnp.int32) + self.reach

    @property
    def _bucket_of(self) -> np.ndarray:
        """Of the distances -reach ... reach."""
        return _buckets(self.num_buckets, self.max_distance, self.bidirectional)

    def of_distance(self, distance):
        return _look_up(self.table, self.buckets(distance))

    def scaled(self, factor):
        return dataclasses.replace(self, table=self.table * np.float32(factor))


def check_buckets(name: str, num_buckets: int, max_distance: int, *, bidirectional: bool) -> None:
    """Raises ValueError, naming it, unless T5's buckets can be made of these."""
    least = 4 if bidirectional else 2
    if num_buckets < least or num_buckets % least:
        raise ValueError(f"{name}: {num_buckets} buckets, wanted a multiple of {least}, such as 32")
    exact = num_buckets // least
    if max_distance <= exact:
        raise ValueError(
            f"{name}: max_distance={max_distance}, wanted more than the {exact} distances that have a bucket each"
        )


@functools.cache
def _buckets(num_buckets: int, max_distance: int, bidirectional: bool) -> np.ndarray:
    """The buckets of the distances -max_distance ... max_distance."""
    distance = np.arange(-max_distance, max_distance + 1)
    of_direction = num_buckets // 2 if bidirectional else num_buckets
    first = np.where(distance < 0, of_direction, 0) if bidirectional else 0
    length = np.abs(distance) if bidirectional else np.maximum(distance, 0)
    exact = of_direction // 2
    # In float32, as it is defined: a range may end at a whole number.
    ratio = np.log(np.maximum(length, 1).astype(np.float32) / np.float32(exact)) / np.float32(
        math.log(max_distance / exact)
    )
    large = exact + (ratio.astype(np.float32) * np.float32(of_direction - exact)).astype(np.int32)
    return (first + np.where(length < exact, length, np.minimum(large, of_direction - 1))).astype(np.int32)


@jax.custom_vjp
def _look_up(table: jax.Array, buckets: jax.Array) -> jax.Array:
    """table[buckets], whose gradient is a sum for each bucket in a fixed order, and no scatter."""
    return table[buckets]


def _look_up_fwd(table, buckets):
    return table[buckets], (buckets, jnp.arange(table.shape[0], dtype=jnp.int32))


def _look_up_bwd(residuals, cotangent):
    buckets, numbers = residuals
    # One reduction that keeps the buckets as its last dim: a warp of a GPU reads each pair once for 32 of them.
    of_pairs = jnp.where(buckets[..., None] == numbers, cotangent[..., None], 0.0)
    return jnp.sum(of_pairs, axis=tuple(range(buckets.ndim))), None


_look_up.defvjp(_look_up_fwd, _look_up_bwd)


def check_bias(op: str, bias: object, num_heads: int) -> Bias | None:
    """The bias, its parameters float32; None of None.

    Raises: ValueError, naming the argument, unless its parameters are floats of these heads.
    """
    if bias is None:
        return None
    if not isinstance(bias, Bias):
        raise ValueError(f"{op}: bias={bias!r}, wanted None or a Bias, such as Alibi.geometric({num_heads})")
    for path, x in jax.tree.leaves_with_path(bias, is_leaf=lambda x: x is None):
        name = "bias" + jax.tree_util.keystr(path)
        if not hasattr(x, "dtype"):
            raise ValueError(
                f"{op}: {name} is {x!r}, wanted an array of floats [{num_heads}, ...]; make it with jnp.asarray"
            )
        if x.ndim < 1 or x.shape[0] != num_heads or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"{op}: {name} is {x.dtype}{list(x.shape)}, wanted floats [{num_heads}, ...], of each query head"
            )
    return bias


def gradient_of_tile(bias: Bias, q_positions, kv_positions, dlogits: Float[Array, "B N T S"]) -> Bias:
    """The gradient of a bias' parameters, float32, given that of the logits of a tile; summed over the rows."""
    bias = bias.in_float32()
    # Batched over the heads and not over the pairs, so that each parameter's sum is one reduction.
    per_head = jnp.moveaxis(dlogits, 1, 0)

    def of_head(head: Bias, dlogits: Float32[Array, "B T S"]):
        _, vjp = jax.vjp(lambda head: jnp.broadcast_to(head.pair(q_positions, kv_positions), dlogits.shape), head)
        return vjp(dlogits)[0]

    return jax.vmap(of_head)(bias, per_head)


def like_parameters(gradient: Bias, bias: Bias) -> Bias:
    """The gradient in the dtypes of the bias' parameters."""
    return jax.tree.map(lambda dx, x: dx.astype(x.dtype), gradient, bias)
