"""The bottleneck is returned by what is traced, compiled, exported, copied and shared between threads."""

import copy
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import amed_engine
from amed_engine.adapters import taps, wrap
from amed_engine.adapters.taps import Tap, find
from amed_engine.errors import ConfigError
from amed_engine.networks import EDMPrecond, OpenAIUNet

SIGMA = torch.tensor([0.3, 5.0])


def inputs(batch=2):
    return torch.randn(batch, 1, 8, 8, generator=torch.Generator().manual_seed(batch)), SIGMA.repeat(batch)[:batch]


def truth(denoiser, x, sigma):
    """The output of middle_block, seen by a hook of our own."""
    seen = []
    handle = denoiser.network.middle_block.register_forward_hook(lambda m, i, o: seen.append(o))
    denoised = denoiser(x, sigma).x0
    handle.remove()
    return denoised, seen[0]


@pytest.fixture
def denoiser(make_unet):
    return wrap(make_unet(), "epsilon")


def compiled(denoiser, x, sigma):
    torch.compiler.reset()
    return torch.compile(denoiser, fullgraph=True, backend="aot_eager")


def traced(denoiser, x, sigma):
    return torch.jit.trace(denoiser, (x, sigma))


def exported(denoiser, x, sigma):
    batch = torch.export.Dim("batch", min=1, max=1024)
    program = torch.export.export(denoiser, (x, sigma), dynamic_shapes=({0: batch}, {0: batch}))
    return program.module()


@pytest.mark.parametrize("transform", [compiled, traced, exported])
def test_a_tap_survives(denoiser, transform):
    with torch.no_grad():
        changed = transform(denoiser, *inputs())
        other = inputs(4)  # other data and another batch than was looked at
        x0, features = changed(*other)
        expected = truth(denoiser, *other)
    torch.testing.assert_close(x0, expected[0])
    torch.testing.assert_close(features, expected[1])


@pytest.mark.parametrize("suffix", [".pt", ".pt2"])
def test_a_saved_adapter_samples_with_a_predictor_that_reads_its_bottleneck(denoiser, tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if suffix == ".pt":
            traced(denoiser, *inputs()).save(str(path))
        else:
            batch = torch.export.Dim("batch", min=1, max=1024)
            torch.export.save(torch.export.export(denoiser, inputs(), dynamic_shapes=({0: batch}, {0: batch})), path)
    predictor = amed_engine.distill(denoiser, nfe=3, total_kimg=0.008, batch=8, progress=False)
    predictor.plan = None
    options = {"nfe": 3, "sigma_min": denoiser.sigma_min, "sigma_max": denoiser.sigma_max, "shape": (1, 8, 8)}
    expected = amed_engine.Sampler(denoiser, predictor, **options).run([1, 2, 3]).images
    got = amed_engine.Sampler(str(path), predictor, **options).run([1, 2, 3]).images
    torch.testing.assert_close(got, expected)


def test_a_copy_has_a_tap_of_its_own(denoiser):
    twin = copy.deepcopy(denoiser)
    for parameter in twin.parameters():
        parameter.zero_()
    assert twin(*inputs()).features.abs().max() == 0
    assert denoiser(*inputs()).features.abs().max() > 0
    assert twin(*inputs()).features.abs().max() == 0


def test_threads_do_not_see_each_others_bottleneck(denoiser):
    def work(seed):
        x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
        expected = denoiser.network.middle_block(
            denoiser.network.first(x / (1 + SIGMA[0] ** 2).sqrt())
            + denoiser.network.time(denoiser.family(SIGMA[:1]).time[:, None] / 1000)[:, :, None, None]
        )
        return all(torch.allclose(denoiser(x, SIGMA[:1]).features, expected, atol=1e-6) for _ in range(50))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [True] * 4


def test_threads_that_tap_one_foreign_network_read_their_own():
    network, meet = nn.Conv2d(1, 1, 1), threading.Barrier(2, timeout=60)

    def model(x, sigma):
        features = network(x)
        meet.wait()
        return features

    def work(value):
        x, own = torch.full((1, 1, 2, 2), value), []
        with torch.no_grad(), Tap(network, network) as tap:
            denoiser = tap.denoiser(model)
            meet.wait()
            for _ in range(20):
                denoised = denoiser(x, SIGMA[:1])
                own.append(torch.equal(denoised.features, denoised.x0))
            meet.wait()
        return own

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, (1.0, 2.0))) == [[True] * 20] * 2
    assert not network._forward_hooks


def test_bottlenecks_of_known_networks_are_found(make_unet, tiny_model):
    assert find(make_unet()) == "middle_block"
    assert find(tiny_model) == "model.enc.4x4_block0"
    assert find(tiny_model.model) == "enc.4x4_block0"
    assert find(nn.Conv2d(1, 1, 1)) is None
    assert find(lambda x, t: x) is None


