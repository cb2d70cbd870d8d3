"""What attention over a split sequence costs: the model that `context_parallel.strategy: auto` goes by.

One pass over one layer, on one device, in seconds:

  compute + carried + waiting

  compute   The tiles that the busiest device visits in each call of the op, one call after the other: 4 H FLOPs for
            each pair of tokens and query head forward, 10 H backward, over the speed of the op.
  carried   Where a layer makes M > 1 calls, what goes from one to the next is read and written by each, in float32: the
            softmax of the queries, 8 M B (T / P) N H bytes; backward the gradient of the queries, as many, and 16 M
            B (S / P) K 2 H for those of keys and values, which start at 0 in every call and are then added up. Over the
            bandwidth of memory.
  waiting   Of each collective (`Strategy.transfers`) what its links take (links.py) longer than the calls beside it
            (`Transfer.beside_calls`): max(0, latency + bytes / bandwidth - compute).

What is left out: launches, copies that put gathered tokens in order, and what kernels and links take from each other.
docs/context_parallel.md compares it with measurements.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int

from longctx.context_parallel.balance import hop_tiles
from longctx.context_parallel.config import STRATEGIES, AttentionSharding
from longctx.context_parallel.layout import Layout
from longctx.context_parallel.strategy import Setting
from longctx.context_parallel.traffic import PHASES, Transfer
from pallas_kernels import BlockSizes, Mask
from train.devices import DeviceSpec
from train.planning.links import Links

BACKWARD_MATMULS = 5 / 2  # of a tile, over those of the forward pass
_BLOCK = 128  # tokens of a tile of the kernels
_BLOCKS = 2048  # of the whole sequence, at most: tiles of longer sequences are counted coarsely


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """Softmax attention of one layer, of rows that are one document each; hashable.

    Attributes:
      mask: Which pairs may attend.
      seq_len: Tokens of a whole row, T = S.
      degree: Devices that share it, P.
      num_heads, num_kv_heads: Of these devices, N and K.
      head_dim: H.
      rows: Of these devices, B.
      dtype: Of q, k and v.
      max_document_length: As of AttentionSharding.
    """

    mask: Mask
    seq_len: int
    degree: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rows: int = 1
    dtype: str = "bfloat16"
    max_document_length: int | None = None

    def setting(self, layout: Layout, inner_degree: int) -> Setting:
        """Of this layer, whose devices are in groups of `inner_degree`."""
        sharding = AttentionSharding(
            layout=layout, inner_degree=inner_degree, max_document_length=self.max_document_length
        )
        return sharding.setting(
            self.mask,
            degree=self.degree,
            q_len=self.seq_len,
            kv_len=self.seq_len,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
        )

    def transfers(self, strategy: str, setting: Setting) -> tuple[Transfer, ...]:
        """What a device sends for it."""
        sizes = dict(batch_size=self.rows, key_dim=self.head_dim, value_dim=self.head_dim)
        return STRATEGIES[strategy].transfers(setting, **sizes, dtype=self.dtype)

    def flops(self, strategy: str, setting: Setting) -> Float[np.ndarray, "devices calls"]:
        """Of a forward pass, of every device in every call of the op."""
        pairs = _pairs(self.mask, setting.layout, self.seq_len, self.degree)
        return 4.0 * self.rows * self.num_heads * self.head_dim * STRATEGIES[strategy].tiles_of_calls(setting, pairs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speeds:
    """What devices and links do.

    Attributes:
      spec: The device; must have `spec.has_speeds`.
      implementation: Of the attention op.
      links: Of groups of so many devices: the links between the devices of a row.
    """

    spec: DeviceSpec
    implementation: str
    links: Callable[[int], "RowLinks"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowLinks:
    """The links between the devices that share a row.

    Attributes:
      links: Of the mesh.
      devices: Those of each row by group and place in it, as numbers of places of `links`.
    """

    links: Links
    devices: Int[np.ndarray, "rows groups places"]

    def seconds(self, transfer: Transfer) -> float:
        """Of one collective."""
        rows, devices = len(self.devices), self.devices
        flat = devices.reshape(rows, -1)
        if transfer.kind == "collective-permute":
            to = {
                None: np.roll(flat, -1, axis=1).reshape(devices.shape),
                "inner": np.roll(devices, -1, axis=2),
                "outer": np.roll(devices, -1, axis=1),
            }[transfer.level]
            groups = np.stack([devices.reshape(-1), to.reshape(-1)], axis=1)
        else:
            groups = devices.reshape(-1, devices.shape[2]) if transfer.level == "inner" else flat
        return self.links.seconds(transfer.kind, transfer.num_bytes, groups.tolist())[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PassCost:
    """Seconds of one pass over one layer, on one device; the parts of the sum above."""

    compute: float
    carried: float
    waiting: float

    @property
    def seconds(self) -> float:
        return self.compute + self.carried + self.waiting

    def __add__(self, other: "PassCost") -> "PassCost":
        return PassCost(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)})

    def __mul__(self, times: int) -> "PassCost":
        return PassCost(**{f.name: getattr(self, f.name) * times for f in dataclasses.fields(self)})


def layer_cost(layer: Layer, strategy: str, layout: Layout, inner_degree: int, speeds: Speeds) -> dict[str, PassCost]:
    """The cost of a layer by pass, "forward" and "backward".

    Args:
      strategy: One that does not refuse the layer.
    """
    setting = layer.setting(layout, inner_degree)
    transfers, flops = layer.transfers(strategy, setting), layer.flops(strategy, setting)
    links = speeds.links(inner_degree)
    costs = {}
    for phase in PHASES:
        matmuls = 1.0 if phase == "forward" else BACKWARD_MATMULS
        calls = matmuls * flops.max(axis=0) / speeds.spec.attention_flops(speeds.implementation, phase, layer.head_dim)
        waiting = 0.0
        for transfer in transfers:
            if transfer.phase == phase:
                exposed = np.maximum(0.0, links.seconds(transfer) - compute_beside(transfer, calls))
                waiting += transfer.count * float(exposed.mean())
        carried = carried_bytes(layer, phase, len(calls)) / (1e9 * speeds.spec.memory_gb_per_s)
        costs[phase] = PassCost(compute=float(calls.sum()), carried=carried, waiting=waiting)
    return costs


def carried_bytes(layer: Layer, phase: str, num_calls: int) -> int:
    """Bytes that go from one call of a layer to the next, read and written."""
    if num_calls == 1:
        return 0
    tokens = layer.rows * layer.seq_len // layer.degree
    of_queries = 2 * 4 * tokens * layer.num_heads * layer.head_dim
    of_keys = 4 * 4 * tokens * layer.num_kv_heads * 2 * layer.head_dim if phase == "backward" else 0
    return num_calls * (of_queries + of_keys)


def held_bytes(transfers: Sequence[Transfer]) -> int:
    """Of what a strategy sends, what a device holds at most: it arrives in one buffer and is used from another."""
    return 2 * sum(max((t.num_bytes for t in transfers if t.phase == phase), default=0) for phase in PHASES)


def compute_beside(transfer: Transfer, seconds: Float[np.ndarray, " calls"]) -> Float[np.ndarray, " times"]:
    """Seconds of attention that may run beside each of the collectives, from those of a layer's calls of the op."""
    if transfer.beside_calls == 0:
        return np.zeros(1)
    return np.add.reduceat(seconds, np.arange(0, len(seconds), transfer.beside_calls))


@functools.lru_cache(maxsize=64)
def _pairs(mask: Mask, layout: Layout, length: int, degree: int) -> Int[np.ndarray, "devices hops"]:
    """Pairs of tokens in the tiles that each device visits at each hop of a ring."""
    own = length // degree
    block = min(own, max(_BLOCK, math.ceil(length / _BLOCKS)))
    tiles = hop_tiles(mask, layout.order(length, degree), degree, BlockSizes(block_q=block, block_kv=block))
    return tiles * block**2
