"""The registry of sequence-mixing mechanisms: what a mixer is, and how one is added."""

import abc
import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import DTypeLike, Int

from longctx.context_parallel import AttentionSharding
from longctx.context_parallel.traffic import Transfer
from longctx.remat import BLOCK_NAMES
from pallas_kernels import BlockSizes, Mask

_VARIANTS: dict[str, type["MixerConfig"]] = {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixerConfig(abc.ABC):
    """Configuration of a mixer; a subclass registers under a kind and builds the layer.

    The layer that `build` returns is an nnx.Module with
      `__call__(x_BTD, *, positions=None, segment_ids=None, schedule=None) -> y_BTD`, which must not let information
        cross documents where segment_ids are given,
      `init_cache(batch_size, max_length) -> cache`, a pytree of arrays, and
      `decode(x_BTD, cache) -> (y_BTD, cache)`, and may have
      `prefill(x_BTD, plan, max_length, *, schedule=None) -> (y_BTD, cache)`, which works on a context that is split
        over devices as the PrefillPlan says, and returns a new cache that holds it.
    Where the config `is_stochastic`, the call also takes `rngs=None` (`longctx.attention.RandomSource`) to draw from.
    Where it `uses_depth`, the call, decode and prefill also take `depth`, a float32 scalar: l / (L - 1) in layer l of
    L, 0 in the first and 1 in the last, and 0 where there is one.
    """

    kind: ClassVar[str]

    @property
    def mask(self) -> Mask | None:
        """What the layer's schedule is built from; None if it takes no schedule."""
        return None

    @property
    def block_sizes(self) -> BlockSizes | None:
        """What else the layer's schedule is built from; None takes the kernel's table."""
        return None

    @property
    def is_stochastic(self) -> bool:
        """Whether the layer draws random numbers in training."""
        return False

    @property
    def uses_depth(self) -> bool:
        """Whether what the layer computes depends on where it stands in the model."""
        return False

    @property
    def needs_runs(self) -> bool:
        """Whether each device must hold runs of neighbouring tokens of a split row, in the order of the sequence.

        A model brings tokens into runs for such layers where the layout has none (context_parallel/relayout.py).
        """
        return False

    @property
    def tensor_names(self) -> frozenset[str]:
        """The names (`longctx.remat.NAMES`) of the tensors of a block with this mixer; a mixer adds those it has."""
        return BLOCK_NAMES

    @abc.abstractmethod
    def build(
        self,
        dim: int,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        norm_eps: float = 1e-6,
        out_init_scale: float = 1.0,
        sharding: AttentionSharding | None = None,
        rngs: nnx.Rngs,
    ) -> nnx.Module:
        """The layer.

        Args:
          dim: Model dim of x and y.
          dtype: Compute dtype and dtype of y.
          param_dtype: Dtype of the parameters.
          norm_eps: Epsilon of norms inside the layer.
          out_init_scale: Multiplies the initial standard deviation of the projection back into the residual.
          sharding: How the layer is split over a mesh; None means a ring over the axes of `longctx.make_mesh`, where
            such a mesh is in scope.
          rngs: Source of the initial values.
        """

    @abc.abstractmethod
    def flops_by_part(self, dim: int, document_lengths: Int[np.ndarray, " documents"]) -> dict[str, float]:
        """Floating-point operations of a forward pass over documents of these lengths, by the part that spends them.

        2 m n k for a matmul of [m, k] by [k, n]; pairs of tokens that the mask forbids count nothing. The names of the
        parts are the mixer's own.
        """

    def forward_flops(self, dim: int, document_lengths: Int[np.ndarray, " documents"]) -> float:
        """Floating-point operations of a forward pass over documents of these lengths: the sum of `flops_by_part`."""
        return float(sum(self.flops_by_part(dim, document_lengths).values()))

    def refusal(
        self, dim: int, *, seq_len: int, heads_split: int, ring_size: int, sharding: AttentionSharding
    ) -> str | None:
        """Why a layer cannot be split this way, in one sentence with a remedy; None if it can. Args: `transfers`."""
        return None

    def transfers(
        self,
        dim: int,
        *,
        rows: int,
        seq_len: int,
        heads_split: int,
        ring_size: int,
        sharding: AttentionSharding,
        dtype: DTypeLike,
    ) -> tuple[Transfer, ...]:
        """What one device sends for one layer where a sequence is split over devices: nothing, unless a mixer says so.

        Args:
          dim: Model dim.
          rows: Rows of a device.
          seq_len: Tokens of a whole row.
          heads_split: Devices that share the heads of a row.
          ring_size: Devices that share the tokens of a row.
          sharding: How they do.
          dtype: Compute dtype.
        """
        return ()

    @classmethod
    def variants(cls) -> dict[str, type["MixerConfig"]]:
        """The registered config classes by kind."""
        return dict(_VARIANTS)


def register[C: type[MixerConfig]](kind: str) -> Callable[[C], C]:
    """Class decorator: makes a MixerConfig available under `kind` in model configs.

    Raises: ValueError if the kind is taken by another class.
    """

    def decorate(config_class: C) -> C:
        if kind in _VARIANTS:
            raise ValueError(f"kind: got {kind!r}, which {_VARIANTS[kind].__name__} has taken; choose another name")
        config_class.kind = kind
        _VARIANTS[kind] = config_class
        return config_class

    return decorate
