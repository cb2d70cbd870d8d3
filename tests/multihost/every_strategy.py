"""One process of a run in which every strategy, and state passing, is compared with one device.

They run over the devices of all processes.

python every_strategy.py COORDINATOR_ADDRESS NUM_PROCESSES PROCESS_ID: prints one line a strategy.
"""

import functools
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from longctx import AttentionSharding, MeshConfig, make_mesh, masks
from longctx.context_parallel import Layout, sharded_attention, sharded_linear_attention
from longctx.context_parallel.config import STRATEGIES
from longctx.context_parallel.layout import permute
from pallas_kernels import Tokens, blockwise_attention
from pallas_kernels.linear.api import linear_attention
from pallas_kernels.testing import packed_tokens
from train.distributed import DistributedConfig, initialize

LENGTH, LAYOUT = 64, Layout(name="zigzag")
WINDOW = masks.sliding_window(left=3) & masks.documents()
CAUSAL = masks.causal() & masks.documents()


def out_and_gradients(attend, q, k, v, dout):
    out, vjp = jax.vjp(attend, q, k, v)
    return out, *vjp(dout)


def compare(name: str, one: Callable, many: Callable, num_kv_heads: int, mesh: jax.sharding.Mesh) -> None:
    """Compares functions of q, k, v and tokens: `one` on one device with `many` over the mesh."""
    heads = (8, num_kv_heads, num_kv_heads, 8)
    keys = jax.random.split(jax.random.key(0), 4)
    arrays = [np.asarray(jax.random.normal(k, (2, LENGTH, n, 8))) for k, n in zip(keys, heads, strict=True)]
    tokens = packed_tokens(((30, 1, 20), (64,)), LENGTH)

    def on_one_device(*arrays):
        return out_and_gradients(lambda *qkv: one(*qkv, tokens=tokens), *arrays)

    order = LAYOUT.order(LENGTH, 8)
    wanted = [permute(np.asarray(x), order) for x in jax.jit(on_one_device)(*arrays)]
    spec = jax.NamedSharding(mesh, jax.P(None, ("context_outer", "context_inner")))

    def placed(x):
        x = permute(np.asarray(x), order)
        return jax.make_array_from_callback(x.shape, spec, lambda index: x[index])

    def on_all_devices(positions, segment_ids, *arrays):
        tokens = Tokens.self_attention(positions, segment_ids)
        return out_and_gradients(lambda *qkv: many(*qkv, tokens=tokens), *arrays)

    with jax.set_mesh(mesh):
        sides = placed(tokens.kv_positions), placed(tokens.kv_segment_ids)
        got = jax.block_until_ready(jax.jit(on_all_devices)(*sides, *map(placed, arrays)))
    for result, ours, theirs in zip(("out", "dq", "dk", "dv"), got, wanted, strict=True):
        for shard in ours.addressable_shards:
            np.testing.assert_allclose(shard.data, theirs[shard.index], atol=2e-5, err_msg=f"{name}: {result}")
    print(f"{name} over {jnp.size(mesh.device_ids)} devices of {jax.process_count()} processes", flush=True)


def linear(attend: Callable, **options) -> Callable:
    decay = -jnp.linspace(0.01, 0.3, 8)
    return lambda q, k, v, tokens: attend(
        q, k, v, decay=decay, segment_ids=jnp.asarray(tokens.q_segment_ids), **options
    )


def main() -> None:
    address, num_processes, rank = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    here = dict(coordinator_address=address, num_processes=num_processes, process_id=rank)
    devices = initialize(DistributedConfig(virtual_cpu_devices=8, initialization_timeout=60, **here))
    mesh = make_mesh(MeshConfig(context_outer=num_processes, context_inner=8 // num_processes), devices)
    for strategy in (name for name, strategy in STRATEGIES.items() if strategy.platform is None):
        mask = WINDOW if strategy == "halo" else CAUSAL
        sharding = AttentionSharding(strategy=strategy, layout=LAYOUT)
        one = functools.partial(blockwise_attention, mask=mask)
        compare(strategy, one, functools.partial(sharded_attention, mask=mask, sharding=sharding), 2, mesh)
    state_passing = linear(sharded_linear_attention, sharding=AttentionSharding(layout=LAYOUT))
    compare("state passing", linear(linear_attention), state_passing, 8, mesh)


if __name__ == "__main__":
    main()
