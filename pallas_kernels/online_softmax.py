"""The softmax over blocks: its running state, the (out, lse) convention, and the one merge of finished parts.

Convention of every softmax op: lse is the natural-log sum of exponentials of the scaled, masked logits, float32,
`[B, N, T]`. A row that may attend to nothing has out = 0, lse = -inf and gradient 0; with a sink, lse is the sink.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from pallas_kernels.arguments import check_results
from pallas_kernels.tokens import Leaf

MASK_VALUE = -jnp.inf
"""The logit of a pair that may not attend. With it, exp() of a masked logit is exactly 0 against any finite maximum;
`finite_max` supplies that maximum for rows that have seen nothing."""


def finite_max(row_max: jax.Array) -> jax.Array:
    """The maximum to subtract before exp(): 0 for rows that have seen nothing, so that -inf minus it stays -inf."""
    return jnp.where(row_max == -jnp.inf, 0.0, row_max)


def pooled_max(x: jax.Array, rows: int, columns: int) -> jax.Array:
    """The greatest number of each block of so many rows and columns, the last two dims; the last may be ragged."""
    *batch, T, S = x.shape
    x = jnp.pad(x, [(0, 0)] * len(batch) + [(0, -T % rows), (0, -S % columns)], constant_values=-jnp.inf)
    return jnp.max(x.reshape(*batch, x.shape[-2] // rows, rows, x.shape[-1] // columns, columns), axis=(-3, -1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftmaxCarry:
    """The running state of a softmax over blocks of keys, float32: what a ring hands from hop to hop.

    Attributes:
      max: What logits are measured against, `[B, N, T]`: the greatest seen, or less by 8 log 2 at most; -inf where
        there was none.
      sum: Sum of exp(logit - max) over the keys seen, `[B, N, T]`.
      acc: Sum of exp(logit - max) v over the keys seen, `[B, T, N, V]`; None for zeros, where none was seen.

    Reference: Milakov and Gimelshein 2018, Online normalizer calculation for softmax, arXiv:1805.02867, Algorithm 3.
    """

    max: Leaf
    sum: Leaf
    acc: Leaf

    @classmethod
    def empty(cls, *, batch_size: int, q_len: int, num_heads: int, value_dim: int) -> "SoftmaxCarry":
        """The state before any key."""
        rows = (batch_size, num_heads, q_len)
        return cls(
            max=jnp.full(rows, -jnp.inf, jnp.float32),
            sum=jnp.zeros(rows, jnp.float32),
            acc=jnp.zeros((batch_size, q_len, num_heads, value_dim), jnp.float32),
        )

    @classmethod
    def of_sinks(
        cls, sinks: Float[Array, " N"], *, batch_size: int, q_len: int, value_dim: int | None = None
    ) -> "SoftmaxCarry":
        """The state before any key where each query head has a sink: a logit that has been seen, with no value.

        Args:
          sinks: Of each query head; -inf is none.
          value_dim: Of acc; None leaves acc out.
        """
        sinks = sinks.astype(jnp.float32)
        rows = (batch_size, sinks.shape[0], q_len)
        return cls(
            max=jnp.broadcast_to(sinks[:, None], rows),
            sum=jnp.broadcast_to(jnp.where(sinks == -jnp.inf, 0.0, 1.0)[:, None], rows),
            acc=None,
        ).whole(value_dim)

    def whole(self, value_dim: int | None) -> "SoftmaxCarry":
        """The same with zeros of this dim where acc is None; None leaves it so."""
        if self.acc is not None or value_dim is None:
            return self
        batch_size, num_heads, q_len = self.max.shape
        return dataclasses.replace(self, acc=jnp.zeros((batch_size, q_len, num_heads, value_dim), jnp.float32))

    def merge(self, other: "SoftmaxCarry") -> "SoftmaxCarry":
        """The state over the keys of both, which must be disjoint. O(B T N V) elementwise."""
        top = jnp.maximum(self.max, other.max)
        mine, others = (jnp.exp(x.max - finite_max(top)) for x in (self, other))

        def rows(x_BNT):
            return x_BNT.transpose(0, 2, 1)[..., None]

        accs = [rows(weight) * x.acc for weight, x in ((mine, self), (others, other)) if x.acc is not None]
        return SoftmaxCarry(
            max=top,
            sum=mine * self.sum + others * other.sum,
            acc=functools.reduce(jnp.add, accs) if accs else None,
        )

    def finalize(self, dtype: DTypeLike) -> tuple[Float[Array, "B T N V"], Float32[Array, "B N T"]]:
        """`(out, lse)` over the keys seen: out = acc / sum in `dtype`, lse = max + log(sum)."""
        empty = self.sum == 0
        inverse_BNT = jnp.where(empty, 0.0, 1.0 / jnp.where(empty, 1.0, self.sum))
        out = self.acc * inverse_BNT.transpose(0, 2, 1)[..., None]
        lse = jnp.where(empty, -jnp.inf, finite_max(self.max) + jnp.log(jnp.where(empty, 1.0, self.sum)))
        return out.astype(dtype), lse


def delta_of(
    out: Float[Array, "B T N V"] | None, dout: Float[Array, "B T N V"], dlse: Float32[Array, "B N T"] | None
) -> Float32[Array, "B N T"]:
    """rowsum(dout out) - dlse: what a backward pass subtracts from the gradient of each probability of a row.

    Args:
      out: None where dlse has that term already.
      dlse: None for zero.
    """
    if out is None:
        return -dlse
    delta = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1).swapaxes(1, 2)
    return delta if dlse is None else delta - dlse


def merge_partials(
    first: tuple[Float[Array, "B T N V"], Float32[Array, "B N T"]],
    second: tuple[Float[Array, "B T N V"], Float32[Array, "B N T"]],
) -> tuple[Float[Array, "B T N V"], Float32[Array, "B N T"]]:
    """Merges the attention of the same queries over two disjoint sets of keys.

    lse = log(exp(lse_1) + exp(lse_2));  out = exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2

    Args:
      first: `(out, lse)` over the first set of keys.
      second: `(out, lse)` over the second.
    Returns: `(out, lse)` over both; out in the first's dtype, the sums in float32. Rows that both leave empty stay
      out = 0, lse = -inf. Differentiable in all four, with gradient 0 for empty rows.
    Raises: ValueError where shapes or dtypes do not fit.
    Cost: O(B T N V) elementwise.
    """
    (out_1, lse_1), (out_2, lse_2) = first, second
    if out_1.ndim != 4:
        raise ValueError(f"merge_partials: out has shape {out_1.shape}, wanted [batch, length, heads, head dim]")
    outs = {"the first's out": out_1, "the second's out": out_2}
    check_results("merge_partials", out_1.shape, out=outs, lse={"the first's lse": lse_1, "the second's lse": lse_2})
    top = finite_max(jax.lax.stop_gradient(jnp.maximum(lse_1, lse_2)))
    weight_1, weight_2 = _exp_of_lse(lse_1, top), _exp_of_lse(lse_2, top)
    total = weight_1 + weight_2
    empty = total == 0
    safe_total = jnp.where(empty, 1.0, total)

    def rows(x_BNT):
        return x_BNT.transpose(0, 2, 1)[..., None]

    out = rows(weight_1 / safe_total) * out_1.astype(jnp.float32) + rows(weight_2 / safe_total) * out_2.astype(
        jnp.float32
    )
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(safe_total))
    return out.astype(out_1.dtype), lse


def _exp_of_lse(lse: jax.Array, top: jax.Array) -> jax.Array:
    # The inner where keeps -inf out of exp's gradient, which would otherwise be 0 * nan.
    empty = lse == -jnp.inf
    return jnp.where(empty, 0.0, jnp.exp(jnp.where(empty, 0.0, lse) - top))
