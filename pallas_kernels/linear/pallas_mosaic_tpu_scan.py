"""Decays for each dim of the keys, and delta rules with none or one a head or token, on TPU: one kernel a pass, which
carries the state of a head from chunk to chunk.

Grid: (rows, heads, chunks), the last in order, in reverse for the gradients. The state stays in VMEM, transposed,
[V, H], so that the decay of each dim is a row that multiplies it. A chunk is one function of its inputs and of the
state before it (`_chunk`), of matmuls alone: the kernel of the gradients differentiates it, given the states before
all chunks, which a pass forward wrote, and the cotangent of the state behind it.

Decays of each dim stand inside the product of queries and keys: the levels of prepared.py split each between two tokens
at a point in between, into two factors of at most 1. The unit triangular system of a delta rule is inverted by halves:
where those of both halves are known, that of the whole is two products more, with nothing that grows on the way.

Reference: Yang et al. 2024, Gated Linear Attention, arXiv:2312.06635, section 4.3; Yang et al. 2024, Parallelizing
Linear Transformers with the Delta Rule over Sequence Length, arXiv:2406.06484, section 3.2.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.linear.chunks import Chunks, chunks_of, sum_groups
from pallas_kernels.linear.options import Options
from pallas_kernels.linear.prepared import without_starts
from pallas_kernels.linear.state import Passed
from pallas_kernels.linear.xla_chunks import multiply

CHUNK = 128
_HALVES = tuple(2**i for i in range(7))
"""Tokens of half a block, for blocks of 2 tokens up to a chunk."""

_VMEM_BYTES = 32 * 2**20
"""Of the 64 MiB and more of a core: float32 gradients of head dims of 256 take more than the default of 16."""

# The rows of numbers of a chunk, [8, CHUNK]: what is one float a token. Those of documents are factors of 0 and 1.
_LOG, _BETA, _DOCUMENT, _READS, _WRITES, _KEEPS = range(6)
_NUM_ROWS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Rule:
    """What is static of a chunk.

    Attributes:
      decays_by_token: Whether `_LOG` holds the log decays; those of each dim are an array of their own.
      dtype: Of the inputs, and of what the matrix units are handed.
    """

    decays_by_token: bool
    beta: bool
    documents: bool
    scale: float
    dtype: str


def forward(q, k, v, *, decay, beta, initial_state, segment_ids, options: Options) -> Passed:
    """As `api.linear_attention_forward`, of a row that is one part."""
    arrays, rule = _arrays(q, k, v, decay, beta, segment_ids, options)
    out, end, _ = _run(arrays, rule, initial_state, v, snapshots=False)
    B, _, N, V = v.shape
    first = jnp.zeros((B, N, q.shape[3], V), jnp.float32) if initial_state is None else initial_state
    return Passed(out, end, first[:, None])


def backward(q, k, v, dout, dstate, *, decay, beta, initial_state, segment_ids, options: Options) -> tuple:
    """As `api.linear_attention_backward`."""
    B, T, N, V = v.shape
    arrays, rule = _arrays(q, k, v, decay, beta, segment_ids, options)
    *_, states = _run(arrays, rule, initial_state, v, snapshots=True)
    shape = B, N, V, q.shape[3]
    arrays |= {
        "dout": _by_heads(dout.astype(v.dtype)),
        "states": states,
        "dstate": jnp.zeros(shape, jnp.float32) if dstate is None else dstate.mT,
    }
    results = _call(_gradients, arrays, _shapes_of_gradients(arrays, N), rule, reverse=True)

    def by_tokens(x):
        return jnp.moveaxis(x, 1, 2)[:, :T]

    def of_tokens(row):
        return by_tokens(results["drows"][..., row, :].reshape(B, N, -1))

    dq, dk = (sum_groups(by_tokens(results[name]), q.shape[2]) for name in ("dq", "dk"))
    ddecay = None
    if decay is not None and options.decay_gradient:
        ddecay = by_tokens(results["dlog"]) if decay.ndim == 4 else of_tokens(_LOG)
        ddecay = without_starts(ddecay, segment_ids, initial_state is not None)
        ddecay = jnp.sum(ddecay, axis=(0, 1)) if decay.ndim == 1 else ddecay
    return dq, dk, by_tokens(results["dv"]), ddecay, None if beta is None else of_tokens(_BETA), results["dbefore"].mT


def _run(arrays: dict, rule: _Rule, initial_state, v, *, snapshots: bool) -> tuple:
    """out, the state after the row, and the states before its chunks, transposed."""
    (B, T, N, V), H = v.shape, arrays["k"].shape[3]
    arrays = dict(arrays)
    arrays["before"] = jnp.zeros((B, N, V, H), jnp.float32) if initial_state is None else initial_state.mT
    shapes = {"end": jax.ShapeDtypeStruct((B, N, V, H), jnp.float32)}
    if snapshots:
        num_chunks = arrays["rows"].shape[2]
        shapes["states"] = jax.ShapeDtypeStruct((B, N, num_chunks, V, H), jnp.float32)
    else:
        shapes["out"] = jax.ShapeDtypeStruct(arrays["v"].shape, v.dtype)
    results = _call(_forward, arrays, shapes, rule, reverse=False)
    out = None if snapshots else jnp.moveaxis(results["out"], 1, 2)[:, :T]
    return out, results["end"].mT, results.get("states")


def _arrays(q, k, v, decay, beta, segment_ids, options: Options) -> tuple[dict[str, jax.Array], _Rule]:
    """What both kernels read, of whole chunks and heads before tokens."""
    B, T, N, _ = v.shape
    of_tokens = None if decay is None or decay.ndim == 4 else jnp.broadcast_to(decay.astype(jnp.float32), (B, T, N))
    chunks = chunks_of(None, segment_ids, batch_size=B, length=T, num_heads=N, chunk=CHUNK)
    arrays = {name: _by_heads(x) for name, x in (("q", q), ("k", k), ("v", v))}
    if decay is not None and decay.ndim == 4:
        arrays["log"] = _by_heads(decay.astype(jnp.float32))
    arrays["rows"] = _rows(of_tokens, beta, chunks)
    rule = _Rule(
        decays_by_token=of_tokens is not None,
        beta=beta is not None,
        documents=chunks.document is not None,
        scale=options.scale,
        dtype=v.dtype.name,
    )
    return arrays, rule


def _by_heads(x: jax.Array) -> jax.Array:
    """`[B, T, K, H]` to `[B, K, T', H]`, padded with zeros to whole chunks."""
    return jnp.moveaxis(jnp.pad(x, ((0, 0), (0, -x.shape[1] % CHUNK), (0, 0), (0, 0))), 2, 1)


def _rows(decay, beta, chunks: Chunks) -> jax.Array:
    """float32 `[B, N, n, 8, CHUNK]`."""
    B, N, num = chunks.keeps.shape

    def of_tokens(x):
        """Of `[B, T, N]`."""
        x = jnp.moveaxis(x.astype(jnp.float32), 2, 1)
        return jnp.pad(x, ((0, 0), (0, 0), (0, num * CHUNK - x.shape[2])))

    rows = {_READS: chunks.reads, _WRITES: chunks.writes, _KEEPS: jnp.repeat(chunks.keeps, CHUNK, axis=2)}
    rows |= {i: of_tokens(x) for i, x in ((_LOG, decay), (_BETA, beta)) if x is not None}
    if chunks.document is not None:
        # Counted from the chunk's first, which float32 holds exactly however many there are.
        document = chunks.document.reshape(B, 1, num, CHUNK)
        run = chunks.run.reshape(document.shape)
        document = jnp.where(document < 0, -1, document - run[..., :1])
        rows[_DOCUMENT] = jnp.broadcast_to(document, (B, N, num, CHUNK))
    zeros = jnp.zeros((B, N, num * CHUNK), jnp.float32)
    stacked = [rows.get(i, zeros).astype(jnp.float32).reshape(B, N, num, CHUNK) for i in range(_NUM_ROWS)]
    return jnp.stack(stacked, axis=3)


def _shapes_of_gradients(arrays: dict, num_heads: int) -> dict:
    B, _, T, H = arrays["k"].shape
    dtype, V = arrays["v"].dtype, arrays["v"].shape[3]
    of_keys = jax.ShapeDtypeStruct((B, num_heads, T, H), dtype)
    shapes = {"dq": of_keys, "dk": of_keys, "dv": jax.ShapeDtypeStruct(arrays["v"].shape, dtype)}
    if "log" in arrays:
        shapes["dlog"] = jax.ShapeDtypeStruct((B, num_heads, T, H), jnp.float32)
    shapes["drows"] = jax.ShapeDtypeStruct(arrays["rows"].shape, jnp.float32)
    shapes["dbefore"] = jax.ShapeDtypeStruct((B, num_heads, V, H), jnp.float32)
    return shapes


def _call(kernel, arrays: dict, shapes: dict, rule: _Rule, *, reverse: bool) -> dict:
    """Runs a kernel over all chunks of all rows and heads."""
    B, N, num_chunks = arrays["rows"].shape[:3]

    def spec(name, x):
        at = (lambda i: num_chunks - 1 - i) if reverse else (lambda i: i)
        if name in ("before", "end", "dstate", "dbefore"):
            return pl.BlockSpec((1, 1, *x.shape[2:]), lambda b, n, i: (b, n, 0, 0))
        if x.ndim == 5:  # something of each chunk
            return pl.BlockSpec((1, 1, 1, *x.shape[3:]), lambda b, n, i: (b, n, at(i), 0, 0))
        shared = N // x.shape[1]
        return pl.BlockSpec((1, 1, CHUNK, x.shape[3]), lambda b, n, i: (b, jax.lax.div(n, shared), at(i), 0))

    def specs(arrays):
        return {name: spec(name, x) for name, x in arrays.items()}

    H, V = arrays["k"].shape[3], arrays["v"].shape[3]
    matmuls = CHUNK * (2 * len(_HALVES) * (H + CHUNK) + 2 * V) + 3 * H * V
    return pl.pallas_call(
        functools.partial(kernel, rule=rule),
        grid=(B, N, num_chunks),
        in_specs=(specs(arrays),),
        out_specs=specs(shapes),
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=(6 if reverse else 2) * B * N * num_chunks * CHUNK * matmuls,
            transcendentals=B * N * num_chunks * CHUNK * H * len(_HALVES),
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arrays.values(), *shapes.values())),
        ),
        name=f"linear_attention_scan{'_gradients' if reverse else ''}",
    )(arrays)


def _forward(inputs, outputs, *, rule: _Rule) -> None:
    state = outputs["end"].at[0, 0]

    @pl.when(pl.program_id(2) == 0)
    def _():
        state[...] = inputs["before"][0, 0]

    if "states" in outputs:
        outputs["states"][0, 0, 0] = state[...]
    out, after = _chunk(state[...], _given(inputs), inputs["rows"][0, 0, 0], rule)
    state[...] = after
    if "out" in outputs:
        outputs["out"][0, 0] = out.astype(outputs["out"].dtype)


def _gradients(inputs, outputs, *, rule: _Rule) -> None:
    dstate = outputs["dbefore"].at[0, 0]

    @pl.when(pl.program_id(2) == 0)
    def _():
        dstate[...] = inputs["dstate"][0, 0]

    rows = inputs["rows"][0, 0, 0]
    _, vjp = jax.vjp(lambda state, given: _chunk(state, given, rows, rule), inputs["states"][0, 0, 0], _given(inputs))
    before, given = vjp((inputs["dout"][0, 0].astype(jnp.float32), dstate[...]))
    dstate[...] = before
    for name in ("q", "k", "v", "log"):
        if name in given:
            outputs[f"d{name}"][0, 0] = given[name].astype(outputs[f"d{name}"].dtype)
    outputs["drows"][0, 0, 0] = jnp.zeros((_NUM_ROWS, CHUNK), jnp.float32)
    for row, name in ((_LOG, "log_row"), (_BETA, "beta_row")):
        outputs["drows"][0, 0, 0, row : row + 1, :] = given[name]


def _given(inputs) -> dict[str, jax.Array]:
    """What a chunk is differentiated in, float32."""
    given = {name: inputs[name][0, 0].astype(jnp.float32) for name in ("q", "k", "v", "log") if name in inputs}
    rows = inputs["rows"]
    return given | {
        name: rows[0, 0, 0, row : row + 1, :] for row, name in ((_LOG, "log_row"), (_BETA, "beta_row"))
    }  # fmt: skip


def _chunk(state, given: dict, rows, rule: _Rule) -> tuple[jax.Array, jax.Array]:
    """out `[C, V]` and the state after the chunk, `[V, H]`.

    Args:
      state: Before it.
      rows: The chunk's rows of numbers, `[8, C]`.
    """
    q, k, v = (given[name] for name in "qkv")
    product = _product_of(rule.dtype)
    H, V = k.shape[1], v.shape[1]
    reader, writer = (jax.lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), i) for i in (0, 1))
    seen = writer <= reader
    decays = _Decays(given.get("log"), given["log_row"] if rule.decays_by_token else None, rule.dtype)
    from_start, to_end, whole = decays.from_start, decays.to_end, decays.whole
    if rule.documents:
        document = rows[_DOCUMENT : _DOCUMENT + 1]
        seen &= (_column(document, CHUNK) == document) & (document >= 0)
        from_start = from_start * _column(rows[_READS : _READS + 1], H)
        to_end = to_end * _column(rows[_WRITES : _WRITES + 1], H)
        whole = whole * rows[_KEEPS : _KEEPS + 1, :1]
    value = v
    if rule.beta:
        beta = given["beta_row"]
        value = _column(beta, V) * (v - product("ch,vh->cv", k * from_start, state))
        among = jnp.where(seen & (writer < reader), decays.between(k, k), 0.0)
        value = _solve(_column(beta, CHUNK) * among, value)
    weights = jnp.where(seen, decays.between(q, k), 0.0)
    out = product("ch,vh->cv", q * from_start, state) + product("cd,dv->cv", weights, value)
    written = product("cv,ch->vh", value, k * to_end)
    return rule.scale * out, whole * state + written


class _Decays:
    """Factors of the decays in a chunk, given their logs, `[C, H]` or `[1, C]`, or none.

    Attributes:
      from_start: From the chunk's start to each token, its own decay included, `[C, H or 1]`, or 1.
      to_end: From each token, its own decay left out, to the chunk's end.
      whole: From start to end, `[1, H or 1]`, or 1.
    """

    def __init__(self, log, row, dtype: str):
        self.log, self.row, self.product = log, row, _product_of(dtype)
        self.from_start = self.to_end = self.whole = 1.0
        reader, writer = (jax.lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), i) for i in (0, 1))
        self.reader, self.writer = reader, writer
        if log is not None:
            self.from_start = jnp.exp(_sums(writer <= reader, log))
            self.to_end = jnp.exp(_sums(writer > reader, log))
            self.whole = jnp.exp(jnp.sum(log, axis=0, keepdims=True))
            self.levels = [(half, jnp.exp(_sums(self._to_middle(half), log))) for half in _HALVES]
        elif row is not None:
            self.from_start = jnp.exp(jnp.sum(jnp.where(writer <= reader, row, 0.0), axis=1, keepdims=True))
            self.to_end = jnp.exp(jnp.sum(jnp.where(writer > reader, row, 0.0), axis=1, keepdims=True))
            self.whole = jnp.exp(jnp.sum(row, axis=1, keepdims=True))
            # What lies between is added up: a difference of sums would have their rounding.
            after = (reader > writer).astype(jnp.float32)
            self.apart = _product_of("float32")("is,sj->ij", jnp.where(writer <= reader, row, 0.0), after)

    def _to_middle(self, half: int) -> jax.Array:
        """Which tokens, of columns, lie between one and the middle of its block of two halves: in its own half, in the
        later one up to itself, in the earlier one behind it."""
        shift = half.bit_length() - 1
        token, other = self.reader, self.writer
        same, is_later = (token >> shift) == (other >> shift), (token >> shift) & 1
        return same & (((is_later == 1) & (other <= token)) | ((is_later == 0) & (other > token)))

    def between(self, x, y) -> jax.Array:
        """x[i]^T G[i, j] y[j] of all j <= i, `[C, C]`; for other j something finite."""
        if self.log is None:
            products = self.product("ch,dh->cd", x, y)
            return products if self.row is None else products * jnp.exp(self.apart)
        itself = jnp.sum(x * y, axis=1, keepdims=True)
        total = jnp.where(self.reader == self.writer, itself, 0.0)
        for half, factors in self.levels:
            pairs = _pairs(half, self.reader, self.writer)
            total += jnp.where(pairs, self.product("ch,dh->cd", x * factors, y * factors), 0.0)
        return total


def _pairs(half: int, reader, writer) -> jax.Array:
    """Whether one token is in the later half, and the other in the earlier half, of the same block."""
    shift = half.bit_length() - 1
    return ((reader >> shift) == (writer >> shift) + 1) & (((reader >> shift) & 1) == 1)


def _product_of(dtype: str):
    return lambda spec, x, y: multiply(spec, dtype, x, y)


def _sums(mask, log) -> jax.Array:
    """Of each row of `mask` the sum of the logs of its columns, by all bits of float32."""
    return multiply("is,sh->ih", "float32", mask.astype(jnp.float32), log)


def _column(row, width: int) -> jax.Array:
    """`[1, C]` as `[C, width]`."""
    return jnp.broadcast_to(row, (width, CHUNK)).T


@jax.custom_vjp
def _solve(system, values) -> jax.Array:
    """(1 + L)^-1 values, for a strictly lower triangular L, `[C, C]`."""
    return _solve_fwd(system, values)[0]


def _solve_fwd(system, values):
    reader, writer = (jax.lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), i) for i in (0, 1))
    product = functools.partial(_product_of("float32"), "ij,jk->ik")
    inverse = (reader == writer).astype(jnp.float32)
    for half in _HALVES:
        # [[A, 0], [B, D]]^-1 = [[A^-1, 0], [-D^-1 B A^-1, D^-1]], of all blocks at once.
        below = jnp.where(_pairs(half, reader, writer), system, 0.0)
        inverse -= product(product(inverse, below), inverse)
    solved = product(inverse, values)
    return solved, (inverse, solved)


def _solve_bwd(residuals, dsolved):
    inverse, solved = residuals
    dvalues = _product_of("float32")("ji,jk->ik", inverse, dsolved)
    return -_product_of("float32")("ik,jk->ij", dvalues, solved), dvalues


_solve.defvjp(_solve_fwd, _solve_bwd)
