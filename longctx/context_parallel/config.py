"""How attention is split over a mesh: as a run's config says it, and as a layer is told it."""

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Int

from longctx.context_parallel.all_gather import AllGather
from longctx.context_parallel.double_ring import DoubleRing
from longctx.context_parallel.halo import Halo
from longctx.context_parallel.layout import Layout, LayoutName
from longctx.context_parallel.ring import Ring
from longctx.context_parallel.ring_dma import RingDma
from longctx.context_parallel.strategy import Setting, Strategy, StrategyName
from longctx.context_parallel.ulysses import Ulysses
from longctx.context_parallel.usp import Usp
from pallas_kernels import Mask

STRATEGIES: dict[str, Strategy] = {
    strategy.name: strategy for strategy in (Ring(), RingDma(), AllGather(), Ulysses(), Halo(), Usp(), DoubleRing())
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionSharding:
    """Names the mesh axes that attention is split over, and how.

    Where none of `batch`, `heads` and `sequence` names an axis, they are those of `longctx.make_mesh` if such a mesh is
    in scope, and nothing is split otherwise.

    Attributes:
      batch: Axes that split the rows of the batch.
      heads: Axes that split the heads; their size must divide the number of kv heads.
      sequence: Axes that split the tokens, queries and keys alike; their size must divide both lengths.
      strategy: How queries meet the keys of other devices, where `sequence` splits anything.
      window_strategy: The same for masks whose window is bounded on both sides; None means `strategy` for them too.
      layout: Which tokens a device holds, where it is known: `halo` needs it, `ring` leaves hops out by it, the others
        bring tokens into the order of the sequence. Tokens are permuted in the data, by `layout.order`.
      max_document_length: Most tokens of a document, in rows of packed documents whose positions start at 0 in each.
        Where it is given, attention within documents reaches no farther; rows that hold a longer one become NaN.
      inner_degree: Devices along the last of several axes of `sequence`, for plans that are made without a mesh. Calls
        go by the mesh in scope alone.
    """

    batch: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    sequence: tuple[str, ...] = ()
    strategy: StrategyName = "ring"
    window_strategy: StrategyName | None = None
    layout: Layout | None = None
    max_document_length: int | None = None
    inner_degree: int | None = None

    def __post_init__(self):
        for name in ("strategy", "window_strategy"):
            value = getattr(self, name)
            if value not in STRATEGIES and not (name == "window_strategy" and value is None):
                raise ValueError(f"AttentionSharding: {name}={value!r}, wanted one of {', '.join(STRATEGIES)}")
        if self.max_document_length is not None and self.max_document_length < 1:
            raise ValueError(
                f"AttentionSharding: max_document_length={self.max_document_length}, wanted None or a number of tokens "
                ">= 1"
            )

    def strategy_for(self, mask: Mask) -> Strategy:
        """The strategy of layers with this mask."""
        return STRATEGIES[(mask.span.is_bounded and self.window_strategy) or self.strategy]

    def setting(self, mask: Mask, **fields) -> Setting:
        """The Setting of attention that is split this way; `fields` are those that are not known here."""
        known = dict(layout=self.layout, max_document_length=self.max_document_length, inner_degree=self.inner_degree)
        return Setting(mask=mask, **known | fields)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContextParallelConfig:
    """How attention works when the tokens of a sequence are split over the context axes of the mesh."""

    strategy: StrategyName | Literal["auto"] = "ring"
    """How a query meets keys of other devices: `ring` passes keys and values from device to device, under the compute;
    `ring_dma` does the same inside the attention kernels of a TPU; `all_gather` gathers all of them at once; `ulysses`
    splits the heads in place of the tokens while it attends; `halo` sends the tokens around a device's own, for
    windows; `usp` splits the heads over mesh.context_inner, and passes keys and values round mesh.context_outer;
    `double_ring` passes them round mesh.context_inner, and on to the next group of devices meanwhile; `auto` chooses
    when the run starts, and layout and groups too, and says why."""
    window_strategy: StrategyName | None = None
    """The same for layers whose mask is a window; null means `strategy`. `halo` sends no more than the window."""
    layout: LayoutName | None = None
    """Which tokens a device holds: `contiguous` one run; `zigzag` an early and a late run, which evens out causal
    masks; `striped` every P-th stripe, which evens out packed documents too; `balanced` chunks that the loader chooses
    for each row, by its documents, so that devices have the same to do; null is zigzag, or what `strategy: auto`
    chooses."""
    stripe_size: int = 1
    """Tokens of a stripe, for `layout: striped`."""
    chunk_size: int = 512
    """Tokens of a chunk, for `layout: balanced`; a row is a multiple of P^2 chunks."""

    def __post_init__(self):
        _ = self.placement  # refuses sizes of what the layout does not have

    @property
    def placement(self) -> Layout:
        """The layout with its options."""
        return Layout(name=self.layout or "zigzag", stripe_size=self.stripe_size, chunk_size=self.chunk_size)

    @property
    def is_auto(self) -> bool:
        """Whether the strategy is still to be chosen."""
        return self.strategy == "auto"

    def multiple(self, degree: int) -> int:
        """As Layout.multiple."""
        return self.placement.multiple(degree)

    def order(self, length: int, degree: int) -> Int[np.ndarray, " length"]:
        """As Layout.order."""
        return self.placement.order(length, degree)

    def sharding(self, *, max_document_length: int | None = None) -> AttentionSharding:
        """What the layers of a model are told; the axes are those of `make_mesh`."""
        return AttentionSharding(
            strategy=self.strategy,
            window_strategy=self.window_strategy,
            layout=self.placement,
            max_document_length=max_document_length,
        )
