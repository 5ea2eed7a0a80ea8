"""Latents of any rank, with or without a shape that is told; memory formats that fit them; pictures of images alone."""

import numpy as np
import pytest
import torch
from torch import nn

from amed_engine import Sampler, fit, load_package, measure_mean
from amed_engine.adapters import ClassifierFree, ClassifierGuided, Thresholded, save_onnx, wrap
from amed_engine.engine.images import to_uint8
from amed_engine.errors import ConfigError

SHAPES = [(6,), (3, 16), (3, 8, 8), (3, 4, 8, 8), (2, 3, 4, 6, 6)]
IDS = [f"{len(shape)}-D" for shape in SHAPES]
FORMATS = {3: torch.channels_last, 4: torch.channels_last_3d}


def shrink(x, sigma):
    return x / (1 + sigma.reshape(-1, *[1] * (x.dim() - 1)) ** 2)


class Conditional(nn.Module):
    """A layer along the last axis, moved by a number for each class."""

    label_dim = 3

    def __init__(self, shape):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.classes = nn.Linear(shape[-1], shape[-1]), nn.Linear(3, 1)

    def forward(self, x, t, labels):
        return self.layer(x) + self.classes(labels).reshape(-1, *[1] * (x.dim() - 1))


class Convolution(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.layer = kind(3, 3, 3, padding=1)

    def forward(self, x, t):
        return self.layer(x)


class Classifier(nn.Module):
    out_channels = 3

    def forward(self, x, t):
        return x.flatten(1)[:, :3].tanh()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_latents_tell_their_own_shape(shape, dtype):
    told = Sampler(shrink, nfe=5, shape=shape, dtype=dtype).run([0, 1])
    latents = torch.cat([torch.randn(1, *shape, dtype=dtype) for _ in range(2)])
    drawn = Sampler(shrink, nfe=5, dtype=dtype).run(latents).images
    assert drawn.dtype == told.images.dtype == dtype
    assert drawn.shape == told.images.shape == (2, *shape)
    torch.testing.assert_close(drawn, Sampler(shrink, nfe=5, shape=shape, dtype=dtype).run(latents).images)
    torch.testing.assert_close(told.images[1:], Sampler(shrink, nfe=5, shape=shape, dtype=dtype).run([1]).images)
    flat = Sampler(shrink, nfe=5, dtype=dtype).run(latents.flatten(1)).images
    torch.testing.assert_close(drawn, flat.reshape(drawn.shape))


def test_latents_are_rows_of_samples_and_numbers_need_a_shape():
    with pytest.raises(ConfigError, match="pass shape="):
        Sampler(shrink, nfe=5).run(2)
    with pytest.raises(ConfigError, match=r"latents must have shape \(B, C, \.\.\.\)"):
        Sampler(shrink, nfe=5).run(torch.randn(4))
    with pytest.raises(ConfigError, match=r"latents must have shape \(B, 3, 16\), got \(2, 3, 4, 4\)"):
        Sampler(shrink, nfe=5, shape=(3, 16)).run(torch.randn(2, 3, 4, 4))


@pytest.mark.parametrize("solver", ["euler", "heun", "dpm", "ipndm", "deis", "dpmpp", "unipc"])
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_solvers_know_no_rank(shape, solver):
    latents, options = torch.randn(2, *shape), {"solver": solver, "nfe": 6}
    images = Sampler(shrink, **options).run(latents).images
    torch.testing.assert_close(images, Sampler(shrink, **options).run(latents.flatten(1)).images.reshape(images.shape))


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_classes_guidance_and_thresholding_know_no_rank(shape):
    denoiser, options = wrap(Conditional(shape), "epsilon", shape=shape), {"class_labels": [0, 2]}
    free = Sampler(ClassifierFree(denoiser, 2.0), nfe=5, afs=False).run([0, 1], **options).images
    by_run = Sampler(denoiser, nfe=5, afs=False).run([0, 1], guidance_scale=2.0, **options).images
    torch.testing.assert_close(free, by_run)
    one = Sampler(denoiser, nfe=5, afs=False).run([1], class_labels=[2], guidance_scale=2.0).images
    torch.testing.assert_close(by_run[1:], one)
    x, sigma, labels = 9 * torch.randn(2, *shape), torch.tensor([9.0, 0.1]), torch.tensor([0, 2])
    clear = Thresholded(denoiser)(x, sigma, labels).x0
    assert denoiser(x, sigma, labels).x0.abs().max() > 1 >= clear.abs().max()
    torch.testing.assert_close(clear[1:], Thresholded(denoiser)(x[1:], sigma[1:], labels[1:]).x0)
    guided = ClassifierGuided(wrap(lambda x, t: x, "epsilon", shape=shape), Classifier(), 1.0)
    assert Sampler(guided, nfe=5).run([0, 1], **options).images.shape == (2, *shape)


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_a_mean_answer_is_of_any_rank(shape):
    denoiser = wrap(Conditional(shape), "epsilon", shape=shape)
    assert measure_mean(denoiser).shape == shape
    assert Sampler(denoiser, nfe=4, afs="mean").run(2).images.shape == (2, *shape)


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_a_loop_of_any_rank_is_exported(shape, tmp_path):
    sampler = Sampler(wrap(Conditional(shape), "epsilon", shape=shape), solver="euler", nfe=2)
    sampler.export(tmp_path / "loop.pt2", "exported")
    got = load_package(tmp_path / "loop.pt2").run([0, 1, 2], class_labels=[0, 1, 2]).images
    torch.testing.assert_close(got, sampler.run([0, 1, 2], class_labels=[0, 1, 2]).images)


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_arrays_of_any_rank_come_back_as_they_came(shape):
    latents = np.random.default_rng(0).standard_normal((2, *shape), dtype=np.float32)
    images = Sampler(shrink, nfe=5).run(latents, output_type="numpy").images
    expected = Sampler(shrink, nfe=5).run(torch.from_numpy(latents.copy())).images
    np.testing.assert_array_equal(images, expected.numpy())


@pytest.mark.parametrize("asked", [torch.channels_last, torch.channels_last_3d])
@pytest.mark.parametrize("told", [True, False], ids=["told", "open"])
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_a_memory_format_is_for_samples_of_its_rank(shape, told, asked):
    seen = []

    def denoise(x, sigma):
        seen.append(x.is_contiguous(memory_format=asked))
        return shrink(x, sigma)

    def run():
        return Sampler(denoise, nfe=5, memory_format=asked, shape=shape if told else None).run(latents).images

    latents = torch.randn(2, *shape)
    if FORMATS.get(len(shape)) is asked:
        torch.testing.assert_close(run(), Sampler(shrink, nfe=5).run(latents).images)
        assert seen
        assert all(seen)
        return
    instead = FORMATS.get(len(shape))
    with pytest.raises(ConfigError, match=r"memory_format=.* is for samples of [34] axes") as caught:
        run()
    assert ("leave memory_format out" if instead is None else f"pass {instead}, or") in str(caught.value)
    assert not seen


def test_a_refused_memory_format_leaves_the_weights_as_they_are():
    network = Convolution(nn.Conv3d)
    before = [parameter.stride() for parameter in network.parameters()]
    with pytest.raises(ConfigError, match=r"pass torch\.channels_last_3d"):
        Sampler(lambda x, s: x, shape=(3, 4, 8, 8), memory_format=torch.channels_last)
    with pytest.raises(ConfigError, match=r"pass torch\.channels_last_3d"):
        Sampler(wrap(network, "epsilon", shape=(3, 4, 8, 8)), memory_format=torch.channels_last)
    assert [parameter.stride() for parameter in network.parameters()] == before


def test_files_of_networks_take_no_memory_format(tmp_path):
    pytest.importorskip("onnxruntime", reason="needs pip install 'amed-engine[onnx]'")
    save_onnx(wrap(Convolution(nn.Conv2d), "epsilon", shape=(3, 8, 8), verify=False), tmp_path / "net.onnx")
    with pytest.raises(ConfigError, match=r"memory_format=torch\.channels_last: .*ONNX graphs take none; leave it out"):
        Sampler(tmp_path / "net.onnx", solver="euler", memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("kind", "axes"),
    [(nn.Conv1d, "3, L"), (nn.Conv2d, "3, H, W"), (nn.Conv3d, "3, F, H, W")],
    ids=["1-D", "2-D", "3-D"],
)
def test_the_shape_that_is_asked_for_is_of_the_network_s_rank(kind, axes):
    class Net(nn.Module):
        in_channels = out_channels = 3

        def __init__(self):
            super().__init__()
            self.middle_block = kind(3, 3, 1)

        def forward(self, x, timesteps):
            return self.middle_block(x)

    model, asked = wrap(Net(), "epsilon"), rf"pass shape=\({axes}\)"
    for use in (
        lambda: Sampler(model, solver="euler").run([0]),
        lambda: measure_mean(model),
        lambda: fit(model, progress=False),
    ):
        with pytest.raises(ConfigError, match=asked):
            use()


@pytest.mark.parametrize("shape", [(3, 16), (3, 4, 8, 8)], ids=["1-D", "3-D"])
def test_only_images_are_pictures(shape):
    with pytest.raises(ConfigError, match=r"pictures need samples of shape \(1 or 3, H, W\), .*; draw them with .*run"):
        to_uint8(Sampler(shrink, nfe=5, shape=shape).run(2).images)
