"""Samples of any rank: what is read of a bottleneck, of lines, volumes and frames, and what refuses to be read."""

import pytest
import torch
from torch import nn

import amed_engine
from amed_engine import AMEDPredictor, Sampler, make_plan
from amed_engine.adapters import wrap
from amed_engine.adapters.taps import Tap
from amed_engine.errors import ConfigError

SIGMA = torch.tensor([0.7, 2.5])
CONVOLUTIONS = {"line": (nn.Conv1d, (3, 16)), "image": (nn.Conv2d, (3, 8, 6)), "volume": (nn.Conv3d, (3, 4, 8, 6))}


class Plain(nn.Module):
    """A network whose middle block is one convolution."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.middle_block = kind(3, 3, 3, padding=1)

    def forward(self, x, t):
        return self.middle_block(x)


class Folded(nn.Module):
    """A video network with its frames in the batch: those of one sample together, or the same frame of all."""

    def __init__(self, together=True):
        super().__init__()
        torch.manual_seed(0)
        self.mid_block, self.together = nn.Conv2d(3, 3, 3, padding=1), together

    def forward(self, x, t):
        if not self.together:
            frames = self.mid_block(x.permute(2, 0, 1, 3, 4).flatten(0, 1))
            return frames.unflatten(0, (-1, x.shape[0])).permute(1, 2, 0, 3, 4)
        return self.mid_block(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (x.shape[0], -1)).transpose(1, 2)


class Uncalled(nn.Module):
    """No hook sees the layers of a list."""

    def __init__(self):
        super().__init__()
        self.mid_block = nn.ModuleList([nn.Conv2d(3, 3, 1)])

    def forward(self, x, t):
        return self.mid_block[0](x)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.mid_block = nn.Linear(3, 3)

    def forward(self, x, t):
        return self.mid_block(x.flatten(2).mT).mT.reshape(x.shape)


UNREAD = {
    "frames": (Folded(), (3, 3, 8, 8), r"\(6, 3, 8, 8\) for 2 samples"),
    "frames outside": (Folded(together=False), (3, 3, 8, 8), r"\(6, 3, 8, 8\) for 2 samples"),
    "tokens": (Tokens(), (3, 8, 8), r"\(2, 64, 3\) for 2 samples"),
    "uncalled": (Uncalled(), (3, 8, 8), "no tensor, or its module was not called for 2 samples"),
}


def predictor(size, guidance_scale=None):
    torch.manual_seed(1)
    made = AMEDPredictor(scale_dir=0.5, bottleneck=size)
    made.plan = make_plan(5, solver="amed", sigma_min=0.03, sigma_max=14.0, guidance_scale=guidance_scale)
    return made


def wrapped(network, shape, **options):
    return wrap(network, "epsilon", betas="scaled_linear", shape=shape, **options)


def seen_in(denoiser, x, sigma):
    """The features that the denoiser returns, and what a hook of our own sees of its middle."""
    seen = []
    handle = denoiser.network.get_submodule(denoiser.bottleneck).register_forward_hook(lambda m, i, o: seen.append(o))
    features = denoiser(x, sigma).features
    handle.remove()
    return features, seen[0]


@pytest.mark.parametrize(
    ("rank", "read"),
    [("line", lambda f: f[:, :, None]), ("image", lambda f: f), ("volume", lambda f: f.mean(2))],
    ids=["line", "image", "volume"],
)
def test_predictors_read_places_of_any_rank_as_height_and_width(rank, read):
    kind, shape = CONVOLUTIONS[rank]
    denoiser = wrapped(Plain(kind), shape)
    features, seen = seen_in(denoiser, torch.randn(2, *shape), SIGMA)
    torch.testing.assert_close(features, read(seen))
    size = tuple(features.shape[2:])
    together = Sampler(denoiser, predictor(size), verify=False).run([0, 1]).images
    alone = Sampler(denoiser, predictor(size), verify=False).run([1]).images
    torch.testing.assert_close(together[1:], alone)
    zeros = Sampler(wrapped(Plain(kind), shape, bottleneck=None), predictor(size), verify=False).run([0, 1]).images
    assert not torch.allclose(zeros, together, rtol=1e-4)
    with pytest.raises(ConfigError, match=r"predictor expects bottleneck features \(B, C, 5, 5\)"):
        Sampler(denoiser, predictor((5, 5)), verify=False).run(1)
    trained = amed_engine.distill(denoiser, nfe=3, total_kimg=0.008, batch=8, progress=False)
    assert trained.bottleneck == size


@pytest.mark.parametrize("kind", UNREAD)
def test_a_bottleneck_that_nobody_reads_does_not_matter(kind):
    network, shape, got = UNREAD[kind]
    for solver in ("euler", "dpm"):  # one point at once, and two
        images = Sampler(wrapped(network, shape), solver=solver, nfe=6).run([0, 1]).images
        bare = Sampler(wrapped(network, shape, bottleneck=None), solver=solver, nfe=6).run([0, 1]).images
        torch.testing.assert_close(images, bare, rtol=0, atol=0)
    with pytest.raises(ConfigError, match=got) as caught:
        Sampler(wrapped(network, shape), predictor((8, 8)), verify=False).run([0, 1])
    assert "bottleneck=None" in str(caught.value)
    assert "(x, sigma) -> (D, features)" in str(caught.value)
    with pytest.raises(ConfigError, match="bottleneck=None"):
        amed_engine.distill(wrapped(network, shape), nfe=3, total_kimg=0.008, batch=8, progress=False)
    with pytest.raises(ConfigError, match=r"the module 'mid_block' gave .* as the bottleneck of 8 samples"):
        Sampler(wrapped(network, shape, bottleneck="mid_block"), nfe=5).run([0, 1])
    assert Sampler(wrapped(network, shape, bottleneck=None), predictor((8, 8)), verify=False).run(2).nfe == 5


@pytest.mark.parametrize("kind", UNREAD)
def test_an_exported_adapter_whose_bottleneck_cannot_be_read_samples_without_one(kind, tmp_path):
    network, shape, _ = UNREAD[kind]
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    with torch.no_grad():
        example = (torch.zeros(2, *shape), torch.ones(2))
        program = torch.export.export(wrapped(network, shape), example, dynamic_shapes=(batch, batch))
    torch.export.save(program, tmp_path / "model.pt2")
    options = {"sigma_min": 0.03, "sigma_max": 14.0}
    got = Sampler(str(tmp_path / "model.pt2"), nfe=5, **options).run([0, 1, 2]).images
    torch.testing.assert_close(got, Sampler(wrapped(network, shape), nfe=5, **options).run([0, 1, 2]).images)
    with pytest.raises(ConfigError, match="bottleneck=None"):
        Sampler(str(tmp_path / "model.pt2"), predictor((8, 8)), verify=False).run(3)


def test_a_function_says_what_frames_in_the_batch_mean():
    network, kept = Folded(), []
    denoiser = wrapped(network, (3, 3, 8, 8), bottleneck=None)
    network.mid_block.register_forward_hook(lambda module, inputs, output: kept.append(output))

    def denoise(x, sigma):
        x0 = denoiser(x, sigma).x0
        return x0, kept.pop().unflatten(0, (len(x), -1)).mean(1)

    sampler = Sampler(denoise, predictor((8, 8)), shape=(3, 3, 8, 8))
    torch.testing.assert_close(sampler.run([0, 1]).images[1:], sampler.run([1]).images)


FEATURES = [(2, 3, 8, 8), (6, 3, 8, 8), (1, 3, 8, 8), (2, 5, 8), ()]


@pytest.mark.parametrize("shape", FEATURES, ids=str)
def test_features_of_a_function_are_looked_at_by_predictors_alone(shape):
    def denoise(x, sigma, labels=None):  # as many rows for each sample under guidance
        rows = shape and (shape[0] * len(x) // 2, *shape[1:])
        return 0.5 * x, torch.zeros(rows)

    own = {"shape": (3, 8, 8)}
    assert Sampler(denoise, nfe=6, solver="dpm", **own).run(2).nfe == 6
    guided = {**own, "label_dim": 2}
    assert Sampler(denoise, nfe=5, **guided).run(2, guidance_scale=2.0).nfe == 5
    runs = (
        lambda: Sampler(denoise, predictor((8, 8)), **own).run(2).nfe,
        lambda: Sampler(denoise, predictor((8, 8), 2.0), **guided).run(2, guidance_scale=2.0).nfe,
    )
    for run in runs:
        if shape == FEATURES[0]:
            assert run() == 5
        else:
            with pytest.raises(ConfigError, match=r"\(B, C, |a row of features for each of 2 samples"):
                run()


def test_a_tap_reads_lines_and_volumes_too():
    for kind, shape in CONVOLUTIONS.values():
        network, x = Plain(kind), torch.randn(2, *shape)
        denoiser = wrapped(network, shape)
        with torch.no_grad(), Tap(network, "middle_block") as tap:
            got = tap.denoiser(lambda x, sigma, net=network: net(x, sigma))(x, SIGMA)
            scaled = denoiser(x * (1 + SIGMA.reshape(-1, *[1] * len(shape)) ** 2).sqrt(), SIGMA)
        torch.testing.assert_close(got.features, scaled.features)


def test_coefficients_adapt_to_volumes_and_refuse_what_they_cannot_read():
    kind, shape = CONVOLUTIONS["volume"]
    options = {"nfe": 3, "variant": "adaptive", "codes": 4, "progress": False}
    fitted = amed_engine.fit(wrapped(Plain(kind), shape), **options)
    assert fitted.inputs == 8 * 6 + 3
    with pytest.raises(ConfigError, match="bottleneck=None"):
        amed_engine.fit(wrapped(Folded(), (3, 2, 8, 8)), **options)
    with pytest.raises(ConfigError, match=r"a row of features for each"):
        amed_engine.fit(lambda x, s: (0.5 * x, x.new_zeros(3 * len(x), 3, 8, 8)), shape=(3, 8, 8), **options)


def guided_diffusion(kind):
    network = Plain(kind)
    network.in_channels, network.image_size = 3, 8
    return network


def test_networks_of_guided_diffusion_are_of_one_to_three_dimensions():
    lines, images, volumes = (guided_diffusion(kind) for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    assert wrap(lines, "epsilon").sample_shape == (3, 8)
    assert wrap(images, "epsilon").sample_shape == (3, 8, 8)
    assert wrap(volumes, "epsilon").sample_shape is None
    assert wrap(volumes, "epsilon").notes["samples"] == "not known: pass shape=(C, F, H, W) to Sampler"
    assert Sampler(wrap(volumes, "epsilon"), nfe=5, shape=(3, 2, 8, 8)).run(2).images.shape == (2, 3, 2, 8, 8)
    with pytest.raises(ConfigError, match=r"takes samples \(3, F, H, W\), got shape=\(3, 8, 8\)"):
        wrap(volumes, "epsilon", shape=(3, 8, 8))
    with pytest.raises(ConfigError, match=r"takes samples \(3, H, W\), got shape=\(3, 2, 8, 8\)"):
        wrap(images, "epsilon", shape=(3, 2, 8, 8))
