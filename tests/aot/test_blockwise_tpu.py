"""The TPU kernels of blockwise attention by the TPU's compiler ahead of time, for TPUs that are not there."""

import functools
import importlib.util
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels import (
    BlockSizes,
    SoftmaxCarry,
    Tokens,
    blockwise_attention_backward,
    blockwise_attention_forward,
    dispatch,
)
from pallas_kernels.blockwise import suite
from pallas_kernels.blockwise.cases import KERNEL_CASES
from pallas_kernels.blockwise.pallas_mosaic_tpu import HEAD_DIMS
from pallas_kernels.mask import Causal, SameDocument

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")

TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
KERNELS = ["blockwise_attention_backward_dkdv", "blockwise_attention_backward_dq", "blockwise_attention_forward"]


def compiled_for(topology: str, function, *arguments):
    """The program of one chip of a TPU, the implementations that it takes, and its kernels by name."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # other tests may compile at the same time
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = jax.sharding.Mesh(np.array(devices[:1]), ("device",))

    def shape(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    with jax.set_mesh(mesh), dispatch.record() as taken:
        program = jax.jit(function).lower(*jax.tree.map(shape, arguments)).compile()
    kernels = re.findall(r"%(blockwise_attention_[a-z_]+)[.\d]* = .*? custom-call\(", program.as_text())
    return program, {name for _, name in taken}, sorted(kernels)


def check_hop(topology: str, head_dim: int, value_dim: int, dtype: str, block_sizes: BlockSizes | None = None) -> None:
    """A hop of packed documents, with a carry, running gradients and a soft cap: all that kernels hold."""
    T, N, K = 4096, 4, 2
    q, k, v, dout = (
        jax.ShapeDtypeStruct((1, T, heads, dim), dtype)
        for heads, dim in ((N, head_dim), (K, head_dim), (K, value_dim), (N, value_dim))
    )
    carry = jax.eval_shape(lambda: SoftmaxCarry.empty(batch_size=1, q_len=T, num_heads=N, value_dim=value_dim))
    running = tuple(jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (q, k, v))
    positions = jax.ShapeDtypeStruct((1, T), jnp.int32)

    def hop(q, k, v, dout, lse, carry, running, positions, segment_ids):
        options = {
            "mask": Causal() & SameDocument(),
            "tokens": Tokens.self_attention(positions, segment_ids),
            "logits_soft_cap": 30.0,
            "block_sizes": block_sizes,
        }
        after = blockwise_attention_forward(q, k, v, carry=carry, return_carry=True, **options)
        backward = functools.partial(blockwise_attention_backward, q, k, v, dout, lse, dout, lse, **options)
        return after, backward(accumulate=running)

    arguments = q, k, v, dout, carry.max, carry, running, positions, positions
    _, taken, kernels = compiled_for(topology, hop, *arguments)
    assert taken == {"mosaic_tpu"}
    assert kernels == KERNELS


def test_compiles_for_a_tpu_which_takes_it():
    check_hop("v5e:2x2", 128, 128, "bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("head_dim", "value_dim"), [*((dim, dim) for dim in HEAD_DIMS), (192, 128), (64, 256)], ids=str
)
def test_every_head_dim_compiles(head_dim, value_dim, dtype, topology):
    check_hop(topology, head_dim, value_dim, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize(
    ("block_q", "block_kv", "dtype"),
    [(128, 128, "bfloat16"), (512, 2048, "bfloat16"), (1024, 1024, "float32")],
)
def test_blocks_that_are_asked_for_compile_in_parts_that_fit(block_q, block_kv, dtype, topology):
    check_hop(topology, 256, 256, dtype, BlockSizes(block_q=block_q, block_kv=block_kv))


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [case for case in KERNEL_CASES if case.name in suite.SERVES["mosaic_tpu"].cases],
    ids=lambda case: case.name,
)
def test_every_case_compiles(case):
    """Every mask's pair test among them."""
    inputs = jax.eval_shape(lambda: case.inputs("bfloat16"))
    _, taken, kernels = compiled_for("v6e:2x2", suite.WAYS["gradient of lse"].function(case, None), inputs)
    assert taken == {"mosaic_tpu"}
    assert kernels == KERNELS
