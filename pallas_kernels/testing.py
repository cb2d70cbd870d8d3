"""Comparing an implementation with its reference: the tolerance table, and the assertion that uses it."""

import numpy as np

from pallas_kernels.tokens import PADDING_SEGMENT_ID, Tokens

# By dtype of the inputs: the error's root mean square over the reference's, and its maximum over the reference's
# greatest magnitude. An implementation multiplies and stores in the input dtype and accumulates in float32, the
# reference does everything in float32; the table is that difference, measured, with a factor of about 3.
TOLERANCE = {
    "float32": (1e-6, 4e-6),
    "bfloat16": (1e-2, 2e-2),
    "float16": (1.5e-3, 3e-3),
}


def assert_close(name: str, got, want, dtype: str) -> None:
    """Asserts that `got` agrees with the float32 reference `want` within the table's tolerance for `dtype`.

    Where `want` is infinite `got` must be the same infinity; nan never passes.
    """
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"{name}: shape {got.shape}, wanted {want.shape}"
    finite = np.isfinite(want)
    np.testing.assert_array_equal(got[~finite], want[~finite], err_msg=f"{name}: where the reference is infinite")
    error, want = got[finite] - want[finite], want[finite]
    if not want.size:
        return
    assert np.isfinite(error).all(), f"{name}: {np.size(error) - np.isfinite(error).sum()} values are not finite"
    rms_tolerance, max_tolerance = TOLERANCE[dtype]
    rms, magnitude = np.sqrt(np.mean(want**2)), np.max(np.abs(want))
    rms_error, max_error = np.sqrt(np.mean(error**2)), np.max(np.abs(error))
    assert rms_error <= rms_tolerance * rms, f"{name}: rms error {rms_error:.3g}, wanted <= {rms_tolerance} x {rms:.3g}"
    assert max_error <= max_tolerance * magnitude, (
        f"{name}: max error {max_error:.3g}, wanted <= {max_tolerance} x {magnitude:.3g}"
    )


def packed_tokens(rows: tuple[tuple[int, ...], ...], length: int) -> Tokens:
    """Tokens of self-attention over rows of packed documents, given each row's document lengths.

    Positions restart in every document; what a row does not fill is padding.
    """
    positions = np.zeros((len(rows), length), np.int32)
    segment_ids = np.full((len(rows), length), PADDING_SEGMENT_ID, np.int32)
    for row, lengths in enumerate(rows):
        if sum(lengths) > length:
            raise ValueError(f"packed_tokens: documents {lengths} hold {sum(lengths)} tokens, wanted <= {length}")
        start = 0
        for segment, document_length in enumerate(lengths):
            positions[row, start : start + document_length] = np.arange(document_length)
            segment_ids[row, start : start + document_length] = segment
            start += document_length
    return Tokens.self_attention(positions, segment_ids)
