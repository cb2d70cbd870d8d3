"""Other people's blockwise and linear attention: how each is called, and which cases it serves."""

import dataclasses
import importlib.util
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.cases import BLOCK, Batch, Case, Pass
from benchmarks.linear_cases import LinearCase


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to compute a case.

    Attributes:
      name: As results call it.
      ours: Whether it is this project's.
      deterministic: Whether its gradients come out the same, bit by bit, each time.
      attend: (q, k, v, extra) -> out, differentiable in q, k and v; linear attention's takes (q, k, v, decay, extra).
      extra: Builds what does not change from layer to layer, outside the timing.
      passes: The passes worth timing.
      out_of: out, for the check, of what attend returns; not timed.
    """

    name: str
    ours: bool
    deterministic: bool
    attend: Callable[..., Any]
    extra: Callable[[], Any] = lambda: None
    passes: tuple[Pass, ...] = ("forward", "forward+backward")
    out_of: Callable[[Any], jax.Array] = lambda result: result


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peer[C: Batch]:
    """Another library.

    Attributes:
      module: What is imported.
      package: What is installed.
      candidates: Its candidates for a case; raises NotImplementedError with the reason where it serves none.
    """

    module: str
    package: str
    candidates: Callable[[C], list[Candidate]]

    @property
    def is_installed(self) -> bool:
        return importlib.util.find_spec(self.module) is not None


def _needs_gpu() -> None:
    if jax.default_backend() != "gpu":
        raise NotImplementedError(f"needs an NVIDIA GPU, the platform is {jax.default_backend()}")


def _cudnn(case: Case) -> list[Candidate]:
    """cuDNN through jax.nn: documents and blocks as a dense mask, since its public interface has no other way."""
    _needs_gpu()

    def dense_mask():
        if case.one_block_in is not None:
            return jnp.repeat(jnp.repeat(jnp.asarray(case.mask.blocks), BLOCK, axis=0), BLOCK, axis=1)[None, None]
        ids = case.segment_ids
        return None if ids is None else ids[:, None, :, None] == ids[:, None, None, :]

    def attend(q, k, v, mask):
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            mask=mask,
            is_causal=case.causal,
            local_window_size=None if case.window is None else (case.window - 1, 0),
            implementation="cudnn",
        )

    if case.value_dim is not None:
        attend = _cudnn_of_other_values(case)
    return [Candidate(name="cuDNN (jax.nn)", ours=False, deterministic=False, attend=attend, extra=dense_mask)]


def _cudnn_of_other_values(case: Case) -> Callable:
    """What jax.nn calls, as that takes values of the keys' head dim alone."""
    if case.window is not None or not case.causal or case.documents is not None:
        raise NotImplementedError("values of another head dim are timed under a causal mask, over tokens in order")
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    def attend(q, k, v, mask):
        return cudnn.dot_product_attention(q, k, v, scale=case.head_dim**-0.5, mask_type=cudnn.MaskType.CAUSAL)

    return attend


def _jla(case: Case) -> list[Candidate]:
    """The Mosaic GPU kernels of jax-linear-attention, and their fused backward, an option, dq in any order."""
    _needs_gpu()
    if not case.causal:
        raise NotImplementedError("is causal only")
    if {case.head_dim, case.dim_of_values} not in ({64}, {128}):
        raise NotImplementedError(f"head dims are 64 or 128, got {case.head_dim} and {case.dim_of_values}")
    from jla.ops.mosaic_gpu.attention import flash_attention

    def segment_ids():
        ids = case.segment_ids
        return None if ids is None else jnp.broadcast_to(ids, (case.batch_size, case.length))

    def attend_with(backward: str):
        return lambda q, k, v, ids: flash_attention(
            q, k, v, segment_ids=ids, sliding_window=case.window, backward=backward
        )

    ranged = Candidate(name="jla", ours=False, deterministic=True, attend=attend_with("ranged"), extra=segment_ids)
    fused = dataclasses.replace(
        ranged, name="jla fused", deterministic=False, attend=attend_with("fused"), passes=("forward+backward",)
    )
    return [ranged, fused]


