"""Where AMEDScheduler's steps stand, what becomes of D and what is done before set_timesteps, by the settings of diffusers."""

import pytest
import torch

from amed_engine import ConfigError, make_plan, sample
from amed_engine.adapters import Thresholded, wrap
from amed_engine.solvers import make_solver

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

from amed_engine.integrations.diffusers import AMEDScheduler  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network(x, t):
    return 0.8 * torch.tanh(x) + 0.1


def drawn(scheduler, x=X, steps=4, network=network):
    scheduler.set_timesteps(steps)
    x = x * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x).prev_sample
    return x


# ---- spacings


@pytest.mark.parametrize("steps", [3, 7, 10])
@pytest.mark.parametrize(
    "options",
    [
        {"timestep_spacing": "leading"},
        {"timestep_spacing": "leading", "steps_offset": 1},
        {"timestep_spacing": "trailing"},
        {"timestep_spacing": "trailing", "use_exponential_sigmas": True},
        {"timestep_spacing": "leading", "steps_offset": 1, "use_karras_sigmas": True},
        {"timestep_spacing": "leading", "steps_offset": 1, "use_beta_sigmas": True},
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"use_beta_sigmas": True},
        {"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 10.0},
    ],
)
def test_the_noise_levels_are_those_of_euler(options, steps):
    theirs, ours = diffusers.EulerDiscreteScheduler(**SD, **options), AMEDScheduler(**SD, **options)
    theirs.set_timesteps(steps)
    ours.set_timesteps(steps)
    torch.testing.assert_close(ours.levels.float(), theirs.sigmas[:-1], rtol=2e-5, atol=1e-7)
    torch.testing.assert_close(ours.timesteps[::2], theirs.timesteps, rtol=0, atol=0.02)


def test_equal_steps_are_those_that_the_network_was_trained_on():
    """Between two training steps Euler takes sigma itself as linear, here it is log alpha, as the network is told."""
    theirs, ours = (
        kind(**SD, timestep_spacing="linspace") for kind in (diffusers.EulerDiscreteScheduler, AMEDScheduler)
    )
    for steps in (4, 10):  # 999 is divided by 3 and by 9
        theirs.set_timesteps(steps)
        ours.set_timesteps(steps)
        assert torch.equal(ours.timesteps[::2], theirs.timesteps)
        torch.testing.assert_close(ours.levels.float(), theirs.sigmas[:-1], rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_the_end_at_sigma_min_is_the_last_level(spacing):
    scheduler = AMEDScheduler(**SD, timestep_spacing=spacing, final_sigmas_type="sigma_min")
    scheduler.set_timesteps(5)
    assert len(scheduler.levels) == 6
    assert float(scheduler.levels[-1]) == pytest.approx(scheduler.model.family.sigma_min, rel=1e-6)
    assert len(scheduler.timesteps) == 10
    assert drawn(scheduler).isfinite().all()


def test_the_last_training_step_is_0():
    scheduler = AMEDScheduler(**SD)
    scheduler.set_timesteps(10)
    assert scheduler.timesteps[-1] == 0
    assert scheduler.timesteps[0] == 999
    assert scheduler.index_for_timestep(0) == 18


def test_a_spacing_of_another_class_stays_its_own(tmp_path):
    """As what is said of its range does: a pipeline's configuration names one whatever its scheduler."""
    present = diffusers.EulerDiscreteScheduler(**SD, timestep_spacing="trailing", use_beta_sigmas=True)
    plain = AMEDScheduler(**SD)
    plain.set_timesteps(4)
    present.save_config(tmp_path / "theirs")
    for config in (present.config, diffusers.EulerDiscreteScheduler.load_config(tmp_path / "theirs")):
        scheduler = AMEDScheduler.from_config(config)
        scheduler.set_timesteps(4)
        assert torch.equal(scheduler.levels, plain.levels)
        back = diffusers.EulerDiscreteScheduler.from_config(scheduler.config)
        assert (back.config.timestep_spacing, back.config.use_beta_sigmas) == ("trailing", True)


def test_a_spacing_that_this_class_was_told_stays_with_it(tmp_path):
    present = diffusers.EulerDiscreteScheduler(**SD, timestep_spacing="leading")
    told = AMEDScheduler.from_config(present.config, timestep_spacing="trailing", use_exponential_sigmas=True)
    direct = AMEDScheduler(**SD, timestep_spacing="trailing", use_exponential_sigmas=True)
    told.set_timesteps(4)
    for scheduler in (told, direct):
        scheduler.save_config(tmp_path)
        back = diffusers.EulerDiscreteScheduler.from_config(scheduler.config)
        for again in (
            scheduler,
            AMEDScheduler.from_pretrained(tmp_path),
            AMEDScheduler.from_config(scheduler.config),
            AMEDScheduler.from_config(back.config),
        ):
            again.set_timesteps(4)
            assert again.settings["timestep_spacing"] == "trailing"
            assert torch.equal(again.levels, told.levels)
    assert diffusers.EulerDiscreteScheduler.from_config(told.config).config.timestep_spacing == "leading"


def test_what_nobody_said_is_not_in_the_configuration():
    """Another class would read it there as its own."""
    assert "timestep_spacing" not in AMEDScheduler(**SD).config
    assert "shift" not in AMEDScheduler().config


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({**SD, "timestep_spacing": "karras"}, "one of leading, linspace, trailing, got 'karras'"),
        ({"timestep_spacing": "leading"}, "says nothing of a model without training steps"),
        ({**SD, "timestep_spacing": "trailing", "steps_offset": 1}, "goes with 'leading' alone"),
        ({**SD, "timestep_spacing": "leading", "steps_offset": -1}, "an offset, 0 or more"),
        ({**SD, "use_karras_sigmas": True, "use_beta_sigmas": True}, "pass one schedule"),
        ({**SD, "use_beta_sigmas": True, "sigma_schedule": "exponential"}, "pass one schedule"),
        ({**SD, "use_beta_sigmas": True, "noise_levels": [3.0, 1.0, 0.1]}, "noise_levels are what the midpoints"),
        ({"rescale_betas_zero_snr": True}, "says nothing of a model without a beta_schedule"),
        ({"thresholding": True, "dynamic_thresholding_ratio": 1.5}, "need 0 <= dynamic_thresholding_ratio <= 1"),
        ({"clip_sample": True, "clip_sample_range": 0}, "clip_sample_range > 0"),
        ({"clip_sample": True, "afs": True}, "set afs=False"),
        ({"thresholding": True, "solver": "dpmpp", "solver_options": {"thresholding": True}}, "has its own"),
    ],
)
def test_settings_that_say_nothing_or_contradict_are_refused(options, match):
    with pytest.raises(ConfigError, match=match):
        AMEDScheduler(**options)


