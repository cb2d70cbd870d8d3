"""python -m train.plan CONFIG [--devices NAME] [--max-seq]: will it fit, what will it cost, are the links hidden.

Compiles the training step of a config for the devices at hand or for named ones, on any machine, and reports memory,
collectives and predicted time. Exit code 0 where the run fits and no hop of its context parallelism is exposed, 3 where
there is a problem, 2 for a wrong config.
"""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from train.assemble import config_of
from train.command import check_output, run_command
from train.config import ConfigError, TrainConfig
from train.devices import device_table
from train.distributed import initialize
from train.planning.analysis import analyse, estimate
from train.planning.auto import resolve
from train.planning.longest import length_unit, longest
from train.planning.plan import Plan
from train.planning.program import DoesNotFit, Run, compile_step, plan_run
from train.planning.report import show, verdict
from train.planning.target import Target, local_target, named_target
from train.planning.verdict import memory_levers

PROBLEM_CODE = 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m train.plan",
        description="Says whether a run fits its devices, what a step costs and whether its communication is hidden.",
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the run, or the folder of one")
    parser.add_argument("overrides", metavar="a.b=c", nargs="*", help="config keys that differ from the file")
    parser.add_argument(
        "--devices",
        metavar="NAME",
        default="local",
        help="local (default), or a TPU slice or number of GPUs: v5p:8x8x8, v6e:16x16, tpu7x:4x4x4, h100:64, h200:8",
    )
    parser.add_argument("--max-seq", action="store_true", help="find the longest data.seq_len that fits; the last line")
    parser.add_argument("--json", metavar="FILE", help="write the plan as JSON; - for stdout, in place of the tables")
    parser.add_argument(
        "--device-table", metavar="FILE", help="speeds of devices, in place of the config's device_table"
    )
    parser.add_argument("--formula", action="store_true", help="do not compile; figures by formula")
    options = parser.parse_intermixed_args(arguments)
    problems: list[str] = []

    def run() -> None:
        problems.extend(_plan(options))

    code = run_command(run)
    return code or (PROBLEM_CODE if problems else 0)


def _plan(options: argparse.Namespace) -> Sequence[str]:
    """Plans, prints, and returns the problems."""
    # Tables are for people, and go to stderr where stdout carries the JSON.
    console = Console(stderr=options.json == "-", width=None if sys.stdout.isatty() else 160)
    if options.json not in (None, "-"):
        check_output("--json", options.json)
    config = config_of(options.config, options.overrides)
    table = device_table(options.device_table or config.device_table)
    if options.devices == "local":
        target = local_target(initialize(config.distributed), table)
    else:
        target = named_target(options.devices, table)
    config, notes = resolve(config, lambda: target)
    for note in notes:
        console.print(note, highlight=False, markup=False)
    plan = make_plan(config, target, by_formula=options.formula, console=console)
    show(plan, console)
    data = plan.to_dict()
    if options.max_seq:
        data["max_seq"] = max_seq(config, target, by_formula=options.formula, plan=plan, console=console)
    if options.json == "-":
        json.dump(data, sys.stdout, indent=2)
        print()
    elif options.json:
        Path(options.json).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    return plan.problems


def make_plan(config: TrainConfig, target: Target, *, by_formula: bool, console: Console) -> Plan:
    """The plan of a config on a target: compiled where there is a compiler, else by formula.

    Raises: ConfigError where mesh, rows or tokens do not fit the devices.
    """
    if by_formula and target.platform == "gpu":
        # JAX's descriptions of GPUs that are not there forget what lies in the host's memory; a mesh of sizes does not.
        target = dataclasses.replace(target, devices=None)
    run = plan_run(config, target)
    if by_formula or target.missing:
        return estimate(run, "asked for with --formula" if by_formula else target.missing)
    try:
        with console.status(f"compiling the training step for {target.num_devices} x {target.device_kind} ..."):
            program = compile_step(run)
    except DoesNotFit as refusal:
        return _refused(run, refusal)
    return analyse(run, program)


def _refused(run: Run, refusal: DoesNotFit) -> Plan:
    """The plan by formula of a run that the compiler refuses, with the compiler's figure where it gives one."""
    plan = estimate(run, "the compiler refused the program because of its memory")
    if refusal.temporaries is not None:
        exact = {name: plan.memory[name] for name in ("parameters", "optimizer", "batch")}
        by_class = exact | {"temporaries": refusal.temporaries}
        plan = dataclasses.replace(plan, memory=by_class, memory_total=sum(by_class.values()))
    return dataclasses.replace(
        plan,
        refused=True,
        problems=[
            f"does not fit: {str(refusal).splitlines()[0]}",
            *(problem for problem in plan.problems if not problem.startswith("does not fit")),
        ],
        advice=memory_levers(run, plan.memory, plan.memory_total),
    )


def max_seq(config: TrainConfig, target: Target, *, by_formula: bool, plan: Plan, console: Console) -> int:
    """Finds the longest data.seq_len that fits, and prints it; 0 where not even the shortest does.

    Args:
      plan: Of the config as it is.
    Raises: ConfigError where nobody knows how much memory the devices have.
    Cost: a handful of plans.
    """
    if plan.memory_limit is None:
        raise ConfigError(
            f"--max-seq: nobody says how much memory a {target.device_kind} has; name other devices with --devices"
        )
    degree = plan.mesh["context_outer"] * plan.mesh["context_inner"]
    unit = length_unit(config.context_parallel.multiple(degree), degree)

    def memory_at(length: int) -> int | None:
        if length == config.data.seq_len:
            tried = plan
        else:
            data = dataclasses.replace(config.data, seq_len=length)
            tried = make_plan(dataclasses.replace(config, data=data), target, by_formula=by_formula, console=console)
        console.print(f"{length:,} tokens: {verdict(tried)}", highlight=False)
        if tried.refused and tried.memory_total <= plan.memory_limit:
            return None
        # Of the two memories the one that is fuller, as bytes of the device's.
        share = tried.host_memory_total / (tried.host_memory_limit or math.inf)
        return max(tried.memory_total, round(share * plan.memory_limit))

    found = longest(memory_at, limit=plan.memory_limit, start=config.data.seq_len, unit=unit)
    console.print(f"longest data.seq_len that fits {target.name}: {found:,} tokens", highlight=False)
    return found


if __name__ == "__main__":
    sys.exit(main())
