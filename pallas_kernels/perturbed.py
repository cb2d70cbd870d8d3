"""Which arguments of an op are differentiated: what the forward rule of a custom_vjp with symbolic zeros is told."""

from typing import Any

import jax
from jax.custom_derivatives import CustomVJPPrimal


def values_of(arguments: Any) -> Any:
    """The arrays of such arguments."""
    return jax.tree.map(lambda x: x.value, arguments, is_leaf=_is_primal)


def is_perturbed(argument: Any) -> bool:
    """Whether anything asks for the gradient of any array of such an argument, which may be None."""
    return any(x.perturbed for x in jax.tree.leaves(argument, is_leaf=_is_primal))


def _is_primal(x: Any) -> bool:
    return isinstance(x, CustomVJPPrimal)
