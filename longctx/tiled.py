"""A function of each token alone, computed a tile of tokens at a time."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from longctx.token_shards import TokenShards, in_tiles


def over_tiles(
    function: Callable[[Any, jax.Array], jax.Array], modules: Any, x_BTD: Float[Array, "B T D"], *, tile: int
) -> Float[Array, "B T E"]:
    """function(modules, x), of which a tile of tokens is held at a time, in the backward pass too.

    The backward pass keeps x alone and computes each tile once more. Each device walks its own tokens, whatever their
    order: matrices are cast to x's dtype and gathered before the loop over tiles, their gradients are added up over the
    tiles in float32 and sent once after it, as a layer without tiles does. A tile's part of a gradient has the rounding
    that JAX gives the gradient of all tokens, x's dtype.

    Args:
      function: Of modules and tokens `[1, C, D]` to `[1, C, E]`, each token by itself; what it closes over gets no
        gradient.
      modules: Flax modules, a pytree whose leaves are parameters with `logical_axes`.
      tile: Tokens of a tile, at most, on each device.

    Raises: ValueError where a module holds an array that is no parameter.
    Memory: O(tile) of all that lies between x and the result; a float32 copy of the modules' gradients.
    Cost: one more forward pass in the backward pass.
    """
    variables = jax.tree.leaves(modules, is_leaf=lambda node: isinstance(node, nnx.Variable))
    leaves, structure = jax.tree.flatten(modules)
    if len(variables) != len(leaves) or not all(isinstance(variable, nnx.Param) for variable in variables):
        raise ValueError(f"modules: got {modules}, wanted modules that hold nothing but parameters")
    shards = TokenShards.of(x_BTD.shape[:2])
    specs = [
        # A layer that a scan over periods handed out keeps their name in front.
        shards.of_parameter(variable.get_metadata("logical_axes")[-leaf.ndim :], leaf.shape)
        for variable, leaf in zip(variables, leaves, strict=True)
    ]
    tokens = PartitionSpec(*shards.tokens, None)
    whole = [PartitionSpec()] * len(leaves)
    on_mesh = functools.partial(shards.map, with_tensor=False)

    def low(leaves: list[jax.Array], dtype) -> list[jax.Array]:
        """Cast before they are gathered; gains stay as they are, since norms are computed in float32."""
        return [leaf.astype(dtype) if leaf.ndim > 1 else leaf for leaf in leaves]

    def of_tile(leaves: list[jax.Array], x_CD: jax.Array) -> jax.Array:
        return function(jax.tree.unflatten(structure, leaves), x_CD[None])[0]

    def tiles_of(x_BTD: jax.Array):
        return in_tiles(x_BTD.shape[0] * x_BTD.shape[1], tile)

    def forward_shard(leaves, x_BTD):
        tiled, untiled = tiles_of(x_BTD)
        _, y = jax.lax.scan(lambda _, x_CD: (None, of_tile(leaves, x_CD)), None, tiled(x_BTD))
        return untiled(y).reshape(*x_BTD.shape[:2], -1)

    def backward_shard(leaves, x_BTD, dy_BTE):
        tiled, untiled = tiles_of(x_BTD)

        def body(sums, tile):
            x_CD, dy_CE = tile
            _, vjp = jax.vjp(of_tile, leaves, x_CD)
            dleaves, dx_CD = vjp(dy_CE)
            return [total + part.astype(jnp.float32) for total, part in zip(sums, dleaves, strict=True)], dx_CD

        start = [jnp.zeros(leaf.shape, jnp.float32) for leaf in leaves]
        sums, dx = jax.lax.scan(body, start, (tiled(x_BTD), tiled(dy_BTE)))
        return [total[None] for total in sums], untiled(dx).reshape(x_BTD.shape)

    # Differentiated outside the shard_map, so that what is sent of gradients stands after the loop.
    @jax.custom_vjp
    def run(leaves, x_BTD):
        return on_mesh(forward_shard, (whole, tokens), tokens)(low(leaves, x_BTD.dtype), x_BTD)

    def run_forward(leaves, x_BTD):
        return run(leaves, x_BTD), (leaves, x_BTD)

    def run_backward(residuals, dy_BTE):
        leaves, x_BTD = residuals
        one_a_device = [PartitionSpec(shards.axes or None)] * len(leaves)
        sums, dx_BTD = on_mesh(backward_shard, (whole, tokens, tokens), (one_a_device, tokens))(
            low(leaves, x_BTD.dtype), x_BTD, dy_BTE
        )
        gradients = [
            shards.placed(jnp.sum(total, axis=0), spec).astype(leaf.dtype)
            for total, spec, leaf in zip(sums, specs, leaves, strict=True)
        ]
        return gradients, dx_BTD

    run.defvjp(run_forward, run_backward)
    return run(leaves, x_BTD)
