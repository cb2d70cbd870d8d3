"""Native Sparse Attention: every query attends to compressed blocks, to blocks that it selects, and to a window.

The compressed and the sliding branch are calls of blockwise attention, the selected one is `selected_attention`. What
is selected follows from the attention to compressed keys, whose lse makes probabilities of its logits (nsa_choose.py).
"""

from typing import NamedTuple, NoReturn

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.arguments import check_heads
from pallas_kernels.blockwise.api import blockwise_attention
from pallas_kernels.dispatch import Implementation
from pallas_kernels.mask import Causal, Mask, SameDocument, Window
from pallas_kernels.sparse.nsa_blocks import BlockTables, NsaSizes, TokenBlocks, blocks_of, compressed_tokens
from pallas_kernels.sparse.nsa_choose import choose_blocks
from pallas_kernels.sparse.nsa_selected import selected_attention
from pallas_kernels.tokens import Tokens

COMPRESSED_MASK = Causal() & SameDocument()
"""The mask of the compressed branch: a key stands where the last token of its block does."""

_SIZES = NsaSizes()


class BranchKeys(NamedTuple):
    """Keys and values of a branch, which has its own."""

    k: jax.Array
    v: jax.Array


def nsa_attention(
    q: Float[Array, "B T N H"],
    compressed: BranchKeys,
    selected: BranchKeys,
    sliding: BranchKeys,
    gates: Float[Array, "B T N 3"],
    *,
    sizes: NsaSizes = _SIZES,
    segment_ids: Int32[Array, "#B T"] | None = None,
    scale: float | None = None,
    implementation: Implementation | None = None,
    deterministic: bool = True,
) -> Float[Array, "B T N V"]:
    """Causal attention to compressed blocks, to the blocks of highest scores and to the nearest tokens, gated.

    out[t] = sum_c gates[t, c] Attn(q[t], K_c, V_c)
      compressed: the keys of all blocks of compress_block tokens that end at or before t
      selected: the tokens up to t of num_blocks blocks of block_size tokens: the first, the one before t's own, its
        own, and those of highest score, which is the compressed branch's probability on them, over a group's heads
      sliding: the last `window` tokens, t's own among them

    Each document is cut into blocks from its own start. The heads of a group, which read one kv head, select the same
    blocks. Of equal scores the earlier block. Nothing is differentiated through the selection.

    Args:
      q: Queries; N is a multiple of K, and query head n reads kv head n // (N / K).
      compressed: One key and value a compressed block, `[B, M, K, H or V]`, M and their order those of
        `compressed_starts`; what the learned compression makes of `tokens_of_blocks`.
      selected, sliding: Keys and values of the same tokens as q, `[B, T, K, H or V]`.
      gates: The weight of each branch for each query and head, in the order of the arguments; after their sigmoid.
      sizes: How much each branch sees.
      segment_ids: Document of each token, negative for padding, in the order of the sequence: the tokens of a document
        stand together. None means one document a row.
      scale: Multiplies q.k; default H ** -0.5.
      implementation: As `blockwise_attention` and `selected_attention`, of which it names both's.
      deterministic: As `blockwise_attention`.
    Returns: out in q's dtype; zero for padding. Differentiable in q, keys, values and gates.
    Raises: ValueError where the call is wrong; as those ops where no implementation serves it.
    Memory: O(B T N (H + V)), three times, and the scores of a group of queries.
    Cost: attention 2 B N T (T / (2 compress_stride) + num_blocks block_size + window) (H + V) FLOPs, and scores
      B N T T / compress_stride H once more.
    Reference: Yuan et al. 2025, Native Sparse Attention, arXiv:2502.11089, section 3.
    """
    check_nsa_call("nsa_attention", q, compressed, selected, sliding, gates, sizes=sizes, segment_ids=segment_ids)
    tables, queries = blocks_of(segment_ids, q.shape[1], sizes)
    options = dict(scale=scale, implementation=implementation, deterministic=deterministic)
    of_compressed, of_selected = compressed_and_selected(
        q, compressed, selected, tables, queries, sizes=sizes, **options
    )
    # Left to the implementation where tokens are in order, which may know them as constants.
    tokens = None if segment_ids is None else Tokens.self_attention(queries.place, queries.segment)
    of_sliding = blockwise_attention(q, *sliding, mask=sliding_mask(sizes), tokens=tokens, **options)
    return gated_sum((of_compressed, of_selected, of_sliding), gates)


