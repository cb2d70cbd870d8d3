"""What is wrong with a plan, and what to change."""

import collections
import re
from collections.abc import Iterable, Mapping, Sequence

import jax

from longctx.remat import RESIDUAL, offloaded
from train.planning.estimate import expected_transfers
from train.planning.plan import Collective, Plan
from train.planning.program import Run
from train.planning.target import preallocated_fraction
from train.planning.timeline import HOST_COPY

_UNEVEN = 1.2  # from here on a layout's imbalance is worth a word
_LONG = 0.05  # of a step: from here on what a strategy sends before it computes is too much
_WHOLE = 1.5  # times the even share: from here on parameters count as replicated


def judge(run: Run, plan: Plan) -> dict[str, list[str]]:
    """The plan's problems, advice and notes."""
    problems, advice, notes = [], [], list(plan.notes)
    if plan.memory_limit is not None and plan.memory_total > plan.memory_limit:
        problems.append(
            f"does not fit: {_gib(plan.memory_total)} of {_gib(plan.memory_limit)} a device ({plan.memory_note})"
        )
        advice += memory_levers(run, plan.memory, plan.memory_total)
    if not plan.fits_host:
        problems.append(
            f"does not fit: {_gib(plan.host_memory_total)} of {_gib(plan.host_memory_limit)} of the host's memory a "
            f"device ({plan.host_memory_note})"
        )
        advice.append("save or recompute some of what model.remat offloads, or a device table with this host's memory")
    elif plan.fits is None:
        notes.append("whether it fits is not known: nobody says how much memory a device, or its host, has")
    problems += _replicated_parameters(run, plan)
    if plan.step_seconds is not None:
        up_front = _sent_up_front(run, plan)
        problems += _exposed_hops(plan, up_front)
        notes += _exposed_rest(plan, up_front)
        notes += _long_hops(plan)
    else:
        notes.append(f"no times: the table of devices has no speeds for {plan.device_kind}")
    problems += _unexpected_hops(run, plan)
    for name, uneven in plan.imbalance.items():
        if uneven > _UNEVEN:
            layout = run.config.context_parallel.placement.name
            notes.append(
                f"{name}: the {layout} layout makes attention {uneven:.2f} times as slow as even work would"
                + ("; try context_parallel.layout=zigzag or striped" if layout == "contiguous" else "")
            )
    return {"problems": problems, "advice": advice, "notes": notes}


def memory_levers(run: Run, memory: Mapping[str, int], total: int) -> list[str]:
    """What would lower the memory, most effective first.

    Args:
      run: The run.
      memory: Bytes of a device by class.
      total: The most that it holds at once.
    """
    model, training, shape = run.parts.model, run.config.training, run.mesh.shape
    rows = run.rows
    shards = run.mesh.size // shape["data"]
    of = collections.Counter(memory)
    state = of["parameters"] + of["optimizer"] + of["gradients"]
    levers = []
    if model.remat != "full" and not offloaded(model.remat):
        step = "dots or full" if model.remat == "none" else "full"
        levers.append((total - state, f"model.remat={step}: recompute activations instead of keeping them"))
    elif RESIDUAL not in offloaded(model.remat):
        inputs = "model.remat={residual: offload}: the inputs of layers go to the host's memory"
        levers.append((of["activations"] + of["saved activations"], inputs))
    if rows > 1:
        parts = training.accumulate_steps * rows
        levers.append((total - state, f"training.accumulate_steps={parts}: one row of a device at a time, not {rows}"))
    if shape["data"] > 1:
        levers.append(
            (state, f"mesh.fsdp in place of mesh.data: each device then keeps 1 / {shape['data']} of the state")
        )
    levers.append(
        (
            (total - state) / 2,
            f"a larger mesh.context_inner (now {run.ring_size}, of {shards} that share the state): activations shrink "
            "with the devices of a sequence, the state with all",
        )
    )
    if model.param_dtype == "float32":
        levers.append((state / 4, "model.param_dtype=bfloat16: half of the parameters' memory, at a cost in precision"))
    if run.target.platform == "gpu" and preallocated_fraction() < 0.9:
        levers.append((total, "XLA_PYTHON_CLIENT_MEM_FRACTION=0.92 in the environment: more of the GPU for JAX"))
    return [text for _, text in sorted(levers, key=lambda lever: -lever[0])]


