"""Every family of adapters in the captured loop: it equals the eager one, and nothing in it waits for the host."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from amed_engine import AMEDPredictor, Sampler, make_plan
from amed_engine.adapters import ClassifierFree, ClassifierGuided, Flux, Thresholded, wrap
from amed_engine.engine.graphs import GraphCache
from amed_engine.engine.resolve import resolve
from amed_engine.engine.runner import BoundLoop
from amed_engine.networks import OpenAIUNet

SHAPE, CLASSES = (4, 8, 8), 3
TEXT = {"encoder_hidden_states": torch.randn(2, 5, 12), "pooled_projections": torch.randn(2, 6)}


class MiddleUNet(nn.Module):
    """Built like the U-Nets of guided-diffusion as others publish them; four classes, the last meaning none."""

    image_size, in_channels, out_channels, num_classes = 8, 4, 4, CLASSES + 1

    def __init__(self):
        super().__init__()
        self.first, self.time = nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.Linear(1, 8)
        self.label_emb = nn.Embedding(CLASSES + 1, 8)
        self.middle_block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.SiLU())
        self.last = nn.ConvTranspose2d(8, 4, 2, stride=2)

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor) -> Tensor:
        emb = self.time(timesteps[:, None].to(x.dtype) / 1000) + self.label_emb(y)
        return self.last(self.middle_block(self.first(x) + emb[:, :, None, None]))


class Classifier(nn.Module):
    out_channels = CLASSES + 1

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, CLASSES + 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layer(x.mean(dim=(2, 3)).tanh()) * (1 + t[:, None] / 1000)


class Prompted(nn.Module):
    """Prompts (B, L, 12), of no published class."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(12, 4)

    def forward(self, x: Tensor, t: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return 0.1 * x + self.mix(encoder_hidden_states).mean(dim=1)[:, :, None, None] * (t / 1000)[:, None, None, None]


def wrapped(prediction, **options):
    return wrap(MiddleUNet(), prediction, null_class=CLASSES, verify=False, **options)


def openai():
    network = OpenAIUNet(8, 4, 32, 4, 1, [2], channel_mult=[1, 1], num_classes=CLASSES + 1)
    return wrap(network, "cm", null_class=CLASSES)


def prompted():
    text = {"encoder_hidden_states": TEXT["encoder_hidden_states"]}
    none = {name: torch.zeros_like(value[:1]) for name, value in text.items()}
    return wrap(Prompted(), "v", shape=SHAPE, conditions=text, null_conditions=none, verify=False)


def unet_2d():
    diffusers = pytest.importorskip("diffusers", reason="needs pip install 'amed-engine[diffusers]'")
    network = diffusers.UNet2DModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    )  # fmt: skip
    return wrap(network, "epsilon")


def unet_2d_condition():
    diffusers = pytest.importorskip("diffusers", reason="needs pip install 'amed-engine[diffusers]'")
    network = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=12,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
    )  # fmt: skip
    text = {"encoder_hidden_states": TEXT["encoder_hidden_states"]}
    none = {name: torch.zeros_like(value[:1]) for name, value in text.items()}
    return wrap(network, "epsilon", conditions=text, null_conditions=none)


def dit():
    diffusers = pytest.importorskip("diffusers", reason="needs pip install 'amed-engine[diffusers]'")
    heads = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "norm_num_groups": 4}
    shape = {"sample_size": 8, "in_channels": 4, "out_channels": 8}
    return wrap(diffusers.DiTTransformer2DModel(**shape, **heads, num_embeds_ada_norm=CLASSES))


def sd3():
    diffusers = pytest.importorskip("diffusers", reason="needs pip install 'amed-engine[diffusers]'")
    network = diffusers.SD3Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1,
        pos_embed_max_size=8, joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=6,
    )  # fmt: skip
    return wrap(network, conditions=TEXT)


def flux():
    diffusers = pytest.importorskip("diffusers", reason="needs pip install 'amed-engine[diffusers]'")
    network = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=6, guidance_embeds=True, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    none = {name: torch.zeros_like(value[:1]) for name, value in TEXT.items()}
    return wrap(Flux(network, 2.0), conditions=TEXT, null_conditions=none, shape=SHAPE)


