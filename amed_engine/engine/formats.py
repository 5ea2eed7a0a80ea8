"""Memory formats of samples and weights, which are for so many axes each."""

from __future__ import annotations

import torch
from torch import nn

from amed_engine.errors import ConfigError

# How many axes a sample has in each; its weights have one more.
RANKS = {torch.channels_last: 3, torch.channels_last_3d: 4}


def lay_out(module: nn.Module, memory_format: torch.memory_format) -> None:
    """`Module.to` takes no network that has convolutions of images and of volumes: those of another rank stay as they are."""
    rank = 1 + RANKS.get(memory_format, -1)
    module._apply(lambda t: t.contiguous(memory_format=memory_format) if rank in (0, t.dim()) else t)


def check_format(memory_format: torch.memory_format | None, rank: int) -> None:
    """Raise ConfigError for a memory format that samples of this rank cannot have."""
    expected = RANKS.get(memory_format, rank)  # type: ignore[arg-type]
    if expected != rank:
        instead = next((f"pass {known}, or " for known, own in RANKS.items() if own == rank), "")
        raise ConfigError(
            f"memory_format={memory_format} is for samples of {expected} axes, channels first, these have {rank}; {instead}"
            "leave memory_format out"
        )
