"""The family's cases, as data: what its conformance suite runs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.linear.options import DecayKind
from pallas_kernels.testing import packed_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One call of the ops.

    Attributes:
      decay: Which form of log decays.
      strength: Log decays are normal and negative, of about this size, except that in one of four tokens they are a
        hundredth of it: strong ones next to weak ones.
      beta: Whether it is a delta rule; the keys are then of length 1, or the state would grow without bounds.
      num_heads, num_key_heads: N and K.
      documents: Document lengths of each row of the batch, the rest of which is padding; None for no segment ids.
      initial_state: Whether there is a state before the row.
      normalize: Whether the weights are divided by their sum; q and k are then squares.
      bidirectional: Whether tokens read what comes after them too.
      run_length: Tokens of a run where the row is cut into runs.
      all_ways: Whether the conformance suite also calls it without a cotangent of the state, and in runs.
    """

    name: str
    length: int
    decay: DecayKind = "none"
    strength: float = 0.1
    beta: bool = False
    batch_size: int = 2
    num_heads: int = 2
    num_key_heads: int = 2
    head_dim: int = 16
    value_dim: int = 16
    documents: tuple[tuple[int, ...], ...] | None = None
    initial_state: bool = False
    normalize: bool = False
    bidirectional: bool = False
    scale: float | None = None
    run_length: int = 48
    all_ways: bool = False

    def segment_ids(self) -> jax.Array | None:
        """The case's documents."""
        if self.documents is None:
            return None
        return jnp.asarray(packed_tokens(self.documents, self.length).q_segment_ids)

    def inputs(self, dtype: str, seed: int = 0) -> dict[str, jax.Array]:
        """q, k, v and the cotangent dout, normal, rounded to `dtype`; decay, beta, initial_state and the cotangent
        dstate, float32, as far as the case has them."""
        B, T, N, K, H, V = (
            *(self.batch_size, self.length, self.num_heads),
            *(self.num_key_heads, self.head_dim, self.value_dim),
        )
        # NumPy's, since JAX would compile a program for each shape.
        random = np.random.default_rng(seed)
        arrays = {name: random.standard_normal((B, T, K, H), np.float32) for name in ("q", "k")}
        arrays |= {name: random.standard_normal((B, T, N, V), np.float32) for name in ("v", "dout")}
        if self.normalize:
            arrays |= {name: arrays[name] ** 2 for name in ("q", "k")}
        elif self.decay == "fixed":
            # Or the gradient of a head's decay, a sum over all tokens, might cancel out to its rounding.
            arrays = {name: x + np.float32(0.5) for name, x in arrays.items()}
        if self.beta:
            arrays["k"] /= np.linalg.norm(arrays["k"], axis=3, keepdims=True)
        arrays = {name: x.astype(jnp.dtype(dtype)) for name, x in arrays.items()}
        shape = {"none": None, "fixed": (N,), "scalar": (B, T, N), "vector": (B, T, N, H)}[self.decay]
        if shape is not None:
            weak = random.random(shape, np.float32) < 0.25
            sizes = np.abs(random.standard_normal(shape, np.float32)) * self.strength
            arrays["decay"] = -np.where(weak, 0.01 * sizes, sizes)
        if self.beta:
            arrays["beta"] = random.random((B, T, N), np.float32)
        state = B, N, H, V + self.normalize
        if self.initial_state:
            arrays["initial_state"] = random.standard_normal(state, np.float32)
            if self.normalize:
                arrays["initial_state"] = np.abs(arrays["initial_state"])
        if not self.bidirectional:
            arrays["dstate"] = random.standard_normal(state, np.float32)
        return {name: jnp.asarray(x) for name, x in arrays.items()}


_PACKED = ((30, 1, 66, 20, 1), (1, 63, 1, 1, 40))  # 118 and 106 tokens
_PADDED = ((), (9, 50))

