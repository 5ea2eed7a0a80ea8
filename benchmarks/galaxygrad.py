"""The trained score networks of galaxygrad 0.1.9 (PyPI), read from its wheel and run in torch as denoisers.

    python benchmarks/galaxygrad.py hsc32 hsc32.pt2
    amed calibrate --model hsc32.pt2 --nfe 5 --out recipe.json

Nobody here trained them, which is their use: what is assumed of networks in general can be wrong of these. Eight MLP-Mixers
of 1 x 32² to 1 x 72² pixels of galaxies, log(flux + 1) / 0.1, by Sampson (github.com/SampsonML/galaxygrad). The wheel states
no licence, so it is downloaded, never shipped.

A network F(y; t) is the score of y = e^(-t/2) x0 + sqrt(1 - e^-t) n, the VP process with beta 1, t in [0, 10]. With
sigma² = e^t - 1 and x = sqrt(1 + sigma²) y that is

    D(x; sigma) = x + sigma² / sqrt(1 + sigma²) F(x / sqrt(1 + sigma²); log(1 + sigma²))
"""

from __future__ import annotations

import io
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import wheels
from torch import Tensor, nn

PACKAGE = "galaxygrad==0.1.9"
WHEEL = "galaxygrad-0.1.9-py3-none-any.whl"
SHA256 = "3bd8cbc50926b59f0e081f95622b423f79ef8949169a79d81bf96a117198e785"
FOLDER = Path(tempfile.gettempdir()) / "galaxygrad"  # the wheel, kept from one run to the next
HORIZON = 10.0  # the largest t
PATCH, CHANNELS, HIDDEN, BLOCKS = 4, 64, 512, 4
# Name -> the file of its weights, and pixels along one side.
NETWORKS: dict[str, tuple[str, int]] = {
    "hsc32": ("eqx_hsc_ScoreNet32.eqx", 32),
    "hsc64": ("eqx_hsc_ScoreNet64.eqx", 64),
    "hsc32-log": ("eqx_hsc_LogNet32.eqx", 32),
    "hsc64-log": ("eqx_hsc_LogNet64.eqx", 64),
    "ztf32": ("eqx_ZTF_ScoreNet32.eqx", 32),
    "ztf64": ("eqx_ZTF_ScoreNet64.eqx", 64),
    "lsst60": ("eqx_lsst_ScoreNet60.eqx", 60),
    "quasar72": ("eqx_quasar_lens72.eqx", 72),
}


class Mixer(nn.Module):
    """One block on (B, channels, patches): an MLP along the patches, then one along the channels, each on a residual."""

    def __init__(self, patches: int):
        super().__init__()
        self.along_patches = _mlp(patches)
        self.along_channels = _mlp(CHANNELS)
        self.before_patches = nn.LayerNorm([CHANNELS, patches])
        self.before_channels = nn.LayerNorm([patches, CHANNELS])

    def forward(self, y: Tensor) -> Tensor:
        y = y + self.along_patches(self.before_patches(y))
        return y + self.along_channels(self.before_channels(y.mT)).mT


def _mlp(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, width))


