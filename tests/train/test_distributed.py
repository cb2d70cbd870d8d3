import jax
import pytest

from train.distributed import DeviceError, DistributedConfig, initialize


def test_a_started_process_with_enough_cpu_devices_will_do():
    devices = jax.devices()
    assert initialize(DistributedConfig(virtual_cpu_devices=2)) == devices[:2]
    assert initialize(DistributedConfig()) == devices
    assert len(jax.devices()) == 8


def test_a_started_process_with_too_few_devices_is_refused():
    jax.devices()
    with pytest.raises(DeviceError, match=r"virtual_cpu_devices: got 9, but JAX has already started on 8 cpu device"):
        initialize(DistributedConfig(virtual_cpu_devices=9))


def test_refused_settings():
    with pytest.raises(ValueError, match="virtual_cpu_devices: got 0, wanted 1 or more"):
        DistributedConfig(virtual_cpu_devices=0)


def test_the_compilation_cache_is_off_unless_named(tmp_path):
    assert jax.config.jax_compilation_cache_dir is None
    try:
        initialize(DistributedConfig(compilation_cache_dir=str(tmp_path)))
        assert jax.config.jax_compilation_cache_dir == str(tmp_path)
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
