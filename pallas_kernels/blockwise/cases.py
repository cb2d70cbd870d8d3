"""The family's cases, as data: what its conformance suite and its benchmarks run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_sizes import BlockSizes
from pallas_kernels.mask import Causal, Full, Mask, PerHead, Prefix, SameDocument, Window
from pallas_kernels.mask_patterns import Chunked, GlobalQueries, Neighborhood, Predicate, Strided, Summary, Table
from pallas_kernels.testing import packed_tokens
from pallas_kernels.tokens import Tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One call of the ops.

    Attributes:
      documents: Document lengths of each row of the batch; None for one document and no segment ids.
      stripe: If given, the sequence is permuted so that token i stands at (i % stripe, i // stripe): positions are
        then data, and out of order.
    """

    name: str
    mask: Mask
    q_len: int
    kv_len: int | None = None
    batch_size: int = 2
    num_heads: int = 2
    num_kv_heads: int = 2
    head_dim: int = 16
    value_dim: int | None = None
    documents: tuple[tuple[int, ...], ...] | None = None
    stripe: int | None = None
    logits_soft_cap: float | None = None
    scale: float | None = None
    block_sizes: BlockSizes = BlockSizes(block_q=16, block_kv=24)

    def tokens(self) -> Tokens | None:
        """The case's tokens, or None for the static path."""
        if self.documents is not None:
            tokens = packed_tokens(self.documents, self.q_len)
        elif self.stripe is not None:
            tokens = Tokens.self_attention(np.arange(self.q_len, dtype=np.int32)[None])
        else:
            return None
        if self.stripe is not None:
            order = np.arange(self.q_len).reshape(-1, self.stripe).T.reshape(-1)
            tokens = jax.tree.map(lambda x: x[:, order], tokens)
        return jax.tree.map(jnp.asarray, tokens)

    def inputs(self, dtype: str, seed: int = 0) -> dict[str, jax.Array]:
        """q, k, v, and cotangents dout and dlse: normal, rounded to `dtype` (dlse float32)."""
        B, T, S = self.batch_size, self.q_len, self.kv_len or self.q_len
        V = self.value_dim or self.head_dim
        shapes = {
            "q": (B, T, self.num_heads, self.head_dim),
            "k": (B, S, self.num_kv_heads, self.head_dim),
            "v": (B, S, self.num_kv_heads, V),
            "dout": (B, T, self.num_heads, V),
        }
        *keys, dlse_key = jax.random.split(jax.random.key(seed), len(shapes) + 1)
        inputs = {
            name: jax.random.normal(key, shape, jnp.float32).astype(dtype)
            for key, (name, shape) in zip(keys, shapes.items(), strict=True)
        }
        inputs["dlse"] = jax.random.normal(dlse_key, (B, self.num_heads, T), jnp.float32)
        return inputs

    def arguments(self) -> dict:
        """The keyword arguments of the ops."""
        return {
            "mask": self.mask,
            "tokens": self.tokens(),
            "scale": self.scale,
            "logits_soft_cap": self.logits_soft_cap,
            "block_sizes": self.block_sizes,
        }


def _remainders_agree(q_positions, kv_positions, q_segment_ids, kv_segment_ids):
    return (q_positions * kv_positions) % 3 == 1


_PACKED = ((30, 1, 25, 8), (17, 1, 1, 40))

CASES = (
    Case(name="causal", mask=Causal(), q_len=64),
    Case(name="full", mask=Full(), q_len=64),
    Case(name="one_token", mask=Causal(), q_len=1),
    Case(name="causal_T63", mask=Causal(), q_len=63),
    Case(name="causal_T1000", mask=Causal(), q_len=1000, batch_size=1,
         block_sizes=BlockSizes(block_q=128, block_kv=256)),
    Case(name="block_of_one", mask=Causal(), q_len=9, block_sizes=BlockSizes(block_q=1, block_kv=1)),
    Case(name="gqa", mask=Causal(), q_len=50, num_heads=6, num_kv_heads=2),
    Case(name="mqa", mask=Causal(), q_len=50, num_heads=4, num_kv_heads=1),
    Case(name="value_dim", mask=Causal(), q_len=50, head_dim=24, value_dim=8),
    Case(name="cross", mask=Full(), q_len=40, kv_len=97),
    Case(name="cross_one_query", mask=Full(), q_len=1, kv_len=97, num_heads=4),
    Case(name="chunked_prefill", mask=Causal(offset=60), q_len=37, kv_len=97),
    Case(name="empty_rows", mask=Causal(offset=-20), q_len=64),
    Case(name="all_empty", mask=Causal(offset=-64), q_len=64),
    Case(name="window", mask=Causal() & Window(left=20), q_len=100),
    Case(name="window_within_block", mask=Causal() & Window(left=3), q_len=63),
    Case(name="window_both_sides", mask=Window(left=10, right=5), q_len=63),
    Case(name="not_window", mask=Causal() & ~Window(left=10), q_len=63),
    Case(name="documents", mask=Causal() & SameDocument(), q_len=70, documents=_PACKED),
    Case(name="documents_window_gqa", mask=Causal() & Window(left=9) & SameDocument(), q_len=70, num_heads=4,
         documents=_PACKED),
    Case(name="documents_bidirectional", mask=SameDocument(), q_len=70, documents=_PACKED),
    Case(name="prefix", mask=Causal() | Prefix(20), q_len=64),
    Case(name="documents_prefix", mask=(Causal() | Prefix(5)) & SameDocument(), q_len=70, documents=_PACKED),
    Case(name="striped", mask=Causal(), q_len=64, stripe=4),
    Case(name="striped_documents_window", mask=Causal() & Window(left=12) & SameDocument(), q_len=72, stripe=8,
         documents=((40, 1, 20), (9, 30, 30))),
    Case(name="soft_cap", mask=Causal(), q_len=50, logits_soft_cap=2.0),
    Case(name="soft_cap_empty_rows_gqa", mask=Causal(offset=-9), q_len=50, num_heads=4, logits_soft_cap=2.0),
    Case(name="scale", mask=Causal(), q_len=50, scale=0.7),
    Case(name="head_dim_64_gqa_scale", mask=Causal(), q_len=130, num_heads=4, head_dim=64, scale=0.2),
    Case(name="head_dim_128_cross_mqa", mask=Full(), q_len=66, kv_len=200, num_heads=4, num_kv_heads=1, head_dim=128),
    Case(name="head_dim_128_window_gqa", mask=Causal() & Window(left=50), q_len=200, num_heads=4, head_dim=128),
    Case(name="global_dilated", mask=GlobalQueries(2) | Prefix(2) | (Strided(3) & Window(9, 9)), q_len=63),
    Case(name="sparse_fixed_documents", mask=Causal() & (Chunked(8) | Summary(8, 2)) & SameDocument(), q_len=70,
         documents=_PACKED),
    Case(name="neighborhood_3d_tiles", mask=Neighborhood((3, 4, 6), (1, 0, 1), (1, 2, 2), shift_at_edges=False),
         q_len=72),
    Case(name="table", mask=Table(np.arange(49).reshape(7, 7) % 3 == 0, block_q=8, block_kv=16), q_len=50, kv_len=97),
    Case(name="predicate", mask=Causal() & ~Predicate(_remainders_agree), q_len=50),
    Case(name="per_head_gqa", mask=Causal() & PerHead((Window(left=9), Full(), Strided(2))), q_len=50, num_heads=6,
         num_kv_heads=2),
)  # fmt: skip
