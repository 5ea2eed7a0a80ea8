"""Train the bundled model: a class-conditional DDPM++ on scikit-learn's 1,797 handwritten digits of 8x8 pixels.

    python -m amed_engine.zoo.train_digits --out DIR

EDM's loss (Karras et al. 2022, arXiv:2206.00364), with one change: where the data set is small enough to be looked at
whole, the regression target is the posterior mean over the training set instead of the one image that was noised.
The expected gradient is the same, its variance a fraction (stable targets, Xu et al. 2023, arXiv:2302.00670).
Needs scikit-learn. Deterministic for a given seed, number of steps, thread count and torch version.
"""

from __future__ import annotations

import copy
import math
import platform
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from tqdm import tqdm

from amed_engine.checkpoints import save_model
from amed_engine.networks import EDMPrecond

NETWORK: dict[str, Any] = {
    "img_resolution": 8,
    "img_channels": 1,
    "label_dim": 10,
    "model_type": "SongUNet",
    "model_channels": 32,
    "channel_mult": [1, 2],
    "channel_mult_emb": 2,
    "num_blocks": 2,
    "attn_resolutions": [4],
    "dropout": 0.0,
    "sigma_min": 0.002,
    "sigma_max": 80.0,
}
UNLABELLED = -1  # EDMPrecond's zero label: the unconditional row that classifier-free guidance reads


@dataclass(frozen=True)
class Recipe:
    steps: int = 9000
    batch: int = 64
    lr: float = 1.5e-3
    warmup: int = 200
    label_dropout: float = 0.1
    p_mean: float = -0.5  # log(sigma) ~ N(p_mean, p_std²)
    p_std: float = 1.4
    ema_power: float = 16.0  # weight of step t in the average grows as t^ema_power: some 6% of the run count
    seed: int = 0
    minutes: float = math.inf  # ends the learning-rate schedule early on a slow machine; then runs differ


@dataclass(frozen=True)
class Digits:
    images: Tensor  # (1797, 1, 8, 8), in [-1, 1]
    labels: Tensor  # (1797,), 0 .. 9


def load_digits(device: torch.device) -> Digits:
    from sklearn import datasets

    pixels, labels = datasets.load_digits(return_X_y=True)  # 0 .. 16
    images = torch.tensor(pixels, dtype=torch.float32, device=device).reshape(-1, 1, 8, 8) / 8 - 1
    return Digits(images, torch.tensor(labels, device=device))


def posterior_mean(noisy: Tensor, sigma: Tensor, labels: Tensor, data: Digits) -> Tensor:
    """E[x0 | noisy, sigma, label] if x0 is drawn from the training set, or from its images of that label.

    x0_i has weight softmax_i(-|noisy - x0_i|² / (2 sigma²)). noisy (B, 1, 8, 8), sigma (B,), labels (B,).
    """
    images = data.images.flatten(1)
    logits = torch.cdist(noisy.flatten(1), images).square() / (-2 * sigma.square()[:, None])
    excluded = (data.labels != labels[:, None]) & (labels != UNLABELLED)[:, None]
    return (logits.masked_fill(excluded, -math.inf).softmax(1) @ images).view_as(noisy)


