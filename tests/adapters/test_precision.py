"""In which dtypes a network is handed its state, time, labels and conditions: those that its own layers take."""

import pytest
import torch
from torch import nn

from amed_engine import ConfigError, Sampler, wrap
from amed_engine.adapters import ClassifierGuided
from amed_engine.adapters.precision import Precision

diffusers = pytest.importorskip("diffusers")

HALVES = (torch.float16, torch.bfloat16)


def images(denoiser, **options):
    return (
        Sampler(denoiser, solver="euler", nfe=3, **options)
        .run([1, 2], **({"class_labels": 1} if denoiser.label_dim else {}))
        .images
    )


def wrapped(network, **options):
    return wrap(network, "epsilon", shape=(3, 8, 8), **options)


def relative(got, expected):
    return float((got - expected).abs().max() / expected.abs().max())


class Seeded(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(1, 3)
        self.body = nn.Conv2d(3, 3, 1)
        self.requires_grad_(False).eval()


class CastsTime(Seeded):
    """A float32 layer for the time beside a body of another dtype."""

    def forward(self, x, t):
        self.seen = x.dtype, t.dtype
        return self.body(x) + self.first(t[:, None] / 1000)[:, :, None, None].to(x.dtype)


class Plain(Seeded):
    """Every layer in the dtype of its input."""

    def __init__(self):
        super().__init__()
        self.labels = nn.Linear(4, 3)

    def forward(self, x, t, rows):
        self.seen = x.dtype, t.dtype, rows.dtype
        return self.body(x) + (self.first(t[:, None] / 1000) + self.labels(rows))[:, :, None, None]


class CastsBody(Seeded):
    """As guided-diffusion does it: a body in half precision inside, float32 outside."""

    def __init__(self):
        super().__init__()
        self.body.half()
        self.out = nn.Conv2d(3, 3, 1)

    def forward(self, x, t):
        self.seen = x.dtype, t.dtype
        return self.out(self.body(x.half()).to(x.dtype))


class Storage(Seeded):
    """Weights in whole numbers, first of all the parameters, and scales beside them."""

    def __init__(self, scales_are_buffers=False, dtype=torch.float32):
        super().__init__()
        del self.first, self.body
        self.packed = nn.Parameter(torch.randint(-127, 127, (3, 3), dtype=torch.int8), requires_grad=False)
        scale = torch.full((3, 1), 0.01, dtype=dtype)
        if scales_are_buffers:
            self.register_buffer("scale", scale)
        else:
            self.scale = nn.Parameter(scale, requires_grad=False)

    def forward(self, x, t):
        self.seen = x.dtype
        return torch.einsum("oc,bchw->bohw", self.packed.to(self.scale.dtype) * self.scale, x)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_float32_layer_does_not_speak_for_a_half_body(dtype):
    network = CastsTime()
    network.body.to(dtype)
    denoiser = wrapped(network)
    assert images(denoiser).isfinite().all()
    assert network.seen == (dtype, torch.float32)
    assert "precision   network " + str(dtype).removeprefix("torch.") in denoiser.explain()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_time_and_labels_come_in_half_precision_only_where_layers_ask_for_it(dtype):
    network = Plain().to(dtype)
    assert images(wrapped(network, label_dim=4)).isfinite().all()
    assert network.seen == (dtype, dtype, dtype)


def test_a_half_body_inside_does_not_speak_for_the_network():
    network = CastsBody()
    assert images(wrapped(network)).isfinite().all()
    assert network.seen == (torch.float32, torch.float32)


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_whole_numbers_are_storage(buffers, dtype):
    network = Storage(buffers, dtype)
    got = images(wrapped(network))
    assert network.seen == dtype
    expected = images(wrapped(lambda x, t: network(x.to(dtype), t)))
    assert torch.equal(got, expected)


def test_a_network_is_tried_once_and_again_when_it_was_converted():
    network, calls = CastsTime(), []
    network.body.bfloat16()
    network.register_forward_pre_hook(lambda module, inputs: calls.append(inputs[0].dtype))
    denoiser, x, sigma = wrapped(network, verify=False), torch.randn(2, 3, 8, 8), torch.ones(2)
    denoiser(x, sigma)
    assert calls == [torch.float32, torch.bfloat16]  # the widest first
    denoiser(x, sigma)
    assert calls[2:] == [torch.bfloat16]
    network.float()
    denoiser(x, sigma)
    assert calls[-1] == torch.float32


def test_other_errors_are_the_networks_own():
    def fails(x, t):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        wrapped(fails)(torch.randn(2, 3, 8, 8), torch.ones(2))


def test_a_network_that_takes_none_of_its_dtypes_says_why():
    def fails(x, t):
        raise RuntimeError(f"expected scalar type Long but found {x.dtype}")

    with pytest.raises(RuntimeError, match=r"found torch\.float32"):
        Precision(CastsBody()).call(
            CastsBody(), torch.float32, lambda handed: fails(torch.zeros(1, dtype=handed.state), 0)
        )


def test_several_dtypes_are_tried_before_a_network_is_compiled():
    network = CastsTime()
    network.body.bfloat16()
    denoiser, inputs = wrapped(network, verify=False), (torch.randn(2, 3, 8, 8), torch.ones(2))
    with pytest.raises(ConfigError, match="call the denoiser once before it is compiled, traced or exported"):
        torch.jit.trace(denoiser, inputs, check_trace=False)
    expected = denoiser(*inputs).x0
    torch.testing.assert_close(torch.export.export(denoiser, inputs).module()(*inputs).x0, expected)


# ---- networks of diffusers


def unet(**options):
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    return diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, **blocks, **options
    ).eval()


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
def test_layerwise_casting_computes_in_its_compute_dtype(compute):
    networks = [unet(), unet()]
    for network in networks:
        network.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=compute)
    got = images(wrap(networks[0], "epsilon"))
    expected = images(wrapped(lambda x, t: networks[1](x.to(compute), t, return_dict=False)[0]))
    assert relative(got, expected) < 1e-5
    assert Sampler(wrap(networks[0], "epsilon")).model.precision == str(compute).removeprefix("torch.")


