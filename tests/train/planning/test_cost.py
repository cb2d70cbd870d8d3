"""The cost model: its bytes and FLOPs are those of compiled programs, its seconds near what H100s took."""

import collections
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx import AttentionSharding, MeshConfig, make_mesh, masks
from longctx.context_parallel import Layout, sharded_attention
from longctx.context_parallel.config import STRATEGIES
from longctx.context_parallel.traffic import Transfer
from pallas_kernels import BlockSizes, Tokens
from train.devices import device_table
from train.planning import hlo
from train.planning.auto import PLAINER_FIRST
from train.planning.cost import BACKWARD_MATMULS, Layer, RowLinks, Speeds, carried_bytes, layer_cost
from train.planning.links import Links, Place, groups_of, kind_of
from train.planning.work import Work

MEASURED = {
    "h100": "benchmarks/results/2026-11-27_nvidia-h100-80gb-hbm3_context_parallel.json",
    "h200": "benchmarks/results/2026-11-29_nvidia-h200_context_parallel.json",
}
FULL = Layer(mask=masks.full(), seq_len=128, degree=4, num_heads=8, num_kv_heads=4, head_dim=16, dtype="float32")


def gpus(count: int, hosts: int = 1, kind: str = "h100") -> Speeds:
    spec = device_table().devices[kind]
    links = Links(spec, [Place(i * hosts // count, (i,)) for i in range(count)])
    devices = np.arange(count)
    return Speeds(
        spec=spec,
        implementation="mosaic_gpu",
        links=lambda inner: RowLinks(links=links, devices=devices.reshape(1, -1, inner)),
    )


def compiled(layer: Layer, strategy: str, inner: int) -> hlo.Module:
    """Both passes of one layer; blocks as large as they can be, so that loops over them run once."""
    axes = dict(context_outer=layer.degree // inner, context_inner=inner)
    mesh = make_mesh(MeshConfig(**axes), jax.devices()[: layer.degree])
    spec = jax.NamedSharding(mesh, jax.P(None, tuple(axes)))
    q, kv = (
        jax.ShapeDtypeStruct((layer.rows, layer.seq_len, heads, layer.head_dim), layer.dtype, sharding=spec)
        for heads in (layer.num_heads, layer.num_kv_heads)
    )
    positions = jax.ShapeDtypeStruct((1, layer.seq_len), jnp.int32, sharding=spec)

    def both(q, k, v, positions):
        def attend(q, k, v):
            return sharded_attention(
                q, k, v, mask=layer.mask, tokens=Tokens.self_attention(positions, None),
                block_sizes=BlockSizes(block_q=128, block_kv=128),
                sharding=AttentionSharding(strategy=strategy, layout=Layout()),
            )  # fmt: skip

        # Behind a barrier, or XLA takes scores of the forward pass for those of the backward pass.
        out, vjp = jax.lax.optimization_barrier(jax.vjp(attend, q, k, v))
        return vjp(jnp.sin(out))

    with jax.set_mesh(mesh):
        return hlo.parse(jax.jit(both).lower(q, kv, kv, positions).compile().as_text())


def counted(module: hlo.Module, degree: int) -> tuple[float, collections.Counter]:
    """FLOPs of all matmuls of a program, and the bytes that a device sends of floats, by kind of collective."""
    work = Work(module)

    def of_computation(name):
        flops, sent = 0.0, collections.Counter()
        computation = module.computations[name]
        for instruction in computation.instructions:
            called = [name for names in instruction.called.values() for name in names]
            kind = kind_of(instruction)
            times, inside = 1, []
            if instruction.opcode == "while":
                times, inside = module.trip_count(instruction, computation) or 1, instruction.called["body"]
            elif instruction.opcode == "conditional":
                inside = [max(instruction.called["branches"], key=lambda name: of_computation(name)[0])]
            elif instruction.opcode == "call":
                inside = called
            elif kind is not None and kind[1] != "done" and instruction.shapes[0].dtype != "s32":
                size = max(map(len, groups_of(instruction.attributes, degree)))
                num_bytes = sum(shape.data_bytes for shape in instruction.shapes)
                share = {"collective-permute": 1, "reduce-scatter": size - 1}.get(kind[0], (size - 1) / size)
                sent[kind[0]] += num_bytes * share
            else:
                flops += work.flops(instruction, computation)
            for name in inside:
                more_flops, more_sent = of_computation(name)
                flops += times * more_flops
                sent.update({kind: times * count for kind, count in more_sent.items()})
        return flops, sent

    return of_computation(module.entry.name)


@pytest.mark.parametrize(
    ("strategy", "inner"), [("ring", 4), ("all_gather", 4), ("ulysses", 4), ("usp", 2), ("double_ring", 2)]
)
def test_flops_and_bytes_are_those_of_the_compiled_program(strategy, inner):
    setting = FULL.setting(Layout(), inner)
    flops, transfers = FULL.flops(strategy, setting), FULL.transfers(strategy, setting)
    stated = collections.Counter()
    for transfer in transfers:
        stated[transfer.kind] += transfer.total_bytes
    got_flops, got_sent = counted(compiled(FULL, strategy, inner), FULL.degree)
    assert got_sent == stated
    np.testing.assert_allclose(got_flops, (1 + BACKWARD_MATMULS) * flops.sum() / len(flops), rtol=1e-6)


@pytest.mark.parametrize(("kind", "num_rows"), [("h100", 8), ("h200", 4)])
@pytest.mark.parametrize("which", ["forward", "forward+backward"])
def test_the_model_is_near_what_was_measured(which, kind, num_rows):
    """Causal attention over 2 and 4 H100s and over 2 H200s, 8,192 tokens each: within 13 %."""
    with open(MEASURED[kind], encoding="utf-8") as file:
        rows = json.load(file)["rows"]
    found = 0
    for row in rows:
        split = re.fullmatch(r"(ring|all_gather|ulysses) (contiguous|zigzag)", row["implementation"])
        if row["which"] != which or not split or not row["case"].startswith("causal B1 S8192 a device 64/8 D128"):
            continue
        degree, mask = row["devices"], masks.causal() & masks.documents()
        layer = Layer(mask=mask, seq_len=8192 * degree, degree=degree, num_heads=64, num_kv_heads=8, head_dim=128)
        costs = layer_cost(layer, split[1], Layout(name=split[2]), degree, gpus(degree, kind=kind))
        seconds = costs["forward"].seconds + ("backward" in which) * costs["backward"].seconds
        assert 0.87 < 1e3 * seconds / row["median_ms"] < 1.13, row["implementation"]
        found += 1
    assert found == num_rows


def test_a_hop_waits_for_what_its_compute_does_not_hide():
    """Four devices with 64 tokens each: a hop's bytes take longer than its matmuls."""
    layer = Layer(mask=masks.full(), seq_len=256, degree=4, num_heads=4, num_kv_heads=4, head_dim=64)
    cost = layer_cost(layer, "ring", Layout(), 4, gpus(4))["forward"]
    spec = device_table().devices["h100"]
    of_a_hop = 4 * 64 * 64 * 4 * 64 / 510e12
    link = 1e-6 * spec.latency_us + 64 * 4 * 128 * 2 / (1e9 * spec.link_gb_per_s)
    assert cost.compute == pytest.approx(4 * of_a_hop)
    assert cost.waiting == pytest.approx(3 * (link - of_a_hop))
    assert cost.carried == pytest.approx(4 * 2 * 4 * 64 * 4 * 64 / (1e9 * spec.memory_gb_per_s))
    assert carried_bytes(layer, "backward", 1) == 0


def test_only_hops_between_groups_take_the_network():
    """Two hosts of four."""
    links = gpus(8, hosts=2).links(4)

    def seconds(**fields):
        return links.seconds(Transfer(phase="forward", count=1, num_bytes=2**26, **fields))

    inside, between, flat = (seconds(kind="collective-permute", level=level) for level in ("inner", "outer", None))
    assert 5 * inside < between == flat
    assert seconds(kind="all-to-all", level="inner") == inside < seconds(kind="all-to-all")


def test_every_strategy_has_a_place_in_the_order_of_plainness():
    assert set(PLAINER_FIRST) == {name for name, strategy in STRATEGIES.items() if strategy.platform is None}
