"""What the commands have in common: errors as one line, and the exit code."""

import sys
from collections.abc import Callable

from train.checkpoint import CheckpointError
from train.config import ConfigError
from train.data import DataError
from train.distributed import DeviceError
from train.step import NonFiniteError


def run_command(run: Callable[[], None]) -> int:
    """Calls `run` and turns what the user can mend into lines on stderr.

    Returns: the exit code: 0; 1 for a run that failed; 2 for a wrong config; 130 for Ctrl-C before the first
      step.
    """
    try:
        run()
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except (CheckpointError, DataError, DeviceError, NonFiniteError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted outside the training loop; nothing was saved", file=sys.stderr)
        return 130
    return 0
