"""What XLA's passes over chunks share: arrays cut into chunks, and products in the precision of the inputs."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.linear.chunks import Chunks

CHUNK = 64


def split(x: jax.Array) -> jax.Array:
    """`[B, T, K, ...]` to `[n, B, K, C, ...]`, padded with zeros."""
    B, T, *rest = x.shape
    x = jnp.pad(x, ((0, 0), (0, -T % CHUNK), *((0, 0),) * len(rest)))
    return jnp.moveaxis(x.reshape(B, -1, CHUNK, *rest), (1, 3), (0, 2))


def join(chunks: jax.Array, length: int) -> jax.Array:
    """The inverse of `split`."""
    joined = jnp.moveaxis(chunks, (0, 2), (1, 3))
    return joined.reshape(joined.shape[0], -1, *joined.shape[3:])[:, :length]


def split_rows(x: jax.Array) -> jax.Array:
    """`[..., T']` to `[n, ..., C]`."""
    return jnp.moveaxis(x.reshape(*x.shape[:-1], -1, CHUNK), -2, 0)


def split_factors(chunks: Chunks) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """reads and writes `[n, B, N, C]`, keeps `[n, B, N]` and document `[n, B, C]` of each chunk."""
    document = None if chunks.document is None else split_rows(chunks.document)
    return split_rows(chunks.reads), split_rows(chunks.writes), jnp.moveaxis(chunks.keeps, 2, 0), document


def in_order(document: jax.Array | None, *, reverse: bool = False, strict: bool = False) -> jax.Array:
    """Whether token i of a chunk sees token j: one before it (after it in reverse) in its document, or itself unless
    `strict`; bool `[B or 1, 1, i, j]`."""
    order = jnp.tril(jnp.ones((CHUNK, CHUNK), bool), -1 if strict else 0)
    seen = (order.T if reverse else order)[None]
    if document is not None:
        seen = seen & (document[:, :, None] == document[:, None, :]) & (document >= 0)[:, :, None]
    return seen[:, None]


def per_value_head(x: jax.Array, num_heads: int) -> jax.Array:
    """float32 `[B, N, C, H]` of `[B, K, C, H]`, whose heads value heads share."""
    return jnp.repeat(x.astype(jnp.float32), num_heads // x.shape[1], axis=1)


def sums_up_to(log: jax.Array) -> jax.Array:
    """Sums over s <= i along C, of `[..., C, H]` `[..., i, H]`."""
    return _sums("is,...sh->...ih", _order(log), log)


def sums_after(log: jax.Array) -> jax.Array:
    """Sums over s > j along C, of `[..., C, H]` `[..., j, H]`."""
    return _sums("js,...sh->...jh", ~_order(log), log)


def sums_between(log: jax.Array) -> jax.Array:
    """Sums over j < s <= i along C, of `[..., C, H]` `[..., i, j, H]`; 0 where j >= i.

    Of what lies between alone: a difference of running sums would have the rounding of all that came before.
    """
    after = jnp.where(~_order(log).T[..., None], log[..., :, None, :], 0.0)
    return _sums("is,...sjh->...ijh", _order(log), after)


def _order(log: jax.Array) -> jax.Array:
    """Whether s <= i, `[i, s]`."""
    return jnp.tril(jnp.ones((log.shape[-2],) * 2, bool))


def _sums(spec: str, order: jax.Array, log: jax.Array) -> jax.Array:
    # One matmul, where a running sum would be many steps.
    return jnp.einsum(spec, order.astype(jnp.float32), log, precision=jax.lax.Precision.HIGHEST)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def multiply(spec: str, dtype: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """einsum of two float32 arrays, float32, as precisely as inputs of `dtype` deserve; its derivatives too, which by
    JAX's own rule would multiply float32 cotangents in full.

    bfloat16 inputs: operands are rounded to it. float16: a state may be beyond its range, and TF32 has its precision.

    Args:
      spec: Each index stands in two of the three terms or in all.
    """
    if dtype == "bfloat16":
        x, y, precision = x.astype(dtype), y.astype(dtype), None
    else:
        # Left to itself XLA multiplies float32 in TF32 on a GPU and in bfloat16 on a TPU.
        precision = jax.lax.Precision.HIGHEST if dtype == "float32" else jax.lax.Precision.HIGH
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32, precision=precision)


def _multiply_fwd(spec: str, dtype: str, x, y):
    return multiply(spec, dtype, x, y), (x, y)


def _multiply_bwd(spec: str, dtype: str, operands, cotangent):
    x, y = operands
    terms, result = spec.split("->")
    of_x, of_y = terms.split(",")
    dx = multiply(f"{result},{of_y}->{of_x}", dtype, cotangent, y)
    return dx, multiply(f"{of_x},{result}->{of_y}", dtype, x, cotangent)


multiply.defvjp(_multiply_fwd, _multiply_bwd)
