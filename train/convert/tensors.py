"""Which tensors of a Hugging Face checkpoint hold which parameters of the model, and in what layout."""

import dataclasses
import math
from typing import Any

import numpy as np
from flax import nnx
from flax.nnx import traversals

from longctx.context_parallel import AttentionSharding
from longctx.model import ModelConfig
from train.assemble import model_builder
from train.state import abstract_model

ParamPath = tuple[Any, ...]
"""Of a parameter: its keys in the nested dicts of a checkpoint."""

_OUTSIDE_LAYERS = {
    ("embedding",): "model.embed_tokens.weight",
    ("final_norm", "scale"): "model.norm.weight",
    ("unembedding",): "lm_head.weight",
}
_IN_LAYERS = {
    "mixer_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "mixer.q": "self_attn.q_proj",
    "mixer.k": "self_attn.k_proj",
    "mixer.v": "self_attn.v_proj",
    "mixer.out": "self_attn.o_proj",
    "mixer.q_norm": "self_attn.q_norm",
    "mixer.k_norm": "self_attn.k_norm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
_OWN_NAMES = {"kernel": "weight", "scale": "weight", "bias": "bias"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """One tensor of a Hugging Face checkpoint, which is a parameter or, of layers that are stacked, a slice of it."""

    name: str
    index: int | None
    """Its place along the first dim of the parameter; None: it is all of it."""
    is_matrix: bool
    """Whether the dims that are summed over come first here, and last in the Hugging Face checkpoint."""
    own_shape: tuple[int, ...]
    """Of the slice of the parameter."""
    shape: tuple[int, ...]
    """In the Hugging Face checkpoint: of a matrix `[out, in]`."""

    def to_own(self, values: np.ndarray) -> np.ndarray:
        """Values of the Hugging Face tensor as the slice of the parameter; a view."""
        return (values.T if self.is_matrix else values).reshape(self.own_shape)

    def from_own(self, values: np.ndarray) -> np.ndarray:
        """The reverse, contiguous."""
        turned = values.reshape(self.shape[::-1]).T if self.is_matrix else values.reshape(self.shape)
        return np.ascontiguousarray(turned)


def layout(model: ModelConfig) -> dict[ParamPath, list[Tensor]]:
    """The tensors of each parameter, in the order of their layers.

    Args:
      model: A model that a Hugging Face architecture computes, without adapters; its vocab_size is set.
    """
    _, abstract = abstract_model(model_builder(model, AttentionSharding()))
    shapes = {path: leaf.shape for path, leaf in traversals.flatten_mapping(nnx.to_pure_dict(abstract)).items()}
    return {path: _tensors(model, path, shape) for path, shape in shapes.items()}


def shape_of(tensors: list[Tensor]) -> tuple[int, ...]:
    """The shape of the parameter that these are."""
    first = tensors[0].own_shape
    return first if tensors[0].index is None else (len(tensors), *first)


def dotted(path: ParamPath) -> str:
    """The name of a parameter in a checkpoint."""
    return ".".join(map(str, path))


def _tensors(model: ModelConfig, path: ParamPath, shape: tuple[int, ...]) -> list[Tensor]:
    if path in _OUTSIDE_LAYERS:
        return [Tensor(name=_OUTSIDE_LAYERS[path], index=None, is_matrix=False, own_shape=shape, shape=shape)]
    where, place, *inside, own_name = path
    module = ".".join(inside)
    is_matrix = own_name == "kernel"
    num_in = 2 if module == "mixer.out" else 1

    def tensor(layer: int, index: int | None, own_shape: tuple[int, ...]) -> Tensor:
        name = f"model.layers.{layer}.{_IN_LAYERS[module]}.{_OWN_NAMES[own_name]}"
        num_values = math.prod(own_shape)
        num_summed = math.prod(own_shape[:num_in])
        return Tensor(
            name=name,
            index=index,
            is_matrix=is_matrix,
            own_shape=own_shape,
            shape=(num_values // num_summed, num_summed) if is_matrix else (num_values,),
        )

    if where != "periods":
        first = 0 if where == "leading" else model.first_of_remainder
        return [tensor(first + place, None, shape)]
    first, period = len(model.leading) + place, len(model.pattern)
    return [tensor(first + index * period, index, shape[1:]) for index in range(model.num_periods)]
