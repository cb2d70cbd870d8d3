"""`longctx.Attention` inside somebody else's NNX model: learns to copy the token before."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from longctx import Attention, masks


class Copier(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.attention = Attention(32, num_heads=4, num_kv_heads=2, mask=masks.sliding_window(left=1), rngs=rngs)
        self.readout = nnx.Linear(32, 4, rngs=rngs)

    def __call__(self, x_BTD):
        return self.readout(x_BTD + self.attention(x_BTD))


@nnx.jit
def train_step(model, optimizer, x_BTD):
    def loss_of(model):
        return jnp.mean((model(x_BTD)[:, 1:] - x_BTD[:, :-1, :4]) ** 2)

    loss, gradients = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, gradients)
    return loss


model = Copier(rngs=nnx.Rngs(0))
optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
losses = [
    float(train_step(model, optimizer, jax.random.normal(jax.random.key(step), (8, 64, 32)))) for step in range(100)
]
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
