"""What is read of what libtpu writes; compiling itself takes minutes, and is the command's."""

from benchmarks.splash_tpu import Found, bundles_of, table


def test_bundles_of_attention_kernels_alone(tmp_path):
    for name, number in {
        "17-blockwise_attention_backward_dq.2-71-schedule-analysis_final_bundles.txt": 7,
        "18-splash_mha_fwd_residuals.1.1-71-schedule-analysis_final_bundles.txt": 8,
        "19-TLP-72-schedule-analysis_final_bundles.txt": 9,
        "20-blockwise_attention_backward_dq.2-60-schedule-analysis_packed-bundles-post-ra.txt": 10,
    }.items():
        (tmp_path / name).write_text(f"Schedule analysis:\n\ttotal scheduled bundles:    {number}\n")
    assert bundles_of(tmp_path) == {"blockwise_attention_backward_dq": 7, "splash_mha_fwd_residuals": 8}


def test_a_table_of_what_fits_and_what_does_not():
    found = {
        ("v5e", 8192, "ours"): Found(3 * 2**20, 2**31, {"kernel": 1234}),
        ("v5e", 8192, "splash"): "RESOURCE_EXHAUSTED: 17 GiB",
    }
    *_, ours, splash = table(found).splitlines()
    assert ours == "| v5e | 8,192 | ours | 3 | 2,048 | `kernel` 1,234 |"
    assert splash == "| v5e | 8,192 | splash | RESOURCE_EXHAUSTED: 17 GiB |  |  |"
