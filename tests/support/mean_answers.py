"""Mean answers of no model, for first steps that start about one."""

import torch

from amed_engine.solvers.mean import Mean


def make_mean(rows: int = 1, classes: int = 0, *, shape=(1, 8, 8), sigma: float = 80.0) -> Mean:
    """Far from zero, and each row from the others."""
    answers = torch.randn(rows, *shape, generator=torch.Generator().manual_seed(3))
    return Mean.of(answers, classes=classes, sigma=sigma, latents=1)
