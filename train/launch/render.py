"""Files that start a run on many hosts, made of the templates in this folder by filling in their placeholders."""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from string import Template

from train.config import ConfigError

_WORD = r"[A-Za-z0-9_./:@,+-]+"  # what neither a shell nor YAML nor an #SBATCH line takes apart
_COUNT = r"[1-9][0-9]*"
_NAME = r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?"  # of a JobSet, whose pods' names are at most 63 characters


@dataclass(frozen=True, kw_only=True)
class Placeholder:
    """A value that a template asks for."""

    help: str
    pattern: str = _WORD
    default: str | None = None
    """None: it has to be given."""


_NODES = Placeholder(help="hosts", pattern=_COUNT)
_RESTARTS = Placeholder(help="how often a run that failed is started again", pattern=r"[0-9]+", default="3")
_GPUS = Placeholder(help="GPUs of a host", pattern=_COUNT, default="8")
_RUN = Placeholder(help="name of the job", pattern=_NAME, default="longctx")

PLACES: Mapping[str, tuple[str, Mapping[str, Placeholder]]] = {
    "slurm": (
        "slurm.sbatch",
        {
            "nodes": _NODES,
            "name": _RUN,
            "processes_per_node": Placeholder(
                help="processes of a host, which share its GPUs evenly", pattern=_COUNT, default="1"
            ),
            "gpus_per_node": _GPUS,
            "time": Placeholder(
                help="time limit, at which the job saves and is queued again", pattern="[0-9:-]+", default="24:00:00"
            ),
            "grace": Placeholder(help="seconds to save before the time limit", pattern=_COUNT, default="300"),
            "restarts": _RESTARTS,
            "workdir": Placeholder(help="folder to run in, the same on all hosts"),
        },
    ),
    "jobset": (
        "jobset.yaml",
        {
            "nodes": _NODES,
            "name": _RUN,
            "image": Placeholder(help="container image that holds longctx and the config"),
            "claim": Placeholder(help="persistent volume claim, writable by all pods, for the runs"),
            "workdir": Placeholder(help="folder of the image to run in", default="/workspace"),
            "runs": Placeholder(help="where the volume is mounted; run_dir lies in it", default="/workspace/runs"),
            "gpus_per_node": _GPUS,
            "grace": Placeholder(help="seconds to save when a pod has to go", pattern=_COUNT, default="300"),
            "start_timeout": Placeholder(help="seconds in which all pods must start", pattern=_COUNT, default="600"),
            "restarts": _RESTARTS,
        },
    ),
    "tpu_vm": (
        "tpu_vm.sh",
        {
            "name": Placeholder(help="name of the TPU slice, whose hosts all take part", pattern=_NAME),
            "zone": Placeholder(help="its zone"),
            "workdir": Placeholder(help="folder to run in, on a disk that all hosts share"),
            "restarts": _RESTARTS,
        },
    ),
}
"""Of each place: the template, and its placeholders beside `command`."""


class _Text(Template):
    delimiter = "%%"  # shells and YAML have a use for $


def render(place: str, values: Mapping[str, str], *, python: str, arguments: Sequence[str]) -> str:
    """The file that starts `PYTHON -m train ARGUMENTS` on the hosts of a place.

    Args:
      place: Key of PLACES.
      values: Placeholders by name; those left out take their default.
      python: The interpreter on the hosts.
      arguments: Config file and overrides, quoted for the shell here.
    Raises: ConfigError for a placeholder that the template does not have, one that is missing, or a value that it
      cannot hold.
    """
    file, placeholders = PLACES[place]
    for name in values:
        if name not in placeholders:
            raise ConfigError(f"{name}: unknown placeholder of {file}; it has {', '.join(placeholders)}")
    filled = {}
    for name, placeholder in placeholders.items():
        value = values.get(name, placeholder.default)
        if value is None:
            raise ConfigError(f"{name}: got nothing, but {file} needs it: {placeholder.help}; pass {option(name)}")
        if not re.fullmatch(placeholder.pattern, value):
            raise ConfigError(f"{name}: got {value!r}, wanted text that matches {placeholder.pattern}")
        filled[name] = value
    command = shlex.join([python, "-m", "train", *arguments])
    if "\n" in command:
        raise ConfigError(f"arguments: got a line break in {command!r}, wanted none; put that value into the config")
    template = resources.files("train.launch").joinpath(file).read_text(encoding="utf-8")
    return _Text(template).substitute(filled, command=command)


def option(name: str) -> str:
    """The command line option of a placeholder."""
    return f"--{name.replace('_', '-')}"
