"""python -m train.generate RUN_DIR [--prompt TEXT]: text from the latest checkpoint of a run."""

import argparse
import json
import sys
from collections.abc import Sequence

import jax

from train.assemble import config_of, model_builder, resolved_model
from train.checkpoint import find_checkpoint, load_params
from train.command import run_command
from train.config import TrainConfig
from train.data import open_tokenizer
from train.planning.auto import start
from train.sampling import check_sample, sample_text
from train.state import abstract_model, abstract_params


def generate(config: TrainConfig) -> str:
    """The continuation of config.sample.prompt by the run's latest checkpoint."""
    directory, step = find_checkpoint(config.checkpoint.directory(config.run_dir))
    config, mesh, _ = start(config)
    with jax.set_mesh(mesh):
        tokenizer = open_tokenizer(config.data.tokenizer, end_token=config.data.end_token)
        build = model_builder(resolved_model(config, tokenizer.vocab_size), config.attention_sharding)
        graphdef, shapes = abstract_model(build)[0], abstract_params(build, mesh)
        check_sample(graphdef, shapes, tokenizer, config.sample)
        return sample_text(graphdef, load_params(directory / str(step), shapes), tokenizer, config.sample)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line, prints prompt and continuation, and returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m train.generate", description=__doc__)
    parser.add_argument("source", metavar="RUN_DIR|CONFIG", help="folder of a run, or its config file")
    parser.add_argument("overrides", metavar="a.b=c", nargs="*", help="config keys to change, such as sample.seed=1")
    parser.add_argument("--prompt", metavar="TEXT", help="short for sample.prompt=TEXT")
    parser.add_argument("--prefill", metavar="HOW", help="short for sample.prefill=HOW: how the prompt is read")
    options = parser.parse_intermixed_args(arguments)
    short = [
        f"sample.{name}={json.dumps(value)}"
        for name, value in (("prompt", options.prompt), ("prefill", options.prefill))
        if value is not None
    ]

    def run() -> None:
        config = config_of(options.source, [*options.overrides, *short])
        text = generate(config)
        if jax.process_index() == 0:
            print(config.sample.prompt + text)

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
