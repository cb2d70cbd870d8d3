"""`python -m train.calibrate` on the virtual devices of the tests."""

import dataclasses

import jax
import numpy as np
import pytest

from train import calibrate
from train.devices import device_table


@pytest.fixture
def small(monkeypatch):
    sizes = dict(matmul=32, copied=2**12, tokens=64, heads=1, head_dim=128, sent=(2**8, 2**16))
    monkeypatch.setattr(calibrate, "_CPU", dataclasses.replace(calibrate._CPU, **sizes))


def test_the_table_it_writes_is_read(small, tmp_path, capsys):
    path = tmp_path / "speeds.yaml"
    assert calibrate.main(["--out", str(path)]) == 0
    name, spec = device_table(str(path)).of_kind(jax.devices()[0].device_kind)
    assert name == "cpu" and spec.has_speeds and list(spec.attention) == ["xla"]
    speeds = spec.matmul_tflops, spec.memory_gb_per_s, spec.link_gb_per_s, *dataclasses.astuple(spec.attention["xla"])
    assert all(speed > 0 for speed in speeds)
    assert "links between 8 devices of a host" in capsys.readouterr().out


def test_a_number_of_devices_that_cannot_be(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        calibrate.main(["--out", str(tmp_path / "speeds.yaml"), "--virtual-cpu-devices", "0"])
    assert "--virtual-cpu-devices: got 0, wanted 1 or more" in capsys.readouterr().err


def test_a_link_is_a_latency_and_a_bandwidth(monkeypatch):
    """Of messages that take 5 us and 2 GB/s, whatever was sent."""

    def seconds(function, x, **_):
        return 5e-6 + x.nbytes / x.sharding.num_devices / 2e9

    monkeypatch.setattr(calibrate, "_difference", seconds)
    grid = np.array(jax.devices()).reshape(2, 4)
    for axis in ("inner", "outer"):
        np.testing.assert_allclose(calibrate._link(grid, axis, calibrate._CPU), (5e-6, 2e9), rtol=1e-6)
