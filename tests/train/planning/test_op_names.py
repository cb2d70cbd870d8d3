"""Names of operations, as JAX writes them."""

from train.planning.op_names import merged, mixer_of, part_of, phase_of, readable


def test_names():
    backward = "jit(step)/while/body/transpose(jvp())/while/body/checkpoint/layer.far/mlp/dot_general"
    again = "jit(step)/transpose(jvp())/while/body/checkpoint/rematted_computation/layer.far/mixer/add"
    assert (part_of(backward), phase_of(backward)) == ("mlp", "backward")
    assert (part_of(again), phase_of(again)) == ("far mixer", "recompute")
    assert (part_of("jit(step)/optimizer/mul"), phase_of("jit(step)/optimizer/mul")) == ("optimizer", "update")
    assert (part_of("jit(step)/jvp(logits)/dot"), phase_of("jit(step)/jvp(logits)/dot")) == ("logits", "forward")
    assert (part_of("copy.3"), phase_of("")) == ("other", "update")
    in_forward = "jit(step)/while/body/jvp(loss)/while/body/gradient/logits/cv,vd->cd/dot_general"
    assert (part_of(in_forward), phase_of(in_forward)) == ("logits", "backward")
    assert phase_of(in_forward.replace("gradient/", "")) == "forward"


def test_the_mixer_that_it_is_part_of():
    mixer = "jit(step)/transpose(jvp())/while/body/checkpoint/layer.far/mixer"
    assert mixer_of(f"{mixer}/shard_map/mul") == mixer_of(mixer) == mixer
    assert mixer_of("jit(step)/jvp(layer.far)/mixer/dot_general") == "jit(step)/jvp(layer.far)/mixer"
    assert mixer_of("jit(step)/jvp()/checkpoint/(layer.far/mixer/a:layer.far/mlp/b)") == (
        "jit(step)/jvp()/checkpoint/layer.far/mixer"
    )
    assert mixer_of(mixer.replace("mixer", "mlp/mul")) is mixer_of("layer.far/mixer/mul") is None


def test_names_that_xla_merged():
    assert merged("jit(step)/jvp()/(layer.a/mixer/x:layer.a/mlp/y)") == [
        "jit(step)/jvp()/layer.a/mixer/x",
        "jit(step)/jvp()/layer.a/mlp/y",
    ]
    assert merged("(reshape.1:jit(step)/mul)") == ["reshape.1", "jit(step)/mul"]
    assert merged("jit(step)/jvp(loss)/mul") == ["jit(step)/jvp(loss)/mul"] and merged("") == [""]
    assert readable("(reshape.1:jit(step)/layer.a/mlp/mul:reshape.2)") == "layer.a mlp mul"
