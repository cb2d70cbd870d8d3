"""python -m train CONFIG [a.b=c ...]: trains, or resumes, one run."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from train.command import run_command
from train.config import ConfigError, TrainConfig, config_text, help_text, load_config
from train.loop import train


def check_folder(file: Path, config: TrainConfig, overrides: Sequence[str]) -> None:
    """Of the config.yaml that a run wrote: whether it names the folder that it lies in, which may have been moved.

    Raises: ConfigError where it would train another run.
    """
    folder = file.parent
    is_of_run = file.name == "config.yaml" and (folder / "metrics.jsonl").exists()
    told = any(override.startswith("run_dir=") for override in overrides)
    if is_of_run and not told and folder.resolve() != Path(config.run_dir).resolve():
        raise ConfigError(
            f"run_dir: got {config.run_dir} in a file of the run in {folder}; add run_dir={folder} to go on with that, "
            f"or run_dir={config.run_dir} to mean the other"
        )


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
        check_folder(Path(options.config), config, options.overrides)
        if options.print_config:
            print(config_text(config), end="")
        else:
            train(config)

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
