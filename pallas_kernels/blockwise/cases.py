"""The family's cases, as data: what its conformance suite runs."""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.bias import Alibi, Bias, KerpleLog, KerplePower, T5Buckets
from pallas_kernels.block_lists import schedule_of_lists
from pallas_kernels.block_sizes import BLOCKWISE_ATTENTION, BlockSizes
from pallas_kernels.dropout import Dropout
from pallas_kernels.mask import Causal, Full, Mask, PerHead, Prefix, SameDocument, Window
from pallas_kernels.mask_grids import Neighborhood
from pallas_kernels.mask_patterns import Chunked, GlobalQueries, Predicate, Strided, Summary, Table
from pallas_kernels.schedule import Schedule
from pallas_kernels.testing import packed_tokens
from pallas_kernels.tokens import PADDING_SEGMENT_ID, Tokens

_SINCE_RECORDED = ("sinks", "dropout_rate", "chosen", "cached", "bias")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chosen:
    """Blocks of keys that each block of queries attends to, up to three, drawn anew for each row and list.

    Attributes:
      num_lists: How many groups of query heads have lists of their own.
      block_sizes: Tokens a block holds.
    """

    num_lists: int
    block_sizes: BlockSizes

    def lists(self, batch_size: int, q_len: int, kv_len: int) -> np.ndarray:
        """Ascending, then -1: int32 `[B, lists, blocks of queries, 3]`; some rows are empty."""
        generator = np.random.default_rng(2)
        num_rows, num_columns = -(-q_len // self.block_sizes.block_q), -(-kv_len // self.block_sizes.block_kv)
        lists = np.full((batch_size, self.num_lists, num_rows, 3), -1, np.int32)
        for at in np.ndindex(lists.shape[:3]):
            num = min(generator.integers(0, 4), num_columns)
            lists[at][:num] = np.sort(generator.choice(num_columns, num, replace=False))
        return lists


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Case:
    """One call of the ops.

    Attributes:
      documents: Document lengths of each row of the batch; None for one document and no segment ids.
      stripe: If given, the sequence is permuted so that token i stands at (i % stripe, i // stripe): positions are
        then data, and out of order.
      all_ways: Whether the conformance suite also calls it without a cotangent of lse, and with its keys in two hops.
      block_sizes: None lets the implementation choose.
      sinks: Whether each query head has a learned sink; the mask of sink tokens is another thing.
      dropout_rate: The share of pairs that is dropped.
      chosen: What blocks are attended to; None for all that the mask allows.
      bias: The kind of additive bias, if any, with parameters of their own for each head.
      cached: If given, keys are the slots of a cache, of which the first so many of each row of the batch hold a token;
        the queries are the last tokens among them. Where a row holds fewer, its first queries see nothing.
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
    all_ways: bool = False
    block_sizes: BlockSizes | None = BlockSizes(block_q=16, block_kv=24)
    sinks: bool = False
    dropout_rate: float = 0.0
    chosen: Chosen | None = None
    cached: tuple[int, ...] | None = None
    bias: Literal["alibi", "t5", "t5_bidirectional", "kerple_log", "kerple_power"] | None = None

    def __repr__(self) -> str:
        """All that the case is. Fields that outcomes on record do not know of are left out at their defaults, so that
        the same case has the same text then and now."""
        fields = [f for f in dataclasses.fields(self) if f.name not in _SINCE_RECORDED or getattr(self, f.name)]
        return f"Case({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in fields)})"

    def tokens(self) -> Tokens | None:
        """The case's tokens, or None for the static path."""
        if self.cached is not None:
            tokens = self._cached_tokens()
        elif self.documents is not None:
            tokens = packed_tokens(self.documents, self.q_len)
        elif self.stripe is not None:
            tokens = Tokens.self_attention(np.arange(self.q_len, dtype=np.int32)[None])
        else:
            return None
        if self.stripe is not None:
            order = np.arange(self.q_len).reshape(-1, self.stripe).T.reshape(-1)
            tokens = jax.tree.map(lambda x: x[:, order], tokens)
        return jax.tree.map(jnp.asarray, tokens)

    def _cached_tokens(self) -> Tokens:
        lengths = np.array(self.cached, np.int32)[:, None]
        slots = np.arange(self.kv_len or self.q_len, dtype=np.int32)[None]
        q_positions = lengths - self.q_len + np.arange(self.q_len, dtype=np.int32)
        return Tokens(
            q_positions=q_positions,
            q_segment_ids=np.zeros_like(q_positions),
            kv_positions=slots,
            kv_segment_ids=np.where(slots < lengths, 0, PADDING_SEGMENT_ID).astype(np.int32),
        )

    def inputs(self, dtype: str, seed: int = 0) -> dict[str, jax.Array]:
        """q, k, v, cotangents dout and dlse, and sinks and a bias if any: normal, rounded to `dtype` (the last three
        float32, and those of a bias that must be positive are made so)."""
        B, T, S = self.batch_size, self.q_len, self.kv_len or self.q_len
        V = self.value_dim or self.head_dim
        shapes = {
            "q": (B, T, self.num_heads, self.head_dim),
            "k": (B, S, self.num_kv_heads, self.head_dim),
            "v": (B, S, self.num_kv_heads, V),
            "dout": (B, T, self.num_heads, V),
            "dlse": (B, self.num_heads, T),
        }
        if self.sinks:
            shapes["sinks"] = (self.num_heads,)
        # NumPy's, since JAX would compile a program for each shape.
        normal = np.random.default_rng(seed).standard_normal
        dtypes = dict.fromkeys(shapes, jnp.dtype(dtype)) | dict.fromkeys(("dlse", "sinks"), jnp.dtype("float32"))
        inputs = {name: jnp.asarray(normal(shape, np.float32).astype(dtypes[name])) for name, shape in shapes.items()}
        return inputs if self.bias is None else inputs | {"bias": self._bias(normal)}

    def _bias(self, normal: Callable[..., np.ndarray]) -> Bias:
        N = self.num_heads
        if self.bias in ("t5", "t5_bidirectional"):
            is_bidirectional = self.bias == "t5_bidirectional"
            table = jnp.asarray(normal((N, 16), np.float32))
            return T5Buckets(table=table, max_distance=50, bidirectional=is_bidirectional)
        first, second = (jnp.asarray(np.abs(normal((N,), np.float32)) + np.float32(0.1)) for _ in range(2))
        if self.bias == "alibi":
            return Alibi(slopes=first / 16)
        if self.bias == "kerple_log":
            return KerpleLog(r1=first, r2=second)
        return KerplePower(r1=first / 8, r2=jnp.minimum(second, 1.0))

    def dropout(self) -> Dropout | None:
        """The case's dropout, or None where nothing is dropped."""
        if not self.dropout_rate:
            return None
        seeds = np.random.default_rng(1).integers(2**32, size=(self.batch_size, self.num_heads), dtype=np.uint32)
        return Dropout(rate=self.dropout_rate, seeds=jnp.asarray(seeds))

    def schedule(self) -> Schedule | None:
        """Of the chosen blocks, or None where none were chosen."""
        if self.chosen is None:
            return None
        kv_len = self.kv_len or self.q_len
        return schedule_of_lists(
            jnp.asarray(self.chosen.lists(self.batch_size, self.q_len, kv_len)),
            mask=self.mask,
            tokens=self.tokens(),
            q_len=self.q_len,
            kv_len=kv_len,
            list_sizes=self.chosen.block_sizes,
            block_sizes=self.block_sizes or BLOCKWISE_ATTENTION["gpu"],
        )

    def arguments(self) -> dict:
        """The keyword arguments of the ops, but for sinks and bias, which are inputs: they have gradients."""
        return {
            "mask": self.mask,
            "tokens": self.tokens(),
            "schedule": self.schedule(),
            "scale": self.scale,
            "logits_soft_cap": self.logits_soft_cap,
            "dropout": self.dropout(),
            "block_sizes": self.block_sizes,
        }


def _remainders_agree(q_positions, kv_positions, q_segment_ids, kv_segment_ids):
    return (q_positions * kv_positions) % 3 == 1


_CHOSEN = Chosen(num_lists=1, block_sizes=BlockSizes(block_q=16, block_kv=24))
_PACKED = ((30, 1, 25, 8), (17, 1, 1, 40))

CASES = (
    Case(name="causal", mask=Causal(), q_len=64, all_ways=True),
    Case(name="full", mask=Full(), q_len=64),
    Case(name="one_token", mask=Causal(), q_len=1),
    Case(name="causal_T63", mask=Causal(), q_len=63),
    Case(name="causal_T1000", mask=Causal(), q_len=1000, batch_size=1,
         block_sizes=BlockSizes(block_q=128, block_kv=256)),
    Case(name="block_of_one", mask=Causal(), q_len=9, block_sizes=BlockSizes(block_q=1, block_kv=1)),
    Case(name="gqa", mask=Causal(), q_len=50, num_heads=6, num_kv_heads=2),
    Case(name="mqa", mask=Causal(), q_len=50, num_heads=4, num_kv_heads=1),
    Case(name="value_dim", mask=Causal(), q_len=50, head_dim=24, value_dim=8),
    Case(name="cross", mask=Full(), q_len=40, kv_len=97, all_ways=True),
    Case(name="cross_one_query", mask=Full(), q_len=1, kv_len=97, num_heads=4),
    Case(name="chunked_prefill", mask=Causal(offset=60), q_len=37, kv_len=97),
    Case(name="empty_rows", mask=Causal(offset=-20), q_len=64, all_ways=True),
    Case(name="all_empty", mask=Causal(offset=-64), q_len=64),
    Case(name="window", mask=Causal() & Window(left=20), q_len=100),
    Case(name="window_within_block", mask=Causal() & Window(left=3), q_len=63),
    Case(name="window_both_sides", mask=Window(left=10, right=5), q_len=63),
    Case(name="not_window", mask=Causal() & ~Window(left=10), q_len=63),
    Case(name="documents", mask=Causal() & SameDocument(), q_len=70, documents=_PACKED, all_ways=True),
    Case(name="documents_window_gqa", mask=Causal() & Window(left=9) & SameDocument(), q_len=70, num_heads=4,
         documents=_PACKED),
    Case(name="documents_bidirectional", mask=SameDocument(), q_len=70, documents=_PACKED),
    Case(name="prefix", mask=Causal() | Prefix(20), q_len=64),
    Case(name="documents_prefix", mask=(Causal() | Prefix(5)) & SameDocument(), q_len=70, documents=_PACKED),
    Case(name="striped", mask=Causal(), q_len=64, stripe=4, all_ways=True),
    Case(name="striped_documents_window", mask=Causal() & Window(left=12) & SameDocument(), q_len=72, stripe=8,
         documents=((40, 1, 20), (9, 30, 30))),
    Case(name="soft_cap", mask=Causal(), q_len=50, logits_soft_cap=2.0),
    Case(name="soft_cap_empty_rows_gqa", mask=Causal(offset=-9), q_len=50, num_heads=4, logits_soft_cap=2.0,
         all_ways=True),
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
    Case(name="learned_sinks_gqa_documents", mask=Causal() & SameDocument(), q_len=70, num_heads=6, num_kv_heads=2,
         documents=_PACKED, sinks=True),
    Case(name="learned_sinks_empty_rows", mask=Causal(offset=-20), q_len=64, sinks=True),
    Case(name="dropout_gqa_documents", mask=Causal() & SameDocument(), q_len=70, num_heads=6, num_kv_heads=2,
         documents=_PACKED, dropout_rate=0.3),
    Case(name="dropout_learned_sinks_soft_cap", mask=Causal(offset=-5), q_len=37, num_heads=4, dropout_rate=0.2,
         sinks=True, logits_soft_cap=2.0, all_ways=True),
    Case(name="bias_alibi_gqa_documents", mask=Causal() & SameDocument(), q_len=70, num_heads=6, num_kv_heads=2,
         documents=_PACKED, bias="alibi", all_ways=True),
    Case(name="bias_t5_striped_soft_cap", mask=Causal(), q_len=64, stripe=4, bias="t5", logits_soft_cap=2.0),
    Case(name="bias_t5_bidirectional_cross_empty_rows", mask=Causal(offset=20) & Window(left=70, right=200), q_len=97,
         kv_len=60, bias="t5_bidirectional", all_ways=True),
    Case(name="bias_kerple_log_sinks_dropout", mask=Full(), q_len=40, kv_len=97, num_heads=4, bias="kerple_log",
         sinks=True, dropout_rate=0.2),
    Case(name="bias_kerple_power_empty_rows", mask=Causal(offset=-20), q_len=64, bias="kerple_power"),
    Case(name="bias_alibi_chosen_by_kv_head", mask=Causal(), q_len=70, num_heads=4, bias="alibi",
         chosen=dataclasses.replace(_CHOSEN, num_lists=2)),
    Case(name="chosen", mask=Causal(), q_len=70, num_heads=4, chosen=_CHOSEN),
    Case(name="chosen_by_head_documents", mask=Causal() & SameDocument(), q_len=70, num_heads=4, documents=_PACKED,
         chosen=dataclasses.replace(_CHOSEN, num_lists=4)),
    Case(name="chosen_by_kv_head_cross_dropout", mask=Full(), q_len=40, kv_len=97, num_heads=4, dropout_rate=0.2,
         chosen=dataclasses.replace(_CHOSEN, num_lists=2)),
)  # fmt: skip


def _kernel_case(name: str, mask: Mask, q_len: int, *, head_dim: int = 64, **options) -> Case:
    return Case(name=f"{name}_D{head_dim}", mask=mask, q_len=q_len, head_dim=head_dim, block_sizes=None, **options)


_LONG_PACKED = ((300, 1, 129, 70), (128, 1, 1, 270))
_LARGE = BlockSizes(block_q=128, block_kv=128)
_BLOCKS = np.arange(20).reshape(4, 5) % 3 == 0

# What CASES ask for, at head dims that kernels are made for, and at lengths of several blocks of 64 or 128.
KERNEL_CASES = (
    _kernel_case("causal", Causal(), 384, all_ways=True),
    _kernel_case("causal", Causal(), 512, head_dim=128, all_ways=True),
    _kernel_case("full", Full(), 256, head_dim=128),
    _kernel_case("one_token", Causal(), 1),
    _kernel_case("one_token", Causal(), 1, head_dim=128),
    _kernel_case("causal_T63", Causal(), 63, head_dim=128),
    _kernel_case("causal_T129", Causal(), 129),
    _kernel_case("causal_T1000", Causal(), 1000, batch_size=1),
    _kernel_case("causal_T1000", Causal(), 1000, head_dim=128, batch_size=1),
    _kernel_case("gqa", Causal(), 300, head_dim=128, num_heads=6, num_kv_heads=2, all_ways=True),
    _kernel_case("gqa_heads_of_3_rows", Causal(), 300, num_heads=6, num_kv_heads=3, batch_size=3),
    _kernel_case("mqa", Causal(), 300, num_heads=4, num_kv_heads=1),
    _kernel_case("cross", Full(), 130, kv_len=517, all_ways=True),
    _kernel_case("cross_fewer_keys", Full(), 517, head_dim=128, kv_len=130),
    _kernel_case("cross_one_query", Full(), 1, head_dim=128, kv_len=517, num_heads=4),
    _kernel_case("cross_one_key", Full(), 200, kv_len=1, num_heads=4),
    _kernel_case("chunked_prefill", Causal(offset=400), 200, head_dim=128, kv_len=600),
    _kernel_case("empty_rows", Causal(offset=-200), 512, all_ways=True),
    _kernel_case("all_empty", Causal(offset=-256), 256, head_dim=128),
    _kernel_case("window", Causal() & Window(left=200), 700, all_ways=True),
    _kernel_case("window", Causal() & Window(left=127), 512, head_dim=128, num_heads=4),
    _kernel_case("window_within_block", Causal() & Window(left=3), 519, head_dim=128),
    _kernel_case("window_both_sides", Window(left=150, right=40), 519),
    _kernel_case("not_window", Causal() & ~Window(left=200), 519, head_dim=128),
    _kernel_case("documents", Causal() & SameDocument(), 512, documents=_LONG_PACKED, all_ways=True),
    _kernel_case("documents", Causal() & SameDocument(), 512, head_dim=128, documents=_LONG_PACKED, all_ways=True),
    _kernel_case("documents_of_blocks", Causal() & SameDocument(), 512, documents=((128, 128, 256), (64, 192, 256))),
    _kernel_case("documents_of_one_token", Causal() & SameDocument(), 200, documents=((1,) * 130, (99, 1, 1, 1, 90))),
    _kernel_case("documents_padding_row", Causal() & SameDocument(), 300, documents=((), (100, 29))),
    _kernel_case("documents_window_gqa", Causal() & Window(left=90) & SameDocument(), 512, head_dim=128, num_heads=4,
                 documents=_LONG_PACKED),
    _kernel_case("documents_bidirectional", SameDocument(), 512, documents=_LONG_PACKED),
    _kernel_case("prefix", Causal() | Prefix(200), 512, head_dim=128),
    _kernel_case("documents_prefix", (Causal() | Prefix(50)) & SameDocument(), 512, documents=_LONG_PACKED),
    _kernel_case("striped", Causal(), 512, stripe=4, head_dim=128, all_ways=True),
    _kernel_case("striped_documents_window", Causal() & Window(left=100) & SameDocument(), 512, stripe=8,
                 documents=_LONG_PACKED),
    _kernel_case("soft_cap", Causal(), 300, logits_soft_cap=2.0),
    _kernel_case("soft_cap_empty_rows_gqa", Causal(offset=-70), 300, head_dim=128, num_heads=4, logits_soft_cap=2.0,
                 all_ways=True),
    _kernel_case("soft_cap_documents_gqa", Causal() & SameDocument(), 512, num_heads=4, documents=_LONG_PACKED,
                 logits_soft_cap=2.0, all_ways=True),
    _kernel_case("soft_cap_large_logits", Causal(), 384, head_dim=128, logits_soft_cap=5.0, scale=1.0, sinks=True),
    _kernel_case("scale", Causal(), 300, head_dim=128, scale=0.2),
    _kernel_case("sinks_window", Causal() & (Prefix(4) | Window(left=100)), 700),
    _kernel_case("global_dilated", GlobalQueries(2) | Prefix(2) | (Strided(3) & Window(150, 150)), 519),
    _kernel_case("sparse_fixed_documents", Causal() & (Chunked(128) | Summary(128, 8)) & SameDocument(), 512,
                 head_dim=128, documents=_LONG_PACKED),
    _kernel_case("neighborhood_3d_tiles", Neighborhood((6, 8, 12), (1, 0, 1), (2, 4, 4), shift_at_edges=False), 576),
    _kernel_case("table", Table(_BLOCKS, block_q=128, block_kv=128), 500, head_dim=128, kv_len=600),
    _kernel_case("table_of_64", Table(np.tile(_BLOCKS, (2, 2)), block_q=64, block_kv=64), 512, kv_len=600),
    _kernel_case("predicate", Causal() & ~Predicate(_remainders_agree), 300, head_dim=128),
    _kernel_case("per_head_gqa", Causal() & PerHead((Window(left=99), Full(), Strided(2))), 300, num_heads=6,
                 num_kv_heads=2),
    _kernel_case("learned_sinks_gqa", Causal(), 300, num_heads=6, num_kv_heads=2, sinks=True, all_ways=True),
    _kernel_case("learned_sinks_gqa", Causal(), 384, head_dim=128, num_heads=4, sinks=True, all_ways=True),
    _kernel_case("learned_sinks_documents", Causal() & SameDocument(), 512, documents=_LONG_PACKED, sinks=True),
    _kernel_case("learned_sinks_documents", Causal() & SameDocument(), 512, head_dim=128, documents=_LONG_PACKED,
                 sinks=True),
    _kernel_case("learned_sinks_empty_rows", Causal(offset=-200), 512, sinks=True, all_ways=True),
    _kernel_case("learned_sinks_all_empty", Causal(offset=-256), 256, head_dim=128, sinks=True),
    _kernel_case("dropout_documents_gqa", Causal() & SameDocument(), 512, num_heads=4, documents=_LONG_PACKED,
                 dropout_rate=0.1, all_ways=True),
    _kernel_case("dropout", Causal(), 300, dropout_rate=0.1),
    _kernel_case("dropout", Causal(), 384, head_dim=128, dropout_rate=0.5),
    _kernel_case("dropout_gqa_soft_cap_sinks", Causal(offset=-70), 300, head_dim=128, num_heads=4, dropout_rate=0.2,
                 logits_soft_cap=2.0, sinks=True, all_ways=True),
    _kernel_case("dropout_documents_gqa", Causal() & SameDocument(), 512, head_dim=256, num_heads=4,
                 documents=_LONG_PACKED, dropout_rate=0.3, all_ways=True),
    _kernel_case("bias_alibi_gqa", Causal(), 450, head_dim=128, num_heads=4, bias="alibi", all_ways=True),
    _kernel_case("bias_alibi_documents", Causal() & SameDocument(), 512, documents=_LONG_PACKED, bias="alibi"),
    _kernel_case("bias_t5_gqa", Causal(), 450, num_heads=4, bias="t5", all_ways=True),
    _kernel_case("bias_t5_bidirectional_documents", SameDocument(), 512, head_dim=128, documents=_LONG_PACKED,
                 bias="t5_bidirectional"),
    _kernel_case("bias_t5_bidirectional_soft_cap", Full(), 300, head_dim=128, kv_len=400, bias="t5_bidirectional",
                 logits_soft_cap=2.0),
    _kernel_case("bias_t5_bidirectional_cross", Full(), 300, head_dim=128, kv_len=400, bias="t5_bidirectional"),
    _kernel_case("bias_kerple_log_sinks_dropout", Causal(offset=-20), 300, head_dim=128, kv_len=517, num_heads=4,
                 bias="kerple_log", sinks=True, dropout_rate=0.2),
    _kernel_case("bias_kerple_log", Causal(), 384, bias="kerple_log"),
    _kernel_case("bias_kerple_power_gqa", Causal(), 300, head_dim=256, num_heads=4, num_kv_heads=1,
                 bias="kerple_power"),
    _kernel_case("causal", Causal(), 384, head_dim=256, all_ways=True),
    _kernel_case("gqa_T129", Causal(), 129, head_dim=256, num_heads=4),
    _kernel_case("cross_mqa", Full(), 300, head_dim=256, kv_len=517, num_heads=4, num_kv_heads=1, all_ways=True),
    _kernel_case("empty_rows", Causal(offset=-200), 512, head_dim=256, sinks=True),
    _kernel_case("documents", Causal() & SameDocument(), 512, head_dim=256, documents=_LONG_PACKED, all_ways=True),
    _kernel_case("window_soft_cap", Causal() & Window(left=127), 512, head_dim=256, logits_soft_cap=2.0),
    _kernel_case("chosen_by_head", Causal(), 640, head_dim=256, num_heads=4,
                 chosen=Chosen(num_lists=4, block_sizes=_LARGE)),
    _kernel_case("values_of_128", Causal(), 384, head_dim=192, value_dim=128, all_ways=True),
    _kernel_case("values_of_128_gqa_documents", Causal() & SameDocument(), 512, head_dim=192, value_dim=128,
                 num_heads=4, documents=_LONG_PACKED, all_ways=True),
    _kernel_case("values_of_128_gqa_T1000", Causal(), 1000, head_dim=192, value_dim=128, num_heads=6, num_kv_heads=2,
                 batch_size=1),
    _kernel_case("values_of_128_window_cross_sinks", Causal(offset=200) & Window(left=150), 130, head_dim=192,
                 value_dim=128, kv_len=330, sinks=True),
    _kernel_case("values_of_128_chosen_by_head", Causal(), 640, head_dim=192, value_dim=128, num_heads=4,
                 chosen=Chosen(num_lists=4, block_sizes=_LARGE)),
    _kernel_case("values_of_128_cross_sinks_soft_cap", Full(), 130, head_dim=192, value_dim=128, kv_len=300, sinks=True,
                 logits_soft_cap=2.0),
    _kernel_case("causal", Causal(), 300, head_dim=96, all_ways=True),
    _kernel_case("causal_gqa", Causal(), 200, head_dim=80, num_heads=4),
    _kernel_case("causal", Causal(), 200, head_dim=192),
    _kernel_case("values_of_64", Causal(), 200, head_dim=128, value_dim=64),
    _kernel_case("values_of_128", Causal(), 200, value_dim=128),
    _kernel_case("per_head_blocks", PerHead((Chunked(128), Causal() & Chunked(256), Full(), Window(left=0, right=0))),
                 512, num_heads=4),
    _kernel_case("chosen_by_head", Full(), 640, num_heads=4, chosen=Chosen(num_lists=4, block_sizes=_LARGE)),
    _kernel_case("chosen_by_head", Causal(), 640, head_dim=128, num_heads=4,
                 chosen=Chosen(num_lists=4, block_sizes=_LARGE)),
    _kernel_case("chosen_by_kv_head_documents", Causal() & SameDocument(), 512, head_dim=128, num_heads=4,
                 documents=_LONG_PACKED, chosen=Chosen(num_lists=2, block_sizes=_LARGE)),
    _kernel_case("chosen_large_blocks", Causal(), 1000, num_heads=4, batch_size=1,
                 chosen=Chosen(num_lists=2, block_sizes=BlockSizes(block_q=256, block_kv=384))),
    _kernel_case("chosen_ragged_cross", Full(), 300, kv_len=517, head_dim=128, sinks=True,
                 chosen=Chosen(num_lists=1, block_sizes=_LARGE)),
    _kernel_case("decode", Causal() & SameDocument(), 1, kv_len=700, batch_size=3, num_heads=8,
                 cached=(517, 0, 700), all_ways=True),
    _kernel_case("decode", Causal() & SameDocument(), 1, kv_len=2048, head_dim=128, num_heads=8,
                 cached=(2048, 300)),
    _kernel_case("decode_some_tokens_gqa", Causal() & SameDocument(), 4, kv_len=1000, head_dim=128, batch_size=3,
                 num_heads=6, num_kv_heads=2, cached=(1000, 130, 2), all_ways=True),
    _kernel_case("decode_sinks_window", Causal() & (Prefix(4) | Window(left=100)) & SameDocument(), 8, kv_len=1400,
                 cached=(1391, 64)),
    _kernel_case("decode_many_rows", Causal() & SameDocument(), 16, kv_len=517, head_dim=128, num_heads=10,
                 num_kv_heads=1, cached=(517, 20)),
    _kernel_case("decode_cross_ragged", Full(), 3, kv_len=517, num_heads=4),
    _kernel_case("decode_learned_sinks", Causal() & SameDocument(), 2, kv_len=600, head_dim=128, num_heads=4,
                 cached=(0, 555), sinks=True, all_ways=True),
)  # fmt: skip
