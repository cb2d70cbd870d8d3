"""`context_parallel.strategy: auto`: strategy, groups and layout of a run, chosen by what its attention would cost.

Every strategy that serves the layers is counted in every layout that the config leaves open and, where it has two
levels, in groups of every size (cost.py); the cheapest sum over the layers of a step is taken. Layers with a window may
have a strategy of their own. Among choices within half a percent the plainer one wins, and none is taken that would
hold more than half of a device's memory in what it sends.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from longctx.context_parallel.config import STRATEGIES, AttentionSharding
from longctx.context_parallel.layout import Layout
from longctx.mixers.attention import AttentionConfig
from longctx.remat import ATTENTION, keeps
from longctx.sharding import AXIS_NAMES, CONTEXT_AXES, MeshConfig, make_mesh
from pallas_kernels import Tokens, blockwise_attention, dispatch, markdown
from train.assemble import start_mesh
from train.config import ConfigError, TrainConfig
from train.devices import device_table
from train.distributed import initialize
from train.planning.cost import Layer, PassCost, RowLinks, Speeds, held_bytes, layer_cost
from train.planning.links import Links, Place
from train.planning.target import GPUS_A_HOST, Target, local_target, places

PLAINER_FIRST = ("ring", "all_gather", "ulysses", "halo", "usp", "double_ring")
"""What is chosen from: what runs on any device. To the model `ring_dma` is `ring`."""
_TWO_LEVELS = ("usp", "double_ring")
_LAYOUTS = ("zigzag", "contiguous", "striped")
_EQUAL = 1.005  # costs that differ by less are the same: the model is not that good
_MOST_HELD = 0.5  # of a device's memory, in what a strategy sends


class Option(NamedTuple):
    """How layers may be split."""

    strategy: str
    layout: Layout
    inner: int

    def __str__(self) -> str:
        groups = f" in groups of {self.inner}" if self.strategy in _TWO_LEVELS else ""
        return f"{self.strategy}{groups}, {self.layout.name}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """Layers that take one strategy: those with a window, or the others.

    Attributes:
      name: Of their mixers.
      layers: Each with how often a step runs it forward, and backward.
    """

    name: str
    layers: Sequence[tuple[Layer, Mapping[str, int]]]

    def refusal(self, option: Option, most_held: float) -> str | None:
        """Why they cannot be split so."""
        for layer, _ in self.layers:
            setting = layer.setting(option.layout, option.inner)
            reason = STRATEGIES[option.strategy].refusal(setting)
            if reason is not None:
                return reason
            held = held_bytes(layer.transfers(option.strategy, setting))
            if held > most_held:
                return f"{option.strategy} would hold {held / 2**30:.1f} GiB of a device in what it sends"
        return None

    def cost(self, option: Option, speeds: Speeds) -> PassCost:
        """Of a step, on one device."""
        total = PassCost(compute=0.0, carried=0.0, waiting=0.0)
        for layer, times in self.layers:
            for phase, cost in layer_cost(layer, *option, speeds).items():
                total += cost * times[phase]
        return total


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """What was chosen for one kind of layers, and from what.

    Attributes:
      kind: The layers.
      option: What was chosen.
      costs: Of every option that serves them, in seconds of a step.
      refused: Why a strategy serves them in none.
    """

    kind: Kind
    option: Option
    costs: Mapping[Option, PassCost]
    refused: Mapping[str, str]

    @property
    def reason(self) -> str:
        """The paragraph, and a table of the best of each strategy."""
        layer, best = self.kind.layers[0][0], self.costs[self.option]
        waits = best.waiting / best.seconds
        lines = [
            f"strategy auto, layers {self.kind.name}: {self.option}. {layer.num_heads} query and {layer.num_kv_heads} "
            f"kv heads of {layer.head_dim}, {layer.seq_len:,} tokens over {layer.degree} devices, "
            f"{layer.seq_len // layer.degree:,} each: {best.seconds:.3g} s of attention a step, {waits:.1%} of it "
            "waiting for links."
        ]
        rows = [["strategy", "layout", "groups of", "compute s", "carried s", "waiting s", "sum s"]]
        for strategy in PLAINER_FIRST:
            of_strategy = [option for option in self.costs if option.strategy == strategy]
            if strategy in self.refused:
                lines.append(f"Not {strategy}: {self.refused[strategy]}.")
            if of_strategy:
                option = self.option if self.option in of_strategy else min(of_strategy, key=self._seconds)
                cost = self.costs[option]
                inner = str(option.inner) if strategy in _TWO_LEVELS else "-"
                parts = (cost.compute, cost.carried, cost.waiting, cost.seconds)
                rows.append([strategy, option.layout.name, inner, *(f"{part:.3g}" for part in parts)])
        return "\n".join([lines[0], markdown.table(rows), *lines[1:]])

    def _seconds(self, option: Option) -> float:
        return self.costs[option].seconds


def choose(
    kinds: Iterable[Kind],
    *,
    strategies: Mapping[str, Sequence[str]],
    layouts: Sequence[Layout],
    groups: Sequence[int],
    speeds: Speeds,
    most_held: float = float("inf"),
    refuses: Callable[[Kind, Option], str | None] = lambda kind, option: None,
) -> dict[str, Choice]:
    """The cheapest way to split layers over the devices of a row, by the name of the kind.

    Layout and groups are the same for all kinds, so what counts is the sum.

    Args:
      strategies: Those that a kind may take, by its name.
      layouts: Those that are open.
      groups: Numbers of devices of a group that are open.
      speeds: Of devices and links.
      most_held: Bytes that a strategy may hold in what it sends.
      refuses: Why what else is in the model cannot be split so; None if it can.
    Raises: ValueError where nothing serves.
    """
    kinds, best = tuple(kinds), None
    degree = kinds[0].layers[0][0].degree
    counted: dict[str, dict[Option, PassCost]] = {kind.name: {} for kind in kinds}
    reasons: dict[str, dict[str, str]] = {kind.name: {} for kind in kinds}
    for layout in layouts:
        if any(layer.seq_len % layout.multiple(degree) for kind in kinds for layer, _ in kind.layers):
            continue
        for inner in groups:
            chosen = {}
            for kind in kinds:
                for strategy in sorted(strategies[kind.name], key=PLAINER_FIRST.index):
                    option = Option(strategy, layout, inner if strategy in _TWO_LEVELS else degree)
                    if option not in counted[kind.name]:
                        reason = kind.refusal(option, most_held) or refuses(kind, option)
                        if reason is not None:
                            reasons[kind.name].setdefault(strategy, reason)
                            continue
                        counted[kind.name][option] = kind.cost(option, speeds)
                    costs = counted[kind.name]
                    taken = chosen.get(kind.name)
                    if taken is None or _EQUAL * costs[option].seconds < costs[taken].seconds:
                        chosen[kind.name] = option
            if len(chosen) == len(kinds):
                seconds = sum(counted[name][option].seconds for name, option in chosen.items())
                if best is None or _EQUAL * seconds < best[0]:
                    best = seconds, chosen
    if best is None:
        told = [reason for of_kind in reasons.values() for reason in of_kind.values()]
        raise ValueError(f"context_parallel.strategy: auto found nothing that serves all layers: {'; '.join(told)}")
    return {
        kind.name: Choice(
            kind=kind,
            option=best[1][kind.name],
            costs=counted[kind.name],
            refused={
                strategy: reason
                for strategy, reason in reasons[kind.name].items()
                if strategy not in {option.strategy for option in counted[kind.name]}
            },
        )
        for kind in kinds
    }


def group_sizes(degree: int, first: int) -> list[int]:
    """Devices that groups of `degree` devices may have: `first`, if it may be, and then the largest first."""
    sizes = [inner for inner in range(degree // 2, 1, -1) if degree % inner == 0]
    return sorted(sizes, key=lambda inner: inner != first) or [degree]


class Started(NamedTuple):
    """A run on its devices.

    Attributes:
      config: With nothing left to choose.
      mesh: Of the devices.
      notes: What was chosen, and why.
    """

    config: TrainConfig
    mesh: Mesh
    notes: Sequence[str]


def start(config: TrainConfig) -> Started:
    """Starts JAX on the run's devices, chooses what the config leaves open, and arranges the devices.

    Raises: As `resolve` and `train.assemble.start_mesh`.
    """
    devices = initialize(config.distributed)
    config, notes = resolve(config, lambda: local_target(devices, device_table(config.device_table)))
    return Started(config, start_mesh(config, devices), notes)


def resolve(config: TrainConfig, target: Callable[[], Target]) -> tuple[TrainConfig, Sequence[str]]:
    """The config with strategy, layout and context axes chosen where it says `strategy: auto`, and the reasons.

    Args:
      target: Makes the devices, if they are asked for.
    Raises: ConfigError where the mesh does not fit them, nothing serves the layers, the model has no softmax attention,
      or nobody knows how fast the devices are.
    """
    if not config.context_parallel.is_auto:
        return config, ()
    run = _Open(config, target())
    if run.degree == 1:
        context_parallel = dataclasses.replace(config.context_parallel, strategy="ring")
        return dataclasses.replace(config, context_parallel=context_parallel), ("strategy auto: rows are not split",)
    choices = run.choices()
    options = {name: choice.option for name, choice in choices.items()}
    strategies = {name: option.strategy for name, option in options.items()}
    first = options.get(_OTHERS, options.get(_WINDOWS))
    context_parallel = dataclasses.replace(
        config.context_parallel,
        strategy=first.strategy,
        window_strategy=strategies.get(_WINDOWS) if len(strategies) > 1 else None,
        layout=first.layout.name,
    )
    mesh = config.mesh
    groups = {option.inner for option in options.values() if option.strategy in _TWO_LEVELS}
    if groups and groups != {run.sizes[CONTEXT_AXES[-1]]}:
        mesh = run.mesh(groups.pop())
    chosen = dataclasses.replace(config, context_parallel=context_parallel, mesh=mesh)
    return chosen, [choice.reason for choice in choices.values()]


_WINDOWS, _OTHERS = "with a window", "without a window"


class _Open:
    """A config whose strategy is still to be chosen, on its devices."""

    def __init__(self, config: TrainConfig, target: Target):
        self.config, self.target = config, target
        try:
            self.sizes = config.mesh.sizes(target.num_devices)
            config.check_mesh(self.sizes)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self.degree = int(np.prod([self.sizes[axis] for axis in CONTEXT_AXES]))

    def choices(self) -> dict[str, Choice]:
        """Of each kind of layers, by its name.

        Raises: ConfigError.
        """
        spec = self.target.spec
        if spec is None or not spec.has_speeds:
            raise ConfigError(
                f"context_parallel.strategy: auto needs the speeds of {self.target.device_kind} devices, and the table "
                "has none; run `python -m train.calibrate --out speeds.yaml` on them and set device_table=speeds.yaml, "
                "or name a strategy"
            )
        kinds = self.kinds()
        if not kinds:
            raise ConfigError(
                "context_parallel.strategy: auto goes by what softmax attention costs, and no layer of the model is of "
                "kind attention; name a strategy"
            )
        settings = self.config.context_parallel
        strategies = {kind.name: PLAINER_FIRST for kind in kinds}
        if settings.window_strategy is not None:
            strategies[_WINDOWS] = (settings.window_strategy,)
        layouts = [settings.placement] if settings.layout else [Layout(name=name) for name in _LAYOUTS]
        speeds = Speeds(spec=spec, implementation=self.implementation(kinds[0]), links=functools.cache(self.links))
        memory = self.target.memory_bytes
        try:
            return choose(
                kinds,
                strategies=strategies,
                layouts=layouts,
                groups=group_sizes(self.degree, self.sizes[CONTEXT_AXES[-1]]),
                speeds=speeds,
                most_held=float("inf") if memory is None else _MOST_HELD * memory,
                refuses=self.refusal_of_others,
            )
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def kinds(self) -> list[Kind]:
        model, training, sizes = self.config.model, self.config.training, self.sizes
        names: dict[str, list[str]] = {_OTHERS: [], _WINDOWS: []}
        for name, mixer in self.attention.items():
            names[_WINDOWS if mixer.mask.span.is_bounded else _OTHERS].append(name)

        def layer(name: str) -> tuple[Layer, dict[str, int]]:
            mixer = self.attention[name].resolved(model.dim)
            times = model.layers.count(name) * training.accumulate_steps
            rows = training.batch_size // training.accumulate_steps // (sizes["data"] * sizes["fsdp"])
            return Layer(
                mask=mixer.mask,
                seq_len=self.config.data.seq_len,
                degree=self.degree,
                num_heads=mixer.num_heads // sizes["tensor"],
                num_kv_heads=mixer.num_kv_heads // sizes["tensor"],
                head_dim=mixer.head_dim,
                rows=rows,
                dtype=model.dtype,
                max_document_length=self.config.data.max_document_length,
            ), {"forward": times * (1 if keeps(model.remat, ATTENTION) else 2), "backward": times}

        return [Kind(name=kind, layers=[layer(name) for name in of_kind]) for kind, of_kind in names.items() if of_kind]

    @property
    def attention(self) -> dict[str, AttentionConfig]:
        used = set(self.config.model.layers)
        mixers = self.config.model.mixers.items()
        return {name: mixer for name, mixer in mixers if name in used and isinstance(mixer, AttentionConfig)}

    def refusal_of_others(self, kind: Kind, option: Option) -> str | None:
        """Why a mixer that is no softmax attention cannot be split so."""
        strategy = {"window_strategy" if kind.name == _WINDOWS else "strategy": option.strategy}
        sharding = AttentionSharding(
            **strategy,
            layout=option.layout,
            inner_degree=option.inner,
            max_document_length=self.config.data.max_document_length,
        )
        model = self.config.model
        for name, mixer in model.mixers.items():
            reason = name not in self.attention and mixer.refusal(
                model.dim,
                seq_len=self.config.data.seq_len,
                heads_split=self.sizes["tensor"],
                ring_size=self.degree,
                sharding=sharding,
            )
            if reason:
                return reason
        return None

    def mesh(self, inner: int) -> MeshConfig:
        """The config's, with rows over groups of `inner` devices."""
        outer_axis, inner_axis = CONTEXT_AXES
        return MeshConfig(**self.sizes | {outer_axis: self.degree // inner, inner_axis: inner})

    def links(self, inner: int) -> RowLinks:
        sizes = self.mesh(inner).sizes(self.target.num_devices)
        shape = tuple(sizes[axis] for axis in AXIS_NAMES)
        if self.target.devices is not None:
            where = places(list(make_mesh(self.mesh(inner), self.target.devices).devices.flat))
        else:  # Nobody knows where the mesh puts them: in order, with those along an axis next to each other.
            is_switch = self.target.spec.link == "switch"
            where = [
                Place(number // GPUS_A_HOST if is_switch else 0, tuple(map(int, np.unravel_index(number, shape))))
                for number in range(self.target.num_devices)
            ]
        numbers = np.arange(self.target.num_devices).reshape(shape)
        axes = [AXIS_NAMES.index(axis) for axis in CONTEXT_AXES]
        rows = np.moveaxis(numbers, axes, (-2, -1)).reshape(-1, self.degree // inner, inner)
        return RowLinks(links=Links(self.target.spec, where), devices=rows)

    def implementation(self, kind: Kind) -> str:
        """Of the attention op of the first of these layers, as the devices would take it."""
        named = next(iter(self.attention.values())).implementation
        if named is not None:
            return named
        layer = kind.layers[0][0]
        if self.target.devices is None:  # nobody can be asked: the fastest that is known
            return self.target.spec.fastest_attention

        def shape(heads):
            return jax.ShapeDtypeStruct((1, layer.seq_len // layer.degree, heads, layer.head_dim), layer.dtype)

        q, kv = shape(layer.num_heads), shape(layer.num_kv_heads)
        with jax.set_mesh(self.target.mesh(self.config.mesh)), dispatch.record() as taken:
            jax.eval_shape(functools.partial(blockwise_attention, mask=layer.mask, tokens=Tokens()), q, kv, kv)
        return dict(taken)["blockwise_attention_forward"]
