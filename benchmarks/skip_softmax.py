"""How many tiles a softmax threshold leaves out, the error, and what it and maxima of blocks cost.

    python -m benchmarks.skip_softmax [--length 32768] [--heads 16] [--head-dim 128] [--threshold 1e-3]

times causal attention forward on three sets of random queries and keys: `random`, independent of each other, where no
tile is negligible; `local`, where each query is drawn to its own key; and `sink`, where all are drawn to the first key.
Beside the times: the share of tiles (64 queries by a block of keys) that are left out, told from the maxima of blocks,
and the error against attention to all keys.
"""

import argparse
import functools
import json
import math

import jax
import jax.numpy as jnp

from benchmarks.measure import time_calls
from pallas_kernels import BlockSizes, blockwise_attention_forward
from pallas_kernels.compiling import compile_all
from pallas_kernels.machine import describe
from pallas_kernels.mask import Causal

TILE = BlockSizes(block_q=64, block_kv=128)
_DATA = ("random", "local", "sink")
_DRAWN = 2.0  # times the root of the head dim is a query's logit with the key that it is drawn to


def inputs(data: str, length: int, num_heads: int, head_dim: int) -> tuple[jax.Array, ...]:
    """q, k and v, bfloat16 `[1, length, num_heads, head_dim]`."""
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (1, length, num_heads, head_dim), jnp.float32) for key in keys)
    if data != "random":
        q = 0.1 * q + _DRAWN * (k if data == "local" else k[:, :1])
    return tuple(x.astype(jnp.bfloat16) for x in (q, k, v))


def share_left_out(maxima_BNTS: jax.Array, threshold: float) -> jax.Array:
    """Of the tiles that causal attention visits, told from the maxima of each query and block of keys."""
    num_blocks = maxima_BNTS.shape[3]
    seen = jax.lax.cummax(maxima_BNTS, axis=3)
    seen = jnp.concatenate([jnp.full_like(seen[..., :1], -jnp.inf), seen[..., :-1]], axis=3)
    counts = ~((maxima_BNTS == -jnp.inf) | (maxima_BNTS < seen + math.log(threshold)))

    def any_of_tile(x):
        return x.reshape(*x.shape[:2], -1, TILE.block_q, num_blocks).any(axis=3)

    return 1 - jnp.sum(any_of_tile(counts)) / jnp.sum(any_of_tile(maxima_BNTS > -jnp.inf))


def measure(args: argparse.Namespace) -> dict:
    shape = jax.ShapeDtypeStruct((1, args.length, args.heads, args.head_dim), jnp.bfloat16)
    attend = functools.partial(
        blockwise_attention_forward, mask=Causal(), block_sizes=TILE, implementation=args.implementation
    )
    variants = {
        "plain": {},
        "threshold": {"skip_softmax_threshold": args.threshold},
        "maxima": {"block_maxima": BlockSizes(block_q=128, block_kv=128)},
        "maxima of queries": {"block_maxima": BlockSizes(block_q=1, block_kv=128)},
        "maxima of heads": {"block_maxima": BlockSizes(block_q=args.length, block_kv=args.length)},
    }
    programs = {
        name: functools.partial(jax.jit(functools.partial(attend, **options)).lower, shape, shape, shape)
        for name, options in variants.items()
    }
    compiled = compile_all(programs, progress=lambda message: None)
    for program in compiled.values():
        if isinstance(program, Exception):
            raise program
    share_of = jax.jit(functools.partial(share_left_out, threshold=args.threshold))
    result = {"machine": describe(), "arguments": vars(args), "data": {}}
    for data in _DATA:
        qkv = inputs(data, args.length, args.heads, args.head_dim)
        milliseconds = {}
        for _ in range(2):  # the clock falls under load: of two rounds the second
            for name in ("plain", "threshold", *(list(variants)[2:] if data == "random" else ())):
                timing = time_calls(functools.partial(compiled[name], *qkv), repetitions=args.repetitions)
                milliseconds[name] = 1e3 * timing.median
        (exact, exact_lse), (out, lse) = compiled["plain"](*qkv), compiled["threshold"](*qkv)
        share = share_of(compiled["maxima of queries"](*qkv)[2])
        result["data"][data] = {
            "ms": milliseconds,
            "ratio": {name: ms / milliseconds["plain"] for name, ms in milliseconds.items()},
            "share_left_out": float(share),
            "error_of_out": float(jnp.max(jnp.abs(out.astype(jnp.float32) - exact.astype(jnp.float32)))),
            "lost_probability": float(jnp.max(1 - jnp.exp(lse - exact_lse))),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=32768, help="tokens; a multiple of 128")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--threshold", type=float, default=1e-3)
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--implementation", default="xla")
    args = parser.parse_args()
    if args.length < 1 or args.length % TILE.block_kv:
        parser.error(f"--length: got {args.length}, wanted a multiple of {TILE.block_kv}")
    print(json.dumps(measure(args), indent=1))


if __name__ == "__main__":
    main()
