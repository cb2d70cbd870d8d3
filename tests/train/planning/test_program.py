"""What is compiled is what training would run."""

import types

import jax
import numpy as np
import pytest

from train.assemble import batch_placement
from train.config import load_config
from train.data import open_data
from train.devices import device_table
from train.planning import program
from train.planning.program import DoesNotFit, abstract_batch, plan_run
from train.planning.target import local_target

QUICK = ["data.sources=[{kind: synthetic, num_symbols: 20, min_length: 20, max_length: 60}]", "data.tokenizer=ids:32"]


@pytest.mark.parametrize("mesh", ["{context_inner: 8}", "{fsdp: 2, context_inner: 2, data: 1, tensor: 2}"])
def test_the_batch_has_the_shapes_and_the_layout_of_a_real_one(mesh):
    config = load_config("configs/cpu_ring8.yaml", [*QUICK, f"mesh={mesh}", "data.seq_len=64"])
    run = plan_run(config, local_target(jax.devices(), device_table()))
    data = open_data(config.data, seed=0)
    size = config.training.batch_size
    placement = batch_placement(config, run.mesh, batch_size=size)
    batches = data.batches(start_step=0, batch_size=size, rows=placement.rows, slots=placement.slots)
    real = placement.place(next(batches))
    batches.close()
    planned = abstract_batch(config, run.mesh)
    assert planned.keys() == real.keys()
    for name, array in real.items():
        assert (array.shape, array.dtype) == (planned[name].shape, planned[name].dtype), name
        assert array.sharding.is_equivalent_to(planned[name].sharding, array.ndim), name


def test_bytes_in_an_out_of_memory_message():
    refusal = DoesNotFit(
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (19.63G) exceeds "
        "available HBM (15.75G). HLO module: jit_step."
    )
    assert refusal.temporaries == round(19.63 * 2**30)
    assert DoesNotFit("something else").temporaries is None


class Refused:
    """A program that the compiler takes only without Triton's matmuls, if at all."""

    def __init__(self, message: str):
        self.message, self.asked = message, []

    def compile(self, compiler_options):
        self.asked.append(compiler_options)
        if "xla_gpu_enable_triton_gemm" not in compiler_options:
            raise jax.errors.JaxRuntimeError(self.message)
        return "compiled"


def test_what_cannot_be_compiled_with_triton_is_compiled_without():
    mesh = types.SimpleNamespace(devices=np.array([types.SimpleNamespace(platform="gpu")]))
    lowered = Refused("INTERNAL: No supported config found for HLO")
    assert program._compiled(lowered, mesh) == ("compiled", (program.WITHOUT_TRITON,))
    assert lowered.asked[0] == {"xla_gpu_autotune_level": "0"}
    lowered = Refused("RESOURCE_EXHAUSTED: 90 GiB")
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        program._compiled(lowered, mesh)
    assert len(lowered.asked) == 1
