"""FLOPs and bytes of instructions, fused ones too."""

from train.planning import hlo
from train.planning.work import Work


def work_of(instructions, *computations):
    text = "\n".join(["HloModule m, is_scheduled=true", *computations, "ENTRY %main (p: f32[1]) -> f32[1] {"])
    module = hlo.parse(text + "\n" + instructions + "\n}")
    last = module.entry.instructions[-1]
    work = Work(module)
    return work.flops(last, module.entry), work.main_memory_bytes(last, module.entry)


def test_a_dot_with_a_batch_dim():
    flops, num_bytes = work_of(
        "  %a = bf16[4,8,16]{2,1,0} parameter(0)\n  %b = bf16[4,16,32]{2,1,0} parameter(1)\n"
        "  %d = f32[4,8,32]{2,1,0} dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, "
        "rhs_contracting_dims={1}"
    )
    assert flops == 2 * 4 * 8 * 16 * 32
    assert num_bytes == 2 * 4 * 8 * 16 + 2 * 4 * 16 * 32 + 4 * 4 * 8 * 32


def test_a_matmul_that_a_tpu_writes_as_a_convolution():
    flops, _ = work_of(
        "  %a = bf16[64,16]{1,0} parameter(0)\n  %b = bf16[16,32]{1,0} parameter(1)\n"
        "  %c = f32[64,32]{1,0} convolution(%a, %b), dim_labels=bf_io->bf"
    )
    assert flops == 2 * 64 * 16 * 32


def test_a_batch_dim_as_a_window_counts_only_the_places_that_meet_data():
    # [3, 64, 16] x [3, 16, 32]: the batch is a window of 3 that fits its 3 places once each, all else is padding.
    flops, _ = work_of(
        "  %a = bf16[64,16,3]{2,1,0} parameter(0)\n  %b = bf16[16,32,3]{2,1,0} parameter(1)\n"
        "  %c = f32[64,32,3]{2,1,0} convolution(%a, %b), window={size=3 stride=2 pad=2_2 lhs_dilate=3}, "
        "dim_labels=bf0_io0->bf0"
    )
    assert flops == 2 * 64 * 16 * 32 * 3


def test_a_contraction_over_a_window():
    flops, _ = work_of(
        "  %a = bf16[64,8,16]{2,1,0} parameter(0)\n  %b = bf16[8,16,32]{2,1,0} parameter(1)\n"
        "  %c = f32[64,1,32]{2,1,0} convolution(%a, %b), window={size=8}, dim_labels=b0f_0io->b0f"
    )
    assert flops == 2 * 64 * 8 * 16 * 32


def test_a_call_of_cublas():
    flops, _ = work_of(
        "  %a = bf16[64,16]{1,0} parameter(0)\n  %b = bf16[16,32]{1,0} parameter(1)\n"
        '  %c = (f32[64,32]{1,0}, s8[4096]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", backend_config='
        '{"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}'
    )
    assert flops == 2 * 64 * 16 * 32


def test_a_fusion_reads_of_a_stack_only_the_slice_that_it_takes():
    fused = (
        "%fused (p0: f32[100,1000], p1: s32[]) -> f32[1,1000] {\n"
        "  %p0 = f32[100,1000]{1,0} parameter(0)\n  %p1 = s32[] parameter(1)\n"
        "  ROOT %s = f32[1,1000]{1,0} dynamic-slice(%p0, %p1, %p1), dynamic_slice_sizes={1,1000}\n}"
    )
    _, num_bytes = work_of(
        "  %stack = f32[100,1000]{1,0} parameter(0)\n  %i = s32[] parameter(1)\n"
        "  %f = f32[1,1000]{1,0} fusion(%stack, %i), kind=kLoop, calls=%fused",
        fused,
    )
    assert num_bytes == 2 * 4000 + 4


def test_a_fusion_that_updates_in_place_touches_only_the_update():
    fused = (
        "%fused (p0: f32[100,1000], p1: f32[1,1000], p2: s32[]) -> f32[100,1000] {\n"
        "  %p0 = f32[100,1000]{1,0} parameter(0)\n  %p1 = f32[1,1000]{1,0} parameter(1)\n  %p2 = s32[] parameter(2)\n"
        "  ROOT %u = f32[100,1000]{1,0} dynamic-update-slice(%p0, %p1, %p2, %p2)\n}"
    )
    _, num_bytes = work_of(
        "  %stack = f32[100,1000]{1,0} parameter(0)\n  %v = f32[1,1000]{1,0} parameter(1)\n"
        "  %i = s32[] parameter(2)\n  %f = f32[100,1000]{1,0} fusion(%stack, %v, %i), kind=kLoop, calls=%fused",
        fused,
    )
    assert num_bytes == 3 * 4000 + 4


def test_vector_memory_of_a_tpu_does_not_count():
    _, num_bytes = work_of("  %a = f32[1000]{0:T(1024)S(1)} parameter(0)\n  %c = f32[1000]{0:T(1024)} copy(%a)")
    assert num_bytes == 4 * 1024
