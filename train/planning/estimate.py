"""A step on paper without a compiler: time by part and collectives from formulas.

Layers one after the other; hops of a ring under the attention of the hop before, what other strategies send before or
after it; parameters gathered once a pass and
gradients scattered once a step, under the compute of the pass.
"""

import collections

import jax
import numpy as np

from longctx.context_parallel.traffic import Transfer
from longctx.model import ModelConfig
from longctx.model_flops import flops_by_part
from longctx.remat import ATTENTION, MIXER_OUTPUT, MLP_HIDDEN, QKV, keeps
from train.devices import DeviceSpec
from train.planning.cost import compute_beside
from train.planning.links import Links, Place
from train.planning.program import Run
from train.planning.target import GPUS_A_HOST
from train.planning.timeline import Collective, OpCall, Timeline


def run_by_formula(run: Run, spec: DeviceSpec, calls: dict[tuple[str, str], OpCall]) -> Timeline:
    """The timeline of a run whose rows are one document each.

    Args:
      run: The run.
      spec: Speeds.
      calls: Calls of attention ops, from AttentionWork.
    """
    compute, flops = collections.Counter(), collections.Counter()
    for (part, phase), (work, seconds) in _work_by_part(run, spec, calls).items():
        flops[part, phase] += work
        compute[part, phase] += seconds
    hops = _hops(run, spec, calls)
    shards = _parameter_collectives(run, spec, compute)
    return Timeline(
        seconds=sum(compute.values()) + sum(c.exposed * c.count for c in hops + shards),
        compute=compute,
        flops=flops,
        collectives=hops + shards,
    )


def _work_by_part(run: Run, spec: DeviceSpec, calls) -> dict[tuple[str, str], tuple[float, float]]:
    """FLOPs and seconds of one device by (part, phase)."""
    model, training = run.parts.model, run.config.training
    lengths = np.full(training.batch_size, run.config.data.seq_len)
    work = {}
    for part, total in flops_by_part(model, lengths).items():
        name, _, of_mixer = part.partition(".")
        forward = total / run.mesh.size
        phases = {"forward": 1.0, "backward": 2.0, "recompute": _recomputed(model, part)}
        for phase, times in phases.items():
            if of_mixer != "attention" and times:
                work[part.replace(".", " "), phase] = (times * forward, times * forward / spec.matmul_flops)
    for name in model.mixers:
        executions = _layers(run, name) * training.accumulate_steps
        for phase in ("forward", "backward") + (() if keeps(model.remat, ATTENTION) else ("recompute",)):
            call = calls[name, "backward" if phase == "backward" else "forward"]
            work[f"{name} attention", phase] = (executions * call.flops.sum(), executions * call.seconds.sum())
    return work


def _recomputed(model: ModelConfig, part: str) -> float:
    """How much of the forward pass of a part, matmuls of attention apart, the backward pass runs again."""
    if part == "logits" or model.remat == "none":
        return 0.0
    if part == "mlp":
        return 0.0 if keeps(model.remat, MLP_HIDDEN) else 1.0
    # Of the mixer's matrices half are taken to lie before the attention op, and half after it.
    return 1.0 - 0.5 * keeps(model.remat, QKV) - 0.5 * keeps(model.remat, MIXER_OUTPUT)


def _hops(run: Run, spec: DeviceSpec, calls) -> list[Collective]:
    """What the strategy sends for each layer, in every pass over it."""
    links = _links(run, spec)
    hops = []
    for name, transfer, phase, count in expected_transfers(run):
        is_permute = transfer.kind in ("collective-permute", "remote-dma")
        devices = _ring_pairs(run, transfer) if is_permute else _ring_group(run, transfer)
        kind = "collective-permute" if is_permute else transfer.kind
        seconds, where = links.seconds(kind, transfer.num_bytes, devices)
        call = calls[name, "backward" if phase == "backward" else "forward"]
        beside = compute_beside(transfer, call.seconds)
        hops.append(
            Collective(
                kind=transfer.kind,
                name=f"layer.{name}",
                part=f"{name} mixer",
                phase=phase,
                is_hop=True,
                asynchronous=True,
                count=count,
                num_bytes=transfer.num_bytes,
                seconds=seconds,
                overlapped=float(np.mean(beside)),
                exposed=float(np.mean(np.maximum(0.0, seconds - beside))),
                links=where,
                group_size=2 if is_permute else len(devices[0]),
            )
        )
    return hops


