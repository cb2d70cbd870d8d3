"""Ranks as threads of this process."""

import socket
import threading
import time

import pytest

from train.roll_call import RollCallError, roll_call


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def address():
    return f"127.0.0.1:{free_port()}"


def call_all(address, ranks, *, num_processes, timeout):
    """What each of these ranks was told, None for the start."""
    answers = {}

    def call(rank):
        try:
            roll_call(address, num_processes=num_processes, process_id=rank, timeout=timeout)
            answers[rank] = None
        except RollCallError as error:
            answers[rank] = str(error)

    threads = [threading.Thread(target=call, args=[rank]) for rank in ranks]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join()
    return answers


@pytest.mark.parametrize("ranks", [(0, 1, 2), (2, 1, 0)])
def test_all_start_whatever_their_order_and_leave_the_port_free(address, ranks):
    assert call_all(address, ranks, num_processes=3, timeout=10) == dict.fromkeys(ranks)
    socket.create_server(("127.0.0.1", int(address.split(":")[1]))).close()


def test_a_missing_rank_is_named_to_all(address):
    started = time.monotonic()
    answers = call_all(address, (0, 2), num_processes=4, timeout=1)
    assert time.monotonic() - started < 5
    message = (
        f"rank 0 of 4 on {socket.gethostname()} waited 1 s at {address}, but rank(s) 1, 3 did not come; check that"
    )
    assert f"distributed.num_processes: {message}" in answers[0]
    assert message in answers[2] and answers[2].startswith(f"rank 2 of 4 on {socket.gethostname()} was told: ")


def test_a_missing_coordinator_is_named(address):
    (message,) = call_all(address, (1,), num_processes=2, timeout=1).values()
    assert (
        f"distributed.coordinator_address: rank 1 of 2 on {socket.gethostname()} did not reach rank 0 at {address} "
        "within 1 s (Connection refused); check that rank 0 runs"
    ) in message


def test_a_host_that_has_no_name(monkeypatch):
    def unknown(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "create_connection", unknown)
    (message,) = call_all("nowhere:1", (1,), num_processes=2, timeout=1).values()
    assert "did not reach rank 0 at nowhere:1 within 1 s (Name or service not known)" in message


def test_a_port_that_is_taken(address):
    with socket.create_server(("", int(address.split(":")[1]))):
        (message,) = call_all(address, (0,), num_processes=2, timeout=5).values()
    assert (
        f"distributed.coordinator_address: rank 0 of 2 on {socket.gethostname()} cannot listen at {address} "
        "(Address already in use); end what holds the port, or choose another one for all ranks"
    ) in message


def test_somebody_else_who_calls_or_listens_is_not_taken_for_a_rank(address):
    port = int(address.split(":")[1])

    def stranger():
        time.sleep(0.2)
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(b"GET / HTTP/1.0\r\n\r\n")

    thread = threading.Thread(target=stranger)
    thread.start()
    assert "rank(s) 1 did not come" in call_all(address, (0,), num_processes=2, timeout=1)[0]
    thread.join()

    with socket.create_server(("127.0.0.1", port)) as server:
        server.settimeout(5)

        def listener():
            connection, _ = server.accept()
            connection.sendall(b"220 mail\n")
            connection.close()
            server.close()

        thread = threading.Thread(target=listener)
        thread.start()
        assert "did not reach rank 0" in call_all(address, (1,), num_processes=2, timeout=1)[1]
        thread.join()
