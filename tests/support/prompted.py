"""What tests of conditions share: a small network that is told a text and a mask, prompts, and what means none."""

import pytest
import torch
from torch import Tensor, nn

from amed_engine import ContinuousSampler, wrap

SHAPE, PROMPTS = (1, 4, 4), 3
PLAN = {"solver": "ipndm", "nfe": 4, "afs": False, "schedule": "polynomial"}


class Net(nn.Module):
    """Noise of a picture about a mean that its prompt says."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(6, 1)
        self.seen: list[int] = []

    def forward(self, x: Tensor, time: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        self.seen.append(len(x))
        mean = self.out((text * mask[..., None]).mean(1))[:, :, None, None]
        return torch.tanh(x - mean) + 0.001 * time.view(-1, 1, 1, 1)


def made() -> Net:
    torch.manual_seed(3)
    return Net().eval()


def prompts() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(PROMPTS, 5, 6, generator=generator)
    return {"text": text, "mask": (text[..., 0] > -0.5).float()}


NONE = {"text": torch.zeros(1, 5, 6), "mask": torch.ones(1, 5)}


def wrapped(net, conditions, null=None):
    return wrap(
        net,
        prediction="epsilon",
        betas="linear",
        shape=SHAPE,
        conditions=conditions,
        null_conditions=null,
        bottleneck=None,
    )


def largest(images, expected):
    return float((images - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module")
def prompted():
    """An engine that is told texts and masks."""
    with ContinuousSampler(wrapped(made(), prompts(), NONE), rows=4, verify=False) as engine:
        yield engine


@pytest.fixture(scope="module")
def asked(prompted):
    """A client of its server, which takes no programs."""
    from starlette.testclient import TestClient

    from amed_engine.serving.http import make_app

    with TestClient(make_app({"prompted": [prompted]})) as client:
        yield client