def test_a_tapped_edm_network_gives_what_ours_returns(tiny_model):
    class Published(nn.Module):
        """Returns the image alone, as the published class does."""

        def __init__(self, own: EDMPrecond):
            super().__init__()
            self.model, self.round_sigma, self.label_dim = own.model, torch.as_tensor, 0
            self.img_channels, self.img_resolution, self.sigma_min, self.sigma_max = 1, 8, 0.002, 80.0
            self.own = [own]

        def forward(self, x, sigma):
            return self.own[0](x, sigma).x0

    denoiser, (x, sigma) = wrap(Published(tiny_model)), inputs()
    for got, expected in zip(denoiser(x, sigma), tiny_model(x, sigma), strict=True):
        torch.testing.assert_close(got, expected)
    assert denoiser.sigma_max == 80.0


def test_raw_networks_of_edm_under_its_preconditioning_are_its_denoiser(tiny_conditional):
    denoiser, (x, sigma) = wrap(tiny_conditional.model, shape=(1, 8, 8)), inputs()
    labels = torch.tensor([3, 7])
    for got, expected in zip(denoiser(x, sigma, labels), tiny_conditional(x, sigma, labels), strict=True):
        torch.testing.assert_close(got, expected)


def test_a_bottleneck_is_named_or_left_out(make_unet):
    x, sigma = inputs()
    assert wrap(make_unet(), "epsilon", bottleneck=None)(x, sigma).features is None
    named = wrap(make_unet(), "epsilon", bottleneck="middle_block.0")(x, sigma).features
    torch.testing.assert_close(nn.functional.silu(named), wrap(make_unet(), "epsilon")(x, sigma).features)


def test_a_bottleneck_that_cannot_be_read_is_refused(make_unet):
    with pytest.raises(ConfigError, match=r"'center' is no submodule of MiddleUNet; it has first, time, middle_block"):
        wrap(make_unet(), "epsilon", bottleneck="center")
    with pytest.raises(ConfigError, match=r"gave \(2, 4\) as the bottleneck"):
        wrap(make_unet(), "epsilon", bottleneck="time", verify=False)(*inputs())
    scripted = torch.jit.trace(make_unet(), (torch.zeros(1, 1, 8, 8), torch.zeros(1)))
    with pytest.raises(ConfigError, match="already scripted or compiled"):
        wrap(scripted, "epsilon", bottleneck="middle_block")
    assert wrap(scripted, "epsilon")(*inputs()).features is None


def test_a_compiled_network_is_wrapped_before_it_is_compiled(make_unet):
    with pytest.raises(ConfigError, match="wrap the plain module"):
        wrap(torch.compile(make_unet(), backend="eager"), "epsilon")


def test_openai_networks_return_theirs(make_unet):
    network = OpenAIUNet(8, 3, 32, 3, 1, [2], channel_mult=[1, 2]).eval()
    x = torch.randn(2, 3, 8, 8)
    assert tuple(wrap(network, "epsilon")(x, SIGMA).features.shape[1:]) == network.bottleneck_shape


def test_a_network_that_was_compiled_in_place_is_refused_before_it_runs():
    network = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 1, 3, padding=1))
    network.compile(backend="eager")
    with pytest.raises(ConfigError, match="cannot be read from a network that is already scripted or compiled"):
        taps.attach(network, "0", object())


def test_a_hook_is_not_removed_while_torch_compile_counts_them(make_unet):
    """Its guards look the last hook up by its number, after the graph was compiled."""
    network = make_unet()
    older, denoiser = [wrap(network, "epsilon")], wrap(network, "epsilon")

    def backend(graph, _):
        older.clear()
        return graph.forward

    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(denoiser, backend=backend)
        answers = compiled(*inputs()), denoiser(*inputs())
    torch.testing.assert_close(answers[0].x0, answers[1].x0)
    torch.testing.assert_close(answers[0].features, answers[1].features)
    assert not older
    assert len(network.middle_block._forward_hooks) == 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("prediction", ["epsilon", "flow", "edm"])
def test_an_adapter_without_a_bottleneck_is_traced(make_unet, prediction):
    denoiser = wrap(make_unet(), prediction, bottleneck=None)
    with torch.no_grad():
        answer = traced(denoiser, *inputs())(*inputs(4))
        assert isinstance(answer, torch.Tensor)
        torch.testing.assert_close(answer, denoiser(*inputs(4)).x0)
    sampler = amed_engine.Sampler(traced(denoiser, *inputs()), solver="euler", nfe=2, sigma_min=0.1, sigma_max=10.0)
    assert sampler.run(2).images.shape == (2, 1, 8, 8)
