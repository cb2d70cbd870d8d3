"""python -m train.launch local|render ...: runs one run in several processes here, or writes what does so elsewhere."""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from train.assemble import check_layers
from train.command import check_output, run_command
from train.config import load_config
from train.launch.local import SECONDS_TO_STOP, launch_local
from train.launch.render import PLACES, option, render


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    # Not argparse's subparsers: they cannot take options and overrides in any order.
    if arguments[:1] == ["render"]:
        return _render(arguments[1:])
    return _local(arguments)


def _local(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m train.launch",
        description="Runs one run in several processes.",
        epilog="python -m train.launch render --help: files for Slurm, Kubernetes and TPU VMs",
    )
    parser.add_argument("place", choices=["local"], help="local: on this machine")
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the run")
    parser.add_argument("overrides", metavar="a.b=c", nargs="*", help="config keys that differ from the file")
    parser.add_argument("--num-processes", type=int, required=True, metavar="N", help="processes to start")
    parser.add_argument(
        "--timeout", type=int, metavar="S", help="seconds in which all must have started; default: the config's"
    )
    parser.add_argument(
        "--restarts",
        type=int,
        default=0,
        metavar="N",
        help="how often to start all again when one was lost, from the last complete checkpoint; default: 0",
    )
    parser.add_argument(
        "--seconds-to-stop",
        type=float,
        default=SECONDS_TO_STOP,
        metavar="S",
        help=f"how long the others have to end when one was lost, before they are killed; default: {SECONDS_TO_STOP:g}",
    )
    options = parser.parse_intermixed_args(arguments)
    if options.num_processes < 1:
        parser.error(f"--num-processes: got {options.num_processes}, wanted 1 or more")
    if options.restarts < 0:
        parser.error(f"--restarts: got {options.restarts}, wanted 0 or more")
    if not 0 <= options.seconds_to_stop < math.inf:
        parser.error(f"--seconds-to-stop: got {options.seconds_to_stop:g}, wanted 0 or more seconds, not infinite")
    overrides = list(options.overrides)
    if options.timeout is not None:
        overrides.append(f"distributed.initialization_timeout={options.timeout}")
    # Here first, so that a wrong config is told once and not by every process.
    code = run_command(lambda: load_config(options.config, overrides))
    return code or launch_local(
        [options.config, *overrides],
        num_processes=options.num_processes,
        restarts=options.restarts,
        seconds_to_stop=options.seconds_to_stop,
    )


def _render(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m train.launch render",
        description="Prints the file that starts a run on many hosts.",
        epilog="python -m train.launch render PLACE --help lists what a place asks for",
    )
    parser.add_argument("place", choices=PLACES, help="where the run will be")
    place = parser.parse_args(arguments[:1]).place
    file, placeholders = PLACES[place]
    parser = argparse.ArgumentParser(prog=f"python -m train.launch render {place}", description=f"Fills in {file}.")
    parser.add_argument("--config", required=True, metavar="CONFIG", help="YAML file of the run, here and on the hosts")
    parser.add_argument("overrides", metavar="a.b=c", nargs="*", help="config keys that differ from the file")
    parser.add_argument("--python", default="python", help="the interpreter on the hosts; default: python")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: print it")
    for name, placeholder in placeholders.items():
        needed = placeholder.default is None
        text = placeholder.help if needed else f"{placeholder.help}; default: {placeholder.default}"
        parser.add_argument(option(name), required=needed, default=placeholder.default, help=text)
    options = parser.parse_intermixed_args(arguments[1:])

    def run() -> None:
        check_layers(load_config(options.config, options.overrides))  # here, not after hours in a queue
        values = {name: getattr(options, name) for name in placeholders}
        text = render(place, values, python=options.python, arguments=[options.config, *options.overrides])
        if options.output is None:
            print(text, end="")
        else:
            check_output("--output", options.output)
            options.output.write_text(text, encoding="utf-8")

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
