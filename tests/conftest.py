"""Every test runs on eight virtual CPU devices, with strict dtype promotion and checked shape annotations."""

import jax
from jaxtyping import install_import_hook

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")

install_import_hook(["pallas_kernels", "longctx"], "beartype.beartype")
