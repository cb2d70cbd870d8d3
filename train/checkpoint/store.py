"""Saving, resuming and initializing from checkpoints, on Orbax."""

import contextlib
import dataclasses
import errno
import fcntl
import functools
import json
import logging
import os
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
import yaml
from orbax.checkpoint import checkpoint_managers

from longctx.lora import is_adapter
from train.files import storage_problem
from train.state import TrainState, frozen

_CHUNK_BYTES = 64 * 2**20
_CONCURRENT_GB = 96  # Orbax's default for what it has in memory of a save


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used, on one line, with the remedy."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the run is saved and which checkpoints are kept."""

    every: int | None = 1000
    """Steps between checkpoints, or null. The last step and an interrupted one are saved in any case."""
    keep_last: int = 2
    """How many of the latest checkpoints are kept."""
    keep_every: int | None = None
    """Also keep every checkpoint whose step is a multiple of this. Default: none."""
    dir: str | None = None
    """Folder of the checkpoints. Default: checkpoints in run_dir."""

    def __post_init__(self):
        for name in ("every", "keep_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: got {value}, wanted 1 or more, or null")
        if self.keep_last < 1:
            raise ValueError(f"keep_last: got {self.keep_last}, wanted 1 or more")
        if self.every is None and self.keep_every is not None:
            raise ValueError(
                f"keep_every: got {self.keep_every} with every=null, which saves the last step alone; set both or "
                "neither"
            )
        if self.every is not None and self.keep_every is not None and self.keep_every % self.every:
            raise ValueError(
                f"keep_every: got {self.keep_every}, which is no multiple of every={self.every}, so no such step would "
                "be saved; choose a multiple"
            )

    def directory(self, run_dir: str | Path) -> Path:
        """Where the checkpoints of a run lie."""
        return Path(self.dir) if self.dir is not None else Path(run_dir) / "checkpoints"


@dataclass(frozen=True, kw_only=True)
class Position:
    """What a checkpoint holds beside arrays."""

    rows: int
    """Training rows consumed: the whole state of the data."""
    data: str
    """Fingerprint of the documents that the rows were made of."""
    config: Mapping[str, Any]
    """The resolved config of the run that saved it, as plain data."""
    losses: Sequence[tuple[int, float]] = ()
    """The recent (step, loss) by which the next steps are judged; none where spikes are ignored."""
    weights_only: bool = False
    """Whether the checkpoint holds parameters and nothing to resume from."""