CASES = (
    Case(name="none", length=150, all_ways=True),
    Case(name="fixed", length=150, decay="fixed", all_ways=True),
    Case(name="scalar", length=150, decay="scalar", all_ways=True),
    Case(name="vector", length=150, decay="vector", all_ways=True),
    Case(name="delta", length=150, beta=True, all_ways=True),
    Case(name="delta_fixed", length=150, decay="fixed", beta=True),
    Case(name="delta_scalar", length=150, decay="scalar", beta=True, all_ways=True),
    Case(name="delta_vector", length=150, decay="vector", beta=True, all_ways=True),
    Case(name="one_token_scalar", length=1, decay="scalar", initial_state=True),
    Case(name="one_token_delta_vector", length=1, decay="vector", beta=True, initial_state=True),
    Case(name="T63_fixed", length=63, decay="fixed"),
    Case(name="T63_vector", length=63, decay="vector"),
    Case(name="T64_none", length=64, head_dim=64, value_dim=64),
    Case(name="T64_delta", length=64, beta=True),
    Case(name="T1000_scalar", length=1000, decay="scalar", batch_size=1, initial_state=True, run_length=300,
         all_ways=True),
    Case(name="T1000_vector", length=1000, decay="vector", batch_size=1, run_length=300, all_ways=True),
    Case(name="T1000_delta_scalar", length=1000, decay="scalar", beta=True, batch_size=1, initial_state=True),
    Case(name="value_dim_shared_heads_none", length=100, num_heads=6, head_dim=8, value_dim=24),
    Case(name="value_dim_shared_heads_scalar", length=100, decay="scalar", num_heads=6, head_dim=24, value_dim=8,
         initial_state=True, all_ways=True),
    Case(name="value_dim_shared_heads_vector", length=100, decay="vector", num_heads=4, num_key_heads=1, head_dim=24,
         value_dim=8, initial_state=True, all_ways=True),
    Case(name="value_dim_shared_heads_delta", length=100, beta=True, num_heads=4, head_dim=8, value_dim=24,
         initial_state=True),
    Case(name="value_dim_shared_heads_delta_vector", length=100, decay="vector", beta=True, num_heads=4, head_dim=8,
         value_dim=24, initial_state=True),
    Case(name="documents_none", length=120, documents=_PACKED, initial_state=True, all_ways=True),
    Case(name="documents_fixed", length=120, decay="fixed", documents=_PACKED, initial_state=True, all_ways=True),
    Case(name="documents_scalar", length=120, decay="scalar", documents=_PACKED, num_heads=4, initial_state=True,
         all_ways=True),
    Case(name="documents_vector", length=120, decay="vector", documents=_PACKED, initial_state=True, all_ways=True),
    Case(name="documents_delta", length=120, beta=True, documents=_PACKED, initial_state=True, all_ways=True),
    Case(name="documents_delta_scalar", length=120, decay="scalar", beta=True, documents=_PACKED, initial_state=True),
    Case(name="documents_delta_vector", length=120, decay="vector", beta=True, documents=_PACKED, num_heads=4,
         initial_state=True),
    Case(name="padding_fixed", length=80, decay="fixed", documents=_PADDED, initial_state=True, all_ways=True),
    Case(name="padding_vector", length=80, decay="vector", documents=_PADDED, initial_state=True, all_ways=True),
    Case(name="padding_delta_scalar", length=80, decay="scalar", beta=True, documents=_PADDED, initial_state=True),
    Case(name="strong_fixed", length=150, decay="fixed", strength=20.0, num_heads=8, documents=((70, 80), (150,)),
         all_ways=True),
    Case(name="strong_scalar", length=150, decay="scalar", strength=20.0, initial_state=True, all_ways=True),
    Case(name="strong_vector", length=150, decay="vector", strength=20.0, initial_state=True, all_ways=True),
    Case(name="strong_delta_scalar", length=150, decay="scalar", beta=True, strength=20.0),
    Case(name="strong_delta_vector", length=150, decay="vector", beta=True, strength=20.0, initial_state=True),
    Case(name="weak_scalar", length=300, decay="scalar", strength=1e-3, all_ways=True),
    Case(name="weak_vector", length=300, decay="vector", strength=1e-3),
    Case(name="weak_delta_vector", length=300, decay="vector", beta=True, strength=1e-3),
    Case(name="normalize_none", length=100, normalize=True, initial_state=True),
    Case(name="normalize_documents_scalar", length=120, decay="scalar", normalize=True, documents=_PACKED),
    Case(name="normalize_vector", length=100, decay="vector", normalize=True, initial_state=True, num_heads=4),
    Case(name="bidirectional_none", length=100, bidirectional=True),
    Case(name="bidirectional_documents_scalar", length=120, decay="scalar", bidirectional=True, documents=_PACKED,
         num_heads=4),
    Case(name="bidirectional_documents_vector", length=120, decay="vector", bidirectional=True, documents=_PACKED),
    Case(name="bidirectional_normalize_fixed", length=100, decay="fixed", bidirectional=True, normalize=True),
    Case(name="scale_scalar", length=100, decay="scalar", scale=0.7, all_ways=True),
    Case(name="scale_delta_vector", length=100, decay="vector", beta=True, scale=-0.7),
)  # fmt: skip


def _kernel_case(name: str, length: int, *, decay: DecayKind, **options) -> Case:
    options = {"head_dim": 128, "value_dim": 128, "beta": False} | options
    rule = "delta_" * options["beta"] + decay
    name = f"{name}_{rule}_{options['head_dim']}_{options['value_dim']}"
    return Case(name=name, length=length, decay=decay, **options)


_LONG_PACKED = ((300, 1, 129, 70), (128, 1, 1, 270))

_PREPARED = (("vector", False), ("none", True), ("fixed", True), ("scalar", True))

