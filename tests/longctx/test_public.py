"""The public surface: names, what importing costs, and that every config field says what it means."""

import ast
import dataclasses
import inspect
import pathlib
import runpy
import sys

import jax
import pytest

import longctx

PACKAGE = pathlib.Path(longctx.__file__).parent
REPOSITORY = PACKAGE.parent


def test_public_names_are_pinned():
    assert sorted(longctx.__all__) == [
        "Attention",
        "AttentionConfig",
        "AttentionSharding",
        "BiasConfig",
        "Block",
        "ContextParallelConfig",
        "DecodeCache",
        "DeltaConfig",
        "DeltaNet",
        "FeatureMap",
        "GatedDeltaConfig",
        "GatedLinearAttention",
        "GlaConfig",
        "KVCache",
        "Layout",
        "LightningConfig",
        "LinearAttention",
        "LinearCache",
        "LinearConfig",
        "LinearRopeScaling",
        "Llama3RopeScaling",
        "LoraConfig",
        "LossSums",
        "Mamba2",
        "Mamba2Config",
        "MeshConfig",
        "MixerConfig",
        "MlaAttention",
        "MlaConfig",
        "MobaAttention",
        "MobaCache",
        "MobaConfig",
        "ModelConfig",
        "NsaAttention",
        "NsaCache",
        "NsaConfig",
        "NsaSizes",
        "Pointwise",
        "PrefillPlan",
        "RMSNorm",
        "ReglaConfig",
        "RetentionConfig",
        "RopeScaling",
        "RotaryConfig",
        "SimpleRMSNorm",
        "SwiGLU",
        "Taylor2",
        "TokenScores",
        "TransformerLM",
        "YarnRopeScaling",
        "__version__",
        "add_adapters",
        "apply_rotary",
        "batch_sharding",
        "constrain",
        "cross_entropy",
        "forward_flops",
        "fused_cross_entropy",
        "logits_of",
        "make_mesh",
        "masks",
        "merged",
        "param_shardings",
        "register",
        "sharded_schedule",
        "token_scores",
    ]
    assert all(hasattr(longctx, name) for name in longctx.__all__)


def test_the_library_imports_nothing_that_only_the_trainer_needs():
    imported = set()
    for path in PACKAGE.rglob("*.py"):
        if (
            path.name == "balance_plot.py"
        ):  # imports matplotlib where something is drawn, and says so where there is none
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
    assert imported - sys.stdlib_module_names <= {"jax", "jaxtyping", "flax", "numpy", "pallas_kernels", "longctx"}


@pytest.mark.parametrize(
    "config_class",
    [
        longctx.ModelConfig,
        longctx.AttentionConfig,
        longctx.MlaConfig,
        longctx.MobaConfig,
        longctx.NsaConfig,
        longctx.MeshConfig,
        longctx.RotaryConfig,
        longctx.LinearRopeScaling,
        longctx.Llama3RopeScaling,
        longctx.YarnRopeScaling,
    ],
    ids=lambda c: c.__name__,
)
def test_every_config_field_is_documented(config_class):
    documented = {
        field.target.id
        for owner in config_class.__mro__[:-1]
        for body in [ast.parse(inspect.getsource(owner)).body[0].body]
        for field, following in zip(body, body[1:], strict=False)
        if isinstance(field, ast.AnnAssign)
        and isinstance(following, ast.Expr)
        and isinstance(following.value, ast.Constant)
        and isinstance(following.value.value, str)
    }
    assert documented == {field.name for field in dataclasses.fields(config_class)}


def test_the_layer_example_learns():
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam promotes
        losses = runpy.run_path(str(REPOSITORY / "docs" / "examples" / "attention_layer.py"))["losses"]
    assert losses[0] > 1 and losses[-1] < 0.1


def test_the_linear_attention_example_decodes_what_it_computes():
    example = runpy.run_path(str(REPOSITORY / "docs" / "examples" / "linear_attention_layer.py"))
    assert example["difference"] < 1e-4 and example["cache"].state.shape == (2, 4, 16, 16)
