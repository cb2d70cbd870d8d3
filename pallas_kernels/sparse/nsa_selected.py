"""Attention of each query to the blocks of keys that are named for it: the selected branch of Native Sparse Attention.

The heads of a group, which read one kv head, share the blocks; queries do not. Which blocks they are is an argument.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Float32, Int32

from pallas_kernels import dispatch
from pallas_kernels.arguments import check_qkv, check_results
from pallas_kernels.dispatch import Implementation
from pallas_kernels.saved import as_attention
from pallas_kernels.sparse import nsa_selected_reference, nsa_selected_xla, pallas_mosaic_gpu_nsa

FORWARD: Mapping = {
    "mosaic_gpu": pallas_mosaic_gpu_nsa.forward,
    "xla": nsa_selected_xla.forward,
    "reference": nsa_selected_reference.forward,
}
BACKWARD: Mapping = {
    "mosaic_gpu": pallas_mosaic_gpu_nsa.backward,
    "xla": nsa_selected_xla.backward,
    "reference": nsa_selected_reference.backward,
}


def selected_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    choices: Int32[Array, "B T K n"],
    block_start: Int32[Array, "#B M"],
    q_place: Int32[Array, "#B T"] | None = None,
    *,
    block_size: int = 64,
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T N V"], Float32[Array, "B N T"]]:
    """Softmax attention of each query to the keys of the blocks chosen for it, up to its own place.

    out[t] = sum_s softmax_s(scale q[t].k[s]) v[s]
      over s <= q_place[t] with block_start[j] <= s < block_start[j] + block_size for a j of choices[t]

    Args:
      q: Queries; N is a multiple of K, and query head n reads kv head n // (N / K).
      k, v: Keys and values, in the order of the sequence.
      choices: Numbers of the blocks of each query and kv head, no number twice in a row; -1 is none.
      block_start: The row of k at which each block begins, not negative. Blocks may begin anywhere, and the last rows
        of one be those of the next; the chosen blocks of a query have no row up to its place in common.
      q_place: The row of k at which each query stands; None means 0, 1, 2, ...
      block_size: Rows of a block; those that k does not have are left out.
      scale: Multiplies q.k; default H ** -0.5.
      implementation: Which implementation to use; None takes the first of the platform's that serves the call.
    Returns: `(out, lse)`: out in q's dtype, lse float32, natural log, with its cotangent. A query without a key is
      out = 0, lse = -inf, gradient 0. Differentiable in q, k and v; the gradients come out the same, bit by bit, each
      time. On Hopper NaN where more blocks are in use than packed documents can have, whose lists find no room.
    Raises: ValueError where the call is wrong; NotImplementedError where the named implementation refuses or is not
      there; ExceptionGroup with every reason where no implementation serves the call.
    Cost: 2 B T N n block_size (H + V) FLOPs.
    Reference: Yuan et al. 2025, Native Sparse Attention, arXiv:2502.11089, section 3.3.2.
    """
    options = options_of("selected_attention", q, k, v, choices, block_start, q_place, block_size, scale)
    return _attention(options, implementation, q, k, v, choices, block_start, q_place)


def selected_attention_forward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    choices: Int32[Array, "B T K n"],
    block_start: Int32[Array, "#B M"],
    q_place: Int32[Array, "#B T"] | None = None,
    *,
    block_size: int = 64,
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T N V"], Float32[Array, "B N T"]]:
    """`selected_attention`, not differentiable by itself."""
    options = options_of("selected_attention_forward", q, k, v, choices, block_start, q_place, block_size, scale)
    return _forward(options, implementation, q, k, v, choices, block_start, q_place)


def selected_attention_backward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    choices: Int32[Array, "B T K n"],
    block_start: Int32[Array, "#B M"],
    q_place: Int32[Array, "#B T"] | None,
    out: Float[Array, "B T N V"],
    lse: Float32[Array, "B N T"],
    dout: Float[Array, "B T N V"],
    dlse: Float32[Array, "B N T"] | None,
    *,
    block_size: int = 64,
    scale: float | None = None,
    gradient_dtype: DTypeLike | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K V"]]:
    """The gradients of q, k and v, given the results and their cotangents.

    dS = P (dP - delta + dlse) with P = exp(S - lse), dP = dout v^T, delta = rowsum(dout out)

    Args:
      out, lse: The results.
      dout, dlse: Their cotangents; dlse None is zero.
      gradient_dtype: Dtype of the results: float32 where they are to be added to others. None means those of q, k, v.
      Others: as `selected_attention`.
    Returns: (dq, dk, dv).
    Raises: as `selected_attention`.
    """
    options = options_of("selected_attention_backward", q, k, v, choices, block_start, q_place, block_size, scale)
    shape = *q.shape[:3], v.shape[3]
    check_results(
        "selected_attention_backward", shape, out={"out": out, "dout": dout}, lse={"lse": lse, "dlse": dlse}
    )  # fmt: skip
    arrays = q, k, v, choices, block_start, q_place, out, lse, dout, dlse
    return _backward(options, implementation, gradient_dtype, *arrays)


class _Options(NamedTuple):
    """What is static of a call."""

    block_size: int
    scale: float


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(options: _Options, implementation, q, k, v, choices, block_start, q_place):
    return _forward(options, implementation, q, k, v, choices, block_start, q_place)


def _attention_fwd(options, implementation, *arrays):
    results = as_attention(_forward(options, implementation, *arrays))
    return results, (*arrays, *results)


def _attention_bwd(options, implementation, saved, cotangents):
    return *_backward(options, implementation, None, *saved, *cotangents), None, None, None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _forward(options: _Options, implementation, *arrays):
    return dispatch.run("selected_attention_forward", FORWARD, implementation, *arrays, **options._asdict())


def _backward(options: _Options, implementation, gradient_dtype, *arrays):
    gradients = dispatch.run("selected_attention_backward", BACKWARD, implementation, *arrays, **options._asdict())
    return tuple(g.astype(gradient_dtype or x.dtype) for g, x in zip(gradients, arrays[:3], strict=True))


def options_of(op: str, q, k, v, choices, block_start, q_place, block_size: int, scale: float | None) -> _Options:
    """Validates a call, and gathers what is static of it."""

    def wrong(message: str) -> NoReturn:
        raise ValueError(f"{op}: {message}")

    def check_int32(name: str, x: Any, shape: str, fits: bool) -> None:
        if not fits or x.dtype != jnp.int32:
            wrong(f"{name} is {x.dtype}{list(x.shape)}, wanted int32 {shape}")

    check_qkv(op, q, k, v)
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0]:
        wrong(f"q, k, v have shapes {q.shape}, {k.shape}, {v.shape}; wanted one B, and k and v of one S and K")
    (B, T, N, H), K = q.shape, k.shape[2]
    if k.shape[3] != H:
        wrong(f"head dim of q is {H} and of k {k.shape[3]}, wanted the same")
    if N % K:
        wrong(f"{N} query heads over {K} kv heads, wanted a multiple")
    if block_size < 1:
        wrong(f"block_size: got {block_size}, wanted a number of rows >= 1")
    fits = choices.ndim == 4 and choices.shape[:3] == (B, T, K) and choices.shape[3] > 0
    check_int32("choices", choices, f"[{B}, {T}, {K}, 1 or more], of the queries and kv heads", fits)
    fits = block_start.ndim == 2 and block_start.shape[0] in (1, B) and block_start.shape[1] > 0
    check_int32("block_start", block_start, f"[{B} or 1, 1 or more]", fits)
    if q_place is not None:
        check_int32("q_place", q_place, f"[{B} or 1, {T}]", q_place.shape in ((B, T), (1, T)))
    return _Options(block_size=block_size, scale=H**-0.5 if scale is None else float(scale))