class ScoreNetwork(nn.Module):
    """F(y; t) on (B, 1, size, size), t (B,): an MLP-Mixer on patches of 4 x 4, t / 10 as a second channel."""

    def __init__(self, size: int):
        super().__init__()
        self.encode = nn.Conv2d(2, CHANNELS, PATCH, PATCH)
        self.decode = nn.ConvTranspose2d(CHANNELS, 1, PATCH, PATCH)
        self.blocks = nn.ModuleList(Mixer((size // PATCH) ** 2) for _ in range(BLOCKS))
        self.norm = nn.LayerNorm([CHANNELS, (size // PATCH) ** 2])

    def forward(self, y: Tensor, t: Tensor) -> Tensor:
        time = (t / HORIZON).reshape(-1, 1, 1, 1).expand_as(y)
        patches = self.encode(torch.cat([y, time], dim=1))
        mixed = patches.flatten(2)
        for block in self.blocks:
            mixed = block(mixed)
        return self.decode(self.norm(mixed).reshape_as(patches))


class Denoiser(nn.Module):
    """D(x; sigma) of a score network, as `Sampler` takes it."""

    label_dim = 0
    # The networks know sigma up to 148 (t = 10); published schedules start at 80.
    sigma_min, sigma_max = 0.002, 80.0

    def __init__(self, score: ScoreNetwork, size: int):
        super().__init__()
        self.score = score
        self.sample_shape = (1, size, size)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        t, sigma = torch.log1p(sigma**2), sigma.reshape(-1, 1, 1, 1)
        scale = (1 + sigma**2).sqrt()
        return x + sigma**2 / scale * self.score(x / scale, t)


def download(folder: Path) -> Path:
    """The wheel in this folder; see `wheels.download`."""
    return wheels.download(folder, PACKAGE, WHEEL, SHA256)


def load(wheel: Path, name: str) -> Denoiser:
    """One network with its weights, float32 on the CPU, without gradients."""
    file, size = NETWORKS[name]
    with zipfile.ZipFile(wheel) as archive:
        arrays = leaves(archive.read(f"galaxygrad/{file}"))
    score = ScoreNetwork(size)
    fill(score, arrays)
    return Denoiser(score, size).requires_grad_(False).eval()


def leaves(data: bytes) -> Iterator[np.ndarray]:
    """The arrays of a file of equinox: .npy files one after another, no names, in the order of the module's fields."""
    file = io.BytesIO(data)
    while file.tell() < len(data):
        yield np.load(file, allow_pickle=False)


def fill(score: ScoreNetwork, arrays: Iterator[np.ndarray]) -> None:
    """Weights into the network; raises ValueError where an array does not fit or is left over.

    Biases of convolutions are (C, 1, 1) there. A transposed convolution is stored (out, in, h, w) and correlates, torch's is
    (in, out, h, w) and convolves: hence the swap and the flips.
    """
    for owner in _owners(score):
        for name in ("weight", "bias"):
            value, parameter = torch.from_numpy(next(arrays)), getattr(owner, name)
            if name == "weight" and owner is score.decode:
                value = value.transpose(0, 1).flip(2, 3)
            if name == "bias":
                value = value.reshape(parameter.shape) if value.numel() == parameter.numel() else value
            if value.shape != parameter.shape:
                raise ValueError(f"expected an array of shape {tuple(parameter.shape)}, got {tuple(value.shape)}")
            parameter.data.copy_(value)
    rest = [array.item() for array in arrays]
    if rest != [HORIZON]:
        raise ValueError(f"expected the largest time {HORIZON} after the weights, got {rest}")


def _owners(score: ScoreNetwork) -> Iterator[Any]:
    """The modules with weights in the order of the file."""
    yield from (score.encode, score.decode)
    block: Any
    for block in score.blocks:
        for mlp in (block.along_patches, block.along_channels):
            yield from (mlp[0], mlp[2])
        yield from (block.before_patches, block.before_channels)
    yield score.norm


def save(denoiser: Denoiser, path: Path) -> None:
    """The denoiser as an ExportedProgram for any batch, which every command and `Sampler` take by its path."""
    x, batch = torch.zeros(2, *denoiser.sample_shape), {0: torch.export.Dim("batch", min=1)}
    program = torch.export.export(denoiser, (x, torch.ones(2)), dynamic_shapes=(batch, batch))
    torch.export.save(program, path)


@click.command()
@click.argument("name", type=click.Choice(list(NETWORKS)))
@click.argument("path", type=click.Path(dir_okay=False, path_type=Path))
def app(name: str, path: Path) -> None:
    """Write the denoiser of a network as PATH.pt2, for the commands of `amed`."""
    if path.suffix != ".pt2":
        raise click.UsageError(f"an ExportedProgram is a .pt2 file, got {path}; name it {path.with_suffix('.pt2')}")
    denoiser = load(download(FOLDER), name)
    save(denoiser, path)
    click.echo(f"wrote {path}: samples {denoiser.sample_shape}, sigma {denoiser.sigma_min:g} to {denoiser.sigma_max:g}")


if __name__ == "__main__":
    app()
