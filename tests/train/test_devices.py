import functools

import pytest

from train.devices import device_table, model_flops_utilization


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU v5", 459e12),
        ("TPU7x", 1153.5e12),  # JAX's devices are the cores, of which a chip has two
        ("cpu", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peak_flops(kind, peak):
    found = device_table().of_kind(kind)
    assert (found and found[1].peak_flops) == peak


def test_model_flops_utilization():
    # 1e15 forward FLOPs are 3e15 with the backward pass: 6 s on two devices of 989e12 use a quarter of
    # 1.1868e16.
    of = functools.partial(model_flops_utilization, 1e15, 6.0, num_devices=2, table=device_table())
    assert of(device_kind="NVIDIA H100 80GB HBM3") == pytest.approx(3e15 / 6.0 / (2 * 989e12))
    assert of(device_kind="cpu") is None


def test_narrow_heads_have_speeds_of_their_own_where_there_are_any():
    h100 = device_table().devices["h100"]
    speeds = h100.attention["mosaic_gpu"]
    for phase in ("forward", "backward"):
        wide, narrow = getattr(speeds, phase), getattr(speeds, f"{phase}_narrow")
        assert [h100.attention_flops("mosaic_gpu", phase, dim) for dim in (32, 64, 65, 128)] == [
            1e12 * speed for speed in (narrow, narrow, wide, wide)
        ]
        assert h100.attention_flops("cudnn", phase, 64) == h100.attention_flops("cudnn", phase, 128)
