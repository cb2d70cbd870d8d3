"""The pair test of a mask as kernels can compute it: elementwise arithmetic over a tile, for each group of heads."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from jax.interpreters import partial_eval

from pallas_kernels.block_sizes import BlockSizes
from pallas_kernels.mask import Full, Mask
from pallas_kernels.schedule import static_schedule


class PairTests(NamedTuple):
    """The distinct pair tests of a mask.

    Attributes:
      tests: Each of four int32 arrays of the tile's shape: positions and segment ids (q, kv, q, kv).
      test_of_group: Which of them each of the mask's `head_groups` takes.
      reads: The numbers of the arrays that any of them reads; the others may be None.
    """

    tests: list[Callable[..., jax.Array]]
    test_of_group: tuple[int, ...]
    reads: frozenset[int]


def tests_of(mask: Mask, tile: tuple[int, int]) -> PairTests:
    """The pair tests of a mask, for tiles of this shape.

    Raises: NotImplementedError with the reason where one cannot be computed in a kernel.
    """
    arguments = (jax.ShapeDtypeStruct(tile, jnp.int32),) * 4
    masks = mask.by_head(mask.head_groups)
    distinct = tuple(dict.fromkeys(masks))
    try:
        tests = [elementwise(_always if one == Full() else one.allowed, *arguments) for one in distinct]
    except NotImplementedError as reason:
        raise NotImplementedError(
            f"mask {mask}: {reason}, its pair test must be arithmetic and comparisons"
        ) from reason
    return PairTests(
        tests=[test for test, _ in tests],
        test_of_group=tuple(distinct.index(one) for one in masks),
        reads=frozenset().union(*(reads for _, reads in tests)),
    )


def all_full(mask: Mask, q_len: int, kv_len: int, sizes: BlockSizes) -> bool:
    """Whether of every block that tokens in order visit all pairs may attend, whole blocks of keys assumed."""
    whole_len = -(-kv_len // sizes.block_kv) * sizes.block_kv
    ranges = static_schedule(mask, q_len, whole_len, sizes).kv_blocks
    full = (ranges.full_start == ranges.start) & (ranges.full_stop == ranges.stop)
    return bool(np.all(full | (ranges.start >= ranges.stop)))


def _always(q_positions, *others) -> jax.Array:
    """Whether a head that may attend to all may attend to a key, as an answer that depends on its arguments."""
    del others
    return q_positions >= jnp.iinfo(jnp.int32).min


# What an elementwise function may compute inside a kernel. Memory is not read there, so there are no tables.
_ARITHMETIC = frozenset(
    "add sub mul div rem neg sign abs max min clamp and or not xor lt le gt ge eq ne select_n convert_element_type "
    "broadcast_in_dim stop_gradient shift_left shift_right_logical shift_right_arithmetic integer_pow".split()
)


def elementwise(
    function: Callable[..., jax.Array], *arguments: jax.ShapeDtypeStruct
) -> tuple[Callable[..., jax.Array], frozenset[int]]:
    """`function` as a kernel can compute it, for arguments of these shapes, and the numbers of those that it reads.

    Raises: NotImplementedError with the reason where it does anything but elementwise arithmetic and comparisons.
    """
    closed = jax.make_jaxpr(function)(*arguments)
    unknown = sorted(_primitives(closed.jaxpr) - _ARITHMETIC)
    if unknown:
        raise NotImplementedError(f"it uses {', '.join(unknown)}")
    if any(np.ndim(constant) for constant in closed.consts):
        raise NotImplementedError("it reads an array")
    if not set(closed.jaxpr.outvars) & _dependent(closed.jaxpr):
        raise NotImplementedError("it is the same for all arguments")

    jaxpr, is_read = partial_eval.dce_jaxpr(closed.jaxpr, [True])
    reads = frozenset(np.flatnonzero(is_read).tolist())

    def evaluate(*values):
        return _evaluate(jaxpr, closed.consts, [values[i] for i in sorted(reads)])[0]

    return evaluate, reads


def _primitives(jaxpr) -> set[str]:
    names = set()
    for equation in jaxpr.eqns:
        inner = list(jax.extend.core.jaxprs_in_params(equation.params))
        names |= set().union(*map(_primitives, inner)) if inner else {equation.primitive.name}
    return names


def _dependent(jaxpr) -> set:
    """Variables that depend on the arguments."""
    dependent = set(jaxpr.invars)
    for equation in jaxpr.eqns:
        if any(atom in dependent for atom in equation.invars if not isinstance(atom, jax.extend.core.Literal)):
            dependent |= set(equation.outvars)
    return dependent


def _evaluate(jaxpr, constants, values) -> list[jax.Array]:
    """Evaluates a jaxpr, its calls inlined. Mosaic GPU has no `not` of booleans, but it has `xor`."""
    environment = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*constants, *values), strict=True))

    def read(atom):
        return atom.val if isinstance(atom, jax.extend.core.Literal) else environment[atom]

    for equation in jaxpr.eqns:
        operands = [read(atom) for atom in equation.invars]
        inner = equation.params.get("jaxpr")
        if inner is not None:
            results = _evaluate(inner.jaxpr, inner.consts, operands)
        elif equation.primitive.name == "not" and equation.outvars[0].aval.dtype == jnp.bool:
            results = [operands[0] ^ True]
        else:
            result = equation.primitive.bind(*operands, **equation.params)
            results = result if equation.primitive.multiple_results else [result]
        environment |= zip(equation.outvars, results, strict=True)
    return [read(atom) for atom in jaxpr.outvars]
