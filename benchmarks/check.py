"""Whether an implementation computes attention at all: against the float32 formula, on a sample of query rows.

The cotangent of `out` is zero outside the sampled rows, so that dk and dv are sums over them alone and every gradient
is checked in full, in memory linear in the length.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.cases import AttentionCase
from pallas_kernels import Bias, Dropout, Mask, Tokens
from pallas_kernels.dropout import key_words
from pallas_kernels.testing import TOLERANCE

NUM_ROWS = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """What the sampled rows of a case must give.

    Attributes:
      rows: Sampled positions, `[R]`.
      dout: The cotangent to call with, zero outside them.
      want: float32 out `[B, R, N, V]`, dq `[B, R, N, H]`, dk `[B, S, K, H]` and dv `[B, S, K, V]`.
    """

    rows: jax.Array
    dout: jax.Array
    want: tuple[jax.Array, ...]

    @classmethod
    def of(cls, case: AttentionCase, q, k, v, dout, *, num_rows: int = NUM_ROWS, seed: int = 0) -> "Check":
        """The first row, the last and others drawn at random; with dropout the second in place of the first.

        The first has one key, and its dq is zero: with dropout what out's rounding to 16 bits leaves of that, 0.026 of
        the greatest dq of the other rows at head dim 64, for anyone who takes delta from out.

        Memory: one `[N / K, R, S]` array of logits and the few that its gradient takes; a bool `[N, R, S]` where the
        mask differs between heads, a float32 `[N, R, S]` where there is a bias, and a `[B, N, R, S]` where there is
        dropout.
        """
        drawn = np.random.default_rng(seed).choice(case.length, min(num_rows, case.length), replace=False)
        options = {**case.constants, **case.learned}
        first = 1 if "dropout" in options else 0
        rows = np.unique([first, case.length - 1, *drawn])
        rows = jnp.asarray(rows[rows >= first], jnp.int32)
        allowed = _allowed(case.mask, rows, case.tokens or Tokens(), k.shape[1], q.shape[2])
        bias = _bias(options.get("bias"), rows, case.tokens or Tokens(), k.shape[1])
        multipliers = _multipliers(options.get("dropout"), rows, case.tokens or Tokens(), k.shape[1])
        others = options.get("logits_soft_cap"), options.get("sinks"), multipliers
        want = _formula(allowed, bias, *others, q[:, rows], k, v, dout[:, rows])
        sampled = jnp.zeros((1, case.length, 1, 1), dout.dtype).at[:, rows].set(1)
        return cls(rows=rows, dout=dout * sampled, want=want)

    def problem(self, results: tuple[jax.Array, ...]) -> str | None:
        """What is wrong with (out,) or (out, dq, dk, dv) of an implementation, or None."""
        dtype = results[0].dtype.name
        for name, got, want in zip(("out", "dq", "dk", "dv"), results, self.want, strict=False):
            if name in ("out", "dq"):
                got = got[:, self.rows]
            if got.shape != want.shape:
                return f"{name} has shape {got.shape}, wanted {want.shape}"
            rms, greatest = (float(x) for x in _errors(got, want))
            rms_tolerance, max_tolerance = TOLERANCE[dtype]
            if not (rms <= rms_tolerance and greatest <= max_tolerance):  # also where either is nan
                return (
                    f"max error {greatest:.2g} of {name}'s greatest, wanted <= {max_tolerance:g}; rms error {rms:.2g}, "
                    f"wanted <= {rms_tolerance:g}"
                )
        return None


@jax.jit
def _errors(got, want) -> tuple[jax.Array, jax.Array]:
    """The error's root mean square and maximum, over those of `want`."""
    error = got.astype(jnp.float32) - want
    rms = jnp.sqrt(jnp.mean(error**2) / jnp.mean(want**2))
    return rms, jnp.max(jnp.abs(error)) / jnp.max(jnp.abs(want))


