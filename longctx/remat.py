"""What a layer's forward pass keeps for its backward pass, by the names of tensors: saved, recomputed, or offloaded."""

from collections.abc import Callable, Iterable, Mapping
from typing import Literal, get_args

import jax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.saved import ATTENTION

Keeping = Literal["save", "offload", "recompute"]
Setting = Literal["none", "dots", "full"]
Remat = Setting | Mapping[str, Keeping]

RESIDUAL, QKV, MIXER_OUTPUT, MLP_HIDDEN = "residual", "qkv", "mixer_output", "mlp_hidden"

NAMES: Mapping[str, str] = {
    RESIDUAL: "the input of the layer",
    QKV: "queries, keys and values as the projections put them out, before norms, convolutions and rotary positions",
    ATTENTION: "what the attention op returns and its backward pass reads: out and lse, or states",
    MIXER_OUTPUT: "what the mixer adds to the residual",
    MLP_HIDDEN: "the outputs of the MLP's gate and up projections",
}
"""What each name stands for."""

BLOCK_NAMES = frozenset({RESIDUAL, MIXER_OUTPUT, MLP_HIDDEN})
"""Those that every layer has, whatever its mixer."""


def named(x: jax.Array, name: str) -> jax.Array:
    """x, for `rematerialised` to know it by this name; nothing else changes."""
    return checkpoint_name(x, name)


def check_remat(remat: Remat, layers: Mapping[str, Iterable[str]]) -> None:
    """Refuses settings and names that are not known, and names that no layer has.

    Args:
      remat: The setting.
      layers: By mixer, the names of the tensors that its layers have.
    Raises: ValueError.
    """
    if isinstance(remat, Mapping):
        _check_names(remat, layers)
    elif remat not in get_args(Setting):
        raise ValueError(
            f"remat: got {remat!r}, wanted one of {', '.join(get_args(Setting))}, or save, offload or recompute by the "
            "name of a tensor; choose one of these"
        )


def _check_names(remat: Mapping[str, Keeping], layers: Mapping[str, Iterable[str]]) -> None:
    for name, keeping in remat.items():
        if keeping not in get_args(Keeping):
            raise ValueError(
                f"remat: got {name}={keeping!r}, wanted one of {', '.join(get_args(Keeping))}; choose one of these"
            )
        if name not in NAMES:
            raise ValueError(f"remat: got the name {name!r}, wanted names of tensors ({', '.join(NAMES)}); use these")
        if not any(name in names for names in layers.values()):
            had = sorted(set().union(*layers.values()), key=list(NAMES).index)
            raise ValueError(
                f"remat: got the name {name!r}, which no layer of the mixers {', '.join(layers)} has, wanted one of "
                f"{', '.join(had)}; remove it"
            )
    if remat.get(RESIDUAL) == "recompute":
        raise ValueError(
            f"remat: got {RESIDUAL}=recompute, wanted save or offload: the input of a layer is what the recomputation "
            "starts from; choose one of these"
        )


def keeps(remat: Remat, name: str) -> bool:
    """Whether the backward pass has this tensor without computing it again; of `dots`, as good as."""
    if isinstance(remat, str):
        return {"none": True, "dots": name != ATTENTION, "full": name == RESIDUAL}[remat]
    return name == RESIDUAL or remat.get(name) in ("save", "offload")


def kept(remat: Mapping[str, Keeping], keeping: Keeping) -> tuple[str, ...]:
    """The names that are treated this way."""
    return tuple(name for name, of_name in remat.items() if of_name == keeping)


def offloaded(remat: Remat) -> tuple[str, ...]:
    """The names of what goes to the host's memory."""
    return () if isinstance(remat, str) else kept(remat, "offload")


def rematerialised(function: Callable, remat: Remat, *, prevent_cse: bool) -> Callable:
    """`function`, whose backward pass has what the setting says, and recomputes the rest.

    What is offloaded goes to memory of the host that the device can read by itself (`pinned_host`), beside the compute,
    and comes back before the backward pass of its layer. On CPU devices, whose memory is the host's, nothing moves.
    """
    if remat == "none":
        return function
    return jax.checkpoint(function, policy=_policy(remat), prevent_cse=prevent_cse)


def _policy(remat: Remat) -> Callable:
    policies = jax.checkpoint_policies
    if remat == "full":
        return policies.nothing_saveable
    if remat == "dots":
        return policies.dots_with_no_batch_dims_saveable
    if not offloaded(remat):
        return policies.save_only_these_names(*kept(remat, "save"))
    return policies.save_and_offload_only_these_names(
        names_which_can_be_saved=list(kept(remat, "save")),
        names_which_can_be_offloaded=list(offloaded(remat)),
        offload_src="device",
        offload_dst="pinned_host",
    )
