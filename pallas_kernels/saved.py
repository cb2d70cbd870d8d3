"""The name under which attention ops hand over what their backward passes read, for rematerialisation to go by."""

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

ATTENTION = "attention"
"""Of results and of what else a forward pass of attention computes for the backward pass: out, lse, states."""


def as_attention(tree: Any) -> Any:
    """The same arrays under that name: a policy of `jax.checkpoint` that keeps it keeps all of them.

    An op names what it returns and what it saves in the forward rule of its custom_vjp. Where all of that is kept,
    nothing in the backward pass depends on the op's forward pass, and it is not run again.

    Where a loop over layers keeps a kernel's result in an array of all layers, XLA for GPUs would have the kernel write
    there itself, and run it once more for the layer that goes on with it, unless something stands between.
    """
    return jax.tree.map(lambda x: checkpoint_name(jax.lax.optimization_barrier(x), ATTENTION), tree)
