"""Attention to latents: one kv head whose values are the first dims of its keys, so that they need not be held twice.

  out[t, n] = sum_s softmax_s(scale q[t, n].latent[s]) latent[s, :value_dim]

It is blockwise attention of that k and v, and any implementation of it serves; one that reads the latents once is twice
as fast where reading them is all that takes time, as in decoding.

Reference: DeepSeek-AI 2024, DeepSeek-V2, arXiv:2405.04434, appendix B and C.
"""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels import dispatch
from pallas_kernels.blockwise import api, pallas_mosaic_gpu_decode, reference, xla
from pallas_kernels.blockwise.options import Options
from pallas_kernels.dispatch import Implementation
from pallas_kernels.mask import Mask
from pallas_kernels.mosaic_gpu import hopper_cores, refuse
from pallas_kernels.online_softmax import SoftmaxCarry
from pallas_kernels.tokens import Tokens

DIMS = (576, 512)
"""Dims of the latents, and of the values among them, that the kernels for Hopper serve."""


def latent_attention(
    q: Float[Array, "B T N R"],
    latent: Float[Array, "B S R"],
    *,
    value_dim: int,
    mask: Mask,
    scale: float,
    tokens: Tokens | None = None,
    implementation: Implementation | None = None,
    deterministic: bool = True,
) -> Float[Array, "B T N V"]:
    """Softmax attention of all heads to latents whose first dims are the values; differentiable in q and latent.

    Args:
      q: Queries, taken to the latents.
      latent: Of each key.
      value_dim: Dims of the values, V.
      mask, tokens, implementation, deterministic: As `blockwise_attention`. `mosaic_gpu` has the forward pass alone, of
        up to 16 queries of a row; gradients are another's.
      scale: Multiplies q.latent; of no default, since it is not of R.
    Returns: out in q's dtype; 0 for queries that may attend to nothing.
    Raises: as `blockwise_attention`.
    Memory: O(B T N (R + V)) plus one tile of logits.
    """
    options = _options("latent_attention", q, latent, value_dim, mask, tokens, scale, deterministic)
    return _attention(options, value_dim, implementation, q, latent, tokens)[0]


def latent_attention_forward(
    q: Float[Array, "B T N R"],
    latent: Float[Array, "B S R"],
    *,
    value_dim: int,
    mask: Mask,
    scale: float,
    tokens: Tokens | None = None,
    implementation: Implementation | None = None,
    return_carry: bool = False,
) -> tuple[Float[Array, "B T N V"], Float32[Array, "B N T"]] | SoftmaxCarry:
    """One forward pass over one set of latents, to be merged with others. Not differentiable by itself.

    Args: as `latent_attention`; return_carry as `blockwise_attention_forward`.
    Returns: `(out, lse)`, or with return_carry the SoftmaxCarry, float32.
    """
    op = "latent_attention_forward"
    options = _options(op, q, latent, value_dim, mask, tokens, scale)
    return _forward(options, value_dim, implementation, q, latent, tokens, return_carry)


def _options(op, q, latent, value_dim, mask, tokens, scale, deterministic: bool = True) -> Options:
    if latent.ndim != 3:
        raise ValueError(f"{op}: latent has shape {latent.shape}, wanted [batch, length, rank]")
    if not 0 < value_dim <= latent.shape[2]:
        raise ValueError(f"{op}: value_dim={value_dim}, wanted 1 to {latent.shape[2]}, as many as latents have dims")
    k, v = _keys_and_values(latent, value_dim)
    return api._options(op, q, k, v, mask, tokens, None, scale, None, None, deterministic)


def _keys_and_values(latent, value_dim: int) -> tuple[jax.Array, jax.Array]:
    return latent[:, :, None], latent[:, :, None, :value_dim]


def _forward(options: Options, value_dim: int, implementation, q, latent, tokens, return_carry: bool):
    return dispatch.run(
        "latent_attention_forward",
        FORWARD,
        implementation,
        q,
        latent,
        value_dim=value_dim,
        tokens=tokens,
        return_carry=return_carry,
        options=options,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attention(options: Options, value_dim: int, implementation, q, latent, tokens):
    return _forward(options, value_dim, implementation, q, latent, tokens, False)


def _attention_fwd(options, value_dim, implementation, q, latent, tokens):
    out, lse = _forward(options, value_dim, implementation, q, latent, tokens, False)
    return (out, lse), (q, latent, out, lse, tokens)


def _attention_bwd(options: Options, value_dim, implementation, residuals, cotangents):
    q, latent, out, lse, tokens = residuals
    dq, dk, dv = dispatch.run(
        "blockwise_attention_backward",
        api.BACKWARD,
        None if implementation == "mosaic_gpu" else implementation,
        q,
        *_keys_and_values(latent, value_dim),
        out,
        lse,
        cotangents[0],
        None,
        tokens=tokens,
        schedule=None,
        accumulate=(None, None, None),
        options=options,
    )
    padded = jnp.pad(dv, ((0, 0), (0, 0), (0, 0), (0, latent.shape[2] - value_dim)))
    return dq, (dk + padded)[:, :, 0], None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _by(forward: Callable) -> Callable:
    """By an implementation of blockwise attention, whose values are a copy unless the compiler does without."""

    def run(q, latent, *, value_dim, **call):
        return forward(q, *_keys_and_values(latent, value_dim), schedule=None, carry=None, **call)

    return run


def _mosaic_gpu(q, latent, *, value_dim, tokens, return_carry, options: Options, interpret=None):
    num_cores = hopper_cores(interpret, interpreted=4)
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        refuse(f"q is {q.dtype}, it takes bfloat16 and float16")
    if (latent.shape[2], value_dim) != DIMS:
        refuse(f"latents of {latent.shape[2]} dims with {value_dim} of values, it takes {DIMS[0]} with {DIMS[1]}")
    if not options.scale > 0:
        refuse(f"scale={options.scale}, it takes positive ones")
    if not pallas_mosaic_gpu_decode.serves(q.shape[1], None, options):
        refuse(
            f"T={q.shape[1]} under mask {options.mask}, it takes up to {pallas_mosaic_gpu_decode.MOST_QUERIES} queries "
            "of a row and masks that are arithmetic and the same for all heads"
        )
    return pallas_mosaic_gpu_decode.forward(
        q,
        latent[:, :, None],
        None,
        tokens=tokens or Tokens(),
        carry=None,
        return_carry=return_carry,
        options=options,
        num_cores=num_cores,
        value_dim=value_dim,
        interpret=interpret,
    )


FORWARD: Mapping[str, Callable] = {
    "mosaic_gpu": _mosaic_gpu,
    "xla": _by(xla.forward),
    "reference": _by(reference.forward),
}
