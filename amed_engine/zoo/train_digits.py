"""Train the bundled model: a class-conditional DDPM++ on scikit-learn's 1,797 handwritten digits of 8x8 pixels.

    python -m amed_engine.zoo.train_digits --out DIR

EDM's loss (Karras et al. 2022, arXiv:2206.00364), with one change: where the data set is small enough to be looked at
whole, the regression target is the posterior mean over the training set instead of the one image that was noised.
The expected gradient is the same, its variance a fraction (stable targets, Xu et al. 2023, arXiv:2302.00670).
Needs scikit-learn. Deterministic for a given seed, number of steps, thread count and torch version.
"""

from __future__ import annotations

import copy
import json
import math
import os
import platform
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

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

    digits = datasets.load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32) / 8 - 1
    return Digits(images[:, None].to(device), torch.tensor(digits.target).to(device))


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
    torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 1 - keep)


@torch.no_grad()
def denoising_loss(net: EDMPrecond, data: Digits, recipe: Recipe, batches: int = 100) -> float:
    """EDM's loss to the clean image, on noise not used in training; no network gets below the posterior variance."""
    generator = torch.Generator().manual_seed(recipe.seed + 1)
    losses = []
    for _ in range(batches):
        clean, noisy, sigma, labels = draw_batch(data, recipe, generator)
        losses.append(edm_loss(net(noisy, sigma, labels).x0, clean, sigma, net.sigma_data))
    return torch.stack(losses).mean().item()


def train(recipe: Recipe, out: Path, device: torch.device, network: dict[str, Any] = NETWORK) -> EDMPrecond:
    """Train, write the averaged weights to `out` every two minutes and at the end, and return the averaged network."""
    torch.manual_seed(recipe.seed)
    data = load_digits(device)
    net = EDMPrecond(**network, sigma_data=round(data.images.std().item(), 4))
    net = net.to(device, memory_format=torch.channels_last).train()
    average = copy.deepcopy(net).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(net.parameters(), betas=(0.9, 0.99))
    generator = torch.Generator().manual_seed(recipe.seed)
    start = written = time.monotonic()
    running, step, progress = 1.0, 0, 0.0
    with tqdm(total=recipe.steps, mininterval=2, unit="step") as bar:
        while progress < 1:
            optimizer.param_groups[0]["lr"] = learning_rate(progress, step, recipe)
            running += 0.01 * (train_step(net, optimizer, data, recipe, generator) - running)
            step += 1
            update_average(average, net, step, recipe.ema_power)
            now = time.monotonic()
            progress = max(step / recipe.steps, (now - start) / 60 / recipe.minutes)
            if now - written > 120 or progress >= 1:
                written = now
                write_model(average, out, recipe, {"steps": step, "minutes": round((now - start) / 60, 1)})
            bar.update()
            bar.set_postfix(loss=f"{running:.4f}", refresh=False)
    seconds = time.monotonic() - start
    report = {"steps": step, "minutes": round(seconds / 60, 1), "loss_to_posterior_mean": round(running, 5)}
    report["loss_to_image"] = round(denoising_loss(average, data, recipe), 5)
    write_model(average, out, recipe, report)
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
    """model.safetensors (published parameter names) and config.json (constructor arguments, how it was trained)."""
    settings = {k: v for k, v in asdict(recipe).items() if k not in ("steps", "minutes")}
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    training = {"data": "scikit-learn digits, 1797 images scaled to [-1, 1]", **report, **settings, **versions}
    config = json.dumps({"class": "EDMPrecond", "config": net.config, "training": training}, indent=2, allow_nan=False)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in net.state_dict().items()}
    out.mkdir(parents=True, exist_ok=True)
    write_file(out / "model.safetensors", save(tensors))
    write_file(out / "config.json", config.encode() + b"\n")


def write_file(path: Path, content: bytes) -> None:
    """Write to a temporary file and rename: a reader sees the old file or the new one, never half of it."""
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(temporary, 0o666 & ~umask)
    os.replace(temporary, path)


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
    train(Recipe(steps=steps, minutes=minutes, batch=batch, seed=seed), out, chosen)


if __name__ == "__main__":
    main()
