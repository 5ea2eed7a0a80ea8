"""Seeds: the notation, the limits, and noise that belongs to its seed alone."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from amed_engine.engine.seeds import check_seeds, draw, draw_seeds, parse_seeds
from amed_engine.errors import ConfigError

SHAPE = (3, 8, 8)
spans = st.tuples(st.integers(0, 2**32 - 200), st.integers(0, 99)).map(lambda s: (s[0], s[0] + s[1]))
spaces = st.sampled_from(["", " ", "  "])


# ---- notation


@pytest.mark.parametrize(
    ("text", "seeds"),
    [
        ("0", [0]),
        ("0-3", [0, 1, 2, 3]),
        ("1,5,9", [1, 5, 9]),
        ("0-2,8, 11-12", [0, 1, 2, 8, 11, 12]),
        (" 7 ", [7]),
        ("5-5", [5]),
        ("3,3,1", [3, 3, 1]),
        ("4294967294-4294967295", [2**32 - 2, 2**32 - 1]),
        ("007", [7]),
    ],
)
def test_edm_notation(text, seeds):
    assert parse_seeds(text) == seeds


@given(st.lists(st.tuples(spans, spaces, spaces, st.booleans()), min_size=1, max_size=6))
def test_every_list_of_numbers_and_ranges_reads_back(parts):
    text, expected = [], []
    for (first, last), before, after, single in parts:
        text.append(f"{before}{first if single else f'{first}-{last}'}{after}")
        expected.extend([first] if single else range(first, last + 1))
    assert parse_seeds(",".join(text)) == expected


@given(st.text(alphabet="019-, x", max_size=7) | st.text(max_size=6))
def test_any_text_is_read_or_refused(text):
    try:
        seeds = parse_seeds(text)
    except ConfigError:
        return
    assert seeds
    assert all(0 <= seed < 2**32 for seed in seeds)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot read seeds ''"),
        ("a", "cannot read seeds 'a': 'a' is neither a number nor a range; write e.g. 0-63"),
        ("1,,2", "'' is neither a number nor a range"),
        ("1,", "'' is neither"),
        ("-1", "'-1' is neither"),
        ("1.5", r"'1\.5' is neither"),
        ("1-2-3", "'1-2-3' is neither"),
        ("0x10", "'0x10' is neither"),
        ("9-3", "the range '9-3' runs backwards"),
        ("0-10000000", "names more than 10,000,000 seeds"),
        ("٣", "'٣' is neither"),
        ("4294967296", "seed 4294967296 is outside 0 .. 2"),
        ("9" * 5000, "neither a number nor a range"),
        ("0-" + "9" * 5000, "neither a number nor a range"),
    ],
    ids=lambda text: text[:12],
)
def test_unreadable_text_is_quoted_back(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_seeds(text)


# ---- limits


def test_both_ends_of_the_range_are_seeds():
    assert check_seeds([0, 2**32 - 1]) == [0, 2**32 - 1]


def test_numpy_and_torch_integers_are_seeds():
    seeds = check_seeds([np.int64(3), np.uint8(4), torch.tensor(5)])
    assert seeds == [3, 4, 5]
    assert all(type(seed) is int for seed in seeds)


@pytest.mark.parametrize(
    "seed", [-1, 2**32, 2**64, True, 1.0, "1", None, np.float64(1), torch.tensor(3.7), torch.tensor([3, 4])], ids=repr
)
def test_anything_else_is_no_seed(seed):
    with pytest.raises(ConfigError, match=r"outside 0 \.\. 2|seeds must be integers, got"):
        check_seeds([0, seed])


# ---- noise and labels


def test_noise_is_torchs_normal_stream_of_the_seed_and_the_label_comes_after():
    noise, labels = draw([7], SHAPE, label_dim=10)
    generator = torch.Generator().manual_seed(7)
    assert torch.equal(noise[0], torch.randn(SHAPE, generator=generator))
    assert labels.tolist() == [torch.randint(10, (), generator=generator).item()]


def test_noise_of_seed_0_has_not_changed():
    """A seed is a promise across releases. Recorded with torch 2.13 on x86-64."""
    noise, _ = draw([0], SHAPE, label_dim=0)
    torch.testing.assert_close(
        noise[0, 0, 0, :4], torch.tensor([-1.1258, -1.1524, -0.2506, -0.4339]), rtol=0, atol=1e-4
    )


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=7), st.randoms(use_true_random=False))
def test_noise_and_label_belong_to_the_seed_in_any_batch_and_order(seeds, rng):
    order = list(range(len(seeds)))
    rng.shuffle(order)
    noise, labels = draw(seeds, SHAPE, label_dim=10)
    shuffled, shuffled_labels = draw([seeds[i] for i in order], SHAPE, label_dim=10)
    assert torch.equal(shuffled, noise[order])
    assert torch.equal(shuffled_labels, labels[order])
    for i, seed in enumerate(seeds):
        alone, label = draw([seed], SHAPE, label_dim=10)
        assert torch.equal(alone[0], noise[i])
        assert label.item() == labels[i]


def test_a_label_does_not_change_the_noise():
    assert torch.equal(draw([5], SHAPE, 0)[0], draw([5], SHAPE, 10)[0])


def test_neighbouring_seeds_are_independent():
    noise, labels = draw(range(4096), (4,), label_dim=10)
    assert abs(noise.mean()) < 0.03
    assert abs(noise.std() - 1) < 0.03
    correlation = (noise[1:] * noise[:-1]).mean()
    assert abs(correlation) < 0.03
    counts = labels.bincount(minlength=10)
    assert len(counts) == 10
    assert counts.min() > 300


def test_large_seeds_do_not_repeat_small_ones():
    """torch's CPU generator looks at the low 32 bits only, hence the limit."""
    noise, _ = draw([0, 1, 2**31, 2**31 + 1, 2**32 - 1], SHAPE, 0)
    assert len({row.numpy().tobytes() for row in noise}) == 5


def test_drawing_leaves_every_global_generator_alone():
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    draw([1, 2], SHAPE, 10)
    draw_seeds(3, None)
    draw_seeds(3, torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
    assert random.getstate() == before[2]


def test_drawn_seeds_follow_the_generator():
    first = draw_seeds(20, torch.Generator().manual_seed(3))
    assert first == draw_seeds(20, torch.Generator().manual_seed(3))
    assert first != draw_seeds(20, torch.Generator().manual_seed(4))
    assert max(first) > 2**31  # the whole range is used
    assert check_seeds(first) == first


def test_without_a_generator_seeds_are_fresh():
    assert draw_seeds(4, None) != draw_seeds(4, None)


@pytest.mark.parametrize("generator", [0, "seed", np.random.default_rng(0)], ids=["int", "str", "numpy"])
def test_a_generator_of_another_kind_is_refused(generator):
    with pytest.raises(ConfigError, match=r"generator must be a torch\.Generator, got"):
        draw_seeds(2, generator)