def _allowed(mask: Mask, rows, tokens: Tokens, length: int, num_heads: int) -> jax.Array:
    """Which keys the rows may attend to, `[N or 1, R, S]`.

    Operation by operation: as one program, XLA for GPUs (of JAX 0.11.2) answers wrongly for neighborhoods on a grid.
    """
    query_axis, key_axis = tokens.queries(length), tokens.keys(length)
    return mask.allowed_by_head(
        num_heads,
        query_axis.positions[0, rows][:, None],
        key_axis.positions[0][None],
        query_axis.segment_ids[0, rows][:, None],
        key_axis.segment_ids[0][None],
    )


def _bias(bias: Bias | None, rows, tokens: Tokens, length: int) -> jax.Array | None:
    """Of the rows and all keys, `[N, R, S]`."""
    if bias is None:
        return None
    q_positions, kv_positions = tokens.queries(length).positions[:, rows], tokens.keys(length).positions
    return bias.of_heads(q_positions[:, :, None], kv_positions[:, None, :])[0]


def _multipliers(dropout: Dropout | None, rows, tokens: Tokens, length: int) -> jax.Array | None:
    """Of the probabilities of the rows and all keys, `[B, N, R, S]`."""
    if dropout is None:
        return None
    words = dropout.query_words(tokens.queries(length))[:, :, rows, None]
    return dropout.multipliers(words, key_words(tokens.keys(length))[:, None, None, :])


@functools.partial(jax.jit, static_argnums=2)
def _formula(allowed, bias, soft_cap: float | None, sinks, multipliers, q, k, v, dout) -> tuple[jax.Array, ...]:
    """softmax(q k^T / sqrt(H) + bias) v over the keys that rows may attend to, and JAX's derivative of it, float32.

    The logits before the bias are capped, a sink takes part in the softmax, and probabilities are multiplied, if given.
    """
    B, R, N, H = q.shape
    K = k.shape[2]
    einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)

    # Of each kv head and its query heads, or of all alike.
    allowed_KGRS = allowed.reshape(*((K, N // K) if len(allowed) > 1 else (1, 1)), R, -1)

    bias_KGRS = jnp.zeros((1, 1, 1, 1)) if bias is None else bias.reshape(K, N // K, R, -1)

    sinks_KG = jnp.full((K, N // K), -jnp.inf) if sinks is None else sinks.reshape(K, N // K)

    def one_kv_head(allowed_GRS, bias_GRS, sinks_G, multipliers_GRS, q_RGH, k_SH, v_SH):
        logits = H**-0.5 * einsum("RGH,SH->GRS", q_RGH, k_SH)
        if soft_cap is not None:
            logits = soft_cap * jnp.tanh(logits / soft_cap)
        logits = jnp.where(allowed_GRS, logits + bias_GRS, -jnp.inf)
        of_sinks = jnp.broadcast_to(sinks_G[:, None, None], (*logits.shape[:2], 1))
        probabilities = jax.nn.softmax(jnp.concatenate([logits, of_sinks], axis=-1), axis=-1)[..., :-1]
        return einsum("GRS,SH->RGH", probabilities * multipliers_GRS, v_SH)

    def one_head_and_gradients(operands):
        head, *arrays = operands
        *qkv, dout_RGH = (x.astype(jnp.float32) for x in arrays)
        of_head = (
            allowed_KGRS[head % len(allowed_KGRS)],
            bias_KGRS[head % len(bias_KGRS)],
            sinks_KG[head % K],
            1.0 if multipliers is None else multipliers.reshape(B * K, N // K, R, -1)[head],
        )
        out, vjp = jax.vjp(functools.partial(one_kv_head, *of_head), *qkv)
        return out, *vjp(dout_RGH)

    q_dout = tuple(x.reshape(B, R, K, N // K, -1).swapaxes(1, 2).reshape(B * K, R, N // K, -1) for x in (q, dout))
    kv = tuple(x.swapaxes(1, 2).reshape(B * K, *x.shape[1::2]) for x in (k, v))
    out, dq, dk, dv = jax.lax.map(one_head_and_gradients, (jnp.arange(B * K), q_dout[0], *kv, q_dout[1]))
    out, dq = (x.reshape(B, K, R, N // K, -1).swapaxes(1, 2).reshape(B, R, N, -1) for x in (out, dq))
    dk, dv = (x.reshape(B, K, *x.shape[1:]).swapaxes(1, 2) for x in (dk, dv))
    return out, dq, dk, dv
