"""From seeds to noise and labels: one generator per seed, so that a sample never depends on its batch.

Generators live on the CPU whatever the sampling device, so a seed gives the same noise everywhere; noise is drawn first,
then the label, then what noise a solver adds on its way. The global generators are not touched.
"""

from __future__ import annotations

import operator
import re
import reprlib
import secrets
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from amed_engine.errors import ConfigError

LIMIT = 1 << 32


def check_seeds(seeds: Sequence[int]) -> list[int]:
    """Seeds as a list; each an integer in 0 .. 2^32 - 1 (beyond, torch's CPU generator repeats itself)."""
    checked = [_integer(seed) for seed in seeds]
    for seed in checked:
        if not 0 <= seed < LIMIT:
            raise ConfigError(
                f"seed {seed} is outside 0 .. 2^32 - 1, where torch's generator would repeat another seed's noise"
            )
    if not checked:
        raise ConfigError("got no seeds: the batch is empty; ask for at least one sample")
    return checked


def _integer(seed: Any) -> int:
    try:
        if not isinstance(seed, bool):
            return operator.index(seed)
    except TypeError:
        pass
    raise ConfigError(f"seeds must be integers, got {reprlib.repr(seed)} of type {type(seed).__name__}")


def parse_seeds(text: str, what: str = "seeds") -> list[int]:
    """EDM's notation: "0-63", "1,5,9" or "0-3,8". Raises ConfigError, which says what the numbers are."""
    seeds: list[int] = []
    for numbers in parse_ranges(text, what):
        if numbers[-1] - numbers[0] >= 10_000_000:
            raise ConfigError(
                f"cannot read {what} {text!r}: '{numbers[0]}-{numbers[-1]}' names more than 10,000,000 {what}"
            )
        seeds.extend(numbers)
    return check_seeds(seeds)


def parse_ranges(text: str, what: str = "seeds") -> list[range]:
    """The same notation, a range for each part; nothing is expanded, so that billions cost nothing. Raises ConfigError."""
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,20})(?:-([0-9]{1,20}))?\s*", part)
        if not match:
            raise ConfigError(
                f"cannot read {what} {text!r}: {part!r} is neither a number nor a range; write e.g. 0-63 or 1,5,9"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ConfigError(f"cannot read {what} {text!r}: the range {part.strip()!r} runs backwards")
        found.append(range(first, last + 1))
    return found


def check_distinct(seeds: Sequence[int]) -> None:
    """Raise ConfigError for seeds that are named twice."""
    if len(set(seeds)) < len(seeds):
        twice = sorted(seed for seed, times in Counter(seeds).items() if times > 1)
        more = f" and {len(twice) - 5} more" if len(twice) > 5 else ""
        raise ConfigError(
            f"seeds are named twice: {', '.join(map(str, twice[:5]))}{more}; a sample is its seed, so name each one once"
        )


def draw_seeds(count: int, generator: torch.Generator | None) -> list[int]:
    """`count` seeds from a generator, or from the operating system where there is none."""
    if count < 1:
        raise ConfigError(f"batch must be at least 1 sample, got {count}")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ConfigError(f"generator must be a torch.Generator, got {type(generator).__name__}; for seeds pass a list")
    if generator is None:
        return [secrets.randbits(32) for _ in range(count)]
    return torch.randint(LIMIT, (count,), generator=generator, device=generator.device).tolist()


def draw(seeds: Sequence[int], shape: tuple[int, ...], label_dim: int) -> tuple[Tensor, Tensor | None]:
    """Unit normal noise (B, *shape) float32 and, for a conditional model, labels (B,) int64, on the CPU."""
    noise, labels, _ = draw_all(seeds, shape, label_dim, 0)
    return noise, labels


def draw_all(
    seeds: Sequence[int], shape: tuple[int, ...], label_dim: int, noises: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The same as `draw`, and as many noises more for each sample, (B, noises, *shape)."""
    # Said in full: the caller's default dtype would change the numbers, a default device refuse the generators.
    noise = torch.empty(len(seeds), *shape, dtype=torch.float32, device="cpu")
    labels = torch.zeros(len(seeds), dtype=torch.int64, device="cpu")
    more = torch.empty(len(seeds), noises, *shape, dtype=torch.float32, device="cpu")
    for row, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        noise[row].normal_(generator=generator)
        if label_dim:
            labels[row].random_(label_dim, generator=generator)
        for each in more[row]:  # one by one: the first of many are the first of few
            each.normal_(generator=generator)
    return noise, labels if label_dim else None, more
