"""TrainConfig: everything one run is made of, read from a YAML file and `a.b=c` overrides."""

import argparse
import collections
import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int

from longctx.context_parallel import AttentionSharding, Balancer, ContextParallelConfig
from longctx.model import ModelConfig
from longctx.sharding import AXIS_NAMES, CONTEXT_AXES, MeshConfig
from train import schema, schema_docs
from train.checkpoint import CheckpointConfig
from train.data import DataConfig
from train.distributed import DistributedConfig
from train.evaluation import EvaluationConfig
from train.metrics import MetricsConfig
from train.optimizer import OptimizerConfig, make_schedule
from train.profiling import ProfileConfig
from train.sampling import SampleConfig
from train.schema import ConfigError
from train.step import TrainingConfig

__all__ = ["ConfigError", "TrainConfig", "config_text", "help_text", "load_config", "markdown_text"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run; each section is defined and explained by the module that uses it."""

    run_dir: str
    """The folder of the run: checkpoints, metrics, plots and the resolved config are written under it."""
    seed: int = 0
    """Seeds the weights, the split and the order of the data, dropout and sampling; from 0 to 2^32 - 1."""
    deterministic: bool = False
    """Whether two runs on the same machine, mesh and versions must give the same bits: refuses mixers that allow other
    orders of sums, and compiles for it on GPUs, where steps may get slower. docs/reliability.md says what it covers."""
    init_from: str | None = None
    """A run folder whose weights a new run starts from, or a published model that `python -m train.convert` read.
    Optimizer, step and data position start afresh."""
    model: ModelConfig
    """The transformer."""
    data: DataConfig
    """Which text is trained on, and how it becomes rows of tokens."""
    training: TrainingConfig
    """How long and in which portions the model is trained."""
    optimizer: OptimizerConfig
    """The update rule and its learning rate."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    """How the devices are arranged."""
    context_parallel: ContextParallelConfig = dataclasses.field(default_factory=ContextParallelConfig)
    """How a sequence is split over the context axes of the mesh, where they have more than one device."""
    device_table: str | None = None
    """Speeds of devices, a file that `python -m train.calibrate` writes: what `strategy: auto`, `train.plan`, MFU and
    the warning of too little memory go by. null takes those that come with the package, of GPUs and TPUs."""
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)
    """The processes and devices of the run."""
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    """When the run is saved and what is kept."""
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    """When the model is measured on held-out text."""
    metrics: MetricsConfig = dataclasses.field(default_factory=MetricsConfig)
    """What is logged, how often, and where to."""
    profile: ProfileConfig = dataclasses.field(default_factory=ProfileConfig)
    """Which steps are profiled."""
    sample: SampleConfig = dataclasses.field(default_factory=SampleConfig)
    """The text that the trained model is asked to go on with."""

    def __post_init__(self):
        if not self.run_dir:
            raise ValueError("run_dir: got empty text, wanted a folder for the run; name one, such as runs/NAME")
        if self.init_from is not None and Path(self.init_from) == Path(self.run_dir):
            raise ValueError(
                f"init_from: got run_dir={self.run_dir} itself, wanted another run's folder; leave init_from out "
                "to resume the run"
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed: got {self.seed}, wanted 0 to 2^32 - 1; choose one of these")
        for name, mixer in self.model.mixers.items():
            if self.deterministic and not getattr(mixer, "deterministic", True):
                raise ValueError(
                    f"deterministic: got true with model.mixers.{name}.deterministic=false, wanted the same of all; "
                    "leave that out"
                )
        make_schedule(self.optimizer, total_steps=self.training.steps)  # refuses phases that outlast the run
        # An axis of -1 takes the machine's devices: what it is part of is checked when the run starts.
        sizes = {name: getattr(self.mesh, name) for name in AXIS_NAMES}
        if self.distributed.virtual_cpu_devices is not None:
            sizes = self.mesh.sizes(self.distributed.virtual_cpu_devices)
        self.check_mesh(sizes)

    def check_mesh(self, sizes: Mapping[str, int]) -> None:
        """Refuses rows or tokens that do not split evenly over a mesh of these sizes, and layers that its strategy does
        not serve; an axis of -1 is left unchecked.

        Raises: ValueError naming the key.
        """
        row_devices = sizes["data"] * sizes["fsdp"]
        rows = self.training.batch_size // self.training.accumulate_steps
        if row_devices > 0 and rows % row_devices:
            raise ValueError(
                f"training.batch_size: got {self.training.batch_size} in {self.training.accumulate_steps} "
                f"microbatch(es) of {rows} rows, wanted rows that mesh.data x mesh.fsdp = {row_devices} devices share "
                "evenly; change batch_size, accumulate_steps or the mesh"
            )
        degree = math.prod(sizes[axis] for axis in CONTEXT_AXES)
        if self.context_parallel.is_auto:  # what is chosen is checked when it is
            return
        if degree > 0:
            self.context_parallel.placement.check(self.data.seq_len, degree)
        if degree > 1 and sizes["tensor"] > 0:
            self._check_strategies(degree, sizes)

    @property
    def attention_sharding(self) -> AttentionSharding:
        """What the layers of the model are told of context parallelism."""
        return self.context_parallel.sharding(max_document_length=self.data.max_document_length)

    def planned_sharding(self, sizes: Mapping[str, int]) -> AttentionSharding:
        """The same for what is asked of a strategy without a mesh in scope, whose axes would have these sizes."""
        return dataclasses.replace(self.attention_sharding, inner_degree=sizes[CONTEXT_AXES[-1]])

    def row_order(self, sizes: Mapping[str, int]) -> Int[np.ndarray, " length"] | Balancer:
        """Where the tokens of a row stand over a mesh of these sizes: the order of all rows, or what makes that of one.

        Raises: ValueError where the tokens do not split.
        """
        degree = math.prod(sizes[axis] for axis in CONTEXT_AXES)
        if degree == 1 or not self.context_parallel.placement.is_of_rows:
            return self.context_parallel.order(self.data.seq_len, degree)
        layers = collections.Counter(self.model.mixers[name].mask for name in self.model.layers)
        return Balancer(
            masks={mask: count for mask, count in layers.items() if mask is not None},
            sharding=self.planned_sharding(sizes),
            degree=degree,
            length=self.data.seq_len,
        )

    def _check_strategies(self, degree: int, sizes: Mapping[str, int]) -> None:
        for name, mixer in self.model.mixers.items():
            reason = mixer.refusal(
                self.model.dim,
                seq_len=self.data.seq_len,
                heads_split=sizes["tensor"],
                ring_size=degree,
                sharding=self.planned_sharding(sizes),
            )
            if reason is not None:
                raise ValueError(f"context_parallel: model.mixers.{name}: {reason}")
        self.row_order(sizes)  # refuses a balanced layout of nothing


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> TrainConfig:
    """The run that a YAML file and `a.b=c` overrides describe; nothing is created on disk.

    Raises: ConfigError with one line a problem.
    """
    return schema.load(TrainConfig, path, overrides)


def config_text(config: TrainConfig) -> str:
    """The resolved config as YAML with every default written out: what `--print-config` shows."""
    return schema.to_yaml(config)


def help_text() -> str:
    """Every key with type, default and meaning: what `--help` shows."""
    return schema_docs.help_text(TrainConfig)


def markdown_text() -> str:
    """The contents of docs/config.md."""
    return f"""# Configuration

Generated by `make docs`; do not edit. A run is one YAML file, read strictly: an unknown key, a wrong type or
a value out of range is an error that names the key. Any key can be given on the command line as `a.b=c`;
items of a list are addressed by index (`data.sources.0.weight=2`), entries of a mapping by name
(`model.mixers.local.window=512`). `python -m train CONFIG --print-config` shows the result. Below, NAME
stands for a name of your choice and N for an index.

{schema_docs.markdown(TrainConfig)}"""


def main() -> None:
    """Writes the page of all keys, docs/config.md."""
    parser = argparse.ArgumentParser(prog="python -m train.config", description=main.__doc__)
    parser.add_argument("--write", type=Path, default=Path("docs/config.md"), metavar="PAGE.md", help="the page")
    target = parser.parse_args().write
    if target.suffix != ".md":
        parser.error(f"--write: got {target}, wanted a page that ends in .md")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(markdown_text(), encoding="utf-8")


if __name__ == "__main__":
    main()