def draw_batch(data: Digits, recipe: Recipe, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(clean, noisy, sigma, labels) of one step. Drawn on the CPU, so that every device sees the same numbers."""
    batch, device = recipe.batch, data.images.device
    index = torch.randint(len(data.images), (batch,), generator=generator).to(device)
    # One sigma in each of `batch` equal slices of probability: every step sees all noise levels.
    quantile = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
    sigma = (recipe.p_mean + recipe.p_std * torch.special.ndtri(quantile.clamp(1e-6, 1 - 1e-6))).exp().to(device)
    dropped = (torch.rand(batch, generator=generator) < recipe.label_dropout).to(device)
    clean = data.images[index]
    noise = torch.randn(clean.shape, generator=generator).to(device)
    labels = data.labels[index].masked_fill(dropped, UNLABELLED)
    return clean, clean + sigma[:, None, None, None] * noise, sigma, labels


def edm_loss(denoised: Tensor, target: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """mean of (sigma² + sd²) / (sigma·sd)² · |D - target|²"""
    weight = (sigma.square() + sigma_data**2) / (sigma * sigma_data).square()
    return (weight[:, None, None, None] * (denoised - target).square()).mean()


def learning_rate(progress: float, step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine from recipe.lr to 0; progress in 0 .. 1."""
    return recipe.lr * min(1.0, (step + 1) / recipe.warmup) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


@torch.no_grad()
def update_average(average: EDMPrecond, net: EDMPrecond, step: int, power: float) -> None:
    """Power-function average (Karras et al. 2024, arXiv:2312.02696): its length grows with the run, its start is forgotten."""
    keep = (1 - 1 / (step + 1)) ** (power + 1)
    for mean, parameter in zip(average.parameters(), net.parameters(), strict=True):
        mean.lerp_(parameter, 1 - keep)


@torch.no_grad()
def denoising_loss(net: EDMPrecond, data: Digits, recipe: Recipe, batches: int = 100) -> float:
    """EDM's loss to the clean image, on noise not used in training; no network gets below the posterior variance."""
    generator = torch.Generator().manual_seed(recipe.seed + 1)
    losses = []
    for _ in range(batches):
        clean, noisy, sigma, labels = draw_batch(data, recipe, generator)
        losses.append(edm_loss(net(noisy, sigma, labels).x0, clean, sigma, net.sigma_data))
    return torch.stack(losses).mean().item()


@dataclass
class Run:
    """Where a training run is."""

    recipe: Recipe
    start: float = field(default_factory=time.monotonic)
    written: float = field(default_factory=time.monotonic)
    step: int = 0
    loss: float = 1.0  # running mean of the last hundred steps or so

    @property
    def minutes(self) -> float:
        return (time.monotonic() - self.start) / 60

    @property
    def progress(self) -> float:
        """0 .. 1, by steps or by time, whichever is further."""
        return max(self.step / self.recipe.steps, self.minutes / self.recipe.minutes)

    def advance(self, loss: float) -> None:
        self.step += 1
        self.loss += 0.01 * (loss - self.loss)

    def save_is_due(self, every: float = 120.0) -> bool:
        due = time.monotonic() - self.written > every
        self.written = time.monotonic() if due else self.written
        return due

    def report(self) -> dict[str, Any]:
        return {"steps": self.step, "minutes": round(self.minutes, 1), "loss_to_posterior_mean": round(self.loss, 5)}


def train(recipe: Recipe, out: Path, device: torch.device, network: dict[str, Any]) -> EDMPrecond:
    """Train, write the averaged weights to `out` every two minutes and at the end, and return the averaged network."""
    torch.manual_seed(recipe.seed)
    generator = torch.Generator().manual_seed(recipe.seed)
    data = load_digits(device)
    net = EDMPrecond(**network, sigma_data=round(data.images.std().item(), 4)).to(device).train()
    # A quarter faster on a CPU; torch's signature of `to` has no such argument.
    net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    average = copy.deepcopy(net).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(net.parameters(), betas=(0.9, 0.99))
    run = Run(recipe)
    with tqdm(total=recipe.steps, mininterval=2, unit="step") as bar:
        while run.progress < 1:
            optimizer.param_groups[0]["lr"] = learning_rate(run.progress, run.step, recipe)
            run.advance(train_step(net, optimizer, data, recipe, generator))
            update_average(average, net, run.step, recipe.ema_power)
            if run.save_is_due():
                write_model(average, out, recipe, run.report())
            bar.set_postfix(loss=f"{run.loss:.4f}", refresh=False)
            bar.update()
    final = {"loss_to_image": round(denoising_loss(average, data, recipe), 5)}
    write_model(average, out, recipe, run.report() | final)
    return average


def train_step(
    net: EDMPrecond, optimizer: torch.optim.Optimizer, data: Digits, recipe: Recipe, generator: torch.Generator
) -> float:
    _, noisy, sigma, labels = draw_batch(data, recipe, generator)
    target = posterior_mean(noisy, sigma, labels, data)
    loss = edm_loss(net(noisy, sigma, labels).x0, target, sigma, net.sigma_data)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def write_model(net: EDMPrecond, out: Path, recipe: Recipe, report: dict[str, Any]) -> None:
    """model.safetensors and config.json, with the recipe and what came of it under "training"."""
    settings = {name: value for name, value in asdict(recipe).items() if name not in ("steps", "minutes")}
    settings["steps_planned"] = recipe.steps
    if math.isfinite(recipe.minutes):
        settings["minutes_limit"] = recipe.minutes  # the learning rate then followed the clock
    data = "scikit-learn digits: 1797 images of 8x8 pixels, scaled to [-1, 1]"
    save_model(net, out, training={"data": data, **report, **settings, "python": platform.python_version()})


@click.command()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder for the weights.")
@click.option("--steps", type=click.IntRange(1), default=Recipe.steps, show_default=True)
@click.option("--minutes", type=float, default=math.inf, help="Stop, schedule complete, after this long at most.")
@click.option("--batch", type=click.IntRange(1), default=Recipe.batch, show_default=True)
@click.option("--seed", type=int, default=Recipe.seed, show_default=True)
@click.option("--device", default=None, help="Default: cuda where there is one, else cpu.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="CPU threads.")
def main(out: Path, steps: int, minutes: float, batch: int, seed: int, device: str | None, threads: int) -> None:
    """Train the bundled `digits` model and write model.safetensors and config.json."""
    torch.set_num_threads(threads)
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    train(Recipe(steps=steps, minutes=minutes, batch=batch, seed=seed), out, chosen, NETWORK)


if __name__ == "__main__":
    main()
