"""Blockwise softmax attention by cuDNN: full, causal and sliding-window attention in half precision, on NVIDIA GPUs.

cuDNN's kernels read no positions and no segment ids, and a dense mask for them would cost `[T, S]` memory and the work
of every pair. So whatever is not a plain band around the diagonal is refused and left to the next implementation.

JAX's public `jax.nn.dot_product_attention` would not do: it rounds the log-sum-exp to the inputs' dtype, and it has no
backward pass that starts from a given `(out, lse)`. So this calls the functions under it, which are private to JAX; a
JAX without them is a refusal like any other.

Reference: cuDNN, Scaled Dot Product Attention; Dao 2023, FlashAttention-2, arXiv:2307.08691.
"""

import math
from typing import Any, NoReturn

import jax.numpy as jnp

from pallas_kernels.blockwise.options import Options
from pallas_kernels.dispatch import current_platform
from pallas_kernels.mask import And, Causal, Full, Mask, SameDocument, Window
from pallas_kernels.tokens import Tokens

MAX_HEAD_DIM = 128
MIN_LENGTH = 64
# Beyond it the backward pass of cuDNN 9.27 returns wrong gradients and no error.
MAX_ELEMENTS = 2**31


def forward(q, k, v, *, tokens, schedule, carry, return_carry, options: Options):
    """`blockwise_attention_forward` by cuDNN; needs no schedule."""
    del schedule
    if carry is not None or return_carry:
        _refuse("it takes and returns no running softmax (carry, return_carry)")
    settings = _settings(q, k, v, tokens, options)
    out, lse = _jax_function("_dot_product_attention_fwd")(q, k, v, *_unused(q), *settings)
    return out, lse


def backward(q, k, v, out, lse, dout, dlse, *, tokens, schedule, accumulate, options: Options):
    """`blockwise_attention_backward` by cuDNN; needs no schedule."""
    del schedule
    if dlse is not None:
        _refuse("its gradient leaves out the cotangent of lse (dlse); it serves dlse=None, which means zero")
    if accumulate is not None:
        _refuse("it adds into no running gradients (accumulate)")
    settings = _settings(q, k, v, tokens, options)
    residuals = q, k, v, *_unused(q), lse, out.astype(q.dtype)
    cotangents = dout.astype(q.dtype), None
    dq, dk, dv, *_ = _jax_function("_dot_product_attention_bwd_rule")(*settings, residuals, cotangents)
    return dq, dk, dv


def _settings(q, k, v, tokens: Tokens | None, options: Options) -> tuple:
    """The static arguments of JAX's functions, in their order, for a call that cuDNN serves.

    Raises: NotImplementedError with the reason where it does not.
    """
    if current_platform() != "gpu":
        _refuse(f"it needs an NVIDIA GPU, the platform is {current_platform()}")
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        _refuse(f"q is {q.dtype}, it takes bfloat16 and float16")
    if options.logits_soft_cap is not None:
        _refuse("it has no soft cap of logits")
    head_dim, value_dim = q.shape[3], v.shape[3]
    if value_dim != head_dim:
        _refuse(f"values have head dim {value_dim} and keys {head_dim}, it takes one head dim")
    if head_dim % 8 or head_dim > MAX_HEAD_DIM:
        _refuse(f"head dim {head_dim}, it takes multiples of 8 up to {MAX_HEAD_DIM}")
    q_len, kv_len = q.shape[1], k.shape[1]
    for name, length in (("T", q_len), ("S", kv_len)):
        if length < MIN_LENGTH or length % 2:
            _refuse(f"{name}={length}, it takes even lengths from {MIN_LENGTH}")
    if max(math.prod(q.shape), math.prod(k.shape)) > MAX_ELEMENTS:
        _refuse(f"q and k have shapes {q.shape} and {k.shape}, its gradients are wrong beyond 2^31 elements")
    causal, left = _causal_window(options.mask, tokens or Tokens(), q_len, kv_len)
    mask_type, layout = _jax_function("MaskType"), _jax_function("AttentionLayout")
    return (
        options.scale,
        42,  # seed of the dropout that is not asked for: JAX's default
        0.0,  # its rate
        (False, False),  # neither a bias nor its gradient
        mask_type.CAUSAL if causal else mask_type.NO_MASK,
        layout.BTNH.value,
        None if left is None else left + 1,  # cuDNN counts the query's own token
        None,  # cuDNN's version, for checks that are made of packed layouts only
        True,  # with lse
    )


def _causal_window(mask: Mask, tokens: Tokens, q_len: int, kv_len: int) -> tuple[bool, int | None]:
    """Whether the mask is causal, and how many tokens to the left it shows if not all.

    Raises: NotImplementedError where it is neither full, nor causal in token order with or without such a window.
    """
    left, right = _band(mask, tokens)
    if (left, right) == (None, None):
        return False, None
    if right != 0:
        _refuse(f"mask {mask}: it takes full and causal attention, and causal windows")
    if tokens.q_positions is not None or tokens.kv_positions is not None:
        _refuse("tokens carry positions, it takes tokens in order (positions None)")
    if q_len != kv_len:
        _refuse(f"T={q_len} and S={kv_len}, it takes causal attention of as many queries as keys")
    return True, left


def _band(mask: Mask, tokens: Tokens) -> tuple[int | None, int | None]:
    """The keys at `position - left` to `position + right` that a query may attend to; None is an open side."""
    match mask:
        case Full():
            return None, None
        case Causal(offset=offset):
            return None, offset
        case Window(left=left, right=right):
            return left, right
        case SameDocument() if tokens.q_segment_ids is None and tokens.kv_segment_ids is None:
            return None, None
        case SameDocument():
            _refuse("tokens carry segment ids: it would need a dense [T, S] mask to tell documents apart")
        case And():
            sides = zip(_band(mask.left, tokens), _band(mask.right, tokens), strict=True)
            left, right = (min((x for x in side if x is not None), default=None) for side in sides)
            return left, right
        case _:
            _refuse(f"mask {mask}: it takes full and causal attention, and causal windows")


def _jax_function(name: str) -> Any:
    """What JAX keeps under `jax.nn.dot_product_attention(implementation="cudnn")`."""
    try:
        from jax._src.cudnn import fused_attention_stablehlo

        return getattr(fused_attention_stablehlo, name)
    except (ImportError, AttributeError) as error:
        raise NotImplementedError(f"cudnn: this version of JAX has no {name} for it ({error})") from error


def _unused(q) -> tuple:
    """Bias, lengths and offsets of packed sequences, and page tables: seven operands that are empty here."""
    return (jnp.zeros(0, q.dtype),) * 7


def _refuse(reason: str) -> NoReturn:
    raise NotImplementedError(f"cudnn: {reason}")
