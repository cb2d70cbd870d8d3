"""The backward kernel of blockwise attention on Hopper GPUs (Mosaic GPU): dq, dk and dv in one walk.

Grid: one block of threads a multiprocessor, which does one item after the other (pallas_mosaic_gpu_queue.py); an item
is a block of 128 keys of one kv head, or, where those are few, of it and a share of its query heads. A producer
warpgroup copies its keys and values, and of each block of queries that its row of the schedule names the tiles of all
its query heads, with their dout, lse and delta, into shared memory (TMA, two buffers). Two consumers, 64 keys each,
keep dk and dv in registers over the whole item and hand a tile's dq, a step later, to a fourth warpgroup, the adder,
through shared memory (two buffers); it adds them into dq in device memory by TMA reductions, and makes the sums of
which the gradient of a bias is made.

On chip: k, v, q and dout (two tiles each), dS (two, for dq) and dq (two, float32) in shared memory; logits, their
gradients, dk and dv in registers. With heads of 192 there is room for one tile of dq, and for half the logits at a time
(`WideConsumer`, `WideAdder`).

dS = P (dP - delta) with P = exp(S - lse), dP = dout v^T; delta comes with dlse subtracted.

Many items add into one tile of dq, and float32 sums depend on their order. So unless told otherwise the adder waits for
its turn (pallas_mosaic_gpu_turns.py): a counter for each tile says how many have added. Items that visit scattered
blocks would wait long; what they add is in fixed point (pallas_mosaic_gpu_fixed_point.py), in any order.

Reference: Dao 2023, FlashAttention-2, arXiv:2307.08691, Algorithm 2; Shah et al. 2024, FlashAttention-3,
arXiv:2407.08608, Appendix B.
"""

import itertools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.blockwise import pallas_mosaic_gpu_queue as queue
from pallas_kernels.blockwise.pallas_mosaic_gpu_backward_consumer import Consumer, WideConsumer
from pallas_kernels.blockwise.pallas_mosaic_gpu_backward_feed import Adder, Producer, WideAdder
from pallas_kernels.blockwise.pallas_mosaic_gpu_backward_matmuls import PIECE
from pallas_kernels.blockwise.pallas_mosaic_gpu_backward_role import (
    AT_A_TIME,
    BLOCK,
    NUM_CONSUMERS,
    SLOTS,
    TILES,
    Config,
    Inputs,
    Outputs,
    Role,
    Shared,
    is_wide,
)
from pallas_kernels.blockwise.pallas_mosaic_gpu_bias import sums_type
from pallas_kernels.blockwise.pallas_mosaic_gpu_bias_sums import near_zeros
from pallas_kernels.blockwise.pallas_mosaic_gpu_turns import Plan
from pallas_kernels.wgmma import ROWS, TRANSFORMS

__all__ = ["AT_A_TIME", "BLOCK", "TILES", "Config", "Inputs", "differentiate"]

_DQ_TRANSFORMS = plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128)


