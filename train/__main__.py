"""python -m train CONFIG [a.b=c ...]: trains, or resumes, one run."""

import argparse
import sys
from collections.abc import Sequence

from train.command import run_command
from train.config import config_text, help_text, load_config
from train.loop import train


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m train",
        description="Trains, or resumes, the run that a config file describes.",
        epilog=f"config keys:\n\n{help_text()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the run")
    parser.add_argument("overrides", metavar="a.b=c", nargs="*", help="config keys that differ from the file")
    parser.add_argument("--print-config", action="store_true", help="show the resolved config and stop")
    options = parser.parse_intermixed_args(arguments)

    def run() -> None:
        config = load_config(options.config, options.overrides)
        if options.print_config:
            print(config_text(config), end="")
        else:
            train(config)

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
