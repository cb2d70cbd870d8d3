"""How long a collective takes on the links between devices.

Bytes over bandwidth, plus a latency: what the links allow, not what a library makes of it. Collectives that share links
at the same time are put one after the other (timeline.py).
"""

import json
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from train.devices import DeviceSpec
from train.planning.hlo import Instruction

KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-broadcast", "collective-permute", "reduce-scatter")
_COLLECTIVE = re.compile(rf"(?:ragged-)?({'|'.join(KINDS)})(-start|-done)?")
_WRAPAROUND = {2: 16, 3: 4}  # links close a TPU torus along an axis of this many chips, by the number of axes


def is_collective(instruction: Instruction) -> bool:
    """Whether it moves data between devices."""
    return bool(_COLLECTIVE.fullmatch(instruction.opcode))


def kind_of(instruction: Instruction) -> tuple[str, str] | None:
    """Its kind, and "start", "done" or "" (synchronous); None for what is no collective."""
    found = _COLLECTIVE.fullmatch(instruction.opcode)
    return found and (found[1], (found[2] or "").removeprefix("-"))


class Place(NamedTuple):
    """Where a device is: its host, and its coordinates in a torus (of one entry elsewhere)."""

    host: int
    coords: tuple[int, ...]


class Links:
    """The links of a mesh.

    Args:
      spec: Bandwidths; must have `spec.has_speeds`.
      places: Of the devices in the order of the mesh.
    """

    def __init__(self, spec: DeviceSpec, places: Sequence[Place]):
        self._spec, self._places = spec, places
        self._extents = tuple(1 + max(p.coords[axis] for p in places) for axis in range(len(places[0].coords)))
        axes = sum(extent > 1 for extent in self._extents)
        self._wrap = _WRAPAROUND.get(axes, math.inf)

    def seconds(self, kind: str, num_bytes: int, groups: Sequence[Sequence[int]]) -> tuple[float, str]:
        """Time of one collective, and the links that it takes.

        Args:
          kind: One of KINDS.
          num_bytes: What one device sends.
          groups: Devices that take part together, by their place in the mesh; for permutes, pairs (source, target).
        """
        if self._spec.link == "torus":
            return self._on_torus(kind, num_bytes, groups)
        return self._on_switch(kind, num_bytes, groups)

    def _on_switch(self, kind, num_bytes, groups):
        hosts = max(len({self._places[d].host for d in group}) for group in groups)
        inside, latency = self._spec.link_gb_per_s * 1e9, self._spec.latency_us * 1e-6
        if hosts == 1:
            return latency + num_bytes / inside, "inside a host"
        network = (self._spec.network_gb_per_s or self._spec.link_gb_per_s) * 1e9
        if self._spec.network_latency_us is not None:
            latency = self._spec.network_latency_us * 1e-6
        if kind == "collective-permute":
            return latency + num_bytes / network, "network"
        # What crosses hosts is shared by the adapters of the group's devices on a host.
        size = max(map(len, groups))
        crossing = num_bytes * size / (size - 1) * (hosts - 1) / hosts / (size / hosts)
        return 2 * latency + max(num_bytes / inside, crossing / network), "network"

    def _on_torus(self, kind, num_bytes, groups):
        link, latency = self._spec.link_gb_per_s * 1e9, self._spec.latency_us * 1e-6
        if kind == "collective-permute":
            # Where every device sends so far, each link carries the data of as many pairs.
            distance = max(1, *(self._distance(*pair) for pair in groups))
            return distance * (latency + num_bytes / link), f"torus, {distance} hop{'s' if distance > 1 else ''}"
        extents = self._spanned(groups[0])
        lanes = sum(2 if self._wraps(axis) else 1 for axis in extents) or 1
        name = f"torus, {len(extents)} ax{'is' if len(extents) == 1 else 'es'}"
        hops = sum(extents.values())
        if kind == "all-to-all":  # half of a ring's way is a quarter of its length on average
            return hops * latency + num_bytes * max(1.0, hops / 4) / (lanes * link), name
        return hops * latency + num_bytes / (lanes * link), name

    def _spanned(self, group: Sequence[int]) -> dict[int, int]:
        """The torus axes along which a group extends, and how far."""
        coords = np.array([self._places[d].coords for d in group])
        extents = {axis: len(np.unique(coords[:, axis])) for axis in range(coords.shape[1])}
        return {axis: extent for axis, extent in extents.items() if extent > 1}

    def _distance(self, source: int, target: int) -> int:
        return sum(
            min(abs(a - b), self._extents[axis] - abs(a - b)) if self._wraps(axis) else abs(a - b)
            for axis, (a, b) in enumerate(zip(self._places[source].coords, self._places[target].coords, strict=True))
        )

    def _wraps(self, axis: int) -> bool:
        return self._extents[axis] >= self._wrap and self._extents[axis] % self._wrap == 0


