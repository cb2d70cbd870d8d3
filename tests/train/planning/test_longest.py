import pytest

from train.planning.longest import length_unit, longest


@pytest.mark.parametrize("start", [1024, 65_536, 10_000_000])
@pytest.mark.parametrize(("fixed", "slope"), [(1e9, 1e4), (0.0, 5e5), (9e9, 100.0)])
def test_finds_the_longest_within_three_percent_in_few_trials(start, fixed, slope):
    limit, unit, tried = int(1e10), 1024, []

    def memory_at(length):
        tried.append(length)
        return int(fixed + slope * length + 1e-3 * length**1.2)

    found = longest(memory_at, limit=limit, start=start, unit=unit)
    assert found % unit == 0 and memory_at(found) <= limit
    assert memory_at(int(1.04 * found) + unit) > limit
    assert len(set(tried)) <= 14


def test_a_compiler_that_refuses_without_a_figure_is_bisected():
    assert longest(lambda n: None if n > 100_000 else 1, limit=10, start=4096, unit=1024) in range(96_000, 100_001)


def test_nothing_fits():
    assert longest(lambda n: 100, limit=10, start=4096, unit=1024) == 0


def test_no_end():
    assert longest(lambda n: 1, limit=10, start=4096, unit=1024, most=100_000) <= 100_000


def test_units_suit_the_layout_and_the_tiles():
    assert length_unit(1, 1) == 128
    assert length_unit(16, 8) == 1024
    assert length_unit(24, 8) == 3072
