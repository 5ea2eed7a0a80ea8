"""A network of one's own that predicts noise, sampled as it is: python examples/wrap.py"""

import torch
from torch import nn

import amed_engine


class Network(nn.Module):
    """epsilon from alpha·x0 + sqrt(1 - alpha²)·n and the step 0 .. 999 of training. A U-Net, in earnest."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, x, step):
        noise = (step / 1000).view(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])
        return self.body(torch.cat([x, noise], dim=1))


torch.manual_seed(0)
denoiser = amed_engine.wrap(Network(), prediction="epsilon", betas="linear", shape=(3, 16, 16))
result = amed_engine.Sampler(denoiser, nfe=5).run([0, 1, 2, 3])
print(denoiser)
print(tuple(result.images.shape), result.plan.describe())