class Checkpoints:
    """The checkpoints of one run: one folder a saved step, written in the background, complete or absent.

    While it is open no other process can open them: it would remove the save that this one is writing.

    A step's folder has three items: `params`, `training` (optimizer state, step, key, skipped steps) and
    `position` (JSON: rows consumed and the config).

    Args:
      directory: Folder of the run's checkpoints; made if it is not there.
      config: What to keep.
    Raises: CheckpointError where the folder cannot be written, or another process has it open.
    """

    def __init__(self, directory: Path, config: CheckpointConfig):
        self.directory = directory
        lock = self._writing(lambda: _locked(directory)) if jax.process_index() == 0 else None
        self._unlock = weakref.finalize(self, os.close, lock) if lock is not None else lambda: None
        cut_off = sorted(directory.glob(f"*{ocp.path.step.TMP_DIR_SUFFIX}*"))
        self._manager = self._writing(lambda: _open(directory, config, write=True))
        kept = "none is complete" if self.latest_step is None else f"step {self.latest_step} is the last complete one"
        self.notes = [f"{path}: a checkpoint whose saving was cut off; it is removed, {kept}" for path in cut_off]
        """Lines about what earlier processes left, for the user to see."""

    @property
    def latest_step(self) -> int | None:
        """The last complete checkpoint's step, or None when there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState, *, step: int, position: Position) -> None:
        """Starts to save a step; returns once the state may be donated. A step already saved is left alone.

        Args:
          state: The state after `step` steps.
          step: Its step.
          position: What else to save of it.
        Raises: CheckpointError where this save cannot be started, or the one before was not completed.
        """
        if step == self.latest_step:
            return
        args = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            training=ocp.args.StandardSave(_without_params(state)),
            position=ocp.args.JsonSave(dataclasses.asdict(position)),
        )
        self._writing(lambda: self._manager.save(step, args=args))

    def check(self, abstract: TrainState) -> None:
        """Compares the latest checkpoint with the state of this config, without reading arrays.

        Raises: CheckpointError when this trainer did not write it, or when its parameters or optimizer state
          are not those of this config; it names the first difference.
        """
        step = self.latest_step
        for item, wanted in (("params", abstract.params), ("training", _without_params(abstract))):
            try:
                stored = _stored_shapes(self._manager, step, item)
            except Exception as error:  # Orbax and tensorstore raise many types for damaged files
                raise self._unreadable(step, brief(error)) from error
            if stored is None and item == "training" and load_position(self.directory, step).weights_only:
                raise CheckpointError(
                    f"{self.directory / str(step)}: holds weights alone, from which no run can resume; choose another "
                    f"run_dir, with init_from={self.directory} to start from them"
                )
            if stored is None:
                raise self._unreadable(step, f"it holds no {item}")
            difference = _first_difference(stored, _shapes(wanted))
            if difference is not None:
                raise CheckpointError(
                    f"{self.directory / str(step)}: this config cannot resume from it: {difference}; choose another "
                    f"run_dir, with init_from={self.directory} if only its weights are wanted"
                )

    def restore(self, abstract: TrainState) -> tuple[TrainState, Position]:
        """The latest checkpoint, laid out as `abstract` asks; the mesh that saved it may have been another.

        Args:
          abstract: ShapeDtypeStructs with the shardings of the current mesh; `check` has passed.
        Raises: CheckpointError when the checkpoint cannot be read.
        """
        step = self.latest_step
        try:
            items = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardRestore(abstract.params),
                    training=ocp.args.StandardRestore(_without_params(abstract)),
                    position=ocp.args.JsonRestore(),
                ),
            )
            position = Position(**items.position)
        except Exception as error:  # as in check
            raise self._unreadable(step, brief(error)) from error
        return TrainState(params=items.params, **items.training), position

    def wait(self) -> None:
        """Blocks until every save that was started is complete.

        Raises: CheckpointError where one was not completed.
        """
        self._writing(self._manager.wait_until_finished)

    def close(self) -> None:
        """Waits for the saves and releases the threads; raises as `wait` does."""
        try:
            self._writing(self._manager.close)
        finally:
            self._unlock()

    def _writing[T](self, write: Callable[[], T]) -> T:
        """Calls what writes; a fault of the disk becomes an error that says so."""
        try:
            return write()
        except Exception as error:  # Orbax and tensorstore raise many types
            problem = storage_problem(error)
            if problem is None:
                raise
            raise CheckpointError(
                f"{self.directory}: cannot be written: {problem}, then run the same command again, which goes on from "
                "the last complete checkpoint"
            ) from error

    def _unreadable(self, step: int, reason: str) -> CheckpointError:
        earlier = [other for other in self._manager.all_steps() if other < step]
        remedy = (
            f"delete that folder to go on from step {max(earlier)}"
            if earlier
            else "no earlier checkpoint exists: delete that folder to start again, or choose another run_dir"
        )
        return CheckpointError(
            f"{self.directory / str(step)}: cannot be read as a checkpoint of this trainer ({reason}); {remedy}"
        )


@functools.cache  # once a process
def tell_faults_once() -> None:
    """Leaves out the tracebacks that Orbax's threads print of a fault of the disk, which it raises as well.

    For the rest of the process: some come after the error. Once Orbax has raised one, what is left of its reads and
    writes ends on an event loop that is closed.
    """

    def is_new(error: BaseException | None) -> bool:
        after_the_end = "Event loop is closed", "cannot schedule new futures after interpreter shutdown"
        return not (error is not None and storage_problem(error)) and str(error) not in after_the_end

    def hook(unraisable: Any) -> None:
        if is_new(unraisable.exc_value):
            previous(unraisable)

    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(lambda record: not record.exc_info or is_new(record.exc_info[1]))
    previous, sys.unraisablehook = sys.unraisablehook, hook


def save_params(directory: Path, params: Any, position: Position) -> None:
    """Writes parameters alone as a checkpoint of step 0: for `load_params`, not to resume from.

    Args:
      directory: The folder of checkpoints, not there yet.
      params: Nested dicts of arrays of this process.
      position: What else to save, `weights_only`.
    Raises: CheckpointError where the disk does not take it.
    Memory: beside the parameters, once or twice the largest of them, or 1 GB.
    """
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    # In chunks, so that a process reads little beside its own shards; one array is one chunk otherwise.
    in_chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), params)
    args = ocp.args.Composite(
        params=ocp.args.StandardSave(params, save_args=in_chunks),
        position=ocp.args.JsonSave(dataclasses.asdict(position)),
    )
    manager = _open(directory, CheckpointConfig(), write=True, concurrent_gb=1 + largest // 10**9)
    try:
        manager.save(0, args=args)
        manager.wait_until_finished()
    except Exception as error:  # as in Checkpoints
        problem = storage_problem(error)
        if problem is None:
            raise
        raise CheckpointError(f"{directory}: cannot be written: {problem}, then run the same command again") from error
    finally:
        manager.close()


def load_position(directory: Path, step: int) -> Position:
    """What a checkpoint holds beside arrays.

    Raises: CheckpointError when it cannot be read.
    """
    try:
        with contextlib.closing(ocp.Checkpointer(ocp.JsonCheckpointHandler())) as reader:
            return Position(**reader.restore(directory.resolve() / str(step) / "position"))
    except Exception as error:  # as in Checkpoints.check
        raise CheckpointError(f"{directory / str(step)}: its position cannot be read ({brief(error)})") from error


def load_params(source: str | Path, abstract_params: Any, *, may_lack_adapters: bool = False) -> Any:
    """The weights alone of another run's latest checkpoint, laid out as `abstract_params` asks.

    Args:
      source: A run's folder, its folder of checkpoints, or one checkpoint in it.
      abstract_params: ShapeDtypeStructs with shardings.
      may_lack_adapters: Whether a checkpoint of a model without adapters will do: then the result has none.
    Raises: CheckpointError when there is no checkpoint, or a parameter is missing, unknown or of another
      shape; it names the first one.
    """
    directory, step = find_checkpoint(source)
    manager = _open(directory, CheckpointConfig(), write=False)
    try:
        stored = _stored_shapes(manager, step, "params")
        if stored is None:
            raise CheckpointError(f"{directory / str(step)}: holds no parameters; pass a checkpoint of this trainer")
        if may_lack_adapters and not any(is_adapter(name.split(".")) for name in stored):
            abstract_params = frozen(abstract_params) or abstract_params
        difference = _first_difference(stored, _shapes(abstract_params), dtypes=False)
        if difference is not None:
            raise CheckpointError(
                f"{directory / str(step)}: its weights do not fit the model: {difference}; give the model the shapes "
                "of that run"
            )
        args = ocp.args.Composite(params=ocp.args.StandardRestore(abstract_params))
        return manager.restore(step, args=args).params
    except CheckpointError:
        raise
    except Exception as error:  # as in Checkpoints.check
        raise CheckpointError(
            f"{directory / str(step)}: cannot be read ({brief(error)}); where `python -m train.checkpoint ls` shows an "
            "earlier one, delete that folder to take it"
        ) from error
    finally:
        manager.close()


def find_checkpoint(source: str | Path) -> tuple[Path, int]:
    """The folder of checkpoints and the step that a path means; the latest step unless the path names one.

    Does not start JAX.

    Raises: CheckpointError when there is none.
    """
    path = Path(source).resolve()
    if path.name.isdecimal() and (path / "params").is_dir():
        return path.parent, int(path.name)
    for directory in checkpoint_folders(path):
        steps = [found.step for found in ocp.path.step.standard_name_format().find_all(directory)]
        if steps:
            return directory, max(steps)
    raise CheckpointError(
        f"{source}: holds no complete checkpoint; pass a run's folder, its folder of checkpoints, or one checkpoint"
    )


def checkpoint_folders(path: Path) -> list[Path]:
    """Where the checkpoints may lie of a run in this folder, or that this is the folder of."""
    folders = [path / "checkpoints", path]
    with contextlib.suppress(OSError, yaml.YAMLError, ValueError, TypeError, AttributeError):
        config = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
        if elsewhere := (config.get("checkpoint") or {}).get("dir"):
            folders.insert(0, Path(elsewhere).resolve())
    return folders


def _locked(directory: Path) -> int | None:
    """The descriptor of a file that this process alone holds until it is closed, or the process has ended, however.

    None on file systems that know no locks.

    Raises: CheckpointError where another process holds it, or the folder cannot be made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:  # by file systems on which nobody makes folders, such as /proc or automounts
        raise CheckpointError(
            f"{directory}: cannot be written: {error.filename} cannot be made; choose another run_dir or checkpoint.dir"
        ) from error
    lock = os.open(directory / ".lock", os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            return None
        raise CheckpointError(
            f"{directory}: another process is training this run; wait until it ends, or choose another run_dir"
        ) from error
    return lock


def changed_settings(stored: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """The settings in which two configs (as plain data) differ, as `key: old -> new`."""
    old, new = _flat(stored), _flat(current)
    return [
        f"{key}: {json.dumps(old.get(key))} -> {json.dumps(new.get(key))}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def _open(
    directory: Path, config: CheckpointConfig, *, write: bool, concurrent_gb: int = _CONCURRENT_GB
) -> ocp.CheckpointManager:
    policies: list[Any] = [checkpoint_managers.LatestN(config.keep_last)]
    if config.keep_every is not None:
        policies.append(checkpoint_managers.EveryNSteps(config.keep_every))
    return ocp.CheckpointManager(
        directory.resolve(),
        options=ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            create=write,
            cleanup_tmp_directories=write,
        ),
        item_handlers={
            "params": ocp.StandardCheckpointHandler(save_concurrent_gb=concurrent_gb),
            "training": ocp.StandardCheckpointHandler(),
            "position": ocp.JsonCheckpointHandler(),
        },
    )


def _without_params(state: TrainState) -> dict[str, Any]:
    return {
        "step": state.step,
        "opt_state": state.opt_state,
        "rng": state.rng,
        "skipped_steps": state.skipped_steps,
    }


def _shapes(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    flat = ocp.tree.to_flat_dict(tree, sep=".")
    return {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in flat.items()}


def _stored_shapes(manager: ocp.CheckpointManager, step: int, item: str):
    metadata = manager.item_metadata(step)
    return None if metadata.get(item) is None else _shapes(metadata[item].tree)


def _first_difference(stored: Mapping, wanted: Mapping, *, dtypes: bool = True) -> str | None:
    for name in sorted(wanted.keys() | stored.keys()):
        if name not in stored:
            return f"{name} is not in the checkpoint"
        if name not in wanted:
            return f"{name} is in the checkpoint but not in this config"
        (old_shape, old_dtype), (shape, dtype) = stored[name], wanted[name]
        if old_shape != shape:
            return f"{name} has shape {list(old_shape)} in the checkpoint and {list(shape)} here"
        if dtypes and old_dtype != dtype:
            return f"{name} has dtype {old_dtype} in the checkpoint and {dtype} here"
    return None


def brief(error: Exception) -> str:
    """The first line of what an error says, or its type."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


def _flat(data: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(data, Mapping):
        items = [(str(key), value) for key, value in data.items()]
    elif isinstance(data, (list, tuple)):
        items = [(str(index), value) for index, value in enumerate(data)]
    else:
        return {prefix: data}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat |= _flat(value, f"{prefix}.{key}" if prefix else key)
    return flat
