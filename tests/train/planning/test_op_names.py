"""Names of operations, as JAX writes them."""

from train.planning.op_names import part_of, phase_of


def test_names():
    backward = "jit(step)/while/body/transpose(jvp())/while/body/checkpoint/layer.far/mlp/dot_general"
    again = "jit(step)/transpose(jvp())/while/body/checkpoint/rematted_computation/layer.far/mixer/add"
    assert (part_of(backward), phase_of(backward)) == ("mlp", "backward")
    assert (part_of(again), phase_of(again)) == ("far mixer", "recompute")
    assert (part_of("jit(step)/optimizer/mul"), phase_of("jit(step)/optimizer/mul")) == ("optimizer", "update")
    assert (part_of("jit(step)/jvp(logits)/dot"), phase_of("jit(step)/jvp(logits)/dot")) == ("logits", "forward")
    assert (part_of("copy.3"), phase_of("")) == ("other", "update")