PREDICTS = ("epsilon", "v", "x0", "flow", "edm", "cm", "vp", "ve", "iddpm", "denoised")
MAKERS = {
    **{name: lambda name=name: wrapped(name) for name in PREDICTS},
    "cosine": lambda: wrapped("epsilon", betas="cosine"),
    "half": lambda: wrap(MiddleUNet().bfloat16(), "epsilon", null_class=CLASSES),
    "openai": openai,
    "prompted": prompted,
    "guided": lambda: ClassifierFree(wrapped("epsilon"), 3.0),
    "guided by two calls": lambda: ClassifierFree(wrapped("epsilon"), 3.0, batched=False),
    "guided in an interval": lambda: ClassifierFree(wrapped("epsilon"), 3.0, interval=(0.3, 5.0)),
    "guided prompts": lambda: ClassifierFree(prompted(), 3.0),
    "guided flux": lambda: ClassifierFree(flux(), 3.0),
    "thresholded": lambda: Thresholded(wrapped("epsilon"), floor=0.05),
    "thresholded, guided": lambda: Thresholded(ClassifierFree(wrapped("v"), 3.0), floor=0.05),
    "classifier": lambda: ClassifierGuided(wrapped("epsilon"), Classifier(), 2.0),
    "UNet2DModel": unet_2d,
    "UNet2DConditionModel": unet_2d_condition,
    "DiT": dit,
    "SD3": sd3,
    "Flux": flux,
}


def made(name):
    torch.manual_seed(0)
    return MAKERS[name]().eval().requires_grad_(False)


def samplers(denoiser, **options):
    """Five evaluations with a predictor, which reads the bottleneck where there is one."""
    torch.manual_seed(1)
    predictor = AMEDPredictor(0.05, 0.2, bottleneck=(4, 4))
    predictor.plan = make_plan(5, solver="amed", sigma_min=0.05, sigma_max=12.0)
    return Sampler(denoiser, predictor, verify=False, **options)


def labels_for(denoiser, rows):
    """Class numbers, in turns; the last row of a denoiser that knows no class means none."""
    if not denoiser.label_dim:
        return None
    labels = torch.arange(rows) % min(denoiser.label_dim, 2)
    return torch.nn.functional.one_hot(labels, denoiser.label_dim).float()


@pytest.mark.parametrize("name", MAKERS)
def test_the_captured_loop_gives_the_eager_images(double, name):
    denoiser = made(name)
    eager, captured = samplers(denoiser), samplers(denoiser)
    captured._runner.cache = GraphCache(double, (1, 4), denoiser, stats=captured._runner.stats)
    expected = eager.run(range(6), class_labels=labels_for(denoiser, 6))
    for _ in range(2):
        result = captured.run(range(6), class_labels=labels_for(denoiser, 6))  # padded and split: 4, then 2 of 4
        assert (result.backend, result.nfe) == ("graph", 5)
        torch.testing.assert_close(result.images, expected.images, rtol=1e-4, atol=1e-4)
    assert captured.stats().captures == 2
    assert captured.stats().eager_runs == 0


@pytest.mark.parametrize("name", MAKERS)
def test_nothing_in_the_loop_waits_for_the_host(no_host, monkeypatch, name):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which knows no meta device
    denoiser = copy.deepcopy(made(name)).to("meta")
    program = samplers(made(name)).program
    predictor = copy.deepcopy(program.predictor).to("meta")
    program = type(program)(program.solver, program.sigmas, predictor, program.afs).on(
        torch.device("meta"), torch.float32
    )
    loop = BoundLoop(resolve(denoiser), program, None)
    labels = labels_for(denoiser, 2)
    arguments = torch.empty(2, *SHAPE, device="meta"), None if labels is None else labels.to("meta")
    with torch.no_grad(), no_host() as watch:
        assert loop(*arguments).shape == (2, *SHAPE)
    assert watch.seen > 50


@pytest.mark.gpu
@pytest.mark.parametrize("name", MAKERS)
def test_a_graph_gives_the_eager_images(name):
    denoiser = made(name).cuda()
    labels = labels_for(denoiser, 6)
    expected = samplers(denoiser, backend="eager").run(range(6), class_labels=labels)
    result = samplers(denoiser, backend="graph", batch_sizes=(1, 4)).run(range(6), class_labels=labels)
    assert result.backend == "graph"
    torch.testing.assert_close(result.images, expected.images, rtol=1e-3, atol=1e-3)
