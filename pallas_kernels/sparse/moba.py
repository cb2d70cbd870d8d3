"""Mixture of Block Attention: every query attends to its own chunk, and to the chunks that it scores highest.

Two calls of blockwise attention make it, so it runs wherever that does: the queries against their own chunks, causal,
and the queries gathered by the chunks that they chose (moba_route.py) against those, in full. A query's results are
merged by their lse. In the backward pass both calls are given the merged lse, and the same part of the gradient that
follows from the merged out, so their gradients add up.
"""

import dataclasses
import functools
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels.arguments import check_qkv
from pallas_kernels.blockwise.api import blockwise_attention_backward, blockwise_attention_forward
from pallas_kernels.dispatch import Implementation
from pallas_kernels.mask import Causal, Mask, SameDocument
from pallas_kernels.mask_patterns import Chunked
from pallas_kernels.online_softmax import delta_of
from pallas_kernels.saved import as_attention
from pallas_kernels.schedule import make_schedule
from pallas_kernels.sparse.moba_keys import ChunkKeys
from pallas_kernels.sparse.moba_route import (
    Chunks,
    chunk_sums,
    chunks_in_order,
    number_chunks,
    route_queries,
)
from pallas_kernels.tokens import Leaf, Tokens, validate_tokens

LOCAL_MASK = Causal() & SameDocument()
"""The mask of the call within chunks: a token's place in its chunk is its position, the chunk's number its segment."""


def moba_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    *,
    chunk_size: int,
    top_k: int,
    tokens: Tokens | None = None,
    scale: float | None = None,
    implementation: Implementation | None = None,
    deterministic: bool = True,
    return_lse: bool = False,
) -> Float[Array, "B T N V"] | tuple[Float[Array, "B T N V"], Float32[Array, "B N T"]]:
    """Causal attention to a query's own chunk and to the top_k - 1 earlier ones whose mean keys it scores highest.

    mu[j] = mean of the keys of chunk j, in float32
    out[t] = sum_s softmax_s(scale q[t].k[s]) v[s],  s <= t in t's chunk, all s in the chunks j of highest q[t].mu[j]

    Chunks are cut by position within each document, position // chunk_size. Every query token and head chooses on its
    own, among the whole chunks before its own in its document; of equal scores the earlier chunk. Nothing is
    differentiated through the choice.

    Args:
      q: Queries; N is a multiple of K, and query head n reads kv head n // (N / K).
      k, v: Keys and values of the same tokens, S = T; the keys are scored as they are, so after any rotary embedding.
      chunk_size: Tokens of a chunk.
      top_k: Chunks a query attends to at most, its own among them; 1 is attention within chunks alone.
      tokens: Positions and segment ids, of self-attention, in the order of the sequence: the tokens of a document stand
        together, with ascending positions. None means arange and one document.
      scale: Multiplies q.k; default H ** -0.5.
      implementation, deterministic: As `blockwise_attention`.
      return_lse: Whether to return lse too.
    Returns: out in q's dtype; with return_lse also lse, natural log, float32, whose cotangent is honoured. Padding is
      out = 0, lse = -inf, gradient 0.
    Raises: ValueError where the call is wrong; as `blockwise_attention` where no implementation serves it.
    Memory: O(B T N top_k (H + V)) for the gathered queries and their results.
    Cost: attention 2 B N T chunk_size (top_k - 1/2) (H + V) FLOPs; the scores 2 B N T (T / chunk_size) H, which is more
      from T = 2 chunk_size ** 2 top_k on.
    Reference: Lu et al. 2025, MoBA: Mixture of Block Attention for Long-Context LLMs, arXiv:2502.13189, Algorithm 1.
    """
    check_moba_call("moba_attention", q, k, v, chunk_size=chunk_size, top_k=top_k, tokens=tokens)
    call = _Call(
        chunk_size=chunk_size,
        top_k=top_k,
        scale=q.shape[3] ** -0.5 if scale is None else float(scale),
        implementation=implementation,
        deterministic=deterministic,
        return_lse=return_lse,
        in_order=not jax.tree.leaves(tokens),
    )
    return _attention(call, q, k, v, tokens or Tokens())


def check_moba_call(op: str, q, k, v, *, chunk_size: int, top_k: int, tokens: Tokens | None) -> None:
    """Raises ValueError, naming the argument, unless these make a call of `moba_attention`."""

    def wrong(message: str) -> NoReturn:
        raise ValueError(f"{op}: {message}")

    check_qkv(op, q, k, v)
    if not q.shape[:2] == k.shape[:2] == v.shape[:2] or k.shape[2] != v.shape[2]:
        wrong(f"q, k, v have shapes {q.shape}, {k.shape}, {v.shape}; wanted one B and T, and k and v of one K")
    if q.shape[3] != k.shape[3]:
        wrong(f"head dim of q is {q.shape[3]} and of k {k.shape[3]}, wanted the same")
    if q.shape[2] % k.shape[2]:
        wrong(f"{q.shape[2]} query heads over {k.shape[2]} kv heads, wanted a multiple")
    if chunk_size < 1:
        wrong(f"chunk_size: got {chunk_size}, wanted a number of tokens >= 1")
    if top_k < 1:
        wrong(f"top_k: got {top_k}, wanted a number of chunks >= 1, the query's own among them")
    if tokens is not None:
        validate_tokens(op, tokens, q.shape[0], q.shape[1], q.shape[1])
        for name in ("positions", "segment_ids"):
            if getattr(tokens, f"q_{name}") is None and getattr(tokens, f"kv_{name}") is not None:
                wrong(
                    f"tokens.kv_{name} without q_{name}: queries and keys are the same tokens; use "
                    "Tokens.self_attention"
                )


