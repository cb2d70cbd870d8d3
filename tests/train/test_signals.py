import os
import signal

from train.signals import StopSignals


def test_the_first_signal_is_noted_and_the_second_would_end_the_process(capfd):
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as signals:
        assert signals.received is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == "SIGTERM"
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) is not signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is before
    assert "SIGTERM: finishing this step, then saving" in capfd.readouterr().err
