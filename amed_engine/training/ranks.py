"""Data-parallel training: every rank draws the whole batch, works on its part, and adds up gradients with the others."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from amed_engine.errors import ConfigError


class Ranks(NamedTuple):
    """This process among those that train together."""

    rank: int = 0
    size: int = 1

    def parts(self, batch: int, accumulate: int) -> list[slice]:
        """The rows of a batch that are this rank's, one slice per backward pass."""
        if not isinstance(accumulate, int) or accumulate < 1:
            raise ConfigError(f"accumulate must be a positive integer, got {accumulate!r}")
        rows, rest = divmod(batch, self.size * accumulate)
        if rest:
            raise ConfigError(
                f"batch {batch} does not split into accumulate={accumulate} parts on each of {self.size} processes; "
                f"pass a multiple of {self.size * accumulate}"
            )
        first = self.rank * accumulate
        return [slice((first + k) * rows, (first + k + 1) * rows) for k in range(accumulate)]

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()


@contextmanager
def join(device: torch.device) -> Iterator[Ranks]:
    """The group torchrun started, or one that the caller has initialised; a single process otherwise."""
    if dist.is_available() and dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size())
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        try:
            yield Ranks(dist.get_rank(), dist.get_world_size())
        finally:
            dist.destroy_process_group()
    else:
        yield Ranks()