def _tokamax(case: Case) -> list[Candidate]:
    """tokamax's Mosaic GPU kernels, at its default tile sizes: documents as the first key of each query."""
    _needs_gpu()
    if case.one_block_in is not None:
        raise NotImplementedError("its Mosaic GPU kernels skip ranges of keys, not blocks of a table")
    logging.getLogger("absl").setLevel(logging.ERROR)  # it warns of every shape that it was not tuned for
    from tokamax._src.ops.attention import api, base

    causal = base.CausalMask(window_size=case.window) if case.causal else None

    def first_keys():
        if case.documents is None:
            return None
        return jnp.broadcast_to(case.document_starts[:, None], (case.batch_size, 1, case.length))

    def attend(q, k, v, first_keys):
        mask = base.Mask(causal_mask=causal, k_start=first_keys)
        return api.IMPLEMENTATIONS["mosaic_gpu"](q, k, v, mask=mask)

    return [Candidate(name="tokamax", ours=False, deterministic=True, attend=attend, extra=first_keys)]


def _jla_linear(case: LinearCase) -> list[Candidate]:
    """Its Mosaic GPU kernels: of GLA, DeltaNet and Gated DeltaNet; else of simple GLA, which take a gate for each token
    and head: a fixed decay is spread inside the program, as its layer of Lightning Attention does, and no decay is a
    gate of 0. Where value heads share queries and keys, its backward that adds up their gradients inside the kernel, an
    option, is another.
    """
    _needs_gpu()
    if not {case.key_dim, case.value_dim} <= {64, 128}:
        raise NotImplementedError(f"head dims are 64 or 128, got {case.key_dim} and {case.value_dim}")
    from jla.ops import linear_attention
    from jla.ops.mosaic_gpu import scalar_gate

    def segment_ids():
        ids = case.segment_ids
        return None if ids is None else jnp.broadcast_to(ids, (case.batch_size, case.length))

    def gate_of(decay):
        return jnp.broadcast_to(0.0 if decay is None else decay, (case.batch_size, case.length, case.num_heads))

    def attend(q, k, v, decay, ids):
        return linear_attention("simple_gla", q, k, v, g=gate_of(decay), segment_ids=ids, impl="mosaic_gpu")[0]

    def attend_grouped(q, k, v, decay, ids):
        return scalar_gate.run(
            q, k, v, gate_of(decay), None, delta=False, scale=None, initial_state=None, output_final_state=False,
            segment_ids=ids, grouped_key_grads=True,
        )[0]  # fmt: skip

    def attend_gla(q, k, v, decay, ids):
        return linear_attention("gla", q, k, v, g=decay, segment_ids=ids, impl="mosaic_gpu")[0]

    def attend_delta(q, k, v, decay, beta, ids):
        kind, gates = ("deltanet", {}) if decay is None else ("gated_deltanet", {"g": decay})
        return linear_attention(kind, q, k, v, beta=beta, **gates, segment_ids=ids, impl="mosaic_gpu")[0]

    if case.delta or case.kind == "vector":
        attend = attend_delta if case.delta else attend_gla
    plain = Candidate(name="jla", ours=False, deterministic=True, attend=attend, extra=segment_ids)
    if case.num_heads == case.num_qk_heads or case.delta or case.kind == "vector":
        return [plain]
    grouped = dataclasses.replace(plain, name="jla grouped", attend=attend_grouped, passes=("forward+backward",))
    return [plain, grouped]


PEERS = {
    "cudnn": Peer(module="jax", package="jax", candidates=_cudnn),
    "jla": Peer(module="jla", package="jax-linear-attention", candidates=_jla),
    "tokamax": Peer(module="tokamax", package="tokamax", candidates=_tokamax),
}
LINEAR_PEERS = {"jla": Peer(module="jla", package="jax-linear-attention", candidates=_jla_linear)}


def chosen_peers(
    names: str | None, *, note: Callable[[str], None], peers: Mapping[str, Peer] = PEERS
) -> dict[str, Peer]:
    """The peers that a comma-separated list names; None means those that are installed, and says which are not.

    Raises: ValueError where a name is unknown or the peer is not installed.
    """
    if names is None:
        for name, peer in peers.items():
            if not peer.is_installed:
                note(f"peer {name} left out: {peer.package} is not installed")
        return {name: peer for name, peer in peers.items() if peer.is_installed}
    chosen = {}
    for name in filter(None, names.split(",")):
        if name not in peers:
            raise ValueError(f"--peers: got {name!r}, wanted some of {','.join(peers)}")
        if not peers[name].is_installed:
            raise ValueError(
                f"--peers: {name} is not installed; `pip install {peers[name].package}`, or leave it out of the list"
            )
        chosen[name] = peers[name]
    return chosen