def differentiate(inputs: Inputs, dq: jax.Array, plan: Plan, config: Config) -> tuple[jax.Array, ...]:
    """Runs the kernel: `dq` (of q's shape; float32, or int32 in units) with the rest of dq added, dk and dv, in whole
    blocks of keys.

    Where heads are shared out, dk and dv are of `K shares` heads. With `bias_gradient` also the sums of which that is
    made (`sums_type`), and those by distance or None (`near_zeros`).
    """
    B, T, N, H = inputs.q.shape
    (S, K), V = inputs.k.shape[1:3], inputs.v.shape[3]
    tile = TILES[H]
    is_added_to = config.shares > 1 or inputs.running is not None
    kv_shape = B, -(-S // BLOCK) * BLOCK, K * config.shares
    kv_dtype = jnp.float32 if is_added_to else inputs.k.dtype
    dq_ref = jax.new_ref(dq)
    counters = None
    if inputs.turns is not None:
        counters = jax.new_ref(jnp.zeros((B * N * -(-T // BLOCK) * (BLOCK // tile),), jnp.int32))
    near = None
    if config.adder_sums and inputs.bias.reach is not None:
        near = jax.new_ref(near_zeros(inputs.bias, (B, N, config.kv_len)))
    leaves, tree = jax.tree.flatten((inputs, dq_ref, counters, near, queue.new_notes(plan.deal.num_blocks)))

    def body(*refs):
        refs = iter(refs)
        inputs, dq_ref, counters, near, notes = jax.tree.unflatten(tree, itertools.islice(refs, tree.num_leaves))
        dk, dv, sums = next(refs), next(refs), next(refs) if config.bias_gradient else None
        outputs = Outputs(dq=dq_ref, counters=counters, dk=dk, dv=dv, sums=sums, near=near)
        shared = jax.tree.unflatten(shared_tree, refs)
        of_all = config, plan, inputs, notes, outputs, shared, lax.axis_index("warpgroup")
        consumer, adder = (WideConsumer, WideAdder) if is_wide(H) else (Consumer, Adder)
        for role, warpgroups, registers in (
            (consumer, range(NUM_CONSUMERS), 232),
            (Producer, range(NUM_CONSUMERS, NUM_CONSUMERS + 1), 24),
            (adder, range(NUM_CONSUMERS + 1, NUM_CONSUMERS + 2), 24),
        ):
            _run(role(*of_all), warpgroups, registers)

    def smem(*shape):
        return plgpu.SMEM(shape, inputs.q.dtype, transforms=TRANSFORMS)

    # With tiles of 128 queries barriers find no room beside them.
    stages_words = config.dropout_rate > 0 and tile == ROWS
    shared = Shared(
        k=smem(BLOCK, H),
        v=smem(BLOCK, V),
        q=smem(SLOTS, tile, H),
        dout=smem(SLOTS, tile, V),
        lse_and_delta=plgpu.SMEM((2, SLOTS, tile), jnp.float32),  # an array takes whole kilobytes
        words=plgpu.SMEM((SLOTS, tile), jnp.uint32) if stages_words else None,
        ds=smem(SLOTS, NUM_CONSUMERS, ROWS, tile),
        dq=plgpu.SMEM((1 if is_wide(H) else SLOTS, NUM_CONSUMERS, PIECE, PIECE), dq.dtype, transforms=_DQ_TRANSFORMS),
        kv_full=plgpu.Barrier(num_arrivals=2),
        tile_full=plgpu.Barrier(num_arrivals=5 if stages_words else 4, num_barriers=SLOTS),
        ds_full=plgpu.Barrier(num_arrivals=NUM_CONSUMERS, num_barriers=SLOTS),
        ds_free=plgpu.Barrier(num_arrivals=NUM_CONSUMERS + config.adder_sums, num_barriers=SLOTS),
        dq_free=plgpu.Barrier(num_barriers=SLOTS),
        item_full=plgpu.Barrier(num_barriers=queue.SLOTS),
    )
    shared_leaves, shared_tree = jax.tree.flatten(shared)
    out_types = [jax.ShapeDtypeStruct((*kv_shape, dim), kv_dtype) for dim in (H, V)]
    if config.bias_gradient:
        shape = B, N, kv_shape[1]
        out_types.append(sums_type(inputs.bias, shape, parts=1) if config.adder_sums else sums_type(inputs.bias, shape))
    gradients = plgpu.kernel(
        body,
        out_type=out_types,
        grid=(plan.deal.num_blocks,),
        grid_names=("block",),
        num_threads=NUM_CONSUMERS + 2,
        thread_name="warpgroup",
        scratch_types=shared_leaves,
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=config.interpret,
    )(*leaves)
    if config.bias_gradient:
        gradients.append(None if near is None else jax.freeze(near))
    return jax.freeze(dq_ref), *gradients


def _run(role: Role, warpgroups: range, registers: int) -> None:
    """Runs it on these warpgroups, with so many registers a thread."""

    @pl.when((role.warpgroup >= warpgroups.start) & (role.warpgroup < warpgroups.stop))
    def _():
        plgpu.set_max_registers(registers, action="increase" if registers > 128 else "decrease")
        role.run()
