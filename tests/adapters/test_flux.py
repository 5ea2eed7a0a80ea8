"""Flux: the packing, positions, time and guidance of diffusers' own pipeline, written out by hand."""

import pytest
import torch

import amed_engine
from amed_engine.adapters import Flux, flow_levels, wrap
from amed_engine.adapters.fingerprint import fingerprint
from amed_engine.errors import ConfigError

diffusers = pytest.importorskip("diffusers", reason="needs pip install 'amed-engine[diffusers]'")

TEXT, POOLED = torch.randn(2, 5, 12), torch.randn(2, 6)


def transformer(guidance_embeds=True):
    torch.manual_seed(0)
    made = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=6, guidance_embeds=guidance_embeds, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    return made.eval().requires_grad_(False)


def by_hand(network, x, t, text, pooled, guidance):
    """The velocity, token by token with loops; no line shared with ours."""
    batch, channels, height, width = x.shape
    tokens, ids = [], []
    for i in range(height // 2):
        for j in range(width // 2):
            patch = x[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
            tokens.append(patch.reshape(batch, 4 * channels))
            ids.append([0.0, i, j])
    out = network(
        hidden_states=torch.stack(tokens, 1), encoder_hidden_states=text, pooled_projections=pooled,
        timestep=torch.full((batch,), t), img_ids=torch.tensor(ids), txt_ids=torch.zeros(text.shape[1], 3),
        guidance=None if guidance is None else torch.full((batch,), guidance),
    ).sample  # fmt: skip
    velocity = torch.empty_like(x)
    for k, (_, i, j) in enumerate(ids):
        velocity[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = out[:, k].reshape(batch, channels, 2, 2)
    return velocity


@pytest.mark.parametrize("guidance", [None, 3.5, 2.0])
@torch.no_grad()
def test_flux_is_its_definition(guidance):
    network = transformer(guidance_embeds=guidance is not None)
    given = network if guidance == 3.5 else Flux(network, guidance)
    denoiser = wrap(given, conditions=["encoder_hidden_states", "pooled_projections"], shape=(4, 6, 8))
    x, t = torch.randn(2, 4, 6, 8), 0.7
    velocity = by_hand(network, x, t, TEXT, POOLED, guidance)
    got = denoiser(x / (1 - t), torch.full((2,), t / (1 - t)), encoder_hidden_states=TEXT, pooled_projections=POOLED)
    torch.testing.assert_close(got.x0, x - t * velocity, rtol=1e-4, atol=1e-5)
    assert got.features is None


def test_flux_samples_from_bound_prompts_on_shifted_levels():
    conditions = {"encoder_hidden_states": TEXT, "pooled_projections": POOLED}
    denoiser = wrap(transformer(), conditions=conditions, shape=(4, 6, 8))
    assert "velocity" in repr(denoiser)
    sampler = amed_engine.Sampler(denoiser, solver="euler", schedule=flow_levels(5, shift=3.0), afs=False)
    result = sampler.run([1, 1], class_labels=[0, 1])
    assert result.nfe == 5
    assert result.images.isfinite().all()
    assert (result.images[0] - result.images[1]).abs().max() > 1e-4


def test_shifted_levels_are_those_of_the_scheduler():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    t = torch.linspace(0.999, 0.001, 6)
    scheduler.set_timesteps(sigmas=t.tolist())
    ours = flow_levels(5, shift=3.0)
    torch.testing.assert_close((ours / (1 + ours)).float(), scheduler.sigmas[:-1], rtol=1e-5, atol=1e-6)


def test_the_guidance_that_flux_is_told_is_part_of_the_model():
    names = ["encoder_hidden_states", "pooled_projections"]
    hashes = {fingerprint(wrap(Flux(transformer(), g), conditions=names, shape=(4, 6, 8))) for g in (2.0, 3.5)}
    assert len(hashes) == 2


def test_flux_that_cannot_work_is_refused():
    with pytest.raises(ConfigError, match="distilled for guidance and must be told one"):
        Flux(transformer(), None)
    with pytest.raises(ConfigError, match=r"latents of Flux must be \(B, 4, H, W\) with even H and W"):
        Flux(transformer())(torch.zeros(2, 4, 5, 8), torch.ones(2), TEXT, POOLED)
    with pytest.raises(ConfigError, match="has width 11, the network takes 12"):
        wrap(transformer(), conditions={"encoder_hidden_states": TEXT[..., :11], "pooled_projections": POOLED})
    with pytest.raises(ConfigError, match="0 < t_min < t_max < 1"):
        flow_levels(5, t_max=1.0)
