"""What wrap returns comes back from a directory as it was: the same samples, the same fingerprint, and no code from files."""

import functools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import amed_engine
from amed_engine import ConfigError, FileFormatError, Sampler, from_pretrained, save_pretrained
from amed_engine.adapters import (
    EDM,
    VE,
    VP,
    ClassifierFree,
    Coefficients,
    Consistency,
    Family,
    Flow,
    VPScore,
    alphas_cumprod,
    wrap,
)
from amed_engine.adapters.fingerprint import digest, fingerprint
from amed_engine.checkpoints.files import config_text
from amed_engine.networks import OpenAIUNet


def unet(classes=None, dtype=torch.float32):
    torch.manual_seed(0)
    network = OpenAIUNet(
        image_size=8,
        in_channels=3,
        out_channels=3,
        model_channels=32,
        num_res_blocks=1,
        channel_mult=(1, 2),
        num_classes=classes,
        attention_resolutions=(),
    )  # fmt: skip
    for parameter in network.parameters():  # the last layers start at zero
        nn.init.normal_(parameter, std=0.1)
    return network.to(dtype).eval()


def diffusers_unet(**options):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    small = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    return diffusers.UNet2DModel(**small, **blocks, attention_head_dim=8, **options).eval()


def text_unet():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    small = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return diffusers.UNet2DConditionModel(**small, **blocks, cross_attention_dim=8, attention_head_dim=2).eval()


def prompts(rows):
    return {"encoder_hidden_states": torch.randn(rows, 3, 8, generator=torch.Generator().manual_seed(rows))}


LEVELS = torch.tensor([50.0, 10.0, 2.0, 0.4])
SAVED = {
    "noise": lambda: wrap(unet(), "epsilon"),
    "score of a table of levels": lambda: wrap(unet(), "score", levels=LEVELS, verify=False),
    "score of a range of its own": lambda: wrap(unet(), VPScore(0, 1, horizon=10), verify=False),
    "EDM's with a range of its own": lambda: wrap(unet(), EDM(1.0, 0.01, 30.0), verify=False),
    "steps of its own": lambda: wrap(unet(), "v", betas=alphas_cumprod("cosine", steps=77), verify=False),
    "no bottleneck": lambda: wrap(unet(), "x0", betas="scaled_linear", bottleneck=None),
    "classes": lambda: wrap(unet(5), "epsilon"),
    "half precision": lambda: wrap(unet(dtype=torch.bfloat16), "epsilon"),
    "a flow": lambda: wrap(unet(), Flow(steps=1)),
    "EDM's with another scale": lambda: wrap(unet(), EDM(sigma_data=1.0, v_prediction=True)),
    "VP": lambda: wrap(unet(), VP(beta_d=10.0)),
    "VE": lambda: wrap(unet(), VE()),
    "iDDPM": lambda: wrap(unet(), "iddpm"),
    "of diffusers": lambda: wrap(diffusers_unet(), "epsilon", betas="cosine"),
    "of diffusers, classes and none": lambda: wrap(diffusers_unet(num_class_embeds=4), "epsilon", null_class=3),
    "of diffusers, half precision": lambda: wrap(diffusers_unet().half(), "epsilon"),
    "prompts": lambda: wrap(text_unet(), "epsilon", conditions=prompts(2), null_conditions=prompts(1)),
}


def drawn(denoiser):
    asked = {"class_labels": [0, 1]} if denoiser.label_dim else {}
    asked |= {"guidance_scale": 2.0} if denoiser.can_guide else {}
    return Sampler(denoiser, solver="ipndm", nfe=3).run([3, 4], **asked).images


@pytest.mark.parametrize("name", SAVED)
def test_it_comes_back_as_it_was(name, tmp_path):
    denoiser = SAVED[name]()
    if name == "noise":
        denoiser.sigma_max = 20.0
    save_pretrained(denoiser, tmp_path / "saved")
    again = from_pretrained(tmp_path / "saved")
    assert fingerprint(again) == fingerprint(denoiser)
    for fact in ("sample_shape", "label_dim", "sigma_min", "sigma_max", "can_guide", "bottleneck", "bottleneck_size"):
        assert getattr(again, fact) == getattr(denoiser, fact), fact
    assert again.notes["sigma"] == denoiser.notes["sigma"] or name == "noise"  # its range is set above
    torch.testing.assert_close(drawn(again), drawn(denoiser), rtol=0, atol=0)
    torch.testing.assert_close(Sampler(tmp_path / "saved", nfe=3).plan.levels, Sampler(denoiser, nfe=3).plan.levels)
    assert not [file for file in (tmp_path / "saved").rglob("*") if file.suffix not in (".json", ".safetensors", "")]


@pytest.mark.parametrize("family", ["consistency", Consistency(sigma_min=0.01, boundary=True)])
def test_a_consistency_function_comes_back_as_one(family, tmp_path):
    denoiser = wrap(unet(), family, verify=False)
    save_pretrained(denoiser, tmp_path)
    again = from_pretrained(tmp_path)
    assert again.consistency
    assert again.notes["predicts"] == denoiser.notes["predicts"]
    images = [Sampler(model, solver="consistency", nfe=2).run([0, 1]).images for model in (again, denoiser)]
    assert torch.equal(*images)


