"""What Mosaic TPU kernels share: the generation, and numbers a row of a tile against numbers a column."""

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import current_platform

LANES = 128
"""Numbers side by side in a vector register, of which there are 8 rows of 32 bits."""

_GENERATIONS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
    "TPU7": "tpu7x",
}


# Of a core: what the compiler's target description says (`pltpu.get_tpu_info_for_chip`), in MiB.
_VMEM_MIB = {"v5e": 128, "v5p": 64, "v6e": 128, "tpu7x": 64}


def vmem_bytes() -> int:
    """What a kernel may take of the vector memory of the TPU at hand, or of the smallest where that is not known: three
    quarters, since XLA keeps other arrays there too."""
    return _VMEM_MIB.get(generation() or "", min(_VMEM_MIB.values())) * 2**20 * 3 // 4


def generation() -> str | None:
    """That of the TPU that a program is being traced for, as `_GENERATIONS` names it; None for others, and for a CPU
    that interprets a kernel.

    Read from the mesh in scope first, as `dispatch.current_platform` does.
    """
    device = _device()
    return None if device is None else _GENERATIONS.get(device.device_kind)


def num_cores() -> int:
    """Cores that share a kernel on the TPU at hand: those that JAX takes for one device. 1 for others.

    Read as `generation` is.
    """
    return 1 if generation() is None else _device().num_cores


def _device() -> jax.Device | jax.sharding.AbstractDevice | None:
    """That which a program is being traced for, where it is a TPU."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return device
    return jax.devices()[0] if current_platform() == "tpu" else None


def column(row: jax.Array) -> jax.Array:
    """A number for each lane, [1, L] with L a multiple of 128, as one for each sublane, the same in all of its 128
    lanes: [L, 128]."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def lanes(x: jax.Array, num: int) -> jax.Array:
    """[L, 128], whose lanes are equal, with `num` lanes."""
    return jnp.concatenate([x] * -(-num // LANES), axis=1)[:, :num]


def dot(a: jax.Array, b: jax.Array, contracted: tuple[int, int]) -> jax.Array:
    """A product over one dim of each, in float32, of float32 by all of its bits."""
    dims = (((contracted[0],), (contracted[1],)), ((), ()))
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)