def _replicated_parameters(run: Run, plan: Plan) -> list[str]:
    shape = run.mesh.shape
    shards = run.mesh.size // shape["data"]
    leaves = jax.tree.leaves(run.parts.abstract.params)
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    if shards == 1 or plan.memory["parameters"] <= _WHOLE * total / shards:
        return []
    whole = [leaf for leaf in leaves if leaf.sharding.shard_shape(leaf.shape) == leaf.shape]
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in whole)
    return [
        f"parameters are replicated: a device keeps {_gib(plan.memory['parameters'])}, an even share of {shards} "
        f"devices is {_gib(total / shards)}; {_gib(size)} lie whole on every device: choose dims that fsdp x context "
        "devices divide"
    ]


def _exposed_hops(plan: Plan, up_front: Sequence[Collective]) -> list[str]:
    too_long = _seconds_waited(up_front) >= _LONG * plan.step_seconds
    hops = [c for c in plan.collectives if c.is_hop and c.is_exposed and (too_long or c not in up_front)]
    return [
        f"exposed hops: {c.count} {c.kind}s of {c.part} ({c.phase}, {_mib(c.num_bytes)}) take {1e3 * c.seconds:.3f} ms "
        + (f"each, of which {1e3 * c.exposed:.3f} ms are waited for" if c.asynchronous else "each and are synchronous")
        for c in hops
    ]


def _sent_up_front(run: Run, plan: Plan) -> list[Collective]:
    """Of strategies that send everything before they compute, or after, and so can hide little."""
    stated = [transfer for _, transfer, _, _ in expected_transfers(run) if not transfer.beside_calls]
    kinds = {(transfer.kind, transfer.num_bytes) for transfer in stated}
    return [c for c in plan.collectives if c.is_hop and (c.kind, c.num_bytes) in kinds]


def _seconds_waited(collectives: Iterable[Collective]) -> float:
    """In a step."""
    return sum(c.exposed * c.count for c in collectives)


def _exposed_rest(plan: Plan, up_front: Sequence[Collective]) -> list[str]:
    notes = []
    rest = _seconds_waited(c for c in plan.collectives if not c.is_hop and c.kind != HOST_COPY)
    if rest >= 0.02 * plan.step_seconds:
        notes.append(f"collectives of parameters and gradients are waited for {1e3 * rest:.1f} ms a step")
    copies = [c for c in plan.collectives if c.kind == HOST_COPY]
    if copies:
        total, waited = sum(c.seconds * c.count for c in copies), _seconds_waited(copies)
        notes.append(
            f"copies to and from the host take {1e3 * total:.1f} ms a step, of which {1e3 * waited:.1f} ms are waited "
            "for"
        )
    waited = _seconds_waited(up_front)
    if 0 < waited < _LONG * plan.step_seconds:
        notes.append(
            f"what halo, all_gather, ulysses, usp or ring_dma send before and after they compute is waited for "
            f"{1e3 * waited:.1f} ms a step, {waited / plan.step_seconds:.1%} of it"
        )
    return notes


def _long_hops(plan: Plan) -> list[str]:
    links = {c.links for c in plan.collectives if c.is_hop and re.search(r"[2-9]\d* hops|1\d+ hops", c.links)}
    return [
        f"the ring's neighbours are not all next to each other ({where}): context axes that are whole axes of the "
        "torus would shorten its hops"
        for where in sorted(links)
    ]


def _unexpected_hops(run: Run, plan: Plan) -> list[str]:
    """Where the program sends other than the strategy states."""
    stated, found = collections.Counter(), collections.Counter()
    for _, transfer, phase, count in expected_transfers(run):
        stated[phase] += count * transfer.num_bytes
    for c in plan.collectives:
        if c.is_hop:
            found[c.phase] += c.count * c.num_bytes
    return [
        f"the program sends {_mib(found[phase])} a device in the {phase} pass, the strategy states "
        f"{_mib(stated[phase])}"
        for phase in sorted(stated | found)
        if stated[phase] != found[phase]
    ]


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def _mib(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:.2f} MiB"
