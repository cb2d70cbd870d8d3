"""Which devices a run uses; must run before any other JAX operation."""

from dataclasses import dataclass

import jax


class DeviceError(RuntimeError):
    """The devices that the config asks for cannot be had, on one line, with the remedy."""


@dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """Devices and processes of a run."""

    virtual_cpu_devices: int | None = None
    """Run on this many virtual CPU devices in total. Default: the devices that the machine has."""
    compilation_cache_dir: str | None = None
    """Folder in which JAX keeps compiled programs for the next start. Default: no such cache."""

    def __post_init__(self):
        if self.virtual_cpu_devices is not None and self.virtual_cpu_devices < 1:
            raise ValueError(
                f"virtual_cpu_devices: got {self.virtual_cpu_devices}, wanted 1 or more, or null for the machine's "
                "devices"
            )


def initialize(config: DistributedConfig) -> list[jax.Device]:
    """Applies the platform settings and returns the devices of the run.

    Raises: DeviceError when JAX has already started on other devices than the config asks for.
    """
    if config.compilation_cache_dir is not None:
        jax.config.update("jax_compilation_cache_dir", config.compilation_cache_dir)
    wanted = config.virtual_cpu_devices
    if wanted is None:
        return jax.devices()
    try:
        jax.config.update("jax_num_cpu_devices", wanted)
        jax.config.update("jax_platforms", "cpu")
    except RuntimeError:
        # JAX has started already. That is fine where it started on enough CPU devices, and an error below
        # otherwise.
        pass
    devices = jax.devices()
    if devices[0].platform != "cpu" or len(devices) < wanted:
        raise DeviceError(
            f"distributed.virtual_cpu_devices: got {wanted}, but JAX has already started on {len(devices)} "
            f"{devices[0].platform} device(s); set it before the first JAX operation of the process"
        )
    return devices[:wanted]
