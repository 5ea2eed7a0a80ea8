"""`midpoint` is the published predictor followed by the two updates of AMED-Solver, in every implementation."""

import itertools
import math
import os

import pytest
import torch
from torch import nn

from amed_engine.kernels import MidpointWeights, combine, midpoint, use

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SIZES = [5, 32] if INTERPRETED else [1, 2, 5, 8, 16, 32]
HEADS = [(0.0, 0.0), (0.01, 0.0), (0.0, 0.2), (0.05, 0.2)]


class Predictor(nn.Module):
    """The network as one would write it from the paper, in float64; layers named as in published files."""

    def __init__(self, pixels, heads, seed, hidden=128, noise=8, encoded=4):
        super().__init__()
        self.widths = dict(zip(("fc_scale_dir", "fc_scale_time"), heads, strict=True))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.map_layer0 = nn.Linear(noise, noise)
            self.enc_layer0 = nn.Linear(pixels, hidden)
            self.enc_layer1 = nn.Linear(hidden, encoded)
            self.fc_r = nn.Linear(encoded + 2 * noise, 1)
            for name, width in self.widths.items():
                setattr(self, name, nn.Linear(encoded + 2 * noise, 1) if width else None)
        # Weights that float32 holds, so that every precision sees the same network.
        self.float().double()

    def weights(self, dtype, device):
        state = self.state_dict()
        names = [name.replace("_weight", ".weight").replace("_bias", ".bias") for name in MidpointWeights._fields]
        return MidpointWeights(*(state[n].to(device, dtype) if n in state else None for n in names))

    def embed(self, sigma):
        half = self.map_layer0.in_features // 2
        frequencies = (torch.tensor(1e-4) ** (torch.arange(half) / (half - 1))).double()  # in float32, as published
        angles = sigma.double()[:, None] * frequencies
        return nn.functional.silu(self.map_layer0(torch.cat([torch.sin(angles), torch.cos(angles)], 1)))

    @torch.no_grad()
    def forward(self, pooled, sigma, sigma_next):
        hidden = nn.functional.silu(self.enc_layer0(pooled.double().flatten(1)))
        z = torch.cat([self.enc_layer1(hidden), self.embed(sigma), self.embed(sigma_next)], 1)
        scales = [torch.ones(len(z)).double()] * 2
        for k, (name, width) in enumerate(self.widths.items()):
            if width:
                scales[k] = 2 * width * torch.sigmoid(getattr(self, name)(z))[:, 0] + 1 - width
        return torch.sigmoid(self.fc_r(z))[:, 0], *scales


