"""One layer of linear attention by itself: a call on whole rows, and the same token by token from its state."""

import jax
import jax.numpy as jnp
from flax import nnx

from longctx import LightningConfig

layer = LightningConfig(num_heads=4).build(64, rngs=nnx.Rngs(0))
x_BTD = jax.random.normal(jax.random.key(0), (2, 100, 64))
y_BTD = nnx.jit(lambda layer, x_BTD: layer(x_BTD, depth=0.0))(layer, x_BTD)  # the first layer of a model

decode = nnx.jit(lambda layer, x_BTD, cache: layer.decode(x_BTD, cache, depth=0.0))
pieces, cache = [], layer.init_cache(batch_size=2, max_length=100)
for start, stop in [(0, 98), (98, 99), (99, 100)]:  # a prompt, then one token at a time
    piece_BTD, cache = decode(layer, x_BTD[:, start:stop], cache)
    pieces.append(piece_BTD)

difference = float(jnp.max(jnp.abs(jnp.concatenate(pieces, axis=1) - y_BTD)))
print(f"a state of {cache.state.shape}, whatever the length; off by {difference:.1e}")