def test_calls_that_no_step_fits_are_refused():
    with pytest.raises(ConfigError, match="takes 1 to 1000 steps of this model, got 1001"):
        AMEDScheduler(**SD, timestep_spacing="trailing").set_timesteps(1001)
    with pytest.raises(ConfigError, match="leads beyond the last of 1000 training steps"):
        AMEDScheduler(**SD, timestep_spacing="leading", steps_offset=10).set_timesteps(1000)
    with pytest.raises(ConfigError, match=r"mu=0\.5 shifts the times of a flow-matching model"):
        AMEDScheduler(**SD).set_timesteps(4, mu=0.5)
    with pytest.raises(ConfigError, match="scale_noise is of flow-matching models"):
        AMEDScheduler(**SD).scale_noise(X, torch.tensor([0]), X)


def test_a_predictor_s_noise_levels_are_its_own(predictor):
    predictor.plan = make_plan(predictor.plan.nfe, solver="amed", sigma_min=0.0292, sigma_max=14.6)
    present = diffusers.EulerDiscreteScheduler(**SD, timestep_spacing="trailing")
    scheduler = AMEDScheduler.from_predictor(predictor, present.config)
    scheduler.set_timesteps()
    assert torch.equal(scheduler.levels, predictor.plan.levels)
    with pytest.raises(ConfigError, match=r"noise_levels are .*timestep_spacing asks for other ones"):
        AMEDScheduler.from_config(scheduler.config, timestep_spacing="trailing")


# ---- betas


def test_betas_are_those_of_the_training():
    for options in (SD, {"beta_schedule": "linear", "num_train_timesteps": 100}, {"beta_schedule": "exp"}):
        kind = diffusers.HeunDiscreteScheduler
        theirs = kind(**{"beta_start": 0.0001, "beta_end": 0.02, **options})
        ours = AMEDScheduler(**options)
        torch.testing.assert_close(ours.betas.float(), theirs.betas, rtol=1e-4, atol=1e-7)
    assert AMEDScheduler().betas is None


