"""Several processes of one run on this machine."""

import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence

SECONDS_TO_STOP = 3.0
"""For a child whose peer is gone; it may hang in a collective."""
_TRAIN = (sys.executable, "-m", "train")
_POLL_SECONDS = 0.05
_WRONG_CONFIG = 2
_LAST_LINES = 15
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _Child:
    """One process of the run. Rank 0 shows its output as it is; lines of the others begin with their rank."""

    def __init__(self, rank: int, command: Sequence[str]):
        self.rank = rank
        # In a session of its own, so that Ctrl-C in a terminal reaches it once only, from here.
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=None if rank == 0 else subprocess.PIPE,
            stderr=subprocess.PIPE if rank == 0 else subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self.last_lines: deque[str] = deque(maxlen=_LAST_LINES)
        self._relay = threading.Thread(target=self._relay_lines, daemon=True)
        self._relay.start()

    def _relay_lines(self) -> None:
        prefix = "" if self.rank == 0 else f"[rank {self.rank}] "
        with self.process.stderr if self.rank == 0 else self.process.stdout as stream:
            for line in stream:
                if "Expected number of connected peer ranks" in line:  # said for every group of CPU devices
                    continue
                self.last_lines.append(line)
                print(prefix + line, end="", file=sys.stderr, flush=True)

    def send(self, number: int) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)

    def finish(self, deadline: float) -> None:
        """Waits for the end, until the deadline, then enforces it."""
        try:
            self.process.wait(timeout=max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._relay.join(timeout=1)

    def ending(self) -> str:
        code = self.process.returncode
        how = f"with exit code {code}" if code >= 0 else f"by {signal.Signals(-code).name}"
        return f"rank {self.rank} on {socket.gethostname()} ended {how}"

    def last_words(self) -> str:
        return "".join(f"  {line.rstrip()}\n" for line in self.last_lines) or "  (none)\n"


def launch_local(
    arguments: Sequence[str], *, num_processes: int, restarts: int = 0, seconds_to_stop: float = SECONDS_TO_STOP
) -> int:
    """Runs `python -m train` with these arguments in as many processes, until all have ended or one has failed.

    SIGINT, SIGTERM and SIGHUP are passed on. When a process fails, the others are stopped, and stderr tells which one
    it was, how it ended and its last lines. Then all are started again, and resume from the last complete checkpoint,
    unless somebody asked for the end by a signal or the exit code says that the config is wrong.

    Args:
      arguments: Config file and overrides.
      num_processes: How many to start.
      restarts: How often to start again, at most.
      seconds_to_stop: How long the others have to end by themselves once one has failed.
    Returns: 0, or the exit code of the process that failed first in the last attempt (1 if a signal ended it).
    """
    for attempt in range(restarts + 1):
        code, asked_to_stop = _run(arguments, num_processes, seconds_to_stop)
        if code in (0, _WRONG_CONFIG) or asked_to_stop or attempt == restarts:
            break
        print(f"starting all {num_processes} processes again: restart {attempt + 1} of {restarts}", file=sys.stderr)
    return code


def _run(arguments: Sequence[str], num_processes: int, seconds_to_stop: float) -> tuple[int, bool]:
    """One attempt: its exit code, and whether a signal asked for its end."""
    common = [
        *arguments,
        f"distributed.coordinator_address=127.0.0.1:{_free_port()}",
        f"distributed.num_processes={num_processes}",
    ]
    children: list[_Child] = []
    passed_on: list[int] = []

    def forward(number: int, _) -> None:
        passed_on.append(number)
        for child in children:
            child.send(number)

    # A SIGHUP that is ignored, as under nohup, stays so.
    forwarded = [n for n in _FORWARDED if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    previous = {number: signal.signal(number, forward) for number in forwarded}
    try:
        for rank in range(num_processes):
            children.append(_Child(rank, [*_TRAIN, *common, f"distributed.process_id={rank}"]))
            for number in passed_on:  # what came before this child was there
                children[-1].send(number)
        while True:
            codes = [child.process.poll() for child in children]
            failed = [child for child, code in zip(children, codes, strict=True) if code]
            if failed or None not in codes:
                break
            time.sleep(_POLL_SECONDS)
        if failed:
            for child in children:
                child.send(signal.SIGTERM)
    finally:
        deadline = time.monotonic() + seconds_to_stop
        for child in children:
            child.finish(deadline)
        for number, handler in previous.items():
            signal.signal(number, handler)
    if not failed:
        return 0, bool(passed_on)
    for child in failed:
        # Whoever asked for the end by a signal need not read how far each process had come.
        last_words = "" if passed_on else f"; its last lines:\n{child.last_words()}".rstrip()
        print(f"error: {child.ending()}{last_words}", file=sys.stderr)
    print(f"error: stopped the run of {num_processes} processes", file=sys.stderr)
    return max(failed[0].process.returncode, 1), bool(passed_on)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
