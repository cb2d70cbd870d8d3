"""Layers and distribution for transformers over long sequences."""

from longctx import masks
from longctx._version import __version__
from longctx.attention import Attention
from longctx.block import Block
from longctx.context_parallel import (
    AttentionSharding,
    ContextParallelConfig,
    KVCache,
    Layout,
    LinearCache,
    MobaCache,
    NsaCache,
    PrefillPlan,
    sharded_schedule,
)
from longctx.delta import DeltaNet
from longctx.feature_maps import FeatureMap, Pointwise, Taylor2
from longctx.fused_loss import TokenScores, fused_cross_entropy, token_scores
from longctx.gla import GatedLinearAttention
from longctx.linear_attention import LinearAttention
from longctx.lora import LoraConfig, add_adapters, merged
from longctx.losses import LossSums, cross_entropy
from longctx.mixers import MixerConfig, register
from longctx.mixers.attention import AttentionConfig
from longctx.mixers.delta import DeltaConfig
from longctx.mixers.gated_delta import GatedDeltaConfig
from longctx.mixers.gla import GlaConfig
from longctx.mixers.lightning import LightningConfig
from longctx.mixers.linear import LinearConfig
from longctx.mixers.mamba2 import Mamba2, Mamba2Config
from longctx.mixers.mla import MlaConfig
from longctx.mixers.moba import MobaConfig
from longctx.mixers.nsa import NsaConfig
from longctx.mixers.regla import ReglaConfig
from longctx.mixers.retention import RetentionConfig
from longctx.mla import MlaAttention
from longctx.mlp import SwiGLU
from longctx.moba import MobaAttention
from longctx.model import DecodeCache, ModelConfig, TransformerLM
from longctx.model_flops import forward_flops
from longctx.norms import RMSNorm, SimpleRMSNorm
from longctx.nsa import NsaAttention
from longctx.position_bias import BiasConfig
from longctx.rope_scaling import LinearRopeScaling, Llama3RopeScaling, RopeScaling, YarnRopeScaling
from longctx.rotary import RotaryConfig, apply_rotary
from longctx.sharding import MeshConfig, batch_sharding, constrain, make_mesh, param_shardings
from longctx.unembedding import logits_of
from pallas_kernels.sparse import NsaSizes

__all__ = [
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