# What kernels are made for: rows of many chunks, which an implementation may sweep in several parts.
KERNEL_CASES = (
    *(
        _kernel_case("whole_chunks", 1024, decay=decay, num_key_heads=1, batch_size=1, head_dim=head_dim,
                     value_dim=value_dim, all_ways=(head_dim, value_dim) == (128, 128), run_length=512)
        for decay in ("none", "fixed", "scalar")
        for head_dim in (64, 128)
        for value_dim in (64, 128)
    ),
    _kernel_case("T1", 1, decay="fixed", initial_state=True),
    _kernel_case("T1", 1, decay="scalar", head_dim=64, value_dim=64, initial_state=True),
    _kernel_case("T63", 63, decay="scalar", initial_state=True),
    _kernel_case("T129", 129, decay="fixed", head_dim=64, value_dim=64),
    _kernel_case("T1000", 1000, decay="none", batch_size=1, initial_state=True),
    _kernel_case("T1000", 1000, decay="fixed", batch_size=1, head_dim=64, value_dim=64, initial_state=True),
    _kernel_case("T1000", 1000, decay="scalar", batch_size=1, initial_state=True, run_length=300, all_ways=True),
    _kernel_case("shared_heads", 320, decay="scalar", num_heads=6, initial_state=True, all_ways=True),
    _kernel_case("shared_heads", 320, decay="none", num_heads=4, num_key_heads=1, head_dim=64, value_dim=64),
    _kernel_case("heads_of_3_rows", 200, decay="fixed", num_heads=3, num_key_heads=3, batch_size=3, head_dim=64,
                 value_dim=128),
    _kernel_case("documents", 512, decay="none", documents=_LONG_PACKED, initial_state=True, head_dim=64,
                 value_dim=128),
    _kernel_case("documents", 512, decay="fixed", documents=_LONG_PACKED, initial_state=True, run_length=200,
                 all_ways=True),
    _kernel_case("documents", 512, decay="scalar", documents=_LONG_PACKED, num_heads=4, head_dim=64, value_dim=64,
                 initial_state=True, run_length=200, all_ways=True),
    _kernel_case("documents_of_chunks", 512, decay="scalar", documents=((128, 128, 256), (64, 192, 256))),
    _kernel_case("documents_of_one_token", 200, decay="scalar", documents=((1,) * 130, (99, 1, 1, 1, 90)),
                 head_dim=64, value_dim=64),
    _kernel_case("padding", 300, decay="scalar", documents=((), (100, 29)), initial_state=True),
    _kernel_case("one_head", 2048, decay="fixed", batch_size=1, num_heads=1, num_key_heads=1, initial_state=True),
    _kernel_case("one_head", 4000, decay="scalar", batch_size=1, num_heads=1, num_key_heads=1, head_dim=64,
                 value_dim=64, initial_state=True, documents=((1000, 1, 2600, 300),)),
    _kernel_case("strong", 400, decay="scalar", strength=20.0, initial_state=True, all_ways=True),
    _kernel_case("weak", 1000, decay="scalar", strength=1e-3, batch_size=1, head_dim=64, value_dim=64),
    _kernel_case("normalize", 300, decay="scalar", normalize=True, head_dim=64, value_dim=64),
    _kernel_case("bidirectional", 300, decay="scalar", bidirectional=True, documents=((100, 1, 190), (300,))),
    _kernel_case("scale", 300, decay="scalar", scale=0.7, head_dim=64, value_dim=64),
    *(
        _kernel_case("whole_chunks", 1024, decay=decay, beta=beta, batch_size=1, head_dim=head_dim,
                     value_dim=value_dim, all_ways=(head_dim, value_dim) == (128, 128), run_length=512)
        for decay, beta in _PREPARED
        for head_dim in (64, 128)
        for value_dim in (64, 128)
    ),
    *(_kernel_case("T1", 1, decay=decay, beta=beta, initial_state=True) for decay, beta in _PREPARED),
    *(_kernel_case("T1000", 1000, decay=decay, beta=beta, batch_size=1, initial_state=True, run_length=300,
                   all_ways=True) for decay, beta in _PREPARED),
    *(_kernel_case("shared_heads", 320, decay=decay, beta=beta, num_heads=6, head_dim=64, initial_state=True)
      for decay, beta in _PREPARED),
    *(_kernel_case("documents", 512, decay=decay, beta=beta, documents=_LONG_PACKED, initial_state=True,
                   run_length=200, all_ways=True) for decay, beta in _PREPARED),
    *(_kernel_case("documents_of_one_token", 200, decay=decay, beta=beta, head_dim=64, value_dim=64,
                   documents=((1,) * 130, (99, 1, 1, 1, 90))) for decay, beta in _PREPARED),
    *(_kernel_case("padding", 300, decay=decay, beta=beta, documents=((), (100, 29)), initial_state=True)
      for decay, beta in _PREPARED),
    _kernel_case("strong", 400, decay="vector", strength=20.0, initial_state=True, all_ways=True),
    _kernel_case("strong", 400, decay="scalar", beta=True, strength=20.0, initial_state=True),
    _kernel_case("weak", 1000, decay="vector", strength=1e-3, batch_size=1, head_dim=64, value_dim=64),
    _kernel_case("weak", 1000, decay="scalar", beta=True, strength=1e-3, batch_size=1),
    _kernel_case("normalize", 300, decay="vector", normalize=True, head_dim=64, value_dim=64),
    _kernel_case("bidirectional", 300, decay="vector", bidirectional=True, documents=((100, 1, 190), (300,))),
    _kernel_case("scale", 300, decay="vector", scale=0.7, head_dim=64, value_dim=64),
    _kernel_case("scale", 300, decay="none", beta=True, scale=-0.7),
)  # fmt: skip
