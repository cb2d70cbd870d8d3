"""python -m train.evaluate RUN_DIR|CONFIG [a.b=c ...]: the latest checkpoint's loss on held-out data."""

import argparse
import json
import sys
from collections.abc import Sequence

import jax

from train.assemble import batch_placement, config_of, model_builder, resolved_model, telling_refusals
from train.checkpoint import find_checkpoint, load_params
from train.command import run_command
from train.config import TrainConfig
from train.data import open_data
from train.evaluation import evaluate, make_eval_step
from train.planning.auto import start
from train.progress import counted
from train.state import abstract_model, abstract_params


def evaluate_run(config: TrainConfig) -> dict[str, float]:
    """The step of the run's latest checkpoint, and the figures of its evaluation."""
    directory, step = find_checkpoint(config.checkpoint.directory(config.run_dir))
    config, mesh, _ = start(config)
    with jax.set_mesh(mesh):
        data = open_data(config.data, seed=config.seed)
        build = model_builder(resolved_model(config, data.tokenizer.vocab_size), config.attention_sharding)
        params = load_params(directory / str(step), abstract_params(build, mesh))
        batch_size = config.training.batch_size // config.training.accumulate_steps
        placement = batch_placement(config, mesh, batch_size=batch_size)
        batches = data.held_out_batches(
            batch_size=batch_size,
            max_batches=config.evaluation.max_batches,
            rows=placement.rows,
            slots=placement.slots,
        )
        eval_step = make_eval_step(
            abstract_model(build)[0],
            num_answer_groups=len(data.answer_groups),
            loss_tile=config.training.loss_tile,
            deterministic=config.deterministic,
        )
        total = data.num_held_out_batches(batch_size, config.evaluation.max_batches)
        batches = counted(batches, total, "evaluating")
        with telling_refusals(config):
            values = evaluate(eval_step, params, batches, placement, answer_groups=data.answer_groups)
        return {"step": step} | values


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line, prints one JSON object and returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m train.evaluate", description=__doc__)
    parser.add_argument("source", metavar="RUN_DIR|CONFIG", help="folder of a run, or its config file")
    parser.add_argument("overrides", metavar="a.b=c", nargs="*", help="config keys to change")
    options = parser.parse_intermixed_args(arguments)

    def run() -> None:
        values = evaluate_run(config_of(options.source, options.overrides))
        if jax.process_index() == 0:
            print(json.dumps(values))

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
