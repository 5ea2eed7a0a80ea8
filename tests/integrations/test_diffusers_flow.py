"""AMEDScheduler in the place of the schedulers of flow-matching models, and in their pipelines."""

import pytest
import torch

from amed_engine import ConfigError, make_plan, sample
from amed_engine.adapters import wrap
from amed_engine.solvers import make_solver

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

from amed_engine.integrations.diffusers import AMEDScheduler  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
FLOW = {"prediction_type": "flow_prediction"}
Euler = diffusers.FlowMatchEulerDiscreteScheduler
X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def velocity(x, t):
    """Of a smooth flow; t from 0 to 1000."""
    return x * (0.6 + 0.2 * torch.as_tensor(t).reshape(-1, 1, 1, 1) / 1000) - 0.3 * torch.tanh(x)


def drawn(scheduler, x=X, network=velocity):
    """As every pipeline of a flow-matching model draws: nothing scales its latents."""
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.expand(len(x))), t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("steps", [3, 8])
@pytest.mark.parametrize(
    ("options", "mu"),
    [
        ({}, None),
        ({"shift": 3.0}, None),
        ({"shift": 3.0}, 0.7),
        ({"use_dynamic_shifting": True}, 0.7),
        ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, 1.7),
        ({"shift": 2.0, "shift_terminal": 0.1}, None),
        ({"shift": 2.0, "use_karras_sigmas": True}, None),
        ({"use_exponential_sigmas": True}, None),
        ({"use_beta_sigmas": True}, None),
    ],
)
def test_the_times_are_those_of_flow_match_euler(options, mu, steps):
    theirs, ours = Euler(**options), AMEDScheduler(**FLOW, **options)
    theirs.set_timesteps(steps, mu=mu)
    ours.set_timesteps(steps, mu=mu)
    torch.testing.assert_close(ours.timesteps[::2], theirs.timesteps, rtol=1e-5, atol=2e-3)
    torch.testing.assert_close(ours.sigmas[::2].float(), theirs.sigmas[:-1], rtol=1e-5, atol=2e-6)
    assert ours.sigmas[-1] == 0
    assert ours.init_noise_sigma == 1.0
    said = torch.linspace(1.0, 1 / steps, steps).tolist()  # as Flux's pipeline says them
    theirs.set_timesteps(sigmas=said, mu=mu)
    ours.set_timesteps(sigmas=said, mu=mu)
    if not any(name.endswith("_sigmas") for name in options):
        torch.testing.assert_close(ours.timesteps[::2], theirs.timesteps, rtol=1e-5, atol=2e-3)


def test_timesteps_are_the_times_themselves():
    scheduler = AMEDScheduler(**FLOW, shift=3.0)
    scheduler.set_timesteps(timesteps=[1000.0, 700.0, 250.0])
    torch.testing.assert_close(scheduler.timesteps[::2], torch.tensor([1000.0, 700.0, 250.0]), rtol=0, atol=2e-3)


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("solver", ["amed", "dpm", "ipndm"])
def test_a_flow_is_drawn_as_the_engine_draws_it(solver, final):
    mids = [[0.4, 1.02, 0.99], [0.6, 1.0, 1.0], [0.5, 0.98, 1.01]]
    scheduler = AMEDScheduler(**FLOW, shift=2.0, solver=solver, midpoints=mids, final_sigmas_type=final)
    scheduler.set_timesteps(4 if final == "zero" else 3)
    images = drawn(scheduler)
    denoiser = wrap(lambda x, t: velocity(x, t), scheduler=scheduler, bottleneck=None, verify=False)
    told = [tuple(mid) for mid in mids]
    start = X.double() * (1 + scheduler.levels[0])
    expected = sample(denoiser, start, scheduler.levels, make_solver(solver), told, denoise_to_zero=final == "zero")
    if final == "sigma_min":
        expected = expected / (1 + scheduler.levels[-1])
    torch.testing.assert_close(images.double(), expected, rtol=1e-5, atol=1e-5)


