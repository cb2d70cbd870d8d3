"""What calls of attention ops cost on a run's devices, call by call."""

import functools
from collections.abc import Mapping

import numpy as np
from jaxtyping import Int

from longctx.context_parallel import Balancer
from longctx.context_parallel.balance import hop_tiles, imbalance
from longctx.mixers.grouped_query import GroupedQueryConfig
from longctx.mixers.registry import MixerConfig
from pallas_kernels import BlockSizes
from pallas_kernels.block_sizes import BLOCKWISE_ATTENTION, XLA_TILES
from train.devices import DeviceSpec
from train.planning.cost import BACKWARD_MATMULS
from train.planning.program import Run
from train.planning.timeline import OpCall


class AttentionWork:
    """The work of the attention ops of a run whose rows are one document each, which is the most there can be.

    One op call after the other as the strategy makes them: a ring hop by hop, the others one for all keys.

    Args:
      run: The run.
      implementations: Implementation by op, from dispatch.record: which of the table's speeds counts.
    """

    def __init__(self, run: Run, implementations: Mapping[str, str]):
        self._run = run
        self._implementations = implementations

    def calls(self, spec: DeviceSpec) -> dict[tuple[str, str], OpCall]:
        """The cost of one call by (mixer's name, "forward" or "backward"), with the device's speeds."""
        return {
            (name, phase): self._call(mixer, phase, spec)
            for name, mixer in self._run.parts.model.mixers.items()
            for phase in ("forward", "backward")
        }

    @property
    def imbalance(self) -> dict[str, float]:
        """Of the layout under each mixer's mask, as balance.imbalance counts it."""
        if self._run.ring_size == 1:
            return {}
        mixers = {name: mixer for name, mixer in self._run.parts.model.mixers.items() if mixer.mask is not None}
        return {name: imbalance(self._tiles(mixer, "forward")) for name, mixer in mixers.items()}

    def _call(self, mixer: MixerConfig, phase: str, spec: DeviceSpec) -> OpCall:
        flops = self._forward_flops(mixer, phase) * (1.0 if phase == "forward" else BACKWARD_MATMULS)
        speed = spec.attention_flops(self._implementation(phase), phase, self._head_dim(mixer))
        return OpCall(seconds=flops.max(axis=0) / speed, flops=flops.mean(axis=0))

    def _head_dim(self, mixer: MixerConfig) -> int:
        """Of its queries; wide where it has none."""
        dim = self._run.parts.model.dim
        resolved = mixer.resolved(dim) if isinstance(mixer, GroupedQueryConfig) else mixer
        return getattr(resolved, "head_dim", None) or dim

    def _implementation(self, phase: str) -> str:
        return next((name for op, name in self._implementations.items() if op.endswith(phase)), "xla")

    def _forward_flops(self, mixer: MixerConfig, phase: str) -> np.ndarray:
        """Of every device in every call of a layer, `[devices, calls]`, in the tiles that `phase` visits."""
        dim, share = self._run.parts.model.dim, self._run.rows / self._run.mesh.shape["tensor"]
        if mixer.mask is None:  # no pairs of tokens are visited: even over the devices
            whole = mixer.flops_by_part(dim, np.array([self._run.config.data.seq_len])).get("attention", 0.0)
            return np.full((1, 1), share * whole / self._run.ring_size)
        blocks = self._blocks(mixer, phase)
        of_a_pair = mixer.flops_by_part(dim, np.array([1]))["attention"]  # a document of one token has one pair
        return share * of_a_pair * blocks.block_q * blocks.block_kv * self._tiles(mixer, phase)

    def _tiles(self, mixer: MixerConfig, phase: str) -> Int[np.ndarray, "devices calls"]:
        degree = self._run.ring_size
        length, sharding = self._run.config.data.seq_len, self._run.sharding
        tiles = _cached_tiles(mixer.mask, self._order.tobytes(), degree, self._blocks(mixer, phase))
        if degree == 1:
            return tiles
        setting = sharding.setting(mixer.mask, degree=degree, q_len=length, kv_len=length)
        return sharding.strategy_for(mixer.mask).tiles_of_calls(setting, tiles)

    @functools.cached_property
    def _order(self) -> Int[np.ndarray, " length"]:
        order = self._run.config.row_order(self._run.mesh.shape)
        if isinstance(order, Balancer):
            positions = np.arange(len(order))
            return order.row(positions, np.zeros_like(positions)).order
        return order

    def _blocks(self, mixer: MixerConfig, phase: str) -> BlockSizes:
        platform = self._run.target.platform
        default = BLOCKWISE_ATTENTION[platform]
        if self._implementation(phase) == "xla":
            default = XLA_TILES.get(platform, default)
        length = self._run.config.data.seq_len // self._run.ring_size
        return (mixer.block_sizes or default).fit(length, length)


@functools.lru_cache(maxsize=8)
def _cached_tiles(mask, order: bytes, degree: int, blocks: BlockSizes) -> Int[np.ndarray, "devices hops"]:
    return hop_tiles(mask, np.frombuffer(order, np.int64), degree, blocks)
