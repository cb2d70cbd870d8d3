"""What layers ask of the arrays that they are called with."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises ValueError, naming the argument, unless it is one of these (`typing.get_args` of a Literal)."""
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, wanted one of {', '.join(choices)}; choose one of these")


def check_names(name: str, names: Sequence[str]) -> None:
    """Raises ValueError where names are a string, whose letters would each be taken for one."""
    if isinstance(names, str):
        raise ValueError(f"{name}: got {names!r}, wanted a list of names; write [{names}]")


def check_positive(**numbers: float | None) -> None:
    """Raises ValueError, naming the argument, unless each is None or a whole number >= 1."""
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}: got {value}, wanted a number >= 1")


def check_soft_cap(name: str, soft_cap: float | None) -> None:
    """Raises ValueError, naming the option, unless it is None or a number that can bound logits."""
    if soft_cap is not None and not 0 < soft_cap < math.inf:
        raise ValueError(f"{name}: got {soft_cap}, wanted null or a finite number > 0")


def check_features(layer: str, x: jax.Array, dim: int) -> None:
    """Raises ValueError unless x is of floats and has `dim` features last."""
    if x.ndim < 1 or x.shape[-1] != dim:
        dims = x.shape[-1] if x.ndim else "no"
        raise ValueError(f"x: got {dims} dims in shape {x.shape}, wanted the layer's dim={dim} last ({layer})")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x: got {x.dtype}, wanted floats; cast it, or embed token ids first ({layer})")


def check_sequence(
    layer: str,
    x_BTD: jax.Array,
    dim: int,
    *,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
) -> None:
    """Raises ValueError unless x is [batch, length, dim] of floats, none of them 0, and the others fit it."""
    check_features(layer, x_BTD, dim)
    if x_BTD.ndim != 3 or 0 in x_BTD.shape:
        raise ValueError(f"x: got shape {x_BTD.shape}, wanted [batch, length, {dim}], no dimension 0 ({layer})")
    check_tokens(layer, x_BTD.shape[:2], positions=positions, segment_ids=segment_ids)


def check_next_tokens(layer: str, x_BTD: jax.Array, dim: int, *, cache_rows: int) -> None:
    """Raises ValueError unless x is [batch, length, dim] of floats, none of them 0, with as many rows as the cache."""
    check_sequence(layer, x_BTD, dim)
    if x_BTD.shape[0] != cache_rows:
        raise ValueError(
            f"x: got {x_BTD.shape[0]} rows, the cache has {cache_rows}; pass the tokens and the cache of the same rows "
            f"({layer})"
        )


def check_ids(layer: str, tokens_BT: jax.Array, *, may_be_empty: bool = False) -> None:
    """Raises ValueError unless these are integers [batch, length], no dimension 0, or only the length."""
    positive = tokens_BT.shape[:1] if may_be_empty else tokens_BT.shape
    if tokens_BT.ndim != 2 or 0 in positive or not jnp.issubdtype(tokens_BT.dtype, jnp.integer):
        raise ValueError(
            f"tokens: got {tokens_BT.dtype}{list(tokens_BT.shape)}, wanted integers [batch, length], no dimension 0 "
            f"({layer})"
        )


def check_tokens(layer: str, shape: tuple[int, ...], **of_tokens: jax.Array | None) -> None:
    """Raises ValueError, naming the argument, unless each is None or int32 [batch or 1, length]."""
    batch_size, length = shape
    for name, array in of_tokens.items():
        if array is None:
            continue
        if array.shape not in ((batch_size, length), (1, length)):
            raise ValueError(
                f"{name}: got shape {array.shape}, wanted {(batch_size, length)} as of x, or {(1, length)} ({layer})"
            )
        if array.dtype != jnp.int32:
            raise ValueError(f"{name}: got {array.dtype}, wanted int32; cast it ({layer})")


def check_unembedding(name: str, hidden_BTD: jax.Array, table_VD: jax.Array, *, soft_cap: float | None) -> None:
    """Raises ValueError unless these are floats [batch, length, dim] and [ids, dim], no dimension 0, and a cap > 0."""
    hidden, table = hidden_BTD, table_VD
    if not (hidden.ndim == 3 and table.ndim == 2 and hidden.shape[2] == table.shape[1]):
        raise ValueError(f"{name}: hidden has shape {hidden.shape}, table {table.shape}, wanted [B, T, D] and [V, D]")
    if 0 in hidden.shape or 0 in table.shape:
        raise ValueError(f"{name}: hidden has shape {hidden.shape}, table {table.shape}, wanted no dimension of 0")
    for what, array in (("hidden", hidden), ("table", table)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name}: {what} is {array.dtype}, wanted floats")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"{name}: soft_cap is {soft_cap}, wanted None or a number > 0")
