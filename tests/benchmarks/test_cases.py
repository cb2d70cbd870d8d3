"""The cases: the pairs and FLOPs they count are those of their masks."""

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.cases import CASES, SMOKE, Case


@pytest.mark.parametrize("case", SMOKE, ids=lambda case: case.name)
def test_pairs_are_those_of_the_dense_mask(case):
    dense = np.asarray(case.mask.dense(case.tokens, case.length, case.length))
    assert case.pairs == dense.sum()
    H, V = case.head_dim, case.value_dim or case.head_dim
    of_a_dim = 2 * dense.sum() * case.num_heads * case.batch_size
    assert case.flops("forward") == of_a_dim * (H + V)
    # dq, dk and the logits again; dv and the gradients of probabilities.
    assert case.flops("backward") == of_a_dim * (3 * H + 2 * V)
    assert case.flops("forward+backward") == case.flops("forward") + case.flops("backward")


def test_a_window_inside_documents_counts_both():
    case = Case(batch_size=1, length=96, num_heads=1, num_kv_heads=1, head_dim=8, window=24, documents=(40, 1, 55))
    assert case.pairs == np.asarray(case.mask.dense(case.tokens, 96, 96)).sum()


def test_the_cases_are_those_that_peers_were_measured_on():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names) == 51
    assert names[0] == "causal B8 S2048 16/16 D128" and names[-1] == "dropout, causal B1 S32768 16/16 D64"
    dense = {f"causal {size} {heads} D{dim}" for size in ("B2 S8192", "B1 S32768") for heads in ("16/16", "16/4")
             for dim in (64, 128)}  # fmt: skip
    assert dense <= set(names)
    by_name = dict(zip(names, CASES, strict=True))
    # TFLOP/s times ms of published cells, within their rounding.
    for name, flops in {
        "causal B2 S8192 16/16 D128": 516e9 * 1.07,
        "full B1 S32768 16/16 D128": 620e9 * 14.2,
        "window 4096 B1 S32768 16/16 D128": 534e9 * 1.93,
        "documents 16 B1 S32768 16/16 D128": 473e9 * 0.909,
    }.items():
        assert by_name[name].flops("forward") == pytest.approx(flops, rel=0.01)


@pytest.mark.parametrize("case", [case for case in CASES if case.one_block_in], ids=lambda case: case.name)
def test_random_blocks_leave_no_query_out_and_are_as_many_as_they_say(case):
    blocks = case.mask.blocks
    assert blocks.shape == (256, 256) and blocks.any(axis=1).all()
    assert blocks.mean() == pytest.approx(1 / case.one_block_in, rel=0.03)
    assert case.pairs == blocks.sum() * 128 * 128


def test_random_blocks_are_whole_and_all_of_the_mask():
    for options in ({"causal": True, "length": 384}, {"causal": False, "length": 400}):
        with pytest.raises(ValueError, match="one_block_in: got causal=.*, wanted causal=False and a multiple of 128"):
            Case(batch_size=1, num_heads=1, num_kv_heads=1, head_dim=8, one_block_in=2, **options)


def test_inputs_are_seeded_and_of_their_dtype():
    first, again = SMOKE[0].inputs("float16"), SMOKE[0].inputs("float16")
    assert all(x.dtype == jnp.float16 for x in first)
    assert [x.shape for x in first] == [x.shape for x in SMOKE[0].shapes("float16")]
    assert all(jnp.array_equal(a, b) for a, b in zip(first, again, strict=True))


def test_document_starts_repeat_where_each_begins():
    case = SMOKE[3]
    assert case.document_starts[0, [0, 39, 40, 41, 95]].tolist() == [0, 0, 40, 41, 41]
