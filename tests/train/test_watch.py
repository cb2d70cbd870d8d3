import numpy as np
import pytest

from longctx import MeshConfig, ModelConfig, forward_flops, make_mesh
from longctx.mixers.attention import AttentionConfig
from train.devices import DeviceSpec, DeviceTable, device_table
from train.watch import Watch


class Clock:
    """Stands for time.monotonic."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("train.watch.time.monotonic", clock)
    return clock


@pytest.fixture
def watch(clock):
    import jax

    mixers = {"global": AttentionConfig(num_heads=2)}
    model = ModelConfig(vocab_size=8, dim=8, num_layers=1, mlp_dim=8, mixers=mixers, pattern=("global",))
    return Watch(make_mesh(MeshConfig(), jax.devices()[:1]), model, device_table())


def steps(watch, clock, durations, reading=0.0):
    for duration in durations:
        with watch.reading():
            clock.now += reading
        clock.now += duration - reading
        watch.step_ended(np.array([5, 3]))


def test_the_first_step_is_not_timed(watch, clock):
    steps(watch, clock, [50.0])
    assert set(watch.figures()) == {"host_memory_gib"}
    assert watch.seconds_a_step() is None and watch.host_seconds == 0.0


def test_figures_of_time(watch, clock):
    watch.restart()
    steps(watch, clock, [1.0] * 19 + [11.0], reading=0.25)
    figures = watch.figures()
    assert figures["step_seconds_p50"] == pytest.approx(1.0)
    assert figures["step_seconds_p95"] == pytest.approx(1.5)
    assert figures["step_seconds_max"] == pytest.approx(11.0)
    assert figures["data_wait_share"] == pytest.approx(20 * 0.25 / 30.0)
    assert figures["tokens_per_second"] == pytest.approx(20 * 8 / 30.0)
    assert figures["host_memory_gib"] > 0.01
    assert watch.host_seconds == pytest.approx(0.25)


def test_mfu_is_of_the_table_at_hand(watch, clock):
    """A table of the config's may know devices that ours does not."""
    watch.restart()
    steps(watch, clock, [2.0])
    assert "mfu" not in watch.figures()
    spec = DeviceSpec(device_kinds=("cpu",), peak_tflops=1e-9)
    known = Watch(watch._mesh, watch._model, DeviceTable(devices={"ours": spec}))
    known.restart()
    steps(known, clock, [2.0])
    flops = forward_flops(watch._model, np.array([5, 3]))
    assert known.figures()["mfu"] == pytest.approx(3 * flops / (2.0 * 1e3))


def test_a_pause_counts_for_nothing_and_a_record_for_what_is_before_it(watch, clock):
    watch.restart()
    steps(watch, clock, [1.0, 1.0])
    watch.recorded()
    clock.now += 1000.0
    watch.restart()
    steps(watch, clock, [2.0])
    assert watch.figures()["step_seconds_max"] == pytest.approx(2.0)
    assert watch.figures()["tokens_per_second"] == pytest.approx(8 / 2.0)


def test_a_slow_process_is_named_once(watch, clock):
    watch._host_names = {0: "node7"}
    watch.restart()
    steps(watch, clock, [1.0])
    figures, line = watch.slowest_process(0, 0.5, 0.1)
    assert figures == {"slowest_process": 0, "slowest_process_seconds": 0.5}
    assert line.startswith("rank 0 on node7 takes 0.500 s a step to read its rows, 0.100 s is the mean of the devices")
    assert watch.slowest_process(0, 0.5, 0.1)[1] is None
    assert watch.slowest_process(0, 0.05, 0.01)[1] is None  # little of a step
    assert watch.slowest_process(0, 0.5, 0.4)[1] is None  # all are slow
