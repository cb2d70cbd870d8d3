"""The TPU kernels of blockwise attention beside JAX's splash attention, as the TPU's compiler sees them: no TPU needed.

`python -m benchmarks.splash_tpu` compiles both ahead of time for each generation and length and prints a table: memory
that the program needs beside its arguments and results, what XLA counts of bytes moved, and how many bundles
(instructions of a TPU core, a cycle each or more) the compiler schedules for each kernel. Loops count once, so a kernel
is comparable with another of the same tiles. Of a causal mask ours holds the tile twice, with the pair test and
without, and computes one of them at a visit; splash holds it once, with a select of every pair. What ours spends inside
the diagonal is what it has without a mask, which is compiled too.

Needs libtpu (`pip install longctx-jax[plan]`). Nothing is run and nothing is timed.
"""

import argparse
import functools
import os
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels import blockwise_attention, markdown
from pallas_kernels.block_sizes import MOSAIC_TPU_ATTENTION, BlockSizes
from pallas_kernels.mask import Causal, Full, Mask

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128
LENGTHS = (8192, 32768)
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
_BUNDLES = re.compile(r"total scheduled bundles:\s+(\d+)")
_ANALYSIS = re.compile(r"\d+-(\w+?)(?:\.\d+)*-\d+-schedule-analysis_final_bundles\.txt")
_KERNELS = re.compile(r"blockwise_attention_\w+|splash_\w+")


class Found(NamedTuple):
    """What the compiler says of one program.

    Attributes:
      temporaries: Bytes beside arguments and results.
      moved: Bytes that XLA counts as read and written, kernels as they state it.
      bundles: By kernel.
    """

    temporaries: int
    moved: float
    bundles: Mapping[str, int]


def ours(sizes: BlockSizes, length: int, *, mask: Mask) -> Callable:
    """Attention and its gradients, `[1, T, N, H]`."""
    del length

    def run(q, k, v, dout):
        attend = functools.partial(blockwise_attention, mask=mask, implementation="mosaic_tpu", block_sizes=sizes)
        out, vjp = jax.vjp(attend, q, k, v)
        return out, *vjp(dout)

    return run


def splashs(
    sizes: BlockSizes, length: int, *, mask: Callable[[tuple[int, int]], splash_mask.Mask], fused: bool
) -> Callable:
    """The same by splash attention in tiles of the same size, with heads before tokens as it wants them."""
    mask = splash_mask.MultiHeadMask([mask((length, length))] * NUM_HEADS)
    q, kv = sizes.block_q, sizes.block_kv
    of_dq = {} if fused else {"block_q_dq": q, "block_kv_dq": kv}
    blocks = splash.BlockSizes(
        block_q=q, block_kv=kv, block_kv_compute=kv, block_q_dkv=q, block_kv_dkv=kv, block_kv_dkv_compute=kv,
        use_fused_bwd_kernel=fused, **of_dq,
    )  # fmt: skip
    kernel = splash.make_splash_mha_single_device(mask, block_sizes=blocks)

    def run(q, k, v, dout):
        out, vjp = jax.vjp(lambda q, k, v: kernel(q * HEAD_DIM**-0.5, k, v), q, k, v)
        return out, *vjp(dout)

    return run


IMPLEMENTATIONS: Mapping[str, Callable[[BlockSizes, int], Callable]] = {
    "ours": functools.partial(ours, mask=Causal()),
    "splash": functools.partial(splashs, mask=splash_mask.CausalMask, fused=False),
    "splash, fused backward": functools.partial(splashs, mask=splash_mask.CausalMask, fused=True),
    "ours without a mask": functools.partial(ours, mask=Full()),
    "splash without a mask": functools.partial(splashs, mask=splash_mask.FullMask, fused=False),
}


def examine(name: str, generation: str, length: int, dump: Path) -> Found | str:
    """Compiles one of IMPLEMENTATIONS, forward and backward; the sentence of the compiler where it does not fit.

    Args:
      dump: Where libtpu writes what it schedules, as `main` told it to.
    """
    device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[generation]).devices[0]
    mesh = jax.sharding.Mesh(np.array([device]), ("device",))

    def array(heads):
        shape = (1, length, heads, HEAD_DIM) if name.startswith("ours") else (heads, length, HEAD_DIM)
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec()))

    arguments = [array(heads) for heads in (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS, NUM_HEADS)]
    for file in dump.iterdir():
        file.unlink()
    run = IMPLEMENTATIONS[name](
        MOSAIC_TPU_ATTENTION[generation], length
    )  # splash makes arrays, which no TPU here holds
    with jax.set_mesh(mesh):
        try:
            program = jax.jit(run).lower(*arguments).compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return str(error).splitlines()[0]
    stats = program.memory_analysis()
    return Found(stats.temp_size_in_bytes, program.cost_analysis()["bytes accessed"], bundles_of(dump))


def bundles_of(dump: Path) -> dict[str, int]:
    """Bundles of the final schedule of each attention kernel, from what libtpu wrote."""
    found = {}
    for file in sorted(dump.iterdir()):
        named = _ANALYSIS.fullmatch(file.name)
        if named and _KERNELS.fullmatch(named[1]):
            counted = _BUNDLES.search(file.read_text())
            found[named[1]] = int(counted[1])
    return found


def table(found: Mapping[tuple[str, int, str], Found | str]) -> str:
    """Markdown, by (generation, length, implementation)."""
    rows = [["TPU", "T = S", "", "temporaries, MiB", "moved, MiB", "bundles of each kernel"]]
    for (generation, length, name), one in found.items():
        if isinstance(one, str):
            rows.append([generation, f"{length:,}", name, one, "", ""])
            continue
        bundles = ", ".join(f"`{kernel}` {number:,}" for kernel, number in one.bundles.items())
        mib = [f"{x / 2**20:,.0f}" for x in (one.temporaries, one.moved)]
        rows.append([generation, f"{length:,}", name, *mib, bundles])
    return markdown.table(rows)


def main() -> None:
    """Compiles what the command line says, and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.splash_tpu", description=__doc__)
    parser.add_argument("--generations", nargs="+", choices=TOPOLOGIES, default=list(TOPOLOGIES))
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS), help="tokens, multiples of 1024")
    parser.add_argument(
        "--of", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS), help="what to compile"
    )
    options = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        # Read once, when libtpu is loaded.
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        for generation in options.generations:
            for length in options.lengths:
                for name in options.of:
                    found[generation, length, name] = examine(name, generation, length, Path(folder))
                    print(f"{generation} {length} {name}: {found[generation, length, name]}", file=sys.stderr)
    print(table(found))


if __name__ == "__main__":
    main()