class CastsItself(Seeded):
    """A body in half precision beside a float32 layer: it casts between them."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Conv2d(3, 3, 1)
        self.body.bfloat16()
        self.requires_grad_(False).eval()

    def forward(self, x, t):
        return self.body(self.enter(x).tanh().bfloat16())


def test_layerwise_casting_of_a_part_speaks_for_that_part():
    from diffusers.hooks import apply_layerwise_casting

    plain, cast = CastsItself(), CastsItself()
    for parameter in plain.body.parameters():
        parameter.copy_(parameter.to(torch.float8_e4m3fn))  # what the storage leaves of it
    apply_layerwise_casting(cast.body, storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    expected = images(wrapped(lambda x, t: plain(x, t).float()))
    assert not torch.equal(images(wrapped(CastsItself())), expected)
    assert torch.equal(images(wrapped(cast)), expected)


class Denoiser(Seeded):
    """The caller's own (x, sigma) -> D. inside: it casts to its layers' dtype by itself."""

    def __init__(self, dtype, inside=False):
        super().__init__()
        self.inside = inside
        self.to(dtype)

    def forward(self, x, sigma):
        self.seen = x.dtype, sigma.dtype
        return self.body(x.to(self.body.weight.dtype) if self.inside else x) / (1 + sigma.view(-1, 1, 1, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_denoiser_given_as_it_is_gets_what_its_layers_take(dtype):
    network = Denoiser(dtype)
    found = Sampler(network, solver="euler", nfe=3, shape=(3, 8, 8)).run([1, 2]).images
    levels = torch.float64 if dtype == torch.float64 else torch.float32
    assert network.seen == (dtype, levels)
    plain = lambda x, sigma: Denoiser(dtype)(x.to(dtype), sigma.to(levels)).float()  # noqa: E731
    expected = Sampler(plain, solver="euler", nfe=3, shape=(3, 8, 8)).run([1, 2]).images
    assert torch.equal(found, expected)


def test_a_denoiser_of_half_precision_that_takes_float32_keeps_it():
    network = Denoiser(torch.bfloat16, inside=True)
    Sampler(network, solver="euler", nfe=3, shape=(3, 8, 8)).run([1])
    assert network.seen == (torch.float32, torch.float32)


def test_group_offloading_runs():
    pytest.importorskip("accelerate")
    network = unet()
    expected = images(wrap(unet(), "epsilon"))
    cpu = torch.device("cpu")
    network.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    assert torch.equal(images(wrap(network, "epsilon")), expected)


# ---- classifiers


class Classifier(nn.Module):
    def __init__(self, writes=False):
        super().__init__()
        torch.manual_seed(1)
        self.image, self.time, self.writes = nn.Conv2d(3, 10, 8), nn.Linear(1, 10), writes

    def forward(self, x, t):
        self.seen = x.dtype, t.dtype
        image, time = x.clone(), t.clone()
        if self.writes:
            x.zero_()
            t.zero_()
        return self.image(image).flatten(1) + self.time(time[:, None] / 1000)


class Body(Seeded):
    def forward(self, x, t):
        return self.body(x)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_a_classifier_gets_its_own_precision_and_may_write(dtype, inference):
    def run(classifier):
        guided = ClassifierGuided(wrapped(Body().to(dtype)), classifier.to(dtype), 1.0, label_dim=10)
        with torch.inference_mode(inference):
            return Sampler(guided, solver="euler", nfe=3).run(torch.ones(2, 3, 8, 8), class_labels=1).images.clone()

    classifier = Classifier()
    got = run(classifier)
    assert classifier.seen == (dtype, dtype)
    assert torch.equal(run(Classifier(writes=True)), got)
    exact = ClassifierGuided(wrapped(Body()), Classifier(), 1.0, label_dim=10)
    expected = Sampler(exact, solver="euler", nfe=3).run(torch.ones(2, 3, 8, 8), class_labels=1).images
    assert relative(got, expected) < (1e-6 if dtype == torch.float32 else 0.05)


class Unlisted(nn.Module):
    """Its only weight is no parameter: a buffer, or an attribute like any other."""

    def __init__(self, dtype, buffer):
        super().__init__()
        weight = torch.randn(3, 3, 1, 1, generator=torch.Generator().manual_seed(0)).to(dtype)
        self.register_buffer("weight", weight) if buffer else setattr(self, "weight", weight)

    def forward(self, x, t):
        return nn.functional.conv2d(x, self.weight)


@pytest.mark.parametrize("buffer", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=str)
def test_a_network_whose_weights_are_no_parameters_gets_what_they_take(dtype, buffer):
    network = Unlisted(dtype, buffer)
    expected = images(wrapped(lambda x, t: network(x.to(dtype), t)))
    assert torch.equal(images(wrapped(network)), expected)


class Silent(Classifier):
    @torch.no_grad()
    def forward(self, x, t):
        return super().forward(x, t)


def test_a_classifier_without_a_gradient_is_refused():
    guided = ClassifierGuided(wrapped(Body()), Silent(), 1.0, label_dim=10)
    with pytest.raises(ConfigError, match="the classifier gives an answer that no gradient comes from: it runs under"):
        guided(torch.ones(2, 3, 8, 8), torch.ones(2), torch.tensor([1, 2]))


def test_a_classifier_made_under_inference_mode_is_refused():
    with torch.inference_mode():
        classifier = Classifier()
    guided = ClassifierGuided(wrapped(Body()), classifier, 1.0, label_dim=10)
    with pytest.raises(ConfigError, match=r"the classifier holds tensors that were made under torch.inference_mode"):
        guided(torch.ones(2, 3, 8, 8), torch.ones(2), torch.tensor([1, 2]))
