"""A small flow-matching network on scikit-learn's digits, trained where the yardstick first asks for it.

    python benchmarks/flow_digits.py --folder DIR

With x_t = (1 - t) x0 + t n and t uniform, F(x_t; 1000 t, label) regresses the velocity n - x0 = (x_t - x0) / t, labels dropped
from a tenth of the samples. In x0's place stands its posterior mean over the training set, as for the bundled model: the
expected gradient is the same. Lipman et al. 2022 (arXiv:2210.02747), Liu et al. 2022 (arXiv:2209.03003).

The same on every run of one torch version, resumed or not: one thread, and each step draws from a seed of its own.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from tqdm import tqdm

from amed_engine import wrap
from amed_engine.adapters.adapter import Adapter
from amed_engine.checkpoints import read, write
from amed_engine.networks.song_unet import SongUNet
from amed_engine.zoo.train_digits import UNLABELLED, Digits, load_digits, posterior_mean

NAME = "flow-digits"
COMMAND = "python benchmarks/flow_digits.py"
NETWORK: dict[str, Any] = {
    "img_resolution": 8,
    "in_channels": 1,
    "out_channels": 1,
    "label_dim": 10,
    "model_channels": 24,
    "channel_mult": [1, 2],
    "channel_mult_emb": 2,
    "num_blocks": 1,
    "attn_resolutions": [4],
    "dropout": 0.0,
}
T_MIN = 1e-3  # t in T_MIN .. 1 - T_MIN: at its ends the posterior mean has no digits left in float32
STEPS = 1000  # the network is told STEPS t, as wrap's "flow" has it
KEEP_EVERY = 60.0  # seconds
HELD_OUT = 50  # batches of the stated loss, on noise not trained on


@dataclass(frozen=True)
class Recipe:
    steps: int = 2500
    batch: int = 64
    lr: float = 2e-3
    warmup: int = 100
    label_dropout: float = 0.1
    ema_power: float = 16.0  # weight of step t in the average grows as t^ema_power
    seed: int = 0

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then a cosine to 0."""
        return self.lr * min(1.0, (step + 1) / self.warmup) * 0.5 * (1 + math.cos(math.pi * step / self.steps))


class Run:
    """Where the training is: the network, its average over steps, and what Adam remembers."""

    def __init__(self, recipe: Recipe):
        torch.manual_seed(recipe.seed)
        self.recipe, self.step, self.minutes = recipe, 0, 0.0
        self.net = SongUNet(**NETWORK)
        self.average = copy.deepcopy(self.net).eval().requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.net.parameters(), betas=(0.9, 0.99))

    def advance(self, data: Digits) -> None:
        """One step, with noise that depends on its number alone."""
        self.optimizer.param_groups[0]["lr"] = self.recipe.learning_rate(self.step)
        loss = velocity_loss(self.net, data, self.recipe, self.step)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.step += 1
        kept = (1 - 1 / self.step) ** (self.recipe.ema_power + 1)
        with torch.no_grad():
            for mean, parameter in zip(self.average.parameters(), self.net.parameters(), strict=True):
                mean.lerp_(parameter, 1 - kept)

    def write(self, file: Path, **notes: Any) -> None:
        """All of it, as one safetensors file, whole or not at all."""
        tensors = {f"net.{name}": value for name, value in self.net.state_dict().items()}
        tensors |= {f"average.{name}": value for name, value in self.average.state_dict().items()}
        for number, slots in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{number}.{name}": value for name, value in slots.items()}
        write(file, tensors, {**self.facts(), "torch": torch.__version__, **notes})

    def facts(self) -> dict[str, Any]:
        own = {"recipe": asdict(self.recipe), "network": NETWORK}
        return {**own, "step": self.step, "minutes": round(self.minutes, 1)}

    @classmethod
    def read(cls, file: Path, recipe: Recipe) -> Run:
        """What `write` kept. Raises ValueError for what was trained otherwise, FileFormatError for another file."""
        config, tensors = read(file)
        run = cls(recipe)
        said = {"recipe": config.get("recipe"), "network": config.get("network")}
        if said != {name: run.facts()[name] for name in said}:
            raise ValueError(f"{file} was trained by another recipe, {said}; delete it to train anew")
        run.step, run.minutes = config["step"], config["minutes"]
        run.net.load_state_dict(_under(tensors, "net."))
        run.average.load_state_dict(_under(tensors, "average."))
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in _under(tensors, "adam.").items():
            number, _, slot = name.partition(".")
            state.setdefault(int(number), {})[slot] = value
        run.optimizer.load_state_dict({**run.optimizer.state_dict(), "state": state})
        return run


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def velocity_loss(net: SongUNet, data: Digits, recipe: Recipe, draw: int, *, to_image: bool = False) -> Tensor:
    """mean |F - (x_t - m) / t|², m the posterior mean of x0, or x0 itself for to_image. Draw number `draw`."""
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_000 + draw)
    batch = recipe.batch
    index = torch.randint(len(data.images), (batch,), generator=generator)
    # One t in each of `batch` equal slices of 0 .. 1: every step sees all of them.
    t = ((torch.arange(batch) + torch.rand(batch, generator=generator)) / batch).clamp(T_MIN, 1 - T_MIN)
    dropped = torch.rand(batch, generator=generator) < recipe.label_dropout
    clean, labels = data.images[index], data.labels[index].masked_fill(dropped, UNLABELLED)
    rows = t[:, None, None, None]
    noisy = (1 - rows) * clean + rows * torch.randn(clean.shape, generator=generator)
    mean = clean if to_image else posterior_mean(noisy / (1 - rows), t / (1 - t), labels, data)
    velocity, _ = net(noisy, STEPS * t, labels)
    return (velocity - (noisy - mean) / rows).square().mean()


