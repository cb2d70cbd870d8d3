"""The cases of linear attention that are measured, as data, and the FLOPs and bytes of each."""

import dataclasses

import jax
import jax.numpy as jnp

from benchmarks.cases import DOCUMENTS, Batch, Pass
from pallas_kernels.linear.options import DecayKind

# A state takes H V multiplications a token to write and as many to read. Its backward pass reads the state for dq, and
# writes and twice reads the cotangent of the state, for dk and dv.
MATMULS: dict[Pass, int] = {"forward": 2, "forward+backward": 6}


_DELTA_RULES: dict[DecayKind, str] = {
    "none": "delta", "fixed": "fixed_delta", "scalar": "gated_delta", "vector": "vector_delta"
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearCase(Batch):
    """Causal linear attention of one shape.

    Attributes:
      kind: No decay; one that is fixed for each head, of which no gradient is taken (Lightning Attention); a scalar
        gate for each token and head, with its gradient (simple GLA, Mamba-2); or one for each dim of the keys (GLA).
      delta: Whether it is a delta rule, with the gradient of its write strengths, over keys of length 1 (DeltaNet,
        Gated DeltaNet).
      num_heads: Heads of the values.
      num_qk_heads: Heads of queries and keys, which as many heads of the values share.
    """

    kind: DecayKind
    num_heads: int
    num_qk_heads: int
    key_dim: int
    value_dim: int
    delta: bool = False

    @property
    def name(self) -> str:
        documents = "" if self.documents is None else f", documents {len(self.documents)}"
        dims = self.key_dim if self.key_dim == self.value_dim else f"{self.key_dim}/{self.value_dim}"
        shape = f"B{self.batch_size} S{self.length} {self.num_heads}/{self.num_qk_heads} D{dims}"
        rule = _DELTA_RULES[self.kind] if self.delta else self.kind
        return f"{rule}{documents} {shape}"

    @property
    def differentiated(self) -> tuple[int, ...]:
        """Which of q, k, v, decay and beta a gradient is taken of."""
        gates = (3,) if self.kind in ("scalar", "vector") else ()
        return 0, 1, 2, *gates, *((4,) if self.delta else ())

    def flops(self, which: Pass) -> int:
        """FLOPs of the recurrence: forward 4 T N H V B, three times that with backward."""
        return MATMULS[which] * 2 * self.batch_size * self.length * self.num_heads * self.key_dim * self.value_dim

    def bytes(self, which: Pass, dtype: str) -> int:
        """Bytes that must be read or written, of arrays as large as q or v.

        Forward reads q, k and v and writes out. With backward q, k, v and dout are read, out, dq, dk and dv written,
        and q, k and v read again. A decay of each dim is float32: read forward, read again and its gradient written.
        """
        tokens = self.batch_size * self.length
        q, v = tokens * self.num_qk_heads * self.key_dim, tokens * self.num_heads * self.value_dim
        elements = 2 * q + 2 * v if which == "forward" else 6 * q + 5 * v
        gates = tokens * self.num_heads * self.key_dim * 4 if self.kind == "vector" else 0
        return elements * jnp.dtype(dtype).itemsize + gates * (1 if which == "forward" else 3)

    def shapes(self, dtype: str) -> tuple[jax.ShapeDtypeStruct | None, ...]:
        """q, k, v, decay, of a delta rule beta, and the cotangent of out."""
        q = (self.batch_size, self.length, self.num_qk_heads, self.key_dim)
        v = (self.batch_size, self.length, self.num_heads, self.value_dim)
        decays = {"fixed": (self.num_heads,), "scalar": v[:3], "vector": (*v[:3], self.key_dim)}
        decay = jax.ShapeDtypeStruct(decays[self.kind], jnp.float32) if self.kind in decays else None
        beta = (jax.ShapeDtypeStruct(v[:3], jnp.float32),) if self.delta else ()
        q, v = (jax.ShapeDtypeStruct(shape, dtype) for shape in (q, v))
        return q, q, v, decay, *beta, v

    def inputs(self, dtype: str, *, seed: int = 0) -> tuple[jax.Array | None, ...]:
        """q, k, v, the log decay, of a delta rule beta, and the cotangent of out; all but the gates, float32, normal.

        A fixed decay is Lightning Attention's, -2^(-8 (n + 1) / N) for head n, which remembers 1 to 256 tokens. A gate
        is that times -log sigmoid of a normal number, one of a dim GLA's, a sixteenth of such a logarithm.
        """
        # Threefry would hold several times the longest rows while it draws them.
        keys = jax.random.split(jax.random.key(seed, impl="rbg"), 5)
        shapes = self.shapes(dtype)
        q, k, v, dout = (
            jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, (*shapes[:3], shapes[-1]), strict=False)
        )
        decay = None
        if self.kind != "none":
            decay = -(2.0 ** (-8.0 * jnp.arange(1, self.num_heads + 1, dtype=jnp.float32) / self.num_heads))
        if self.kind == "scalar":
            decay = -decay * jax.nn.log_sigmoid(jax.random.normal(keys[4], shapes[3].shape))
        if self.kind == "vector":
            decay = jax.nn.log_sigmoid(jax.random.normal(keys[4], shapes[3].shape)) / 16
        if not self.delta:
            return q, k, v, decay, dout
        length = jnp.linalg.norm(k.astype(jnp.float32), axis=3, keepdims=True)
        beta = jax.random.uniform(jax.random.fold_in(keys[4], 1), shapes[4].shape)
        return q, (k / length).astype(k.dtype), v, decay, beta, dout


def _case(kind: DecayKind, batch_size: int, length: int, heads: str, dims: str, **options) -> LinearCase:
    num_heads, num_qk_heads = map(int, heads.split("/"))
    key_dim, value_dim = map(int, dims.split("/"))
    return LinearCase(
        kind=kind,
        batch_size=batch_size,
        length=length,
        num_heads=num_heads,
        num_qk_heads=num_qk_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        **options,
    )


_SHAPES = ((2, 8192), (1, 32768))
CASES = (
    *(
        _case(kind, *shape, "16/16", dims)
        for kind in ("fixed", "scalar")
        for dims in ("128/128", "64/64")
        for shape in _SHAPES
    ),
    _case("none", 1, 32768, "16/16", "128/128"),
    *(_case("scalar", *shape, "16/1", "128/64") for shape in _SHAPES),  # as Mamba-2 has it
    *(_case(kind, 1, 32768, "16/16", "128/128", documents=DOCUMENTS) for kind in ("fixed", "scalar")),
    *(_case("fixed", 1, length, "16/16", "128/128") for length in (2**16, 2**18, 2**20)),
    *(
        _case(kind, *shape, "16/16", "128/128", delta=delta)
        for kind, delta in (("vector", False), ("none", True), ("scalar", True))
        for shape in _SHAPES
    ),
)

SMOKE = (
    _case("none", 2, 70, "2/1", "8/8"),
    _case("scalar", 1, 96, "4/2", "16/8", documents=(40, 1, 55)),
    _case("fixed", 1, 300, "2/2", "16/16"),
    _case("fixed", 1, 300, "2/2", "16/16", documents=(40, 1, 259)),
)
