"""A predictor is for one wrapping of one network: every other is refused before any sampling."""

import warnings
from dataclasses import replace

import pytest
import torch

from amed_engine import AMEDPredictor, Sampler, make_plan
from amed_engine.adapters import (
    EDM,
    IDDPM,
    VP,
    ClassifierFree,
    ClassifierGuided,
    Flow,
    Thresholded,
    alphas_cumprod,
    wrap,
)
from amed_engine.adapters.fingerprint import fingerprint, is_model
from amed_engine.errors import ConfigError


def wrappings(unet):
    """Every way of ours to make a denoiser of one network, by name; all answers differ."""
    plain = wrap(unet, "epsilon")
    classed = wrap(unet, "epsilon", label_dim=3, null_class=3)
    return {
        **{name: wrap(unet, name, verify=False) for name in ("v", "x0", "flow", "edm", "cm", "vp", "ve", "iddpm")},
        "epsilon": plain,
        "scaled_linear": wrap(unet, "epsilon", betas="scaled_linear"),
        "cosine": wrap(unet, "epsilon", betas="cosine"),
        "fewer steps": wrap(unet, "epsilon", betas=alphas_cumprod("linear", 500)),
        "sigma_data": wrap(unet, EDM(sigma_data=1.0)),
        "beta_d": wrap(unet, VP(beta_d=20.0)),
        "levels": wrap(unet, IDDPM(steps=500)),
        "steps": wrap(unet, Flow(steps=1)),
        "bottleneck": wrap(unet, "epsilon", bottleneck="first"),
        "no bottleneck": wrap(unet, "epsilon", bottleneck=None),
        "null class": classed,
        "guided": ClassifierFree(classed, 2.0),
        "guided more": ClassifierFree(classed, 3.0),
        "interval": ClassifierFree(classed, 2.0, interval=(0.1, 5.0)),
        "classifier": ClassifierGuided(classed, lambda x, t: x.flatten(1)[:, :3], 2.0),
        "classifier more": ClassifierGuided(classed, lambda x, t: x.flatten(1)[:, :3], 3.0),
        "not clamped": ClassifierGuided(classed, lambda x, t: x.flatten(1)[:, :3], 2.0, clamp=None),
        "thresholded": Thresholded(plain),
        "quantile": Thresholded(plain, quantile=0.9),
        "floor": Thresholded(plain, floor=2.0),
    }


def predictor_of(denoiser, **changes) -> AMEDPredictor:
    predictor = AMEDPredictor(bottleneck=(4, 4))
    plan = make_plan(3, solver="amed", sigma_min=0.1, sigma_max=10.0)
    predictor.plan = replace(plan, model=fingerprint(denoiser), **changes)
    return predictor


def test_every_wrapping_of_a_network_is_another_model(make_unet):
    hashes = {name: fingerprint(denoiser) for name, denoiser in wrappings(make_unet()).items()}
    assert len(set(hashes.values())) == len(hashes)
    assert hashes == {name: fingerprint(denoiser) for name, denoiser in wrappings(make_unet()).items()}


@pytest.mark.parametrize("other", ["v", "cosine", "edm", "bottleneck", "thresholded", "guided"])
def test_a_predictor_of_another_wrapping_is_refused(make_unet, other):
    made = wrappings(make_unet())
    predictor = predictor_of(made["epsilon"])
    assert Sampler(made["epsilon"], predictor).nfe == 3
    with pytest.raises(ConfigError, match=r"another wrapping of it\): the fingerprints differ"):
        Sampler(made[other], predictor)


def test_what_does_not_change_the_answer_is_the_same_model(make_unet):
    """Two calls or one, and betas by name or from the scheduler in float32."""
    classed = wrap(make_unet(), "epsilon", label_dim=3, null_class=3)
    assert fingerprint(ClassifierFree(classed, 2.0)) == fingerprint(ClassifierFree(classed, 2.0, batched=False))
    for name in ("linear", "scaled_linear", "cosine"):
        given = wrap(make_unet(), "epsilon", betas=alphas_cumprod(name).float())
        assert fingerprint(given) == fingerprint(wrap(make_unet(), "epsilon", betas=name)), name


@pytest.mark.parametrize(
    ("name", "attribute"),
    [
        *(("guided", attribute) for attribute in ("scale", "low", "high", "batched")),
        *(("classifier", attribute) for attribute in ("scale", "clamp")),
        *(("thresholded", attribute) for attribute in ("quantile", "floor")),
        *(("sigma_data", "family.sigma_data"), ("steps", "family.steps"), ("epsilon", "family.name")),
    ],
)
def test_a_setting_cannot_change_under_a_predictor_or_a_graph(make_unet, name, attribute):
    """Both would go on with the old one without a word."""
    owner, before = wrappings(make_unet())[name], fingerprint(wrappings(make_unet())[name])
    path, _, last = attribute.rpartition(".")
    target = owner.get_submodule(path)
    value = getattr(target, last)
    with pytest.raises(ConfigError, match=f"{last} of {type(target).__name__} is fixed once it is made"):
        setattr(target, last, 7.5)
    assert getattr(target, last) == value
    assert fingerprint(owner) == before


def test_every_form_of_a_wrapping_has_its_fingerprint(make_unet):
    guided = Thresholded(wrap(make_unet(), "epsilon", betas="cosine"))
    inputs = torch.zeros(2, 1, 8, 8), torch.ones(2)
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(guided, inputs)
        program = torch.export.export(guided, inputs, dynamic_shapes=[{0: batch}, {0: batch}])
    forms = {"compiled": torch.compile(guided), "traced": traced, "exported": program.module()}
    assert {name: fingerprint(form) for name, form in forms.items()} == dict.fromkeys(forms, fingerprint(guided))


def test_the_older_fingerprint_of_parameters_alone_is_still_right(make_unet):
    denoiser = wrap(make_unet(), "epsilon")
    bare = wrap(make_unet(), "epsilon")
    del bare.amed_settings
    assert fingerprint(bare) != fingerprint(denoiser)
    assert is_model(denoiser, fingerprint(bare))
    other = wrap(make_unet(), "epsilon")
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1
    assert not is_model(other, fingerprint(bare))


def test_the_size_of_the_bottleneck_is_known_before_the_network_runs(make_unet):
    class Never(torch.nn.Module):
        """diffusers' UNet2DModel, but for running."""

        config = type("Config", (), {"in_channels": 1, "out_channels": 1, "sample_size": 32, "num_class_embeds": None})
        config.block_out_channels = (8, 8, 8)

        def forward(self, *args, **kwargs):
            raise AssertionError("the network ran")

    UNet2DModel = type("UNet2DModel", (Never,), {})
    denoiser = wrap(UNet2DModel(), "epsilon")
    assert denoiser.bottleneck_size == (8, 8)
    with pytest.raises(ConfigError, match=r"reads bottlenecks of 4x4, the model's are 8x8"):
        Sampler(Thresholded(denoiser), AMEDPredictor(bottleneck=(4, 4)), nfe=3)
