"""Blockwise softmax attention: the public ops of the family."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Float32

from pallas_kernels import dispatch
from pallas_kernels.arguments import check_kind, check_qkv, check_results
from pallas_kernels.bias import Bias, check_bias, like_parameters
from pallas_kernels.block_sizes import BlockSizes
from pallas_kernels.blockwise import cudnn, pallas_mosaic_gpu, pallas_mosaic_tpu, reference, xla
from pallas_kernels.blockwise.options import Options
from pallas_kernels.blockwise.pallas_mosaic_tpu_ring import RingKernels
from pallas_kernels.dispatch import Implementation
from pallas_kernels.dropout import Dropout
from pallas_kernels.mask import Mask
from pallas_kernels.online_softmax import SoftmaxCarry
from pallas_kernels.perturbed import is_perturbed, values_of
from pallas_kernels.saved import as_attention
from pallas_kernels.schedule import Schedule
from pallas_kernels.tokens import Tokens, validate_tokens

FORWARD: Mapping = {
    "mosaic_gpu": pallas_mosaic_gpu.forward,
    "mosaic_tpu": pallas_mosaic_tpu.forward,
    "cudnn": cudnn.forward,
    "xla": xla.forward,
    "reference": reference.forward,
}
BACKWARD: Mapping = {
    "mosaic_gpu": pallas_mosaic_gpu.backward,
    "mosaic_tpu": pallas_mosaic_tpu.backward,
    "cudnn": cudnn.backward,
    "xla": xla.backward,
    "reference": reference.backward,
}


def blockwise_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    *,
    mask: Mask,
    tokens: Tokens | None = None,
    schedule: Schedule | None = None,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    bias: Bias | None = None,
    dropout: Dropout | None = None,
    block_sizes: BlockSizes | None = None,
    implementation: Implementation | None = None,
    deterministic: bool = True,
    skip_softmax_threshold: float = 0.0,
    block_maxima: BlockSizes | None = None,
    return_lse: bool = False,
) -> Float[Array, "B T N V"] | tuple[Array, ...]:
    """Softmax attention computed block by block, in memory linear in T and S; differentiable in q, k, v, sinks, bias.

    out[t] = sum_s softmax_s(scale q[t].k[s]) v[s], over the keys s that the mask lets t attend to
    with sinks:    out[t] = sum_s exp(S[t, s] - lse[t]) v[s],  lse[t] = log(exp(sink) + sum_s exp(S[t, s]))
    with dropout:  out[t] = sum_s exp(S[t, s] - lse[t]) Z[t, s] v[s],  Z either 0 or 1 / (1 - rate)

    Args:
      q: Queries; N is a multiple of K, and query head n reads kv head n // (N / K).
      k: Keys.
      v: Values; their head dim may differ from the keys'.
      mask: Which (query, key) pairs may attend; a PerHead among its parts makes that differ between query heads.
      tokens: Positions and segment ids; None means arange and one document.
      schedule: The blocks to visit, from `make_schedule` with the same mask, tokens and lengths; None builds it here.
        Build it once and hand it to every layer. Or from `BlockSelection.schedule`: then attention is to the blocks
        chosen for each head, of which the mask allows what it allows.
      scale: Multiplies q.k; default H ** -0.5.
      logits_soft_cap: If given, logits become cap * tanh(logits / cap) before the mask.
      sinks: A logit for each query head that takes part in the softmax and has no value, any float dtype, computed in
        float32; -inf is none. Not to be confused with sink tokens, which are a mask (`longctx.masks.sink_tokens`).
      bias: Added to the logits, after the soft cap: a function of the positions of a pair, whose parameters are of each
        query head (pallas_kernels/bias.py), computed in float32. Their gradient is computed where it is asked for.
      dropout: Which probabilities to drop: by tokens and seeds, so however the call is cut up. Rate 0 is None.
      block_sizes: Tokens a block holds, and a tile; None leaves it to the implementation, or to the schedule.
      implementation: Which implementation to use; None takes the first of the platform's that serves the call.
      deterministic: Whether the gradients must come out the same, bit by bit, each time; False also allows an
        implementation that adds them up in any order, which may be faster. out and lse always do.
      skip_softmax_threshold: In [0, 1). Above 0 an approximation, for inference: a tile of queries and keys is left out
        if, for each of its queries, exp(its greatest logit - the greatest of the tiles before) is less than this. out
        and lse are those over the keys that are left, of which each query had all but at most S skip_softmax_threshold
        of its probability. A tile is a block of queries of a head and one of keys, as the call is cut up; keys go in
        ascending order. `xla` and `reference` serve it, neither in less time.
      block_maxima: Tokens of blocks; the greatest logit of each is returned too, as `blockwise_attention_forward` says.
      return_lse: Whether to return lse too.
    Returns: out in q's dtype; with return_lse also lse, natural log, float32, whose cotangent is honoured; with
      block_maxima also maxima, whose cotangent is not: they are constants to differentiation. A row that
      may attend to nothing is out = 0, lse = -inf (with sinks, lse = sink), gradient 0.
    Raises: ValueError where the call is wrong; NotImplementedError where the named implementation does not serve it;
      ExceptionGroup with every reason where no implementation does.
    Memory: O(B T N (H + V)) plus one tile of logits.
    Reference: Dao 2023, FlashAttention-2, arXiv:2307.08691, Algorithms 1 and 2. Sinks: Miller 2023, Attention is off by
      one, of which they are the learned form in Agarwal et al. 2025, gpt-oss, arXiv:2508.10925; what they replace: Xiao
      et al. 2023, StreamingLLM, arXiv:2309.17453. Threshold: Yuan et al. 2025, BLASST, arXiv:2512.12087, Algorithm 1.
    """
    op = "blockwise_attention"
    options = _options(op, q, k, v, mask, tokens, schedule, scale, logits_soft_cap, block_sizes, deterministic)
    options = _with_forward_options(op, options, skip_softmax_threshold, block_maxima)
    _check_sinks(op, sinks, q)
    dropout, bias = _checked_dropout(op, dropout, q), check_bias(op, bias, q.shape[2])
    return _attention(options, implementation, return_lse, q, k, v, tokens, schedule, sinks, dropout, bias)


def blockwise_attention_forward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    *,
    mask: Mask,
    tokens: Tokens | None = None,
    schedule: Schedule | None = None,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    bias: Bias | None = None,
    dropout: Dropout | None = None,
    block_sizes: BlockSizes | None = None,
    implementation: Implementation | None = None,
    carry: SoftmaxCarry | None = None,
    return_carry: bool = False,
    skip_softmax_threshold: float = 0.0,
    block_maxima: BlockSizes | None = None,
) -> tuple[Array, ...] | SoftmaxCarry | tuple[SoftmaxCarry, Array]:
    """One forward pass over one set of keys, to be continued: a hop of a ring. Not differentiable by itself.

    maxima[b, n, i, j] = max of S[b, n, t, s] over queries t of block i and keys s of block j

    Args:
      carry: The running softmax over keys already seen; None starts afresh. It holds the sinks already.
      return_carry: Whether to return the running softmax, to be continued, instead of the result.
      skip_softmax_threshold: As `blockwise_attention`; tiles before are those of this call, without carry and sinks.
      block_maxima: Tokens of the blocks, from the first token on, whose greatest logits to return: scaled, capped and
        masked, also of tiles that skip_softmax_threshold leaves out; sinks and carry have no part in them. What a
        selector of blocks would like to know, and of one block for all, `BlockSizes(block_q=T, block_kv=S)`, what
        clipping of queries and keys goes by. `xla` and `reference` return them.
      Others: as `blockwise_attention`.
    Returns: `(out, lse)` over all keys seen, or with return_carry the SoftmaxCarry, float32. With block_maxima
      `(out, lse, maxima)`, or `(carry, maxima)`: float32 `[B, N, T / block_q, S / block_kv]`, rounded up, -inf where no
      pair of a block may attend.
    Raises: as `blockwise_attention`.
    Memory: O(B T N (H + V)) plus one tile of logits; maxima B N T S / (p_q p_kv) floats on their way, with p_q and p_kv
      the greatest common divisors of the sizes of their blocks and of the tiles.
    Reference: Kimi Team 2025, Kimi K2, arXiv:2507.20534, section
      2.1 (QK-Clip): what the maximum of a head is for.
    """
    op = "blockwise_attention_forward"
    options = _options(op, q, k, v, mask, tokens, schedule, scale, logits_soft_cap, block_sizes)
    options = _with_forward_options(op, options, skip_softmax_threshold, block_maxima)
    _check_sinks(op, sinks, q)
    dropout, bias = _checked_dropout(op, dropout, q), check_bias(op, bias, q.shape[2])
    if carry is not None and sinks is not None:
        raise ValueError(
            f"{op}: got both sinks and carry, wanted at most one: sinks are what a softmax starts from; pass them with "
            "the first keys only"
        )
    if carry is not None:
        B, T, N, V = *q.shape[:3], v.shape[3]
        expected = {"max": (B, N, T), "sum": (B, N, T)} | ({} if carry.acc is None else {"acc": (B, T, N, V)})
        _check_float32(op, "carry.{}", {name: getattr(carry, name) for name in expected}, expected)
    result = dispatch.run(
        op,
        FORWARD,
        implementation,
        q,
        k,
        v,
        tokens=tokens,
        schedule=schedule,
        carry=_starting_from(sinks, q) if carry is None else carry,
        return_carry=return_carry,
        options=options,
        dropout=dropout,
        bias=bias,
    )
    if block_maxima is None:
        return result
    result, maxima = result
    maxima = jax.lax.stop_gradient(maxima)
    return (result, maxima) if return_carry else (*result, maxima)


def blockwise_attention_backward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    out: Float[Array, "B T N V"] | None,
    lse: Float32[Array, "B N T"],
    dout: Float[Array, "B T N V"],
    dlse: Float32[Array, "B N T"] | None,
    *,
    mask: Mask,
    tokens: Tokens | None = None,
    schedule: Schedule | None = None,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    bias: Bias | None = None,
    bias_gradient: bool = False,
    dropout: Dropout | None = None,
    block_sizes: BlockSizes | None = None,
    implementation: Implementation | None = None,
    deterministic: bool = True,
    accumulate: tuple[
        Float32[Array, "B T N H"] | None, Float32[Array, "B S K H"] | None, Float32[Array, "B S K V"] | None
    ]
    | None = None,
) -> (
    tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K V"]]
    | tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K V"], Bias]
):
    """One backward pass over one set of keys, given the results over all of them: a hop of a ring's backward.

    dS = P (dP - delta + dlse) with P = exp(S - lse), dP = dout v^T (times Z with dropout), delta = rowsum(dout out)

    Sinks are in lse, and change nothing else here; `sinks_gradient` has their own gradient.

    Args:
      out: The attention's result over all keys; None where dlse holds its term too, dlse - rowsum(dout out).
      lse: Its log-sum-exp over all keys, and the sinks if there are any.
      dout: Cotangent of out.
      dlse: Cotangent of lse; None where nothing depends on lse, which some implementations require.
      bias_gradient: Whether to return the gradient of the bias too.
      accumulate: Running (dq, dk, dv) to add into; None, of all or of one, starts from zero. dk and dv go together.
      Others: as `blockwise_attention`.
    Returns: (dq, dk, dv): float32 where something was running, else in the dtypes of q, k and v. With bias_gradient
      also that of the bias, a bias of float32 parameters, summed over the rows, queries and keys at hand: where those
      are split over hops or devices, sum it over them too.
    Raises: as `blockwise_attention`.
    Memory: O(B T N (H + V)) plus one tile of logits.
    """
    op = "blockwise_attention_backward"
    options = _options(op, q, k, v, mask, tokens, schedule, scale, logits_soft_cap, block_sizes, deterministic)
    dropout, bias = _checked_dropout(op, dropout, q), check_bias(op, bias, q.shape[2])
    if bias_gradient and bias is None:
        raise ValueError(f"{op}: got bias_gradient=True and no bias, wanted one; pass the bias, or leave it out")
    options = dataclasses.replace(options, bias_gradient=bias_gradient)
    if out is None and dlse is None:
        raise ValueError(f"{op}: got neither out nor dlse, wanted one of them; pass out, or dlse - rowsum(dout out)")
    check_results(op, (*q.shape[:3], v.shape[3]), out={"out": out, "dout": dout}, lse={"lse": lse, "dlse": dlse})
    running = (None,) * 3 if accumulate is None else accumulate
    if (running[1] is None) != (running[2] is None):
        raise ValueError(f"{op}: accumulate has one of dk and dv, wanted both or neither; pass zeros for the other")
    given = {name: (x, like.shape) for name, x, like in zip(("dq", "dk", "dv"), running, (q, k, v), strict=True)}
    given = {name: pair for name, pair in given.items() if pair[0] is not None}
    _check_float32(op, "accumulate's {}", *({name: pair[i] for name, pair in given.items()} for i in range(2)))
    return dispatch.run(
        op,
        BACKWARD,
        implementation,
        q,
        k,
        v,
        out,
        lse,
        dout,
        dlse,
        tokens=tokens,
        schedule=schedule,
        accumulate=running,
        options=options,
        dropout=dropout,
        bias=bias,
    )


def sinks_gradient(
    sinks: Float[Array, " N"],
    out: Float[Array, "B T N V"],
    lse: Float32[Array, "B N T"],
    dout: Float[Array, "B T N V"],
    dlse: Float32[Array, "B N T"] | None,
) -> Float32[Array, " N"]:
    """The gradient of sinks, given the results over all keys: what `blockwise_attention_backward` leaves to be done.

    dsinks[n] = sum_{b, t} exp(sinks[n] - lse) (dlse - rowsum(dout out))

    Args:
      sinks: As `blockwise_attention`.
      out, lse: The attention's results over all keys and the sinks.
      dout, dlse: Their cotangents; dlse None is zero.
    Returns: dsinks, summed over the rows and queries at hand: where those are split over devices, sum it over them too.
    Raises: ValueError where shapes or dtypes do not fit.
    Cost: O(B T N V) elementwise.
    """
    op = "sinks_gradient"
    if out.ndim != 4:
        raise ValueError(f"{op}: out has shape {out.shape}, wanted [batch, length, heads, head dim]")
    check_results(op, out.shape, out={"out": out, "dout": dout}, lse={"lse": lse, "dlse": dlse})
    if sinks.shape != out.shape[2:3] or not jnp.issubdtype(sinks.dtype, jnp.floating):
        raise ValueError(f"{op}: sinks is {sinks.dtype}{list(sinks.shape)}, wanted floats [{out.shape[2]}], one a head")
    delta = jnp.einsum("btnv,btnv->bnt", out.astype(jnp.float32), dout.astype(jnp.float32))
    weight = -delta if dlse is None else dlse - delta
    sinks = sinks.astype(jnp.float32)[:, None]
    # Without a sink a row may be empty, and -inf - -inf is nan.
    p = jnp.where(sinks == -jnp.inf, 0.0, jnp.exp(sinks - jnp.where(sinks == -jnp.inf, 0.0, lse)))
    return jnp.sum(p * weight, axis=(0, 2))


def ring_kernels(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    *,
    mask: Mask,
    schedule: Schedule,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    bias: Bias | None = None,
    dropout: Dropout | None = None,
    block_sizes: BlockSizes | None = None,
    implementation: Implementation | None = None,
    deterministic: bool = True,
) -> RingKernels:
    """The hops of a ring by kernels that send keys, and gradients, from device to device themselves; inside shard_map.

    Args:
      q, k, v: Of this device.
      schedule: Of any hop.
      implementation: `mosaic_tpu`, which alone has such kernels, or None for it.
      Others: as `blockwise_attention`.
    Raises: ValueError where the call is wrong; NotImplementedError where the kernels do not serve it.
    """
    op = "ring_kernels"
    options = _options(op, q, k, v, mask, None, schedule, scale, logits_soft_cap, block_sizes, deterministic)
    if implementation not in (None, "mosaic_tpu"):
        raise NotImplementedError(
            f"{op}: kernels of {implementation!r} do not send, those of 'mosaic_tpu' do; pass that or None"
        )
    dropout, bias = _checked_dropout(op, dropout, q), check_bias(op, bias, q.shape[2])
    return RingKernels(q, k, v, options=options, block_sizes=schedule.block_sizes, dropout=dropout, bias=bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attention(options: Options, implementation, return_lse: bool, q, k, v, tokens, schedule, sinks, dropout, bias):
    return _forward(options, implementation, return_lse, q, k, v, tokens, schedule, sinks, dropout, bias)[0]


def _forward(options: Options, implementation, return_lse, q, k, v, tokens, schedule, sinks, dropout, bias):
    """What is returned, and what the backward pass needs."""
    context = {"tokens": tokens, "schedule": schedule, "dropout": dropout, "bias": bias}
    result = dispatch.run(
        "blockwise_attention_forward", FORWARD, implementation, q, k, v, carry=_starting_from(sinks, q),
        return_carry=False, options=options, **context,
    )  # fmt: skip
    (out, lse), *maxima = (result,) if options.block_maxima is None else result
    out, lse = as_attention((out, lse))
    returned = out, *((lse,) if return_lse else ()), *maxima
    return returned if len(returned) > 1 else out, ((q, k, v, out, lse), context)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Residuals:
    """What the backward pass takes from the forward pass, and whether anything asks for the gradient of the bias."""

    arrays: tuple
    context: dict[str, Any]
    sinks: Any
    bias_gradient: bool = dataclasses.field(metadata={"static": True})


def _attention_fwd(options, implementation, return_lse, *arguments):
    if options.skip_softmax_threshold:
        raise NotImplementedError(
            f"blockwise_attention: skip_softmax_threshold={options.skip_softmax_threshold} is differentiated: "
            "the backward pass does not know which tiles were left out; pass 0 where you train"
        )
    q, k, v, tokens, schedule, sinks, dropout, bias = values_of(arguments)
    results, (arrays, context) = _forward(
        options, implementation, return_lse, q, k, v, tokens, schedule, sinks, dropout, bias
    )  # fmt: skip
    saved = _Residuals(arrays=arrays, context=context, sinks=sinks, bias_gradient=is_perturbed(arguments[-1]))
    return results, saved


def _attention_bwd(options, implementation, return_lse, saved: _Residuals, cotangents):
    q, k, v, out, lse = saved.arrays
    # An lse that nothing depends on has no cotangent: None says so to implementations that could not take one.
    cotangents = cotangents if return_lse or options.block_maxima is not None else (cotangents,)
    dout, dlse = cotangents[0], cotangents[1] if return_lse else None
    dout = jnp.zeros_like(out) if isinstance(dout, SymbolicZero) else dout
    dlse = None if isinstance(dlse, SymbolicZero) else dlse
    dq, dk, dv, *dbias = dispatch.run(
        "blockwise_attention_backward", BACKWARD, implementation, *saved.arrays, dout, dlse,
        accumulate=(None, None, None),
        options=dataclasses.replace(options, block_maxima=None, bias_gradient=saved.bias_gradient),
        **saved.context,
    )  # fmt: skip
    sinks, bias = saved.sinks, saved.context["bias"]
    dsinks = None if sinks is None else sinks_gradient(sinks, out, lse, dout, dlse).astype(sinks.dtype)
    return dq, dk, dv, None, None, dsinks, None, like_parameters(dbias[0], bias) if dbias else None


_attention.defvjp(_attention_fwd, _attention_bwd, symbolic_zeros=True)


def _starting_from(sinks, q) -> SoftmaxCarry | None:
    """The carry that sinks are. So an implementation that takes a carry serves sinks, and knows nothing of them."""
    if sinks is None:
        return None
    return SoftmaxCarry.of_sinks(sinks, batch_size=q.shape[0], q_len=q.shape[1])


def check_call(
    op: str,
    q,
    k,
    v,
    *,
    mask,
    tokens=None,
    sinks=None,
    bias=None,
    dropout=None,
    scale=None,
    logits_soft_cap=None,
    block_sizes=None,
) -> tuple[Dropout | None, Bias | None]:
    """Raises what `blockwise_attention` raises of a wrong call: for those who cut its arrays up first.

    Returns: the dropout, None where it drops nothing, and the bias.
    """
    _options(op, q, k, v, mask, tokens, None, scale, logits_soft_cap, block_sizes)
    _check_sinks(op, sinks, q)
    return _checked_dropout(op, dropout, q), check_bias(op, bias, q.shape[2])


def _check_sinks(op: str, sinks, q) -> None:
    if sinks is None:
        return
    sinks, num_heads = jnp.asarray(sinks), q.shape[2]
    if sinks.shape != (num_heads,) or not jnp.issubdtype(sinks.dtype, jnp.floating):
        raise ValueError(
            f"{op}: sinks is {sinks.dtype}{list(sinks.shape)}, wanted floats of shape [{num_heads}], one for each "
            "query head"
        )


def _checked_dropout(op: str, dropout: Any, q) -> Dropout | None:
    """The dropout, or None where it drops nothing."""
    if dropout is None:
        return None
    if not isinstance(dropout, Dropout):
        raise ValueError(f"{op}: dropout={dropout!r}, wanted None or a Dropout, such as Dropout.of_key(rate, key, ...)")
    seeds, (batch_size, _, num_heads, _) = dropout.seeds, q.shape
    if seeds.shape not in ((batch_size, num_heads), (1, num_heads)) or seeds.dtype != jnp.uint32:
        raise ValueError(
            f"{op}: dropout.seeds is {seeds.dtype}{list(seeds.shape)}, wanted uint32 [{batch_size} or 1, {num_heads}], "
            "one for each row and query head; make them with Dropout.of_key"
        )
    return dropout if dropout.rate > 0 else None


def _options(
    op, q, k, v, mask, tokens, schedule, scale, logits_soft_cap, block_sizes, deterministic: bool = True
) -> Options:
    """Validates a call, and gathers what is static of it."""

    def wrong(message: str) -> NoReturn:
        raise ValueError(f"{op}: {message}")

    check_qkv(op, q, k, v)
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0]:
        wrong(f"q, k, v have shapes {q.shape}, {k.shape}, {v.shape}; wanted one B, and k and v of one S and K")
    if q.shape[3] != k.shape[3]:
        wrong(f"head dim of q is {q.shape[3]} and of k {k.shape[3]}, wanted the same")
    if q.shape[2] % k.shape[2]:
        wrong(f"{q.shape[2]} query heads over {k.shape[2]} kv heads, wanted a multiple")
    if not isinstance(mask, Mask):
        wrong(f"mask={mask!r}, wanted a Mask, such as longctx.masks.causal()")
    mask.by_head(q.shape[2])
    for name, value, kind in (
        ("tokens", tokens, Tokens), ("schedule", schedule, Schedule), ("block_sizes", block_sizes, BlockSizes)
    ):  # fmt: skip
        check_kind(op, name, value, kind)
    if logits_soft_cap is not None and not 0 < logits_soft_cap < math.inf:
        wrong(f"logits_soft_cap={logits_soft_cap}, wanted None or a finite number > 0")
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    if not math.isfinite(scale):
        wrong(f"scale={scale}, wanted a finite number")
    q_len, kv_len = q.shape[1], k.shape[1]
    if tokens is not None:
        validate_tokens(op, tokens, q.shape[0], q_len, kv_len)
    if schedule is not None:
        if schedule.mask != mask:
            wrong(f"the schedule was built from {schedule.mask}, the call's mask is {mask}; build it from this mask")
        if (schedule.q_len, schedule.kv_len) != (q_len, kv_len):
            wrong(
                f"the schedule was built for T={schedule.q_len}, S={schedule.kv_len}, the call has T={q_len}, "
                f"S={kv_len}; build it for these lengths"
            )
        if q.shape[2] % schedule.num_lists:
            wrong(
                f"the schedule has blocks of {schedule.num_lists} groups of heads, the call {q.shape[2]} query heads, "
                "wanted a multiple"
            )
        rows = schedule.kv_blocks.start.shape[0]
        if rows not in (1, q.shape[0]):
            wrong(f"the schedule was built for B={rows}, the call has B={q.shape[0]}; build it for this batch")
        if block_sizes is not None and schedule.block_sizes != block_sizes.fit(q_len, kv_len):
            wrong(f"block_sizes={block_sizes}, the schedule has {schedule.block_sizes}; pass one of the two")
    return Options(
        mask=mask,
        scale=scale,
        logits_soft_cap=None if logits_soft_cap is None else float(logits_soft_cap),
        block_sizes=block_sizes,
        deterministic=deterministic,
    )


def _with_forward_options(op: str, options: Options, skip_softmax_threshold, block_maxima) -> Options:
    """With what the forward pass alone has."""
    if not 0 <= skip_softmax_threshold < 1:
        raise ValueError(
            f"{op}: skip_softmax_threshold={skip_softmax_threshold}, wanted a share of the greatest probability in "
            "[0, 1), such as 1e-3; 0 leaves out nothing"
        )
    if not (block_maxima is None or isinstance(block_maxima, BlockSizes)):
        raise ValueError(
            f"{op}: block_maxima={block_maxima!r}, wanted None or tokens of a block, such as "
            "BlockSizes(block_q=128, block_kv=128)"
        )
    return dataclasses.replace(options, skip_softmax_threshold=float(skip_softmax_threshold), block_maxima=block_maxima)


def _check_float32(op: str, name_format: str, arrays: Mapping, expected: Mapping) -> None:
    for name, shape in expected.items():
        array = arrays[name]
        if array.shape != shape or array.dtype != jnp.float32:
            raise ValueError(
                f"{op}: {name_format.format(name)} is {array.dtype}{list(array.shape)}, wanted float32{list(shape)}"
            )
