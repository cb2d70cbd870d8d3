"""What the commands have in common: errors as one line, and the exit code."""

import os
import select
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from train.checkpoint import CheckpointError, tell_faults_once
from train.config import ConfigError
from train.data import DataError
from train.distributed import DeviceError, process_label
from train.files import GoneError, storage_problem
from train.planning.startup import OutOfDeviceMemory
from train.spikes import SpikeError
from train.step import NonFiniteError


def run_command(run: Callable[[], None]) -> int:
    """Calls `run` and turns what the user can mend into lines on stderr.

    Returns: the exit code: 0; 1 for a run that failed; 2 for a wrong config; 130 for Ctrl-C before the first
      step. As one of several processes it does not return from a failure but ends the process: a regular exit would
      wait for the others, which wait for this one.
    """
    code = _outcome(run)
    if code and process_label():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def check_output(option: str, file: str | Path) -> None:
    """To be called before the work whose result goes into the file.

    Raises: ConfigError unless its folder is there.
    """
    if not Path(file).parent.is_dir():
        raise ConfigError(f"{option}: got {file}, wanted a folder that is there")


def _outcome(run: Callable[[], None]) -> int:
    tell_faults_once()
    try:
        run()
    except ConfigError as error:
        print(f"{_label()}{error}", file=sys.stderr)
        return 2
    except (CheckpointError, DataError, GoneError, NonFiniteError, OutOfDeviceMemory, SpikeError) as error:
        print(f"error: {_label()}{error}", file=sys.stderr)
        return 1
    except DeviceError as error:  # names host and rank itself
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted outside the training loop; nothing was saved", file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _is_stdout_closed():
            return 1
        problem = storage_problem(error) if isinstance(error, OSError) else None
        if problem is not None:
            where = f"{error.filename}: " if error.filename else ""
            print(
                f"error: {_label()}{where}{problem}, then run the same command again; what was complete is kept",
                file=sys.stderr,
            )
            return 1
        if not process_label():
            raise
        traceback.print_exc()
        print(f"error: {_label()}see above", file=sys.stderr)
        return 1
    return 0


def _is_stdout_closed() -> bool:
    """Whether whoever read stdout, such as `head`, has enough; if so, what is left for it is dropped."""
    try:
        stdout = sys.stdout.fileno()
    except OSError:  # it is no file
        return False
    poll = select.poll()
    poll.register(stdout, select.POLLOUT)
    is_closed = any(event & select.POLLERR for _, event in poll.poll(0))
    if is_closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
    return is_closed


def _label() -> str:
    return f"{process_label()}: " if process_label() else ""
