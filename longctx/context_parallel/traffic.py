"""What a context-parallel strategy sends, in numbers: for planning, and for tests that compare it with a program."""

import dataclasses
from typing import Literal, get_args

Phase = Literal["forward", "backward"]
PHASES: tuple[str, ...] = get_args(Phase)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transfer:
    """Equal collectives of one layer: how often a device takes part, and what it sends each time."""

    kind: Literal["collective-permute", "all-gather", "reduce-scatter", "all-to-all", "all-reduce", "remote-dma"]
    """The collective, by XLA's name; `remote-dma` is what a kernel sends itself while it computes."""
    phase: Phase
    """The pass that it belongs to; a layer that is recomputed runs its forward pass twice."""
    count: int
    """Collectives of this kind and size in one pass over the layer."""
    num_bytes: int
    """Bytes that one device sends in one such collective."""
    beside_calls: int = 0
    """Calls of the op, of the same layer, that may run beside one; 0 where they wait for it, or it for them."""
    before_attention: bool = False
    """Whether what the attention op reads is made of it: a layer that keeps the op's results sends it twice all the
    same."""
    level: Literal["inner", "outer"] | None = None
    """Where the axes of the tokens are treated apart, whether it goes over the last of them or over the others."""

    @property
    def total_bytes(self) -> int:
        """Bytes that one device sends in all of them."""
        return self.count * self.num_bytes