def compressed_starts(segment_ids: Int32[Array, "b T"] | None, length: int, sizes: NsaSizes) -> Int32[Array, "b M"]:
    """The token at which each compressed block of a row begins, -1 where there is none.

    Raises: ValueError where segment_ids are not int32 `[b, length]`.
    """
    if segment_ids is not None and (
        segment_ids.ndim != 2
        or 0 in segment_ids.shape
        or segment_ids.shape[1] != length
        or segment_ids.dtype != jnp.int32
    ):
        raise ValueError(
            f"compressed_starts: segment_ids is {segment_ids.dtype}{list(segment_ids.shape)}, wanted int32 "
            f"[rows, {length}]"
        )
    return blocks_of(segment_ids, length, sizes)[0].compressed_start


def compressed_and_selected(
    q: Float[Array, "B T N H"],
    compressed: BranchKeys,
    selected: BranchKeys,
    tables: BlockTables,
    queries: TokenBlocks,
    *,
    sizes: NsaSizes,
    scale: float | None,
    implementation: Implementation | None,
    deterministic: bool = True,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N V"]]:
    """The results of the two branches that see the whole document, of some queries.

    Args:
      compressed, selected: Of the whole row.
      tables: The blocks of the whole row.
      queries: Where the queries stand.
    """
    scale = q.shape[3] ** -0.5 if scale is None else scale
    of_compressed, lse = blockwise_attention(
        q, *compressed, mask=COMPRESSED_MASK, tokens=compressed_tokens(tables, queries), scale=scale,
        implementation=implementation, deterministic=deterministic, return_lse=True,
    )  # fmt: skip
    choices = choose_blocks(
        q, compressed.k, lse, tables, queries, sizes=sizes, scale=scale, implementation=implementation
    )
    of_selected, _ = selected_attention(
        q, *selected, choices, tables.block_start, queries.row, block_size=sizes.block_size, scale=scale,
        implementation=implementation,
    )  # fmt: skip
    return of_compressed, of_selected


def sliding_mask(sizes: NsaSizes) -> Mask:
    """The mask of the sliding branch."""
    return Window(sizes.window - 1, 0) & SameDocument()


def gated_sum(
    branches: tuple[Float[Array, "B T N V"], ...], gates: Float[Array, "B T N branches"]
) -> Float[Array, "B T N V"]:
    """The sum of the branches' results times their gates, in float32."""
    weights = jnp.unstack(gates.astype(jnp.float32), axis=-1)
    total = sum(w[..., None] * out.astype(jnp.float32) for w, out in zip(weights, branches, strict=True))
    return total.astype(branches[0].dtype)


def check_nsa_call(
    op: str,
    q,
    compressed: BranchKeys,
    selected: BranchKeys,
    sliding: BranchKeys,
    gates,
    *,
    sizes: NsaSizes,
    segment_ids,
    num_compressed: int | None = None,
) -> None:
    """Raises ValueError, naming the argument, unless these make a call of `nsa_attention`.

    `num_compressed` is how many compressed keys are wanted, where that is not what a row has.
    """

    def wrong(message: str) -> NoReturn:
        raise ValueError(f"{op}: {message}")

    branches = {"compressed": compressed, "selected": selected, "sliding": sliding}
    keys = {f"{name}.{side}": x for name, of in branches.items() for side, x in of._asdict().items()}
    check_heads(op, {"q": q} | keys)
    B, T, N, H = q.shape
    num_compressed = sizes.num_compressed(T) if num_compressed is None else num_compressed
    K, V = selected.k.shape[2], selected.v.shape[3]
    for name, (k, v) in branches.items():
        length = num_compressed if name == "compressed" else T
        if k.shape != (B, length, K, H) or v.shape != (B, length, K, V):
            wrong(
                f"{name} has keys {k.shape} and values {v.shape}, wanted {(B, length, K, H)} and {(B, length, K, V)}, "
                "of q's rows and head dim and the selected branch's heads"
            )
    if N % K:
        wrong(f"{N} query heads over {K} kv heads, wanted a multiple")
    if gates.shape != (B, T, N, 3) or not jnp.issubdtype(gates.dtype, jnp.floating):
        wrong(f"gates is {gates.dtype}{list(gates.shape)}, wanted floats [{B}, {T}, {N}, 3], one a branch")
    if segment_ids is not None and (segment_ids.shape not in ((B, T), (1, T)) or segment_ids.dtype != jnp.int32):
        wrong(f"segment_ids is {segment_ids.dtype}{list(segment_ids.shape)}, wanted int32 [{B} or 1, {T}]")
