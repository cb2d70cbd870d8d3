"""Makes the plan of a run: from its compiled step, or by formulas where there is no compiler."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from longctx.model_flops import flops_by_part
from train.devices import DeviceSpec
from train.distributed import HOST_MEMORY_LIMIT
from train.planning import hlo, memory
from train.planning.attention_work import AttentionWork
from train.planning.estimate import run_by_formula
from train.planning.formulas import host_memory_by_formula, memory_by_formula, parameter_count, peak_bytes
from train.planning.links import Links
from train.planning.plan import PartTime, Plan
from train.planning.program import Program, Run
from train.planning.target import Target, places
from train.planning.timeline import Collective, Timeline
from train.planning.timeline import run as run_on_paper
from train.planning.verdict import judge
from train.planning.whole_names import with_whole_names
from train.state import is_on_host

# Stands in where the table has no speeds: collectives are still counted, their times are left out.
_NO_SPEEDS = DeviceSpec(device_kinds=(), peak_tflops=1.0, memory_gb_per_s=1.0, link="switch", link_gb_per_s=1.0)


def analyse(run: Run, program: Program) -> Plan:
    """The plan of a run whose step was compiled.

    Cost: seconds for a program of 10 MB; the tiles of each hop take some seconds more at 10M tokens.
    """
    module = with_whole_names(hlo.parse(program.text))
    work = AttentionWork(run, program.implementations)
    spec, has_speeds = _spec(run)
    num_devices = run.mesh.size
    links = Links(spec, places(list(run.mesh.devices.flat)))
    timeline = run_on_paper(module, spec, links, num_devices, work.calls(spec))
    peak = memory.peak(module, parameter_shapes=_parameter_shapes(run))
    by_class = memory.memory_by_class(peak, program.stats, _state_bytes(run))
    on_host = _bytes_of_shards(run.parts.abstract, on_host=True)
    temporaries_on_host = program.stats.host_temp_size_in_bytes
    return _plan(
        run,
        source="compiler",
        source_note="",
        compile_seconds=program.seconds,
        memory=by_class,
        memory_total=sum(by_class.values()),
        host_memory={"activations": temporaries_on_host, "optimizer": on_host},
        buffers=peak.buffers,
        timeline=timeline,
        has_speeds=has_speeds,
        work=work,
        implementations=program.implementations,
        notes=[*program.notes, *_forgotten(run)],
    )


def estimate(run: Run, note: str) -> Plan:
    """The plan of a run by formulas alone; `note` says why."""
    spec, has_speeds = _spec(run)
    # Kernels of GPUs take 16 bits.
    likely = spec.fastest_attention if jnp.dtype(run.parts.model.dtype).itemsize == 2 else "xla"
    work = AttentionWork(run, {f"blockwise_attention_{phase}": likely for phase in ("forward", "backward")})
    by_class, memory_total = estimate_memory(run)
    return _plan(
        run,
        source="formula",
        source_note=note,
        compile_seconds=None,
        memory=by_class,
        memory_total=memory_total,
        host_memory=_host_memory_by_formula(run),
        buffers=(),
        timeline=run_by_formula(run, spec, work.calls(spec)),
        has_speeds=has_speeds,
        work=work,
        implementations={},
    )


def _forgotten(run: Run) -> list[str]:
    """What a compiler of devices that are not there does not know."""
    if not run.config.optimizer.offload or any(map(is_on_host, jax.tree.leaves(run.parts.abstract.opt_state))):
        return []
    return [
        "optimizer.offload is not in these figures, the optimizer's state is counted on the device: JAX's description "
        f"of {run.target.name} has no memory of the host for what a step is given; --formula counts it there"
    ]


def _plan(
    run: Run, *, memory, host_memory, timeline: Timeline, has_speeds: bool, work: "AttentionWork",
    notes: Sequence[str] = (), **fields,
) -> Plan:  # fmt: skip
    config, model, target = run.config, run.parts.model, run.target
    rows = config.training.batch_size
    lengths = np.full(rows, config.data.seq_len)
    model_flops = 3 * sum(flops_by_part(model, lengths).values())
    seconds = timeline.seconds if has_speeds else None
    plan = Plan(
        devices=target.name,
        device_kind=target.device_kind,
        num_devices=run.mesh.size,
        mesh=dict(run.mesh.shape),
        seq_len=config.data.seq_len,
        batch_size=rows,
        parameters=parameter_count(run.parts.abstract.params),
        memory=memory,
        memory_limit=target.memory_bytes,
        memory_note=target.memory_note,
        host_memory={name: size for name, size in host_memory.items() if size},
        host_memory_limit=target.host_memory_bytes,
        host_memory_note=target.host_memory_note,
        collectives=_together(timeline.collectives, has_speeds),
        parts=[
            PartTime(part=part, phase=phase, flops=timeline.flops.get((part, phase), 0.0), seconds=seconds)
            for (part, phase), seconds in sorted(timeline.compute.items(), key=lambda item: -item[1])
        ]
        if has_speeds
        else [],
        compute_seconds=sum(timeline.compute.values()) if has_speeds else None,
        exposed_seconds=timeline.exposed if has_speeds else None,
        step_seconds=seconds,
        mfu=seconds and model_flops / seconds / (run.mesh.size * target.spec.peak_flops),
        tokens_per_second=seconds and lengths.sum() / seconds,
        imbalance=work.imbalance,
        problems=[],
        advice=[],
        notes=[
            *notes,
            *(timeline.notes if has_speeds else ()),
            *_host_memory_notes(target, sum(host_memory.values())),
        ],
        **fields,
    )
    return dataclasses.replace(plan, **judge(run, plan))


def _host_memory_notes(target: Target, num_bytes: int) -> Sequence[str]:
    if target.platform != "gpu" or not num_bytes:
        return ()
    enough = math.ceil(1.02 * num_bytes / 2**30) + 1  # and a little for what lies between tensors
    return (
        f"XLA takes a host's memory by powers of two; with {HOST_MEMORY_LIMIT}={enough} in the run's environment a GPU "
        "takes no more than that, and the first step waits for less of it",
    )


def _spec(run: Run) -> tuple[DeviceSpec, bool]:
    """The speeds of the target, and whether they are known."""
    spec = run.target.spec
    return (spec, True) if spec is not None and spec.has_speeds else (_NO_SPEEDS, False)


def _together(collectives: Sequence[Collective], has_speeds: bool) -> list[Collective]:
    """Equal collectives as one, with mean times; the costliest first."""
    groups: dict[tuple, list[Collective]] = {}
    for c in collectives:
        key = (c.kind, c.part, c.phase, c.is_hop, c.asynchronous, c.num_bytes, c.links, c.is_exposed)
        groups.setdefault(key, []).append(c)

    def mean(group: list[Collective], field: str) -> float | None:
        total = sum(getattr(c, field) * c.count for c in group)
        return total / max(1, sum(c.count for c in group)) if has_speeds else None

    together = [
        dataclasses.replace(
            group[0],
            count=sum(c.count for c in group),
            **{field: mean(group, field) for field in ("seconds", "overlapped", "exposed")},
        )
        for group in groups.values()
    ]
    return sorted(together, key=lambda c: (-(c.seconds or 0) * c.count, -c.num_bytes * c.count))


def _state_bytes(run: Run) -> dict[str, int]:
    """Exact bytes of a device's arguments by class."""
    state = run.parts.abstract
    rest = (state.step, state.rng, state.skipped_steps)
    return {
        "parameters": _bytes_of_shards(state.params),
        "optimizer": _bytes_of_shards(state.opt_state),
        "batch": _bytes_of_shards((run.batch, rest)),
    }


def _bytes_of_shards(tree, *, on_host: bool = False) -> int:
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if is_on_host(leaf) == on_host
    )


def _parameter_shapes(run: Run) -> frozenset[tuple[int, ...]]:
    return frozenset(leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(run.parts.abstract.params))


def estimate_memory(run: Run) -> tuple[Mapping[str, int], int]:
    """Bytes of a device by class, and the most that it holds at once, by formula."""
    training = run.config.training
    by_class = memory_by_formula(
        run.parts.model,
        run.parts.abstract,
        mesh_sizes=run.mesh.shape,
        rows=training.batch_size // training.accumulate_steps,
        seq_len=run.config.data.seq_len,
        accumulate_steps=training.accumulate_steps,
        loss=training.loss,
        loss_tile=training.loss_tile,
        sharding=run.sharding,
    )
    return by_class, peak_bytes(by_class)


def _host_memory_by_formula(run: Run) -> dict[str, int]:
    training = run.config.training
    return host_memory_by_formula(
        run.parts.model,
        run.parts.abstract,
        mesh_sizes=run.mesh.shape,
        rows=training.batch_size // training.accumulate_steps,
        seq_len=run.config.data.seq_len,
    )
