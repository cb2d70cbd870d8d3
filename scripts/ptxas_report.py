"""What ptxas says of the Hopper kernels, on any machine: spills, and matmuls that it serializes.

    pip install -e ".[plan-cuda]"
    python scripts/ptxas_report.py [REGEX]

compiles, for an H100 that need not be there, the kernels' conformance cases whose name the pattern matches: of each the
forward pass without and with a carry, and the backward pass, deterministic and in any order, which also makes the
gradient of a bias. It needs ptxas, from a CUDA toolkit on the PATH or from the package nvidia-cuda-nvcc.
"""

import functools
import os
import re
import sys
import tempfile
from collections.abc import Callable

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"

import jax
from jax.sharding import NamedSharding, PartitionSpec

from longctx.sharding import MeshConfig
from pallas_kernels import SoftmaxCarry, blockwise_attention_backward, blockwise_attention_forward
from pallas_kernels.blockwise.cases import KERNEL_CASES, Case
from pallas_kernels.blockwise.suite import SERVES
from train.devices import device_table
from train.planning.target import named_target

_PASSED_ON = re.compile(r"\(C\d+\).*|.*\bspilled\b.*|Used \d+ registers.*")


def main() -> int:
    """Returns 1 where ptxas serialized matmuls in any kernel."""
    pattern = sys.argv[1] if len(sys.argv) > 1 else ""
    mesh = named_target("h100:1", device_table()).mesh(MeshConfig())
    serialized = False
    for case in KERNEL_CASES:
        if case.name in SERVES["mosaic_gpu"].cases and re.search(pattern, case.name):
            for kernel, compile_it in _KERNELS.items():
                text = _said_of(functools.partial(compile_it, case, mesh))
                found = "; ".join(match.group().strip() for match in map(_PASSED_ON.search, text.splitlines()) if match)
                serialized |= "serialized" in found
                print(f"{case.name}{kernel}: {found or 'nothing was said'}", flush=True)
    return int(serialized)


def _compile_forward(case: Case, mesh, *, with_carry: bool) -> None:
    inputs = case.inputs("bfloat16")
    carry = None
    if with_carry:
        B, T, N, _ = inputs["q"].shape
        V = inputs["v"].shape[3]
        carry = jax.eval_shape(lambda: SoftmaxCarry.empty(batch_size=B, q_len=T, num_heads=N, value_dim=V))

    def forward(q, k, v, bias, sinks, carry):
        return blockwise_attention_forward(
            q, k, v, bias=bias, sinks=sinks, carry=carry, return_carry=with_carry, implementation="mosaic_gpu",
            **case.arguments(),
        )  # fmt: skip

    # A carry to go on from has the sinks already.
    sinks = None if with_carry else inputs.get("sinks")
    _compile(forward, *(inputs[x] for x in "qkv"), inputs.get("bias"), sinks, carry, mesh=mesh)


def _compile_backward(case: Case, mesh, *, deterministic: bool) -> None:
    inputs = case.inputs("bfloat16")

    def backward(q, k, v, bias, out, lse, dout, dlse):
        return blockwise_attention_backward(
            q, k, v, out, lse, dout, dlse, bias=bias, bias_gradient=bias is not None,
            deterministic=deterministic, implementation="mosaic_gpu", **case.arguments(),
        )  # fmt: skip

    dout, dlse = inputs["dout"], inputs["dlse"]
    _compile(backward, *(inputs[x] for x in "qkv"), inputs.get("bias"), dout, dlse, dout, dlse, mesh=mesh)


_KERNELS = {
    "": functools.partial(_compile_forward, with_carry=False),
    ", carry": functools.partial(_compile_forward, with_carry=True),
    ", backward": functools.partial(_compile_backward, deterministic=True),
    ", backward in any order": functools.partial(_compile_backward, deterministic=False),
}


def _compile(function: Callable, *arguments, mesh) -> None:
    here = NamedSharding(mesh, PartitionSpec())
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), arguments)
    with jax.set_mesh(mesh):
        jax.jit(function, out_shardings=here).lower(*shapes).compile()


def _said_of(run: Callable[[], None]) -> str:
    """What is printed while `run` runs, by C++ too."""
    with tempfile.TemporaryFile() as file:
        sys.stdout.flush()
        kept = [os.dup(fd) for fd in (1, 2)]
        try:
            for fd in (1, 2):
                os.dup2(file.fileno(), fd)
            run()
        finally:
            for fd, before in zip((1, 2), kept, strict=True):
                os.dup2(before, fd)
                os.close(before)
        file.seek(0)
        return file.read().decode(errors="replace")


if __name__ == "__main__":
    sys.exit(main())
