"""Measures attention of a few new tokens to the keys of a cache, in bytes a second beside those of a copy."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.cases import Pass
from benchmarks.measure import Bandwidth
from benchmarks.peers import Candidate
from benchmarks.results import Row
from benchmarks.side_by_side import measure_side_by_side
from pallas_kernels import (
    PADDING_SEGMENT_ID,
    Mask,
    Tokens,
    blockwise_attention_forward,
    latent_attention_forward,
)
from pallas_kernels.mask import Causal, SameDocument, Window
from pallas_kernels.testing import TOLERANCE, relative_errors

NOTES = (
    "Cases: rows B with caches of S tokens each (or from S to ..), new tokens T, query heads / kv heads, head dim. "
    "GB/s count the keys and values that the mask allows, which must be read: a cache that is not full is read as far "
    "as it is filled. % of copy is that over the bytes a second, read and written, of the copy of the same run. Which "
    "blocks to read is found inside the timing, from positions and segment ids, as a decoding step does.",
    "What is timed agrees with the float32 formula, every row and head. Peers are handed the number of tokens of each "
    "row, and serve neither several new tokens, each of which sees one more, nor a window. Of latents, which are keys "
    "and, in their first dims, values of all heads, the bytes are counted once.",
)
PEERS = ("cudnn", "triton")
OURS = ("mosaic_gpu", "xla")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeCase:
    """A decoding step of one shape.

    Attributes:
      lengths: Tokens that the cache of each row of the batch holds, the new ones among them.
      num_slots: Tokens that it has room for.
      q_len: New tokens of a row.
      window: Tokens that each sees, itself included; None for all before it.
      value_dim: If given, the cache holds latents of one head, whose first dims are the values.
    """

    lengths: tuple[int, ...]
    num_slots: int
    q_len: int = 1
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    window: int | None = None
    value_dim: int | None = None

    @property
    def name(self) -> str:
        same = len(set(self.lengths)) == 1
        length = f"S{self.lengths[0]}" if same else f"S{min(self.lengths)}..{max(self.lengths)}"
        room = "" if same and self.lengths[0] == self.num_slots else f" of {self.num_slots}"
        kind = "" if self.window is None else f"window {self.window} "
        kind = kind if self.value_dim is None else "latents "
        dims = f"D{self.head_dim}" + ("" if self.value_dim is None else f" of {self.value_dim} values")
        return f"{kind}B{len(self.lengths)} {length}{room} T{self.q_len} {self.num_heads}/{self.num_kv_heads} {dims}"

    @property
    def mask(self) -> Mask:
        mask = Causal() & SameDocument()
        return mask if self.window is None else mask & Window(left=self.window - 1)

    @property
    def tokens(self) -> Tokens:
        """As a cache has them: positions of all slots, and a segment id below 0 for those that hold nothing."""
        lengths = np.array(self.lengths, np.int32)[:, None]
        slots = np.arange(self.num_slots, dtype=np.int32)[None]
        q_positions = lengths - self.q_len + np.arange(self.q_len, dtype=np.int32)
        return jax.tree.map(
            jnp.asarray,
            Tokens(
                q_positions=q_positions,
                q_segment_ids=np.zeros_like(q_positions),
                kv_positions=slots,
                kv_segment_ids=np.where(slots < lengths, 0, PADDING_SEGMENT_ID).astype(np.int32),
            ),
        )

    @property
    def num_read(self) -> int:
        """Keys that any query of their row may attend to, over all rows."""
        if self.window is None:
            return sum(self.lengths)
        return sum(min(length, self.window + self.q_len - 1) for length in self.lengths)

    def bytes(self, dtype: str) -> int:
        """Of those keys and their values."""
        arrays = 2 if self.value_dim is None else 1
        return arrays * self.num_read * self.num_kv_heads * self.head_dim * jnp.dtype(dtype).itemsize

    def shapes(self, dtype: str) -> tuple[jax.ShapeDtypeStruct, ...]:
        """q, k and v; of latents q and k."""
        batch_size = len(self.lengths)
        q = (batch_size, self.q_len, self.num_heads, self.head_dim)
        kv = (batch_size, self.num_slots, self.num_kv_heads, self.head_dim)
        shapes = (q, kv, kv) if self.value_dim is None else (q, kv)
        return tuple(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)

    def inputs(self, dtype: str) -> tuple[jax.Array, ...]:
        shapes = self.shapes(dtype)
        keys = jax.random.split(jax.random.key(0), len(shapes))
        return tuple(jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, shapes, strict=True))


def _latents(lengths: tuple[int, ...], num_heads: int) -> DecodeCase:
    """Of DeepSeek-V2 and V3."""
    return DecodeCase(
        lengths=lengths, num_slots=max(lengths), num_heads=num_heads, num_kv_heads=1, head_dim=576, value_dim=512
    )


_RAGGED = tuple(int(n) for n in np.random.default_rng(0).integers(512, 16385, 16))
CASES = (
    *(DecodeCase(lengths=(n,), num_slots=n) for n in (8192, 32768, 131072, 1048576)),
    DecodeCase(lengths=(131072,), num_slots=1048576),
    DecodeCase(lengths=(131072,), num_slots=131072, head_dim=64),
    DecodeCase(lengths=(131072,), num_slots=131072, q_len=8),
    DecodeCase(lengths=(131072,), num_slots=131072, num_heads=8, num_kv_heads=1),
    DecodeCase(lengths=(8192,) * 16, num_slots=8192),
    DecodeCase(lengths=_RAGGED, num_slots=16384),
    DecodeCase(lengths=(1048576,), num_slots=1048576, window=65536),
    *(_latents((131072,), num_heads) for num_heads in (16, 128)),
    _latents((8192,) * 16, 16),
)
SMOKE = (
    DecodeCase(lengths=(40, 1, 96), num_slots=96, q_len=1, num_heads=4, num_kv_heads=2, head_dim=16),
    DecodeCase(lengths=(90,), num_slots=96, q_len=3, num_heads=2, num_kv_heads=1, head_dim=16, window=24),
    DecodeCase(lengths=(90, 7), num_slots=96, num_heads=4, num_kv_heads=1, head_dim=24, value_dim=16),
)


def measure_decode(
    cases: Sequence[DecodeCase],
    *,
    bandwidth: Bandwidth,
    implementations: Sequence[str] = OURS,
    peers: Sequence[str] = PEERS,
    dtype: str = "bfloat16",
    repetitions: int = 20,
    progress: Callable[[str], None] = print,
) -> list[Row]:
    """Compiles every program, then for each case checks and times its implementations one by one.

    Args:
      bandwidth: What a large copy reaches here.
      peers: Some of PEERS.
    Returns: a row for each case and implementation; what does not fit the float32 formula is not timed. After Ctrl-C,
      the rows until then.
    """
    candidates = functools.partial(_candidates, implementations=implementations, peers=peers)
    family = _Decode(candidates=candidates, bandwidth=bandwidth, dtype=dtype)
    return measure_side_by_side(
        family, cases, passes=("forward",), repetitions=repetitions, max_seconds=1.0, progress=progress
    )


def _candidates(case: DecodeCase, *, implementations: Sequence[str], peers: Sequence[str]) -> Iterator[Candidate | Row]:
    def ours(name: str) -> Candidate:
        call = {"mask": case.mask, "implementation": name}

        def attend(*operands):
            *qkv, tokens = operands
            if case.value_dim is None:
                return blockwise_attention_forward(*qkv, tokens=tokens, **call)[0]
            q, k = qkv
            latents = functools.partial(latent_attention_forward, value_dim=case.value_dim, scale=case.head_dim**-0.5)
            return latents(q, k[:, :, 0], tokens=tokens, **call)[0]

        return _candidate(f"longctx {name}", attend, lambda: case.tokens, ours=True)

    yield from map(ours, implementations)
    for name in peers:
        try:
            yield {"cudnn": _cudnn, "triton": _triton}[name](case)
        except NotImplementedError as reason:
            yield Row(case=case.name, which="forward", implementation=name, ours=False, problem=f"refused: {reason}")


def _candidate(name: str, attend: Callable, extra: Callable, *, ours: bool) -> Candidate:
    return Candidate(name=name, ours=ours, deterministic=True, attend=attend, extra=extra, passes=("forward",))


def _one_token(case: DecodeCase) -> None:
    if jax.default_backend() != "gpu":
        raise NotImplementedError(f"needs an NVIDIA GPU, the platform is {jax.default_backend()}")
    if case.value_dim is not None:
        raise NotImplementedError("it has no latents")
    if case.q_len > 1 or case.window is not None:
        raise NotImplementedError("it is handed lengths of rows alone: one new token, no window")


def _cudnn(case: DecodeCase) -> Candidate:
    """cuDNN through jax.nn, with the number of keys of each row."""
    _one_token(case)

    def attend(q, k, v, lengths):
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            query_seq_lengths=jnp.ones_like(lengths),
            key_value_seq_lengths=lengths,
            implementation="cudnn",
        )

    return _candidate("cuDNN (jax.nn)", attend, lambda: jnp.asarray(case.lengths, jnp.int32), ours=False)


def _triton(case: DecodeCase) -> Candidate:
    """JAX's own example of a decoding kernel in Pallas's Triton lowering; it wants the heads before the keys, so keys
    and values are copied first."""
    _one_token(case)
    from jax.experimental.pallas.ops.gpu.decode_attention import gqa

    def attend(q, k, v, lengths):
        return gqa(q[:, 0], k, v, kv_seq_len=lengths, k_splits=32)[:, None]

    return _candidate("Triton (jax.experimental)", attend, lambda: jnp.asarray(case.lengths, jnp.int32), ours=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Decode:
    """The `Family` of side_by_side."""

    candidates: Callable[[DecodeCase], Iterable[Candidate | Row]]
    bandwidth: Bandwidth
    dtype: str

    def lower(self, candidate: Candidate, case: DecodeCase, which: Pass) -> jax.stages.Lowered:
        return jax.jit(candidate.attend).lower(*case.shapes(self.dtype), jax.eval_shape(candidate.extra))

    def checks(self, case: DecodeCase) -> Mapping[Pass, Callable]:
        return {}  # one small program, the same for every candidate

    def start(self, case: DecodeCase, checks: Mapping) -> Callable:
        inputs = case.inputs(self.dtype)
        want = jax.block_until_ready(_formula(case)(*inputs, case.tokens))

        def run(candidate: Candidate, which: Pass, program: jax.stages.Compiled) -> tuple[str | None, Callable]:
            call = functools.partial(program, *inputs, jax.block_until_ready(candidate.extra()))
            return _problem(call(), want, self.dtype), call

        return run

    def figures(self, case: DecodeCase, which: Pass, seconds: float) -> dict:
        bytes_per_second = case.bytes(self.dtype) / seconds
        return {"details": {"GB/s": bytes_per_second / 1e9, "% of copy": 100 * bytes_per_second / self.bandwidth.bytes}}


def _problem(got: jax.Array, want: jax.Array, dtype: str) -> str | None:
    try:
        rms, greatest = relative_errors("out", got, want)
    except AssertionError as problem:
        return str(problem).splitlines()[0]
    rms_tolerance, max_tolerance = TOLERANCE[dtype]
    if rms <= rms_tolerance and greatest <= max_tolerance:
        return None
    return f"max error {greatest:.2g} of out's greatest, wanted <= {max_tolerance:g}; rms error {rms:.2g}, " \
           f"wanted <= {rms_tolerance:g}"  # fmt: skip


def _formula(case: DecodeCase) -> Callable:
    """softmax(q k^T / sqrt(H)) v in float32, a row and kv head at a time."""

    @jax.jit
    def formula(*operands):
        q, k, *others = operands
        tokens, v = others[-1], k[..., : case.value_dim] if case.value_dim is not None else others[0]
        B, T, N, H = q.shape
        K = k.shape[2]
        einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
        allowed = jnp.broadcast_to(
            case.mask.dense(tokens, T, k.shape[1]).reshape(-1, T, k.shape[1]), (B, T, k.shape[1])
        )

        def one(row_and_head):
            b, h = row_and_head // K, row_and_head % K
            q_TGH = q.reshape(B, T, K, N // K, H)[b, :, h].astype(jnp.float32)
            k_SH, v_SH = (x[b, :, h].astype(jnp.float32) for x in (k, v))
            logits = jnp.where(allowed[b][:, None], H**-0.5 * einsum("TGH,SH->TGS", q_TGH, k_SH), -jnp.inf)
            return einsum("TGS,SH->TGH", jax.nn.softmax(logits, axis=-1), v_SH)

        out = jax.lax.map(one, jnp.arange(B * K))
        return out.reshape(B, K, T, N // K, -1).transpose(0, 2, 1, 3, 4).reshape(B, T, N, -1)

    return formula