def groups_of(attributes: str, num_devices: int) -> list[list[int]]:
    """The devices that take part together in a collective, from its attributes in an HLO text.

    Raises: ValueError for a way of writing groups that is not known.
    """
    pairs = re.search(r"source_target_pairs=\{(.*?\})\}", attributes)
    if pairs:
        return [[int(d) for d in pair.split(",")] for pair in re.findall(r"\{([\d,]+)\}", pairs[1])]
    listed = re.search(r"replica_groups=\{(\{.*?\})\}", attributes)
    if listed:
        return [[int(d) for d in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        numbers = np.arange(num_devices).reshape(_integers(iota[2]))
        if iota[3]:
            numbers = numbers.transpose(_integers(iota[3]))
        return numbers.reshape(_integers(iota[1])).tolist()
    by_axes = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes)
    if by_axes:
        return _groups_over_axes(by_axes[1], by_axes[2])
    if "replica_groups={}" in attributes or "replica_groups=" not in attributes:
        return [list(range(num_devices))]
    raise ValueError(f"replica_groups: got {attributes[:200]!r}, wanted one of the ways XLA is known to write groups")


def sent_by_kernel(attributes: str) -> tuple[int, list[list[int]]] | None:
    """Bytes that a device sends in a kernel, and the pairs (source, target) of the mesh; None where it sends nothing.

    Args:
      attributes: Of the call, with what the kernel says of itself
        (`pallas_kernels.blockwise.pallas_mosaic_tpu_send`).
    """
    found = re.search(r'"sends":("(?:[^"\\]|\\.)*")', attributes)
    if not found:
        return None
    sends = json.loads(json.loads(found[1]))
    mesh, axes = sends["mesh"], sends["axes"]
    numbers = np.arange(math.prod(mesh.values())).reshape(tuple(mesh.values()))
    numbers = np.moveaxis(numbers, [list(mesh).index(axis) for axis in axes], range(-len(axes), 0))
    rings = numbers.reshape(-1, math.prod(mesh[axis] for axis in axes))
    targets = np.roll(rings, -sends["stride"], axis=1)
    return sends["bytes"], np.stack([rings.ravel(), targets.ravel()], axis=1).tolist()


def _groups_over_axes(mesh: str, chosen: str) -> list[list[int]]:
    """Groups over named axes of a mesh, some of them perhaps parts of an axis: 'axis':(skipped)size."""
    axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    numbers = np.arange(math.prod(axes.values()))
    order = re.search(r"device_ids=\(?\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", mesh)
    if order:
        numbers = numbers.reshape(_integers(order[2]))
        numbers = numbers.transpose(_integers(order[3])) if order[3] else numbers
    shape, taken = [], []
    parts = {name: (int(before or 1), int(size or axes[name])) for name, before, size in re.findall(
        r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen
    )}  # fmt: skip
    for name, size in axes.items():
        before, part = parts.get(name, (1, 1))
        shape += [before, part, size // before // part]
        taken.append(len(shape) - 2)
    numbers = np.moveaxis(numbers.reshape(shape), taken, range(-len(taken), 0))
    return numbers.reshape(-1, math.prod(part for _, part in parts.values())).tolist()


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]