def test_prompts_that_each_call_brings_are_named(tmp_path):
    save_pretrained(wrap(text_unet(), "epsilon", shape=(4, 8, 8)), tmp_path)
    given, x = prompts(2), torch.randn(2, 4, 8, 8)
    again = from_pretrained(tmp_path)
    assert again.conditions.names == ("encoder_hidden_states",)
    assert again(x, torch.ones(2), **given).x0.shape == x.shape


def test_a_predictor_goes_with_what_comes_back(tmp_path):
    denoiser = wrap(unet(), "epsilon")
    predictor = amed_engine.distill(denoiser, nfe=3, total_kimg=0.008, batch=8, progress=False)
    save_pretrained(denoiser, tmp_path / "network")
    save_pretrained(predictor, tmp_path / "predictor")
    again = from_pretrained(tmp_path / "predictor")
    Sampler(from_pretrained(tmp_path / "network"), again).run(2)
    with pytest.raises(ConfigError, match="fingerprints differ"):
        Sampler(wrap(unet(), "epsilon", betas="cosine"), again)


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 1)

    def forward(self, x, time):
        return self.layer(x)


class Odd(Family):
    name, sigma_min, sigma_max = "odd", 0.1, 10.0

    def describe(self):
        return "odd"

    def forward(self, sigma):
        one = torch.ones_like(sigma)
        return Coefficients(one, -sigma, one, sigma)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: wrap(Own(), "epsilon", shape=(3, 8, 8)),
            "got Own; save its weights yourself and wrap it where they are loaded",
        ),
        (lambda: wrap(lambda x, t: x, "epsilon", shape=(3, 8, 8)), "got function; save its weights"),
        (
            lambda: ClassifierFree(wrap(diffusers_unet(num_class_embeds=4), "epsilon", null_class=3), 2.0),
            "without guidance",
        ),
        (
            lambda: wrap(functools.partial(diffusers_unet(), class_labels=None), "epsilon"),
            "functools.partial of UNet2DModel",
        ),
        (lambda: wrap(unet(), Odd()), "Odd is no family that a directory can name"),
        (lambda: wrap(unet(), VP(epsilon_t=1e-3)), None),
    ],
)
def test_what_a_directory_cannot_hold_is_refused(make, message, tmp_path):
    if message is None:  # the ends of the range are saved, whatever they came of
        save_pretrained(denoiser := make(), tmp_path)
        assert from_pretrained(tmp_path).sigma_min == denoiser.sigma_min
        return
    with pytest.raises(ConfigError, match=message):
        save_pretrained(make(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_damaged_directories_are_refused(tmp_path):
    save_pretrained(wrap(unet(), "epsilon"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    weights = config["amed_sha256"]["tensors"]
    for change, message in (
        ({"network": "os.system"}, "holds a network 'os.system'"),
        ({"network": ["edm_precond"]}, "holds a network"),
        ({"wrap": {}}, "cannot be wrapped as its config.json says"),
        ({"wrap": None}, "cannot be wrapped"),
        ({"wrap": config["wrap"] | {"family": "Odd"}}, "family 'Odd' is not known"),
        (
            {"wrap": config["wrap"] | {"arguments": {"prediction": "v"}}},
            "its fingerprint is not the one that was saved",
        ),
        ({"wrap": config["wrap"] | {"sigma_max": "wide"}}, "cannot be wrapped"),
        ({"wrap": config["wrap"] | {"sigma_max": 0.0}}, "sigma_min must be at least 0 and below sigma_max"),
        ({"wrap": config["wrap"] | {"sigma_max": True}}, "sigma_max must be a number"),
        ({"wrap": config["wrap"] | {"has_null": 1e308}}, "'has_null' is 1e[+]308, expected False"),
        ({"wrap": config["wrap"] | {"labels": [1] * 1000}}, r"'labels' is \[1, 1, .{,60}\], expected 'rows'"),
        ({"wrap": config["wrap"] | {"label_dim": 10**9}}, "label_dim must be an integer from 0 to 100000"),
        ({"wrap": config["wrap"] | {"colour": 1}}, "'colour' is 1, expected None"),
        (
            {"wrap": config["wrap"] | {"family": "IDDPM", "arguments": {"steps": 10**9}}},
            "its family has 1000000000 steps",
        ),
        (
            {"wrap": config["wrap"] | {"family": "EDM", "arguments": {"v_prediction": 1}}},
            "v_prediction must be True or",
        ),
        ({"fingerprint": "0"}, "its fingerprint is not the one"),
        ({"model": {"image_size": -1}}, "does not build"),
    ):
        (tmp_path / "config.json").write_text(config_text(config | change, weights))
        with pytest.raises(FileFormatError, match=message):
            from_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(iter(tensors))
    changed = tensors | {name: tensors[name] + 1}
    save_file(changed, tmp_path / "model.safetensors", {"amed_config": json.dumps({"kind": "openai_unet"})})
    (tmp_path / "config.json").write_text(config_text(config, digest(changed)))
    with pytest.raises(FileFormatError, match="its fingerprint is not the one"):
        from_pretrained(tmp_path)
    (tmp_path / "wrap.safetensors").unlink()
    with pytest.raises(FileFormatError, match=r"wrap\.safetensors does not exist"):
        from_pretrained(tmp_path)