@torch.no_grad()
def held_out_loss(run: Run, data: Digits) -> float:
    """The loss to n - x0 on noise that no step drew; no network gets below the posterior's variance."""
    draws = range(run.recipe.steps, run.recipe.steps + HELD_OUT)
    losses = [velocity_loss(run.average, data, run.recipe, draw, to_image=True) for draw in draws]
    return round(torch.stack(losses).mean().item(), 5)


def train(file: Path, recipe: Recipe) -> Run:
    """The finished run, from where this file is; every minute it goes back there. Raises what `Run.read` does."""
    run = Run.read(file, recipe) if file.is_file() else Run(recipe)
    if run.step == recipe.steps:
        return run
    torch.set_num_threads(1)
    data, since = load_digits(torch.device("cpu")), time.monotonic()
    with tqdm(total=recipe.steps, initial=run.step, mininterval=10, unit="step", desc=NAME) as bar:
        while run.step < recipe.steps:
            run.advance(data)
            bar.update()
            if (passed := time.monotonic() - since) > KEEP_EVERY or run.step == recipe.steps:
                run.minutes, since = run.minutes + passed / 60, time.monotonic()
                notes = {"loss_to_velocity": held_out_loss(run, data)} if run.step == recipe.steps else {}
                run.write(file, **notes)
    return run


def file_in(folder: Path) -> Path:
    return folder / f"{NAME}.safetensors"


def load(folder: Path) -> Adapter:
    """The denoiser of this folder's network, trained first where it is not there yet or not done."""
    run = train(file_in(folder), Recipe())
    return wrap(run.average, "flow", shape=(1, 8, 8))


def training(folder: Path) -> dict[str, Any]:
    """How the network of this folder came to be, for the results: its command, steps, minutes and final loss."""
    config, _ = read(file_in(folder))
    said = {name: config[name] for name in ("step", "minutes", "loss_to_velocity", "torch")}
    return {"command": COMMAND, **config["recipe"], **said}


@click.command()
@click.option("--folder", type=click.Path(path_type=Path, file_okay=False), required=True, help="For the weights.")
def main(folder: Path) -> None:
    """Train the network, or go on with it."""
    load(folder)
    click.echo(training(folder))


if __name__ == "__main__":
    main()
