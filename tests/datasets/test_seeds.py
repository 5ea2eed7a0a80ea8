"""Seeds as ranges against the plain list of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amed_engine.datasets.seeds import Seeds
from amed_engine.errors import ConfigError


@given(st.lists(st.integers(0, 60), min_size=1, unique=True), st.integers(-70, 70), st.integers(-70, 70))
def test_they_are_the_list_that_was_given(numbers, start, stop):
    seeds = Seeds.of(numbers)
    assert len(seeds) == len(numbers)
    assert [seeds[i] for i in range(len(seeds))] == list(seeds) == numbers
    assert seeds[start:stop] == numbers[start:stop]
    assert seeds[::3] == numbers[::3]
    assert seeds[::-1] == numbers[::-1]
    assert Seeds.of(str(seeds)) == seeds


def test_billions_cost_nothing():
    seeds = Seeds.of("0-4294967295")
    assert len(seeds) == 2**32
    assert seeds[4_000_000_000:4_000_000_003] == [4_000_000_000, 4_000_000_001, 4_000_000_002]
    assert str(Seeds.of(range(10_000_000))) == "0-9999999"
    assert seeds[-1] == 2**32 - 1


@pytest.mark.parametrize(
    ("seeds", "says"),
    [
        ("1,2,2", "named twice: 2;"),
        ("0-9,5-7,20", "named twice: 5, 6, 7;"),
        ("0-99,0-99", "named twice: 0, 1, 2, 3, 4 and 95 more"),
        ([3, 1, 3], "named twice: 3;"),
        ("", "neither a number nor a range"),
        ("5-1", "backwards"),
        ("0-4294967296", "outside"),
        ([], "no seeds"),
        ([-1], "outside"),
        ([0.5], "integers"),
        (range(0), "no seeds"),
        (range(-1, 3), "outside"),
        (7, "seeds must be integers, or text"),
        (None, "seeds must be integers, or text"),
    ],
)
def test_what_is_refused(seeds, says):
    with pytest.raises(ConfigError, match=says):
        Seeds.of(seeds)
