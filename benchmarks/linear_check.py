"""Whether an implementation computes linear attention at all: out and every gradient, in full, against float32.

The truth is a computation by chunks of its own, of decays of each dim and delta rules token by token, in float32 at the
highest matmul precision, and its derivative by JAX. It shares no code with the family. A query head and a row are
computed and compared at a time, so that nothing in float32 is as large as the results, and only sums of errors are
left: of a row of a million tokens too.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.cases import Pass
from benchmarks.linear_cases import LinearCase
from pallas_kernels.testing import TOLERANCE

CHUNK = 256
_GRADIENTS = ("dq", "dk", "dv", "ddecay", "dbeta")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearCheck:
    """What judges the results of one pass of a case: (out,) or (out, dq, dk, dv), and the gradients of gates."""

    case: LinearCase
    which: Pass
    dtype: str

    @property
    def shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Of the results."""
        *operands, dout = self.case.shapes(self.dtype)
        gradients = (operands[i] for i in self.case.differentiated)
        return (dout,) if self.which == "forward" else (dout, *gradients)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the results."""
        return "out", *(_GRADIENTS[i] for i in self.case.differentiated)

    def lower(self) -> jax.stages.Lowered:
        """(inputs, results) -> for each result the sums of squares and the maxima of its error and of the truth."""
        return jax.jit(functools.partial(_statistics, self.case)).lower(self.case.shapes(self.dtype), self.shapes)

    def problem(self, program: jax.stages.Compiled, inputs: tuple, results: tuple[jax.Array, ...]) -> str | None:
        """What is wrong with the results, by the program that `lower` gave, or None."""
        for name, got, want in zip(self.names, results, self.shapes, strict=False):
            if (got.shape, got.dtype) != (want.shape, want.dtype):
                return f"{name} is {got.dtype}{list(got.shape)}, wanted {want.dtype}{list(want.shape)}"
        rms_tolerance, max_tolerance = TOLERANCE[self.dtype]
        for name, (squares, greatest) in zip(self.names, program(inputs, results), strict=False):
            rms, most = np.sqrt(squares[0] / squares[1]), greatest[0] / greatest[1]
            if not (rms <= rms_tolerance and most <= max_tolerance):  # also where either is nan
                return (
                    f"max error {most:.2g} of {name}'s greatest, wanted <= {max_tolerance:g}; rms error {rms:.2g}, "
                    f"wanted <= {rms_tolerance:g}"
                )
        return None


def _statistics(case: LinearCase, inputs: tuple, results: tuple[jax.Array, ...]) -> tuple:
    """For each result `(squares, greatest)`, each of the error and of the truth."""
    group = case.num_heads // case.num_qk_heads
    lengths = case.documents or (case.length,)
    document = jnp.asarray(np.repeat(np.arange(len(lengths)), lengths), jnp.int32)

    def of_qk_head(number):
        row, head = number // case.num_qk_heads, number % case.num_qk_heads

        def slice_of(x):
            """Of [B, T, K or N, D] or [B, T, N], what belongs to the query head, in float32."""
            if x is None:
                return jnp.zeros((case.length, group))
            if x.ndim == 1:
                decay = jax.lax.dynamic_slice(x, (head * group,), (group,))
                return jnp.broadcast_to(decay, (case.length, group))
            heads = x.shape[2] // case.num_qk_heads
            zeros = (0,) * (x.ndim - 3)
            part = jax.lax.dynamic_slice(x, (row, 0, head * heads, *zeros), (1, case.length, heads, *x.shape[3:]))
            return part[0].astype(jnp.float32)

        *operands, dout = map(slice_of, inputs)
        formula = _recurrence if _is_token_by_token(case) else _formula
        truth = functools.partial(formula, document=document, scale=case.key_dim**-0.5)
        if len(results) == 1:
            want = (truth(*operands),)
        else:
            given = {i: operands[i] for i in case.differentiated}
            out, vjp = jax.vjp(lambda given: truth(*(given.get(i, x) for i, x in enumerate(operands))), given)
            want = (out, *vjp(dout)[0].values())
        return tuple(_sums(slice_of(got), x) for got, x in zip(results, want, strict=True))

    # Steps of a token are too small for one head at a time.
    at_once = 16 if _is_token_by_token(case) else None
    by_head = jax.lax.map(of_qk_head, jnp.arange(case.batch_size * case.num_qk_heads), batch_size=at_once)
    return tuple((jnp.sum(squares, axis=0), jnp.max(greatest, axis=0)) for squares, greatest in by_head)


def _sums(got, want) -> tuple[jax.Array, jax.Array]:
    error = got - want
    squares = jnp.stack([jnp.sum(error**2), jnp.sum(want**2)])
    return squares, jnp.stack([jnp.max(jnp.abs(error)), jnp.max(jnp.abs(want))])


def _is_token_by_token(case: LinearCase) -> bool:
    return case.delta or case.kind == "vector"


def _recurrence(q, k, v, decay, beta=None, *, document, scale: float, chunk: int = CHUNK) -> jax.Array:
    """As `_formula`, a token at a time: decay `[T, G]` or `[T, G, H]`, and beta `[T, G]` of a delta rule."""
    length, padding = len(q), -len(q) % chunk
    einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    decay = decay if decay.ndim == 3 else decay[..., None]
    continues = jnp.concatenate([jnp.zeros(1), (document[1:] == document[:-1]).astype(jnp.float32)])

    def step(state, token):
        q, k, v, decay, beta, continues = token
        state = continues * jnp.exp(decay)[..., None] * state
        if beta is not None:
            v = beta[:, None] * (v - einsum("h,ghv->gv", k[0], state))
        state = state + k[0][:, None] * v[:, None]
        return state, scale * einsum("h,ghv->gv", q[0], state)

    def chunked(x):
        x = jnp.pad(x, ((0, padding), *((0, 0),) * (x.ndim - 1)))
        return x.reshape(-1, chunk, *x.shape[1:])

    # A state a chunk is kept for the way back, and those inside are made again.
    inner = jax.checkpoint(lambda state, tokens: jax.lax.scan(step, state, tokens))
    first = jnp.zeros((v.shape[1], q.shape[2], v.shape[2]))
    _, out = jax.lax.scan(inner, first, jax.tree.map(chunked, (q, k, v, decay, beta, continues)))
    return out.reshape(-1, *v.shape[1:])[:length]


def _formula(q, k, v, decay, *, document, scale: float, chunk: int = CHUNK) -> jax.Array:
    """Linear attention of one query head, G heads of values, in float32.

    Args:
      q, k: `[T, 1, H]`.
      v: `[T, G, V]`.
      decay: Log decay, `[T, G]`.
      document: Of each token, from 0 on and ascending, int32 `[T]`.
    Returns: `[T, G, V]`.
    """
    length, padding = len(q), -len(q) % chunk
    einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)

    def chunked(x, mode="constant"):
        x = jnp.pad(x, ((0, padding), *((0, 0),) * (x.ndim - 1)), mode=mode)
        return x.reshape(-1, chunk, *x.shape[1:])

    # Chunks x, tokens t that read and s that were written, heads g.
    q, k, v, decay = chunked(q[:, 0]), chunked(k[:, 0]), chunked(v), chunked(decay)
    document = chunked(document, "edge")
    entering = jnp.concatenate([document[:1, 0], document[:-1, -1]])[:, None]
    since = jnp.cumsum(decay, axis=1)  # log decay from the chunk's start
    left = since[:, -1:] - since

    sees = (document[:, :, None] == document[:, None, :]) & jnp.tri(chunk, dtype=bool)
    apart = jnp.where(sees[..., None], since[:, :, None] - since[:, None], 0.0)
    weights = jnp.where(sees[..., None], jnp.exp(apart), 0.0) * einsum("xth,xsh->xts", q, k)[..., None]
    within = einsum("xtsg,xsgv->xtgv", weights, v)

    written = jnp.where((document == document[:, -1:])[..., None], jnp.exp(left), 0.0)
    written = einsum("xsh,xsg,xsgv->xghv", k, written, v)
    kept = jnp.where(document[:, -1:] == entering, jnp.exp(since[:, -1]), 0.0)

    def step(state, of_chunk):
        kept, written = of_chunk
        return kept[:, None, None] * state + written, state

    _, before = jax.lax.scan(step, jnp.zeros_like(written[0]), (kept, written))
    read = jnp.where((document == entering)[..., None], jnp.exp(since), 0.0)
    carried = einsum("xth,xghv->xtgv", q, before) * read[..., None]
    return (scale * (within + carried)).reshape(-1, *v.shape[2:])[:length]
