"""A roll call over plain TCP, before JAX starts its own service at the same address.

XLA ends a process from C++, without a Python error, when the coordinator or a peer is missing. So rank 0 first listens
at the coordinator's address until every other rank has called, and each of them waits for its answer.
"""

import os
import socket
import time

_CALL = "longctx rank {} of {}\n"
_GO = "go\n"
_ANSWER_GRACE = 5.0  # seconds that rank 0's answer may come late
_LINE_TIMEOUT = 2.0
_RETRY_EVERY = 0.2


class RollCallError(RuntimeError):
    """A process that is not there, on one line, with host, rank, address and remedy."""


def roll_call(address: str, *, num_processes: int, process_id: int, timeout: float) -> None:
    """Returns on every rank once all have called.

    Args:
      address: HOST:PORT of rank 0.
      num_processes: Processes of the run.
      process_id: Rank of this one.
      timeout: Seconds to wait for the others.
    Raises: RollCallError when rank 0 cannot listen, does not answer, or misses a rank.
    """
    who = f"rank {process_id} of {num_processes} on {socket.gethostname()}"
    if process_id == 0:
        _collect(address, who, num_processes, timeout)
    else:
        _call(address, who, _CALL.format(process_id, num_processes), timeout)


def _collect(address: str, who: str, num_processes: int, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    callers: dict[str, socket.socket] = {}
    missing = {_CALL.format(rank, num_processes): rank for rank in range(1, num_processes)}
    try:
        with _listen(address, who) as server:
            while missing:
                server.settimeout(max(deadline - time.monotonic(), 0.01))
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    raise _absent(address, who, sorted(missing.values()), timeout) from None
                line = _read_line(connection, _LINE_TIMEOUT)
                if line in missing or line in callers:
                    missing.pop(line, None)
                    callers[line] = connection
                else:
                    connection.close()  # nobody of this run
        for connection in callers.values():
            _send(connection, _GO)
            _read_line(connection, _LINE_TIMEOUT)  # they close first, so that the port is free for JAX at once
    except RollCallError as error:
        for connection in callers.values():
            _send(connection, f"{error}\n")
        raise
    finally:
        for connection in callers.values():
            connection.close()


def _listen(address: str, who: str) -> socket.socket:
    port = int(address.rpartition(":")[2])
    dual = socket.has_dualstack_ipv6()
    try:
        return socket.create_server(
            ("", port), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual, backlog=1024
        )
    except OSError as error:
        raise RollCallError(
            f"distributed.coordinator_address: {who} cannot listen at {address} ({os.strerror(error.errno)}); end what "
            "holds the port, or choose another one for all ranks"
        ) from None


def _absent(address: str, who: str, ranks: list[int], timeout: float) -> RollCallError:
    names = ", ".join(map(str, ranks))
    return RollCallError(
        f"distributed.num_processes: {who} waited {timeout:g} s at {address}, but rank(s) {names} did not come; check "
        "that they run, that they have the same address and that no firewall stands between"
    )


def _call(address: str, who: str, line: str, timeout: float) -> None:
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + timeout
    problem = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=left) as connection:
                _send(connection, line)
                answer = _read_line(connection, timeout + _ANSWER_GRACE)
        except OSError as error:
            problem = error.strerror or str(error)
        else:
            if answer == _GO:
                return
            if answer.startswith("distributed."):
                raise RollCallError(f"{who} was told: {answer.strip()}")
            problem = "what listens there is not rank 0 of this run"
        time.sleep(_RETRY_EVERY)
    raise RollCallError(
        f"distributed.coordinator_address: {who} did not reach rank 0 at {address} within {timeout:g} s ({problem}); "
        "check that rank 0 runs, that the address is that of its host and that no firewall stands between"
    )


def _send(connection: socket.socket, text: str) -> None:
    try:
        connection.sendall(text.encode())
    except OSError:
        pass  # who has gone will be missed elsewhere


def _read_line(connection: socket.socket, timeout: float) -> str:
    """The line that comes within the timeout; what came of it if the other side closes or is too slow."""
    connection.settimeout(timeout)
    received = b""
    try:
        while not received.endswith(b"\n") and len(received) < 4096 and (more := connection.recv(4096)):
            received += more
    except OSError:
        pass
    return received.decode("utf-8", errors="replace")
