"""python -m train.convert from-hf|to-hf: Hugging Face models, into the trainer and out of it."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import jax

from longctx.model import FloatDType
from train.command import run_command
from train.config import ConfigError
from train.convert.config_json import FAMILIES
from train.convert.from_hf import from_hf
from train.convert.to_hf import NO_TOKENIZER, Export, to_hf

_GB = 10**9


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m train.convert", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    text = "make a checkpoint to start from, and the config for it, of a model's config.json and safetensors files"
    command = verbs.add_parser("from-hf", help=text, description=text)
    command.add_argument("source", metavar="HF_DIR", type=Path, help="folder of the model, as it was downloaded")
    command.add_argument("output", metavar="OUT", type=Path, help="folder to make")
    text = "make a Hugging Face model of a checkpoint, adapters merged"
    command = verbs.add_parser("to-hf", help=text, description=text)
    command.add_argument(
        "source",
        metavar="RUN_DIR|CHECKPOINT",
        type=Path,
        help="a run's folder, its folder of checkpoints, or one of them",
    )
    command.add_argument("output", metavar="OUT", type=Path, help="folder to make")
    command.add_argument("--step", type=int, metavar="N", help="the checkpoint of this step; default the latest")
    command.add_argument(
        "--architecture", choices=list(FAMILIES), help="default: the plainest that computes what the model does"
    )
    command.add_argument("--dtype", choices=get_args(FloatDType), help="of the tensors; default as they are stored")
    command.add_argument(
        "--max-positions", type=_positive, metavar="N", help="max_position_embeddings; default the run's data.seq_len"
    )
    command.add_argument(
        "--tokenizer", metavar="PATH", help=f"in the place of the run's data.tokenizer; {NO_TOKENIZER} for none"
    )
    command.add_argument(
        "--shard-gb", type=_positive, metavar="N", default=5, help="size of a file at most, in 10^9 bytes; default 5"
    )
    options = parser.parse_args(arguments)
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns of files that its other formats have

    def run() -> None:
        _check_output(options.output)
        jax.config.update("jax_platforms", "cpu")  # leaves the accelerators to those that train
        if options.verb == "from-hf":
            print(from_hf(options.source, options.output))
            return
        export = Export(
            step=options.step,
            model_type=options.architecture,
            dtype=options.dtype,
            max_positions=options.max_positions,
            tokenizer=options.tokenizer,
            shard_bytes=options.shard_gb * _GB,
        )
        print(to_hf(options.source, options.output, export))

    return run_command(run)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text}, wanted a number >= 1; leave it out for the default")
    return int(text)


def _check_output(output: Path) -> None:
    """Raises: ConfigError unless the folder is not there yet, or empty."""
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists() or output.is_symlink():
        raise ConfigError(f"OUT: got {output}, which is there and not empty, wanted a new folder; name another")


if __name__ == "__main__":
    sys.exit(main())
