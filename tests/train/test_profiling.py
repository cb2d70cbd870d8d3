import os
import signal

import jax
import jax.numpy as jnp
import pytest

from train.profiling import ProfileConfig, Profiler


@pytest.fixture
def traced(monkeypatch):
    """The folders that traces were started in; None where one was stopped."""
    events = []
    monkeypatch.setattr(jax.profiler, "start_trace", events.append)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: events.append(None))
    return events


def take(profiler, steps):
    for step in steps:
        profiler.before(step)
        profiler.after(step, jnp.zeros(()))


def test_a_range_of_steps_and_what_a_signal_asks_for(traced, tmp_path, capfd):
    notes = []
    before = signal.getsignal(signal.SIGUSR1)
    with Profiler(tmp_path, ProfileConfig(start=3, steps=2), notes.append) as profiler:
        take(profiler, range(1, 6))
        assert traced == [tmp_path / "profile" / "step_3", None]
        os.kill(os.getpid(), signal.SIGUSR1)
        take(profiler, range(6, 7))
        assert traced[2:] == [tmp_path / "profile" / "step_6"]
    assert traced[3:] == [None]  # the run ended first
    assert notes == [f"step 4: profiled 2 steps into {tmp_path / 'profile' / 'step_3'}"]
    assert signal.getsignal(signal.SIGUSR1) is before
    assert "SIGUSR1: profiling the next steps" in capfd.readouterr().err


@pytest.mark.slow
def test_a_profile_is_written(tmp_path):
    with Profiler(tmp_path, ProfileConfig(start=1, steps=1), print) as profiler:
        take(profiler, [1])
    assert list((tmp_path / "profile" / "step_1").glob("plugins/profile/*/*.xplane.pb"))


@pytest.mark.parametrize("name", ["start", "steps"])
def test_refused_settings(name):
    with pytest.raises(ValueError, match=f"{name}: got 0, wanted"):
        ProfileConfig(**{name: 0})
