"""The residual block that every layer of the model is."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Float32, Int32

from longctx.attention import RandomSource
from longctx.context_parallel import AnySchedule, AttentionSharding, PrefillPlan
from longctx.mixers.registry import MixerConfig
from longctx.mlp import SwiGLU
from longctx.norms import RMSNorm
from longctx.remat import MIXER_OUTPUT, RESIDUAL, named
from longctx.sharding import constrain
from longctx.tiled import over_tiles


class Block(nnx.Module):
    """Pre-norm residual block.

    x = x + mixer(norm(x));  x = x + mlp(norm(x))

    Args:
      dim: Model dim.
      mixer: Config of the sequence mixer.
      mlp_dim: Hidden dim of the SwiGLU.
      norm_eps: Epsilon of the norms.
      dtype: Compute dtype.
      param_dtype: Dtype of the parameters.
      mlp_tile: Tokens on each device for which the second half is computed at a time, norm and MLP, and once more in
        the backward pass; None means all at once, and nothing twice.
      out_init_scale: Multiplies the initial standard deviation of the two projections back into the residual.
      prevent_cse: As SwiGLU.
      sharding: How the mixer is split over a mesh.
      rngs: Source of the initial values.
    """

    def __init__(
        self,
        dim: int,
        *,
        mixer: MixerConfig,
        mlp_dim: int,
        norm_eps: float = 1e-6,
        mlp_tile: int | None = None,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        out_init_scale: float = 1.0,
        prevent_cse: bool = True,
        sharding: AttentionSharding | None = None,
        rngs: nnx.Rngs,
    ):
        kwargs = dict(dtype=dtype, param_dtype=param_dtype, out_init_scale=out_init_scale, rngs=rngs)
        self.mixer_norm = RMSNorm(dim, eps=norm_eps, param_dtype=param_dtype)
        self.mixer = mixer.build(dim, norm_eps=norm_eps, sharding=sharding, **kwargs)
        self.mlp_norm = RMSNorm(dim, eps=norm_eps, param_dtype=param_dtype)
        self.mlp = SwiGLU(dim, mlp_dim, prevent_cse=prevent_cse, **kwargs)
        self.mlp_tile = mlp_tile

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        *,
        positions: Int32[Array, "#B T"] | None = None,
        segment_ids: Int32[Array, "#B T"] | None = None,
        schedule: AnySchedule | None = None,
        rngs: RandomSource | None = None,
        depth: Float32[Array, ""] | None = None,
    ) -> Float[Array, "B T D"]:
        """One layer; the arguments are the mixer's, rngs only where it is stochastic and depth where it uses it."""
        some, x_BTD = _given(rngs=rngs, depth=depth), named(x_BTD, RESIDUAL)
        with jax.named_scope("mixer"):
            x_BTD, normed = self.mixer_norm.of_sum(x_BTD)
            mixed = self.mixer(normed, positions=positions, segment_ids=segment_ids, schedule=schedule, **some)
        return self._feed_forward(x_BTD, mixed)

    def init_cache(self, batch_size: int, max_length: int) -> Any:
        """The mixer's empty cache."""
        return self.mixer.init_cache(batch_size, max_length)

    def decode(
        self, x_BTD: Float[Array, "B T D"], cache: Any, *, depth: Float32[Array, ""] | None = None
    ) -> tuple[Float[Array, "B T D"], Any]:
        """One layer on the next T tokens, and the mixer's cache after them."""
        mixed, cache = self.mixer.decode(self.mixer_norm(x_BTD), cache, **_given(depth=depth))
        return self._feed_forward(x_BTD, mixed), cache

    def prefill(
        self,
        x_BTD: Float[Array, "B T D"],
        plan: PrefillPlan,
        max_length: int,
        *,
        schedule: AnySchedule | None = None,
        depth: Float32[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """One layer on a context that is split over devices, and the mixer's cache that holds it."""
        mixed, cache = self.mixer.prefill(
            self.mixer_norm(x_BTD), plan, max_length, schedule=schedule, **_given(depth=depth)
        )
        return self._feed_forward(x_BTD, mixed), cache

    def _feed_forward(self, x_BTD: jax.Array, mixed: jax.Array) -> jax.Array:
        mixed = named(mixed, MIXER_OUTPUT)
        with jax.named_scope("mlp"):
            modules = self.mlp_norm, self.mlp
            if self.mlp_tile is None or x_BTD.shape[0] * x_BTD.shape[1] <= self.mlp_tile:
                x_BTD = _with_mlp(modules, x_BTD, mixed)
            else:
                x_BTD = constrain(x_BTD + mixed, "batch", "sequence", None)
                x_BTD = over_tiles(_with_mlp, modules, x_BTD, tile=self.mlp_tile)
            return constrain(x_BTD, "batch", "sequence", None)


def _with_mlp(modules: tuple[RMSNorm, SwiGLU], x_BTD: jax.Array, mixed: jax.Array | None = None) -> jax.Array:
    norm, mlp = modules
    x_BTD, *normed = norm.of_sum(x_BTD, mixed, uses=2)
    return x_BTD + mlp(*normed)


def _given(**arguments: Any) -> dict[str, Any]:
    """Those that are not None: mixers need not take the others."""
    return {name: value for name, value in arguments.items() if value is not None}