def test_trained_betas_count_the_training_steps(caplog, tmp_path):
    scheduler = AMEDScheduler(trained_betas=[0.1, 0.3, 0.4])
    assert not caplog.records
    assert len(scheduler) == 3
    scheduler = AMEDScheduler(trained_betas=[0.1, 0.3], num_train_timesteps=1100)
    assert "num_train_timesteps=1100 with trained_betas of 2 steps: the betas count" in caplog.text
    scheduler.save_pretrained(tmp_path)
    again = AMEDScheduler.from_pretrained(tmp_path)
    assert len(again) == 2
    torch.testing.assert_close(again.betas, torch.tensor([0.1, 0.3], dtype=torch.float64))
    with pytest.raises(ConfigError, match="trained_betas are of 2 steps, num_train_timesteps is 1100"):
        AMEDScheduler.from_config(
            {"trained_betas": [0.1, 0.3], "num_train_timesteps": 1100, "prediction_type": "epsilon"}
        )


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_zero_terminal_snr_is_that_of_euler(prediction, tmp_path):
    options = {**SD, "rescale_betas_zero_snr": True, "prediction_type": prediction, "timestep_spacing": "trailing"}
    theirs = diffusers.EulerDiscreteScheduler(**options)
    ours = AMEDScheduler(**options)
    torch.testing.assert_close(ours.alphas_cumprod.float(), theirs.alphas_cumprod, rtol=2e-3, atol=1e-7)
    theirs.set_timesteps(5)
    ours.set_timesteps(5)
    torch.testing.assert_close(ours.levels.float(), theirs.sigmas[:-1], rtol=1e-3, atol=1e-6)
    assert ours.init_noise_sigma == pytest.approx(4096, rel=1e-3)
    from_theirs = AMEDScheduler.from_config(theirs.config)
    assert torch.equal(from_theirs.alphas_cumprod, ours.alphas_cumprod)
    ours.save_config(tmp_path)
    assert torch.equal(AMEDScheduler.from_pretrained(tmp_path).alphas_cumprod, ours.alphas_cumprod)
    wrapped = wrap(network, scheduler=ours, bottleneck=None, verify=False).family
    assert wrapped.sigma_max == pytest.approx(ours.model.family.sigma_max)
    assert drawn(ours).isfinite().all()


# ---- D


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ({"thresholding": True, "sample_max_value": 100.0}, None),
        ({"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.2}, None),
        ({"thresholding": True}, 1.0),
        ({"clip_sample": True, "clip_sample_range": 0.7}, 0.7),
    ],
)
def test_d_is_limited_as_diffusers_limits_it(options, limit):
    theirs = diffusers.DDIMScheduler(**SD, **{"clip_sample": False, "prediction_type": "sample", **options})
    ours = AMEDScheduler(**SD, prediction_type="sample", **options)
    output = 3 * X
    ours.set_timesteps(4)
    theirs.set_timesteps(4)
    expected = theirs.step(output, theirs.timesteps[0], X).pred_original_sample
    said = ours.step(output, ours.timesteps[0], X * ours.init_noise_sigma).pred_original_sample
    torch.testing.assert_close(said, expected)
    assert limit is None or float(said.abs().max()) == pytest.approx(limit)
    again = AMEDScheduler.from_config(theirs.config)
    again.set_timesteps(4)
    said = again.step(output, again.timesteps[0], X * again.init_noise_sigma).pred_original_sample
    torch.testing.assert_close(said, expected)


def test_thresholding_draws_what_the_engine_draws_round_its_denoiser():
    ours = AMEDScheduler(**SD, thresholding=True, sample_max_value=1e9)
    denoiser = Thresholded(
        wrap(lambda x, t: network(x, t), scheduler=AMEDScheduler(**SD), bottleneck=None, verify=False)
    )
    images = drawn(ours)
    mids = [(0.5,)] * (len(ours.levels) - 1)
    start = X * ours.init_noise_sigma
    expected = sample(denoiser, start, ours.levels, make_solver("amed"), mids, denoise_to_zero=True)
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-5)


def test_to_clip_is_no_default_of_the_model():
    """It is DDIM's own, which a configuration in memory shows."""
    assert not AMEDScheduler.from_config(diffusers.DDIMScheduler(**SD).config)._limits.any
    assert AMEDScheduler.from_config(diffusers.DDIMScheduler(**SD, clip_sample=True).config)._limits.clip == 1.0


def test_a_network_wrapped_for_it_is_refused_its_limits():
    with pytest.raises(ConfigError, match="has thresholding=True, expected False"):
        wrap(network, scheduler=AMEDScheduler(**SD, thresholding=True), bottleneck=None)


# ---- before set_timesteps


def test_a_scheduler_stands_at_every_training_step_until_it_is_told():
    """As diffusers' own do: noise is added, and a step made, at any of them."""
    scheduler, theirs = AMEDScheduler(**SD), diffusers.DDIMScheduler(**SD)
    assert torch.equal(scheduler.timesteps, torch.arange(999.0, -1.0, -1.0))
    at = torch.tensor([17, 980])
    noised = scheduler.add_noise(X, X.flip(0), at)
    scale = scheduler.model.family.mix(scheduler.model.sigma(at))[2].float().reshape(-1, 1, 1, 1)
    torch.testing.assert_close(noised * scale, theirs.add_noise(X, X.flip(0), at), rtol=1e-4, atol=1e-5)
    last = scheduler.step(0.1 * X, 0, X)
    torch.testing.assert_close(last.prev_sample, X - 0.1 * X * float(scheduler.levels[-1]), rtol=1e-5, atol=1e-6)
    other = AMEDScheduler(**SD)
    told = torch.tensor([0, 500])
    assert other.step(0.1 * X, told[1], X).prev_sample.isfinite().all()
    assert other.step_index == 2 * 499 + 1