def test_it_converges_to_what_flow_match_euler_converges_to():
    def error(steps):
        scheduler = AMEDScheduler(**FLOW, shift=2.0)
        scheduler.set_timesteps(steps)
        return (drawn(scheduler, X.double()) - exact).abs().max()

    theirs = Euler(shift=2.0)
    theirs.set_timesteps(4000)
    exact = drawn(theirs, X.double())
    assert error(8) > 4 * error(24)
    assert error(24) < 0.02 * exact.abs().max()


def test_half_precision_samples_come_back_so():
    scheduler = AMEDScheduler(**FLOW)
    scheduler.set_timesteps(5)
    x = drawn(scheduler, X.half())
    assert x.dtype == torch.float16
    scheduler.set_timesteps(5)
    torch.testing.assert_close(x.float(), drawn(scheduler), rtol=0.01, atol=0.01)


def test_rounding_a_sample_is_not_multiplied_by_its_noise_level():
    scheduler = AMEDScheduler(**FLOW)
    images = []
    for dtype in (torch.float32, torch.float64):
        scheduler.set_timesteps(6)
        images.append(drawn(scheduler, X.to(dtype)).double())
    torch.testing.assert_close(*images, rtol=1e-5, atol=1e-5)


def test_a_callback_may_change_the_sample():
    scheduler = AMEDScheduler(**FLOW, final_sigmas_type="sigma_min")
    scheduler.set_timesteps(4)
    x = X
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(velocity(x, t), t, x).prev_sample
        if i == 3:
            x = x.flip(0)
    plain = AMEDScheduler(**FLOW, final_sigmas_type="sigma_min")
    plain.set_timesteps(4)
    torch.testing.assert_close(x, drawn(plain, X).flip(0), rtol=1e-4, atol=1e-4)  # of the same flow, whatever the order


def test_noise_is_added_along_straight_lines():
    theirs, ours = Euler(shift=3.0), AMEDScheduler(**FLOW, shift=3.0)
    theirs.set_timesteps(6)
    ours.set_timesteps(6)
    noise = X.flip(0)
    for k in (0, 3):
        at = theirs.timesteps[k].expand(2)
        expected = theirs.scale_noise(X, at, noise)
        torch.testing.assert_close(
            ours.scale_noise(X, ours.timesteps[2 * k].expand(2), noise), expected, rtol=1e-4, atol=1e-5
        )
    ours.set_begin_index(6)  # as image-to-image
    x = ours.scale_noise(X, ours.timesteps[6:7].repeat(2), noise)
    for t in ours.timesteps[6:]:
        x = ours.step(velocity(x, t), t, x).prev_sample
    assert x.isfinite().all()


@pytest.mark.parametrize("saved", [False, True], ids=["in memory", "saved"])
@pytest.mark.parametrize(
    "present",
    [
        lambda: Euler(shift=3.0),
        lambda: Euler(use_dynamic_shifting=True, base_shift=0.4, shift_terminal=0.05),
        lambda: diffusers.UniPCMultistepScheduler(**FLOW, use_flow_sigmas=True, flow_shift=3.0),
        lambda: diffusers.DPMSolverMultistepScheduler(**FLOW, use_flow_sigmas=True, flow_shift=5.0),
    ],
    ids=["Flux schnell", "Flux", "UniPC", "DPM-Solver"],
)
def test_configurations_come_and_go(present, saved, tmp_path):
    present = present()
    kind = type(present)
    present.save_config(tmp_path / "theirs")
    config = kind.load_config(tmp_path / "theirs") if saved else present.config
    ours = AMEDScheduler.from_config(config)
    shift = present.config.get("shift", present.config.get("flow_shift"))
    assert ours.model.flow
    assert ours.config.get("shift", 1.0) == ours.config.get("flow_shift", 1.0) == shift
    assert ours.config.get("base_shift", 0.5) == present.config.get("base_shift", 0.5)  # pipelines compute mu from it
    ours.save_config(tmp_path / "ours")
    for told in (ours.config, AMEDScheduler.load_config(tmp_path / "ours")):
        back = kind.from_config(told)
        differ = {
            name: value for name, value in present.config.items() if name[0] != "_" and back.config[name] != value
        }
        assert not differ
        again = AMEDScheduler.from_config(told)
        for scheduler in (ours, again):
            scheduler.set_timesteps(4, mu=0.8)
        assert torch.equal(again.levels, ours.levels)
    changed = AMEDScheduler.from_config(ours.config, shift=7.0)
    assert changed.config["shift"] == changed.config["flow_shift"] == 7.0


