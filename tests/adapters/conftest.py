"""Small networks of the adapters' tests."""

import pytest
import torch
from torch import Tensor, nn


class MiddleUNet(nn.Module):
    """Built like the U-Nets of guided-diffusion as others publish them: a middle_block, one tensor returned."""

    def __init__(self, channels: int = 1, out_channels: int | None = None, num_classes: int | None = None):
        super().__init__()
        self.image_size, self.in_channels, self.out_channels = 8, channels, out_channels or channels
        self.num_classes = num_classes
        self.first = nn.Conv2d(channels, 4, 3, stride=2, padding=1)
        self.time = nn.Linear(1, 4)
        self.label_emb = nn.Embedding(num_classes, 4) if num_classes else None
        self.middle_block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.SiLU())
        self.last = nn.ConvTranspose2d(4, self.out_channels, 2, stride=2)

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        emb = self.time(timesteps[:, None].to(x.dtype) / 1000)
        emb = emb if self.label_emb is None else emb + self.label_emb(y)
        return self.last(self.middle_block(self.first(x) + emb[:, :, None, None]))


@pytest.fixture(scope="session")
def make_unet():
    """(channels, out_channels, num_classes) -> MiddleUNet, the same weights each time."""

    def make(*args, **options):
        torch.manual_seed(0)
        return MiddleUNet(*args, **options).eval().requires_grad_(False)

    return make
