"""Peak speeds and model FLOPs utilization."""

PEAK_BF16_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12,
}
"""Dense bfloat16 FLOP/s of one device, by a part of jax.Device.device_kind; the first match counts."""


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device, or None where the table has no entry (CPUs among them)."""
    return next((peak for name, peak in PEAK_BF16_FLOPS.items() if name in device_kind), None)


def model_flops_utilization(
    forward_flops: float, seconds: float, *, device_kind: str, num_devices: int
) -> float | None:
    """MFU = 3 x forward FLOPs / seconds / (devices x peak); None where the peak is unknown.

    The backward pass counts twice the forward one; recomputation (remat) counts nothing.
    Reference: Chowdhery et al., PaLM, arXiv:2204.02311, Appendix B.
    """
    peak = peak_flops(device_kind)
    return None if peak is None else 3 * forward_flops / seconds / (num_devices * peak)