def test_a_predictor_of_a_flow_is_a_scheduler_too(predictor):
    predictor.plan = make_plan(2 * predictor.plan.intervals, solver="amed", sigma_min=0.01, sigma_max=200.0, afs=False)
    scheduler = AMEDScheduler.from_predictor(predictor, Euler(shift=3.0).config)
    scheduler.set_timesteps()
    assert torch.equal(scheduler.levels, predictor.plan.levels)
    assert float(scheduler.timesteps[0]) == pytest.approx(1000 * 200 / 201)
    assert drawn(scheduler, X[:, :1]).isfinite().all()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"use_flow_sigmas": True}, "use_flow_sigmas=True belongs to prediction_type='flow_prediction'"),
        ({"shift": 3.0}, "shift=3.0 belongs to"),
        ({**FLOW, "shift": 3.0, "flow_shift": 2.0}, "pass one positive number"),
        ({**FLOW, "shift": -1.0}, "pass one positive number"),
        ({**FLOW, "time_shift_type": "cosine"}, "one of exponential, linear"),
        ({**FLOW, "shift_terminal": 1.0}, r"shift_terminal inside \[0, 1\)"),
        ({**FLOW, "use_flow_sigmas": False}, "contradicts"),
        ({**FLOW, "afs": True}, "set afs=False"),
        ({**FLOW, "sigma_schedule": "exponential"}, "pass use_exponential_sigmas=True"),
        ({**FLOW, "timestep_spacing": "trailing"}, "without training steps"),
    ],
)
def test_what_says_nothing_of_a_flow_is_refused(options, match):
    with pytest.raises(ConfigError, match=match):
        AMEDScheduler(**options)


def test_a_shift_that_is_asked_for_is_needed():
    scheduler = AMEDScheduler(**FLOW, use_dynamic_shifting=True)
    with pytest.raises(ConfigError, match="needs set_timesteps"):
        scheduler.set_timesteps(4)
    with pytest.raises(ConfigError, match="mu must be finite"):
        scheduler.set_timesteps(4, mu=float("nan"))


@pytest.mark.parametrize("dynamic", [False, True])
def test_flux_s_pipeline_draws_with_it(dynamic):
    """By its own loop: mu from the configuration, sigmas from 1 down, latents that nothing scales."""
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16,
        pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
    ).eval()  # fmt: skip
    nobody = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    config = Euler(shift=3.0, use_dynamic_shifting=dynamic).config

    def images(kind, steps):
        pipe = diffusers.FluxPipeline(scheduler=kind.from_config(config), transformer=transformer, **nobody)
        pipe.set_progress_bar_config(disable=True)
        given = {
            "prompt_embeds": torch.ones(1, 5, 16),
            "pooled_prompt_embeds": torch.ones(1, 8),
            "output_type": "latent",
        }
        latents = torch.randn(1, 16, 4, generator=torch.Generator().manual_seed(1))
        return pipe(**given, height=64, width=64, num_inference_steps=steps, latents=latents).images

    exact = images(Euler, 300)
    few, many = (float((images(AMEDScheduler, steps) - exact).norm() / exact.norm()) for steps in (8, 24))
    assert few < 0.05
    assert many < few / 2