def num_choices(length: int, chunk_size: int, top_k: int) -> int:
    """Chunks beside its own that a query of a sequence of this length chooses at most."""
    return min(top_k - 1, length // chunk_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Call:
    """What is static of a call; hashable. `in_order` says that tokens are arange and one document."""

    chunk_size: int
    top_k: int
    scale: float
    implementation: Implementation | None
    deterministic: bool
    return_lse: bool
    in_order: bool

    @property
    def options(self) -> dict[str, Any]:
        return {"scale": self.scale, "implementation": self.implementation}

    def local_part(self, chunks: Chunks) -> "_Part":
        """The attention of queries to their own chunks."""
        if self.in_order:  # nothing of it depends on data: left to the implementation, which may know it as constants
            return _Part(mask=Causal() & Chunked(self.chunk_size), tokens=Tokens(), schedule=None)
        tokens, length = Tokens.self_attention(chunks.offset, chunks.own), chunks.own.shape[1]
        schedule = make_schedule(LOCAL_MASK, tokens, q_len=length, kv_len=length)
        return _Part(mask=LOCAL_MASK, tokens=tokens, schedule=schedule)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Part:
    """Which pairs attend in one of the two calls."""

    mask: Mask = dataclasses.field(metadata={"static": True})
    tokens: Leaf
    schedule: Leaf

    @property
    def options(self) -> dict[str, Any]:
        return {"mask": self.mask, "tokens": self.tokens, "schedule": self.schedule}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(call: _Call, q, k, v, tokens: Tokens):
    return _forward(call, q, k, v, tokens)[0]


def _forward(call: _Call, q, k, v, tokens: Tokens):
    B, T = q.shape[:2]
    if call.in_order:
        chunks = chunks_in_order(T, call.chunk_size)
    else:
        chunks = number_chunks(tokens.queries(T), call.chunk_size)
    local, route, keys, routed = call.local_part(chunks), None, None, None
    out, lse = blockwise_attention_forward(q, k, v, **local.options, **call.options)
    if choices := num_choices(T, call.chunk_size, call.top_k):
        means = chunk_sums(k, chunks.whole, T // call.chunk_size) / call.chunk_size
        route = route_queries(q, means, chunks, choices)
        keys = ChunkKeys.of(chunks, call.chunk_size, in_order=call.in_order)
        of_lists = keys.tokens(route.query.shape[1])
        routed = _Part(mask=keys.mask, tokens=of_lists, schedule=keys.schedule(route, B))
        results = blockwise_attention_forward(
            route.of_queries(q), keys.of_tokens(k), keys.of_tokens(v), **routed.options, **call.options
        )
        out, lse = route.merge((out, lse), results)
    out, lse = as_attention((out, lse))
    return (out, lse) if call.return_lse else out, (q, k, v, out, lse, local, route, keys, routed)


def _backward(call: _Call, saved, cotangents):
    q, k, v, out, lse, local, route, keys, routed = saved
    dout, dlse = cotangents if call.return_lse else (cotangents, None)
    options = call.options | {"deterministic": call.deterministic}
    if route is None:
        return *blockwise_attention_backward(q, k, v, out, lse, dout, dlse, **local.options, **options), None
    # Gathered, a number a query rather than its result.
    dlse = -delta_of(out, dout, dlse)
    q_of_lists = route.of_queries(q)
    dq_of_lists, *dkv_of_chosen = blockwise_attention_backward(
        q_of_lists,
        keys.of_tokens(k),
        keys.of_tokens(v),
        None,
        route.of_lse(lse, fill=-jnp.inf),  # where lists are filled up nothing attends
        route.of_queries(dout),
        route.of_lse(dlse, fill=0.0),
        accumulate=(jnp.zeros(q_of_lists.shape, jnp.float32), None, None),
        **routed.options,
        **options,
    )
    dq = route.sum_of_choices(dq_of_lists, q.shape[2])
    dq, *dkv = blockwise_attention_backward(
        q, k, v, None, lse, dout, dlse, accumulate=(dq, None, None), **local.options, **options
    )
    dkv = (
        (own.astype(jnp.float32) + keys.to_tokens(x, q.shape[1]).astype(jnp.float32)).astype(own.dtype)
        for own, x in zip(dkv, dkv_of_chosen, strict=True)
    )
    return dq.astype(q.dtype), *dkv, None


_attention.defvjp(_forward, _backward)
