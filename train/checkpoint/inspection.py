"""Which checkpoints a run has and whether they are whole; reads only, and needs neither config nor mesh."""

import datetime
import re
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from train.checkpoint.store import CheckpointError, Position, brief, checkpoint_folders

_ARRAY_ITEMS = ("params", "training")
_WANTED = "pass a run's folder, its folder of checkpoints, or one checkpoint"


@dataclass(frozen=True, kw_only=True)
class Listed:
    """One checkpoint of a folder."""

    path: Path
    step: int
    finished: bool
    """False where saving was cut off or goes on: a run never resumes from it."""
    time: datetime.datetime
    """When it was completed; otherwise when its folder last changed."""
    num_bytes: int
    """Of all its files."""
    problem: str | None
    """Why it cannot be used, as far as can be told without reading arrays; None: complete."""


def list_checkpoints(source: str | Path) -> list[Listed]:
    """The checkpoints of a run, by step, those included whose saving was cut off.

    Args:
      source: A run's folder, its folder of checkpoints, or one checkpoint in it, which is then the only one listed.
    Raises: CheckpointError when there is none, or the folder is not there.
    """
    path = Path(source).resolve()
    if not path.is_dir():
        raise CheckpointError(f"{source}: is no folder; {_WANTED}")
    for directory in checkpoint_folders(path):
        if directory.is_dir() and (listed := _listed(directory)):
            return listed
    if path.name.isdecimal():
        listed = [checkpoint for checkpoint in _listed(path.parent) if checkpoint.path == path]
        if listed:
            return listed
    raise CheckpointError(f"{source}: holds no checkpoint; {_WANTED}. A run that has saved none starts at step 0")


def verify(checkpoint: Listed, *, progress: Callable[[str], None] = lambda name: None) -> tuple[int, str | None]:
    """Reads every array of a checkpoint into host memory, one at a time.

    Data that is missing, cut off or not what its description says is found. Bits that changed on the disk are found
    only where they break the compression or the index: the format keeps no checksum of an array.

    Args:
      checkpoint: What to read.
      progress: Called with the name of each array before it is read.
    Returns: how many arrays are whole, and what is wrong with the first that is not, or None.
    """
    count = 0
    if checkpoint.problem is not None:
        return count, checkpoint.problem
    for item in _ARRAY_ITEMS:
        if not (checkpoint.path / item).is_dir():  # of weights alone
            continue
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            for name, _, read in array_readers(reader, checkpoint.path / item):
                progress(f"{item}.{name}")
                try:
                    read()
                except Exception as error:  # Orbax and tensorstore raise many types for damaged files
                    return count, f"{item}.{name} cannot be read: {brief(error)}"
                count += 1
    return count, None


def remedy(checkpoint: Listed, others: list[Listed]) -> str:
    """What to do about a checkpoint that is not whole."""
    if not checkpoint.finished:
        return "leave it: a run never resumes from it, and its next start removes it"
    earlier = [other.step for other in others if other.step < checkpoint.step and other.problem is None]
    if earlier:
        return f"delete that folder to go on from step {max(earlier)}"
    return "no earlier one is complete: delete that folder to start again, or choose another run_dir"


def _listed(directory: Path) -> list[Listed]:
    finished = {Path(found.path): found for found in ocp.path.step.standard_name_format().find_all(directory)}
    suffix = re.escape(ocp.path.step.TMP_DIR_SUFFIX)
    listed = []
    for path in directory.iterdir():
        match = re.fullmatch(rf"(\d+)(?:{suffix}.*)?", path.name)
        if match is None or not path.is_dir():
            continue
        found = finished.get(path)
        listed.append(
            Listed(
                path=path,
                step=int(match[1]),
                finished=found is not None,
                time=_time(path),
                num_bytes=sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
                problem="saving it was cut off, or goes on" if found is None else _problem(path),
            )
        )
    return sorted(listed, key=lambda checkpoint: (checkpoint.step, checkpoint.path.name))


def _time(path: Path) -> datetime.datetime:
    """Of the last change of the folder, which is the move to its final name: Orbax's own record may be unreadable."""
    return datetime.datetime.fromtimestamp(path.stat().st_mtime)


def _problem(path: Path) -> str | None:
    missing = [item for item in (*_ARRAY_ITEMS, "position") if not (path / item).is_dir()]
    if missing not in ([], ["training"]):
        return f"not a checkpoint of this trainer: it holds no {missing[0]}"
    try:
        with closing(ocp.Checkpointer(ocp.JsonCheckpointHandler())) as reader:
            position = Position(**reader.restore(path / "position"))
    except Exception as error:  # as in verify
        return f"its position cannot be read: {brief(error)}"
    if missing and not position.weights_only:
        return f"not a checkpoint of this trainer: it holds no {missing[0]}"
    for item in (item for item in _ARRAY_ITEMS if item not in missing):
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            if not _tree(reader, path / item):
                return f"the description of its {item} cannot be read"
    return None


def _tree(reader: ocp.Checkpointer, path: Path):
    """The stored tree, of metadata for arrays; None where Orbax cannot read it, of which it logs the reason."""
    try:
        metadata = reader.metadata(path).item_metadata
    except Exception:  # as in verify
        return None
    return None if metadata is None else metadata.tree


def array_readers(
    reader: ocp.Checkpointer, path: Path
) -> Iterator[tuple[str, jax.ShapeDtypeStruct, Callable[[], Any]]]:
    """The dotted name of each array of an item, its shape and dtype, and what reads it alone into host memory."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(_tree(reader, path))
    for index, (keys, leaf) in enumerate(leaves):
        one = structure.unflatten([ocp.PLACEHOLDER] * index + [leaf] + [ocp.PLACEHOLDER] * (len(leaves) - index - 1))
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), one)
        args = ocp.args.PyTreeRestore(item=one, restore_args=as_numpy)
        yield (
            jax.tree_util.keystr(keys, simple=True, separator="."),
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
            lambda index=index, args=args: jax.tree.leaves(reader.restore(path, args=args))[index],
        )