def levels(batch, seed, dtype, device):
    """Decreasing pairs of noise levels from 80 to 0.002, a different one for each sample."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.rand(2, batch, generator=generator).mul(math.log(80 / 0.002)).add(math.log(0.002))
    low, high = exponents.exp().sort(0).values.to(device, dtype)
    return high, low


def close(value, truth, dtype):
    rtol, atol = (1e-5, 1e-6) if dtype == torch.float32 else (1e-10, 1e-12)
    torch.testing.assert_close(value.cpu().double(), truth, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_equals_the_network_in_float64(device, size, heads, dtype):
    batch, seed = 5, size
    predictor = Predictor(size * size, heads, seed)
    maps = torch.randn(batch, 7, size, size, generator=torch.Generator().manual_seed(seed))
    sigma, sigma_next = levels(batch, seed, dtype, device)
    step = midpoint(maps.to(device), sigma, sigma_next, predictor.weights(dtype, device), *heads)
    truth = predictor(maps.double().mean(1), sigma.cpu(), sigma_next.cpu())
    for value, expected in zip(step[:3], truth, strict=True):
        assert value.shape == (batch,)
        assert value.dtype == dtype
        close(value, expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_coefficients_are_those_of_the_solver(device, dtype):
    """y = x + (m - sigma)(x - D)/sigma and x' = x + scale_dir (sigma_next - sigma)(y - D_y)/m, in float64."""
    predictor = Predictor(64, (0.05, 0.2), 0)
    sigma, sigma_next = levels(6, 0, dtype, device)
    step = midpoint(torch.randn(6, 3, 8, 8).to(device), sigma, sigma_next, predictor.weights(dtype, device), 0.05, 0.2)
    r, scale_dir, scale_time, s, n = (t.cpu().double() for t in (*step[:3], sigma, sigma_next))
    m = n**r * s ** (1 - r)
    tolerance = {"rtol": 2e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(step.sigma.cpu().double(), m, **tolerance)
    torch.testing.assert_close(step.sigma_net.cpu().double(), scale_time * m, **tolerance)

    x, d, d_y = (torch.randn(6, 3, 8, 8, dtype=torch.float64) for _ in range(3))
    y = x + ((m - s) / s).view(-1, 1, 1, 1) * (x - d)
    after = x + (scale_dir * (n - s) / m).view(-1, 1, 1, 1) * (y - d_y)
    moved = [t.to(device, dtype) for t in (x, d, y, d_y)]
    (got_y,) = combine(moved[:2], step.to_midpoint)
    (got_after,) = combine([moved[0], moved[2], moved[3]], step.to_next)
    for got, expected in ((got_y, y), (got_after, after)):
        scale = expected.abs().max().item()
        torch.testing.assert_close(
            got.cpu().double(), expected, rtol=1e-4, atol=(1e-5 if dtype == torch.float32 else 1e-9) * scale
        )


def test_no_features_are_zero_features(device):
    predictor = Predictor(64, (0.01, 0.0), 1)
    sigma, sigma_next = levels(4, 1, torch.float32, device)
    weights = predictor.weights(torch.float32, device)
    without = midpoint(None, sigma, sigma_next, weights, 0.01)
    zeros = midpoint(torch.zeros(4, 5, 8, 8, device=device), sigma, sigma_next, weights, 0.01)
    for a, b in zip(without, zeros, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_forms_of_the_same_features(device):
    """Channels-last, a slice, an averaged map, half and double precision: the same predictor sees the same picture."""
    predictor = Predictor(64, (0.01, 0.2), 2)
    weights = predictor.weights(torch.float32, device)
    maps = torch.randn(4, 6, 8, 8, generator=torch.Generator().manual_seed(3)).to(device).bfloat16().float()
    sigma, sigma_next = torch.tensor([7.0], device=device), torch.tensor([2.0], device=device)
    wanted = midpoint(maps, sigma, sigma_next, weights, 0.01, 0.2)
    sliced = torch.full((4, 9, 8, 8), float("nan"), device=device)
    sliced[:, 2:8] = maps
    forms = [
        maps.to(memory_format=torch.channels_last),
        sliced[:, 2:8],
        maps.mean(1),
        maps.bfloat16(),
        maps.half(),
        maps.double(),
    ]
    for form in forms:
        step = midpoint(form, sigma, sigma_next, weights, 0.01, 0.2)
        for a, b in zip(step, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6)
    expanded = midpoint(maps, sigma.expand(4), sigma_next.expand(4).contiguous(), weights, 0.01, 0.2)
    assert all(torch.equal(a, b) for a, b in zip(wanted, expanded, strict=True))


def test_samples_do_not_know_each_other(device):
    predictor = Predictor(25, (0.05, 0.2), 3)
    weights = predictor.weights(torch.float32, device)
    maps = torch.randn(9, 4, 5, 5).to(device)
    sigma, sigma_next = levels(9, 4, torch.float32, device)
    whole, again = (midpoint(maps, sigma, sigma_next, weights, 0.05, 0.2) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True)), "two runs differ"
    for b in (0, 4, 8):
        one = slice(b, b + 1)
        alone = midpoint(maps[one], sigma[one], sigma_next[one], weights, 0.05, 0.2)
        for a, c in zip(whole, alone, strict=True):
            torch.testing.assert_close(a[..., one], c, rtol=1e-6, atol=1e-7)
    assert midpoint(maps[:0], sigma[:1], sigma_next[:1], weights, 0.05, 0.2).r.shape == (0,)


@pytest.mark.parametrize(("hidden", "noise", "encoded"), [(128, 8, 4), (16, 4, 3), (40, 12, 5)])
def test_other_sizes_of_predictor(device, hidden, noise, encoded):
    """The plain definition and the kernels agree for shapes that are no powers of two."""
    predictor = Predictor(36, (0.05, 0.2), 5, hidden, noise, encoded)
    weights = predictor.weights(torch.float64, device)
    maps = torch.randn(3, 3, 6, 6, dtype=torch.float64).to(device)
    sigma, sigma_next = levels(3, 6, torch.float64, device)
    step = midpoint(maps, sigma, sigma_next, weights, 0.05, 0.2)
    with use("reference"):
        definition = midpoint(maps, sigma, sigma_next, weights, 0.05, 0.2)
    for a, b in zip(step, definition, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("field", range(3))
def test_a_weight_off_by_a_hundredth_is_noticed(device, field):
    """Each head is read: moving its bias by 1e-2 moves its output, and no other head's."""
    predictor = Predictor(64, (0.5, 0.5), 7)
    weights = predictor.weights(torch.float32, device)
    name = ["fc_r_bias", "fc_scale_dir_bias", "fc_scale_time_bias"][field]
    moved = weights._replace(**{name: getattr(weights, name) + 1e-2})
    maps = torch.randn(2, 3, 8, 8).to(device)
    sigma, sigma_next = levels(2, 8, torch.float32, device)
    before, after = (midpoint(maps, sigma, sigma_next, w, 0.5, 0.5) for w in (weights, moved))
    for k, (a, b) in enumerate(zip(before[:3], after[:3], strict=True)):
        assert (a - b).abs().max() > 1e-4 if k == field else torch.equal(a, b)


def test_gradients_take_the_plain_definition(device):
    """Asked for a gradient, `midpoint` gives the one of the definition; gradcheck in float64."""
    predictor = Predictor(4, (0.05, 0.2), 9, hidden=3)
    weights = [w.requires_grad_() for w in predictor.weights(torch.float64, device)]
    maps = torch.randn(2, 2, 2, 2, dtype=torch.float64, device=device, requires_grad=True)
    sigma, sigma_next = levels(2, 10, torch.float64, device)

    def call(maps, *weights):
        return tuple(midpoint(maps, sigma, sigma_next, MidpointWeights(*weights), 0.05, 0.2))

    assert torch.autograd.gradcheck(call, (maps, *weights), atol=1e-4)


@pytest.mark.skipif(INTERPRETED, reason="about torch, not about the kernel")
def test_operator_is_well_formed():
    for features, heads in itertools.product((torch.randn(2, 3, 8, 8), None), HEADS):
        weights = Predictor(64, heads, 11).weights(torch.float32, torch.device("cpu"))
        arguments = (features, torch.full((2,), 3.0), torch.full((2,), 1.0), list(weights), *heads)
        torch.library.opcheck(torch.ops.amed.midpoint.default, arguments)