def expected_transfers(run: Run) -> list[tuple]:
    """(mixer's name, Transfer, phase, count in a step) of everything that the strategy states for this run."""
    model, training, shape = run.parts.model, run.config.training, run.mesh.shape
    expected = []
    for name, mixer in model.mixers.items():
        executions = _layers(run, name) * training.accumulate_steps
        for transfer in mixer.transfers(
            model.dim,
            rows=run.rows,
            seq_len=run.config.data.seq_len,
            heads_split=shape["tensor"],
            ring_size=run.ring_size,
            sharding=run.sharding,
            dtype=model.dtype,
        ):
            expected.append((name, transfer, transfer.phase, executions * transfer.count))
            is_kept = keeps(model.remat, ATTENTION) and not transfer.before_attention
            if transfer.phase == "forward" and model.remat != "none" and not is_kept:
                expected.append((name, transfer, "recompute", executions * transfer.count))
    return expected


def _parameter_collectives(run: Run, spec: DeviceSpec, compute) -> list[Collective]:
    """Gathers of the parameters in each pass over the layers, and the scatter of their gradients."""
    model, links = run.parts.model, _links(run, spec)
    leaves = jax.tree.leaves(run.parts.abstract.params)
    shape = run.mesh.shape
    size = run.mesh.size // shape["data"] // shape["tensor"]
    if size == 1:
        return []
    whole = sum(leaf.size for leaf in leaves) // shape["tensor"] * np.dtype(jax.numpy.dtype(model.dtype)).itemsize
    num_bytes = whole * (size - 1) // size
    passes = {"forward": "all-gather", "backward": "reduce-scatter"}
    if any(_recomputed(model, part) for part in ("mlp", "mixer")):
        passes["recompute"] = "all-gather"
    found = []
    for phase, kind in passes.items():
        seconds, where = links.seconds(kind, num_bytes, [list(range(size))])
        beside = sum(value for (_, of_phase), value in compute.items() if of_phase == phase)
        found.append(
            Collective(
                kind=kind,
                name="parameters" if kind == "all-gather" else "gradients",
                part="parameters",
                phase=phase,
                is_hop=False,
                asynchronous=True,
                count=run.config.training.accumulate_steps,
                num_bytes=num_bytes,
                seconds=seconds,
                overlapped=beside / run.config.training.accumulate_steps,
                exposed=max(0.0, seconds - beside / run.config.training.accumulate_steps),
                links=where,
                group_size=size,
            )
        )
    return found


def _layers(run: Run, name: str) -> int:
    return run.parts.model.layers.count(name)


def _links(run: Run, spec: DeviceSpec) -> Links:
    # Without a compiler nobody knows where the mesh puts its devices: in order, with neighbours next to each other.
    return Links(spec, [Place(i // GPUS_A_HOST if spec.link == "switch" else 0, (i,)) for i in range(run.mesh.size)])


def _ring_group(run: Run, transfer: Transfer) -> list[list[int]]:
    """The devices of one collective."""
    shape = run.mesh.shape
    size = shape["context_inner"] if transfer.level == "inner" else run.ring_size
    return [[i * shape["tensor"] for i in range(size)]]


def _ring_pairs(run: Run, transfer: Transfer) -> list[tuple[int, int]]:
    """Who sends to whom in a permute from neighbour to neighbour, of devices, inside a group or of groups."""
    shape = run.mesh.shape
    size, stride = shape["context_inner"] if transfer.level == "inner" else run.ring_size, shape["tensor"]
    step = shape["context_inner"] if transfer.level == "outer" else 1
    if run.target.spec is None or run.target.spec.link != "switch":
        return [(0, step * stride)]
    return [(i * stride, (i + step) % size * stride) for i in range(size)]
