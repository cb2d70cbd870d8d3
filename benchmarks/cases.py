"""The cases of blockwise attention that are measured, as data, and how much work each is."""

import dataclasses
import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import Alibi, Dropout, KerpleLog, KerplePower, Mask, T5Buckets, Tokens
from pallas_kernels.mask import Causal, Full, SameDocument, Window
from pallas_kernels.mask_patterns import Table
from pallas_kernels.testing import packed_tokens

Pass = Literal["forward", "forward+backward", "backward"]
WHOLE_PASSES: tuple[Pass, ...] = ("forward", "forward+backward")
PASSES: tuple[Pass, ...] = (*WHOLE_PASSES, "backward")
# A pair, over the dims of queries and keys and over those of values: two forward, and five backward.
MATMULS: dict[Pass, tuple[int, int]] = {"forward": (1, 1), "forward+backward": (4, 3), "backward": (3, 2)}
Option = Literal["alibi", "alibi_learned", "t5", "kerple_log", "kerple_power", "soft_cap", "sinks", "dropout"]
OPTIONS: tuple[Option, ...] = get_args(Option)
BLOCK = 128  # edge of the blocks of random block masks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows of tokens.

    Attributes:
      documents: Lengths of the documents packed into each row; None for one.
    """

    batch_size: int
    length: int
    documents: tuple[int, ...] | None = None

    @property
    def segment_ids(self) -> jax.Array | None:
        """Document of each token, int32 `[1, length]`; None for one document."""
        if self.documents is None:
            return None
        return jnp.asarray(packed_tokens((self.documents,), self.length).q_segment_ids)

    @property
    def document_starts(self) -> jax.Array:
        """Where the document of each token begins, int32 `[1, length]`."""
        lengths = np.asarray(self.documents or (self.length,))
        return jnp.asarray(np.repeat(np.cumsum(lengths) - lengths, lengths)[None], jnp.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionCase(Batch):
    """Self-attention of one shape; a subclass has a `name`, a `mask`, `tokens`, and `pairs` of a row and head.

    Attributes:
      head_dim: Of queries and keys.
      value_dim: Of values; None for that.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int | None = None

    @property
    def constants(self) -> dict[str, Any]:
        """What else the op is called with."""
        return {}

    @property
    def learned(self) -> dict[str, Any]:
        """The same, of which gradients are timed too."""
        return {}

    @property
    def shape_name(self) -> str:
        dims = f"D{self.head_dim}" + ("" if self.value_dim is None else f" of {self.value_dim} values")
        return f"B{self.batch_size} S{self.length} {self.num_heads}/{self.num_kv_heads} {dims}"

    def flops(self, which: Pass) -> int:
        """FLOPs of a pass over the allowed pairs: forward 4 pairs D N B, 3.5 times that with backward, which is 2.5."""
        of_head_dim, of_values = MATMULS[which]
        dims = of_head_dim * self.head_dim + of_values * self.dim_of_values
        return 2 * self.pairs * dims * self.num_heads * self.batch_size

    @property
    def dim_of_values(self) -> int:
        return self.head_dim if self.value_dim is None else self.value_dim

    def shapes(self, dtype: str) -> tuple[jax.ShapeDtypeStruct, ...]:
        """q, k, v, and the cotangent of out."""
        heads, dims = (self.num_heads, self.num_kv_heads), (self.head_dim, self.dim_of_values)
        (q, out), (k, v) = (tuple((self.batch_size, self.length, n, dim) for dim in dims) for n in heads)
        return tuple(jax.ShapeDtypeStruct(shape, dtype) for shape in (q, k, v, out))

    def inputs(self, dtype: str, *, seed: int = 0) -> tuple[jax.Array, ...]:
        """q, k, v and the cotangent of out: normal, drawn in `dtype`."""
        shapes = self.shapes(dtype)
        keys = jax.random.split(jax.random.key(seed), len(shapes))
        return tuple(jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, shapes, strict=True))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case(AttentionCase):
    """Self-attention of one shape under one mask.

    Attributes:
      window: Tokens that each sees, itself included; None for all before it.
      one_block_in: If given, a query sees only some blocks of BLOCK keys, one in so many drawn at random.
      hop: Whether this project's implementations are also timed as a hop of a ring: forward with a carry in and out,
        and the backward pass alone, without and with running gradients.
      option: Of the op. The gradients of sinks, and of a bias' parameters unless they are constants ("alibi"), are
        timed too.
    """

    causal: bool = True
    window: int | None = None
    one_block_in: int | None = None
    hop: bool = False
    option: Option | None = None

    def __post_init__(self):
        if self.one_block_in is not None and (self.causal or self.length % BLOCK):
            raise ValueError(
                f"one_block_in: got causal={self.causal} and length={self.length}, wanted causal=False and a multiple "
                f"of {BLOCK}"
            )

    @property
    def name(self) -> str:
        kind = "causal" if self.causal else "full"
        if self.window is not None:
            kind = f"window {self.window}"
        if self.documents is not None:
            kind = f"documents {len(self.documents)}"
        if self.one_block_in is not None:
            kind = f"blocks 1/{self.one_block_in}"
        if self.hop:
            kind = f"hop, {kind}"
        if self.option is not None:
            kind = f"{self.option}, {kind}"
        return f"{kind} {self.shape_name}"

    @property
    def constants(self) -> dict[str, Any]:
        B, N = self.batch_size, self.num_heads
        match self.option:
            case "alibi":
                return {"bias": Alibi.geometric(N)}
            case "soft_cap":
                return {"logits_soft_cap": 30.0}
            case "dropout":
                return {"dropout": Dropout.of_key(0.1, jax.random.key(3), batch_size=B, num_heads=N)}
        return {}

    @property
    def learned(self) -> dict[str, Any]:
        N = self.num_heads
        first, second = (jnp.asarray(np.linspace(*ends, N), jnp.float32) for ends in ((0.1, 1.0), (0.9, 0.3)))
        match self.option:
            case "alibi_learned":
                return {"bias": Alibi.geometric(N)}
            case "t5":
                return {"bias": T5Buckets(table=jax.random.normal(jax.random.key(2), (N, 32)))}
            case "kerple_log":
                return {"bias": KerpleLog(r1=first, r2=second)}
            case "kerple_power":
                return {"bias": KerplePower(r1=first / 10, r2=second)}
            case "sinks":
                return {"sinks": first}
        return {}

    @property
    def mask(self) -> Mask:
        mask = Causal() if self.causal else Full()
        if self.window is not None:
            mask &= Window(left=self.window - 1)
        if self.documents is not None:
            mask &= SameDocument()
        if self.one_block_in is not None:
            mask = Table(self._blocks, block_q=BLOCK, block_kv=BLOCK)
        return mask

    @property
    def _blocks(self) -> np.ndarray:
        """Which blocks of keys each block of queries sees, bool `[length / BLOCK, length / BLOCK]`."""
        return _random_blocks(self.length // BLOCK, self.one_block_in)

    @property
    def tokens(self) -> Tokens | None:
        """Tokens in order: positions need not restart where documents are told apart by their ids."""
        return None if self.documents is None else Tokens.self_attention(None, self.segment_ids)

    @property
    def pairs(self) -> int:
        """(query, key) pairs of one row and head that the mask allows."""
        if self.one_block_in is not None:
            return int(self._blocks.sum()) * BLOCK**2
        return sum(self._pairs_of(length) for length in self.documents or (self.length,))

    def _pairs_of(self, length: int) -> int:
        if not self.causal:
            return length**2
        seen = np.arange(1, length + 1, dtype=np.int64)
        return int(np.minimum(seen, self.window or length).sum())


@functools.cache
def _random_blocks(num: int, one_in: int) -> np.ndarray:
    """Bool `[num, num]`, True with a probability of 1 / one_in, and at least once in each row."""
    rng = np.random.default_rng(0)
    blocks = rng.random((num, num)) < 1 / one_in
    blocks[np.arange(num), rng.integers(num, size=num)] |= ~blocks.any(axis=1)
    return blocks


def _case(batch_size: int, length: int, heads: str, head_dim: int, **options) -> Case:
    num_heads, num_kv_heads = map(int, heads.split("/"))
    return Case(
        batch_size=batch_size,
        length=length,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        **options,
    )


# 16 random lengths packed in one row of 32,768: 52 million pairs.
DOCUMENTS = (3974, 547, 1748, 1687, 500, 3750, 1383, 2908, 4281, 103, 4096, 2415, 4004, 71, 188, 1113)

CASES = (
    _case(8, 2048, "16/16", 128),
    _case(2, 8192, "16/16", 128),
    _case(1, 32768, "16/16", 128),
    _case(2, 8192, "16/4", 128),
    _case(1, 32768, "16/4", 128),
    _case(2, 8192, "16/16", 64),
    _case(1, 32768, "16/16", 64),
    _case(8, 2048, "16/4", 64),
    _case(2, 8192, "16/4", 64),
    _case(1, 32768, "16/4", 64),
    _case(2, 8192, "16/16", 128, causal=False),
    _case(1, 32768, "16/16", 128, causal=False),
    _case(1, 32768, "16/16", 128, window=4096),
    _case(1, 32768, "16/4", 64, window=4096),
    _case(1, 16384, "64/8", 128),
    _case(1, 16384, "64/8", 128, window=8192),
    _case(1, 32768, "16/16", 128, documents=DOCUMENTS),
    _case(1, 32768, "16/4", 64, documents=DOCUMENTS),
    _case(1, 8192, "16/16", 128, causal=False, hop=True),
    _case(2, 8192, "16/16", 256),
    _case(2, 8192, "16/16", 192, value_dim=128),
    _case(1, 32768, "16/16", 192, value_dim=128),
    _case(1, 32768, "16/16", 192, value_dim=128, documents=DOCUMENTS),
    *(_case(1, 32768, "16/16", 128, causal=False, one_block_in=one_in) for one_in in (2, 4, 8, 16)),
    *(
        _case(batch_size, length, "16/16", head_dim, option=option)
        for batch_size, length, head_dim in ((2, 8192, 128), (1, 32768, 128), (1, 32768, 64))
        for option in OPTIONS
    ),
)

SMOKE = (
    _case(2, 64, "2/1", 16),
    _case(1, 64, "2/2", 16, causal=False, hop=True),
    _case(1, 96, "4/2", 8, window=24),
    _case(1, 96, "2/1", 16, documents=(40, 1, 55)),
    _case(1, 384, "2/1", 16, causal=False, one_block_in=4),
    _case(2, 64, "2/1", 24, value_dim=16),
    _case(1, 96, "2/1", 16, option="t5"),
    *(_case(2, 96, "2/1", 16, option=option) for option in ("soft_cap", "sinks", "dropout")),
)
