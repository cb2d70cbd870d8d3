"""Blockwise softmax attention by cuDNN: full, causal and sliding-window attention in half precision, on NVIDIA GPUs.

cuDNN's kernels read no positions and no segment ids, and a dense mask for them would cost `[T, S]` memory and the work
of every pair. So whatever is not a plain band around the diagonal is refused and left to the next implementation.

JAX's public `jax.nn.dot_product_attention` would not do: it rounds the log-sum-exp to the inputs' dtype, and it has no
backward pass that starts from a given `(out, lse)`. So this calls the functions under it, which are private to JAX; a
JAX without them is a refusal like any other.

Reference: cuDNN, Scaled Dot Product Attention; Dao 2023, FlashAttention-2, arXiv:2307.08691.
"""

import inspect
import math
from collections.abc import Mapping
from typing import Any, NoReturn

import jax.numpy as jnp

from pallas_kernels.bias import Bias
from pallas_kernels.blockwise.options import Options
from pallas_kernels.dispatch import current_platform
from pallas_kernels.dropout import Dropout
from pallas_kernels.mask import And, Causal, Full, Mask, SameDocument, Window
from pallas_kernels.schedule import Schedule
from pallas_kernels.tokens import Tokens

MAX_HEAD_DIM = 128
MIN_LENGTH = 64
# Beyond it the backward pass of cuDNN 9.27 returns wrong gradients and no error.
MAX_ELEMENTS = 2**31


def forward(
    q, k, v, *, tokens, schedule, carry, return_carry, options: Options, dropout: Dropout | None = None,
    bias: Bias | None = None,
):  # fmt: skip
    """`blockwise_attention_forward` by cuDNN; needs no schedule."""
    _check_schedule(schedule)
    if carry is not None or return_carry:
        _refuse("it takes and returns no running softmax (carry, return_carry, sinks)")
    if (refusal := options.refusal_of_skipping_and_maxima()) is not None:
        _refuse(refusal)
    settings = _settings(q, k, v, tokens, dropout, bias, options)
    out, lse = _call("_dot_product_attention_fwd", query=q, key=k, value=v, **_unused(q), **settings)
    return out, lse


def backward(
    q,
    k,
    v,
    out,
    lse,
    dout,
    dlse,
    *,
    tokens,
    schedule,
    accumulate,
    options: Options,
    dropout: Dropout | None = None,
    bias: Bias | None = None,
):
    """`blockwise_attention_backward` by cuDNN; needs no schedule."""
    _check_schedule(schedule)
    if dlse is not None:
        _refuse("its gradient leaves out the cotangent of lse (dlse); it serves dlse=None, which means zero")
    if out is None:
        _refuse("its gradient wants the result (out)")
    if any(x is not None for x in accumulate):
        _refuse("it adds into no running gradients (accumulate)")
    settings = _settings(q, k, v, tokens, dropout, bias, options)
    if options.deterministic:
        _refuse("its dq is added up in no fixed order (deterministic=True); pass deterministic=False to allow that")
    # The backward's residuals are the forward's operands and results.
    operands = _parameters("_dot_product_attention_fwd")
    unused = (value for name, value in _unused(q).items() if name in operands)
    residuals = q, k, v, *unused, lse, out.astype(q.dtype)
    cotangents = dout.astype(q.dtype), None
    dq, dk, dv, *_ = _call("_dot_product_attention_bwd_rule", res=residuals, grad_output=cotangents, **settings)
    return dq, dk, dv


def _settings(
    q, k, v, tokens: Tokens | None, dropout: Dropout | None, bias: Bias | None, options: Options
) -> dict[str, Any]:
    """The static arguments of JAX's functions for a call that cuDNN serves.

    Raises: NotImplementedError with the reason where it does not.
    """
    if current_platform() != "gpu":
        _refuse(f"it needs an NVIDIA GPU, the platform is {current_platform()}")
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        _refuse(f"q is {q.dtype}, it takes bfloat16 and float16")
    if options.logits_soft_cap is not None:
        _refuse("it has no soft cap of logits")
    if dropout is not None:
        _refuse("it draws dropout by where a pair lies in the arrays, not by its tokens (dropout)")
    if bias is not None:
        _refuse("its bias is an array of all pairs, [N, T, S], not a function of positions (bias)")
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
    return dict(
        scale=options.scale,
        seed=42,  # of the dropout that is not asked for: JAX's default
        dropout_rate=0.0,
        variadic_args=(False, False),  # neither a bias nor its gradient
        mask_type=mask_type.CAUSAL if causal else mask_type.NO_MASK,
        layout=layout.BTNH.value,
        sliding_window_length=None if left is None else left + 1,  # cuDNN counts the query's own token
        score_mod=None,
        cudnn_version=None,  # for checks that are made of packed layouts only
        is_training=None,  # what JAX 0.11 calls it in the backward
        return_residual=True,  # with lse
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


def _parameters(name: str) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(_jax_function(name)).parameters


def _call(name: str, **arguments: Any) -> Any:
    """Calls one of JAX's functions with those of the arguments that it has, since versions of JAX differ in them.

    Raises: NotImplementedError where it has others.
    """
    parameters = _parameters(name)
    unknown = [key for key in parameters if key not in arguments]
    if unknown:
        _refuse(f"this version of JAX wants {', '.join(unknown)} in {name}, which is not known here")
    return _jax_function(name)(*(arguments[key] for key in parameters))


def _unused(q) -> dict[str, Any]:
    """Operands that are empty here, in JAX's order: bias, lengths and offsets of packed sequences, page tables."""
    names = ("bias", "q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets", "page_table_k", "page_table_v")
    return {name: jnp.zeros(0, q.dtype) for name in names} | {"score_mod_args": ()}


def _check_schedule(schedule: Schedule | None) -> None:
    if schedule is not None and schedule.is_selection:
        _refuse("it attends to all blocks that the mask allows, not to chosen ones")


def _refuse(reason: str) -> NoReturn:
    raise NotImplementedError(f"cudnn: {reason}")
