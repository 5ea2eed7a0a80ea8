"""AMEDScheduler keeps diffusers' conventions, and a pipeline that follows them draws what the engine draws."""

import copy
import inspect

import numpy as np
import pytest
import torch

from amed_engine import ConfigError, Sampler, make_plan, make_schedule, sample
from amed_engine.integrations.common import constants
from amed_engine.sampling.predictors.constant import ConstantPredictor
from amed_engine.solvers import make_solver

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

from amed_engine.integrations.diffusers import AMEDScheduler  # noqa: E402
from amed_engine.integrations.diffusers.parameterization import Parameterization  # noqa: E402

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
MIDS = [[0.4, 1.02, 0.99], [0.6, 1.0, 1.0], [0.5, 0.98, 1.01]]


def pipeline_loop(scheduler, network, latents, start=0):
    """What every diffusers pipeline does after set_timesteps."""
    x = latents * scheduler.init_noise_sigma if not start else latents
    for t in scheduler.timesteps[start:]:
        output = network(scheduler.scale_model_input(x, t), t.expand(len(x)))
        x = scheduler.step(output, t, x, return_dict=False)[0]
    return x


PLANS = {
    "amed": make_plan(6, solver="amed", afs=False),
    "amed-AFS": make_plan(5, solver="amed"),
    "plugin-ipndm-AFS": make_plan(5, solver="ipndm", options={"max_order": 2}, midpoint=True),
    "plugin-dpm": make_plan(6, solver="dpm", midpoint=True, schedule="polynomial"),
    "plugin-unipc-AFS": make_plan(7, solver="unipc", options={"max_order": 2, "thresholding": False}, midpoint=True),
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_predictor_s_constants_draw_what_the_engine_draws(network, denoiser, predictor, latents, plan):
    predictor.plan = plan
    scheduler = AMEDScheduler.from_predictor(predictor)
    scheduler.set_timesteps(plan.intervals)
    assert len(scheduler.timesteps) == plan.nfe
    expected = Sampler(denoiser, predictor, shape=(1, 8, 8)).run(latents).images
    assert (pipeline_loop(scheduler, network, latents) - expected).abs().max() < 5e-5


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_both_ends_of_the_schedule(network, denoiser, latents, final):
    scheduler = AMEDScheduler(final_sigmas_type=final, midpoints=MIDS)
    zero = final == "zero"
    scheduler.set_timesteps(4 if zero else 3)
    assert len(scheduler.timesteps) == (7 if zero else 6)
    levels = make_schedule("polynomial", 4, 0.002, 80.0)
    solver, x = make_solver("amed"), latents * 80
    expected = sample(denoiser, x, levels, solver, [tuple(m) for m in MIDS], denoise_to_zero=zero)
    assert (pipeline_loop(scheduler, network, latents) - expected).abs().max() < 5e-5


def test_r_one_half_is_the_kdpm2_of_diffusers(latents):
    """An independent DPM-Solver-2 midpoint on the noise levels of Stable Diffusion, by a model that ignores the time."""
    theirs = diffusers.KDPM2DiscreteScheduler(**SD, use_karras_sigmas=True)
    ours = AMEDScheduler(**SD)
    theirs.set_timesteps(5)
    ours.set_timesteps(5)
    torch.testing.assert_close(ours.levels.float(), torch.unique(theirs.sigmas).flip(0)[:5], rtol=1e-4, atol=0)
    one, two = (pipeline_loop(s, lambda x, t: 0.8 * torch.tanh(x), latents) for s in (ours, theirs))
    assert one.abs().max() > 1
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def test_edm_models_are_asked_as_edm_euler_asks(latents):
    for prediction in ("epsilon", "v_prediction"):
        theirs = diffusers.EDMEulerScheduler(prediction_type=prediction)
        ours = AMEDScheduler.from_config(theirs.config).model
        sigma = torch.tensor(3.7)
        output = torch.randn_like(latents)
        torch.testing.assert_close(ours.scaled(latents, sigma), theirs.precondition_inputs(latents, sigma))
        torch.testing.assert_close(ours.timestep(sigma), theirs.precondition_noise(sigma))
        torch.testing.assert_close(
            ours.denoised(latents, output, sigma), theirs.precondition_outputs(latents, output, sigma)
        )


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_discrete_models_are_understood_as_ddim_understands_them(latents, prediction, betas):
    theirs = diffusers.DDIMScheduler(
        beta_schedule=betas, prediction_type=prediction, clip_sample=False, set_alpha_to_one=False
    )
    model = Parameterization.of({**AMEDScheduler().config, **theirs.config})
    output = torch.randn_like(latents)
    for k in (3, 500, 990):
        alpha = theirs.alphas_cumprod[k].double()
        sigma = ((1 - alpha) / alpha).sqrt()
        assert float(model.timestep(sigma)) == pytest.approx(k, abs=1e-2)
        assert float(model.sigma(torch.tensor(k))) == pytest.approx(float(sigma), rel=5e-4)
        vp = model.scaled(latents, sigma)
        theirs.set_timesteps(1000)
        expected = theirs.step(output, k, vp).pred_original_sample
        torch.testing.assert_close(model.denoised(latents, output, sigma), expected, rtol=1e-3, atol=1e-3)


def test_a_stable_diffusion_config_becomes_a_discrete_scheduler():
    pndm = diffusers.PNDMScheduler(**SD, skip_prk_steps=True, steps_offset=1)
    scheduler = AMEDScheduler.from_config(pndm.config)
    scheduler.set_timesteps(5)
    assert scheduler.init_noise_sigma == pytest.approx(14.6146, rel=1e-4)
    assert float(scheduler.timesteps[0]) == pytest.approx(999, abs=1e-3)
    assert float(scheduler.timesteps[-1]) == pytest.approx(0, abs=1e-3)


def test_a_trajectory_may_start_in_the_middle(network, denoiser, latents):
    """As image-to-image: noise is added at the begin index, and the steps from there are the engine's."""
    scheduler = AMEDScheduler(midpoints=MIDS, final_sigmas_type="sigma_min")
    for k in (1, 2):
        scheduler.set_timesteps(3)
        scheduler.set_begin_index(scheduler.order * k)
        start = scheduler.timesteps[scheduler.order * k :][:1].repeat(len(latents))
        clean = torch.full_like(latents, 0.3)
        x = scheduler.add_noise(clean, latents, start)
        torch.testing.assert_close(x, clean + latents * scheduler.levels[k].float())
        expected = sample(denoiser, x, scheduler.levels[k:], make_solver("amed"), [tuple(m) for m in MIDS[k:]])
        drawn = pipeline_loop(scheduler, network, x, start=scheduler.order * k)
        assert (drawn - expected).abs().max() < 5e-5


def test_a_callback_may_change_the_sample(network, denoiser, latents):
    scheduler = AMEDScheduler(midpoints=MIDS, final_sigmas_type="sigma_min")
    scheduler.set_timesteps(3)
    x = latents * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t.expand(len(x))), t, x).prev_sample
        if i == 1:
            x = x.flip(0)
    levels, solver = scheduler.levels, make_solver("amed")
    halfway = sample(denoiser, latents * 80, levels[:2], solver, [tuple(MIDS[0])]).flip(0)
    expected = sample(denoiser, halfway, levels[1:], solver, [tuple(m) for m in MIDS[1:]])
    assert (x - expected).abs().max() < 5e-5


# diffusers' common tests for schedulers, written for this one.


@pytest.fixture(params=[{}, SD, {"midpoints": MIDS, "final_sigmas_type": "sigma_min"}], ids=["EDM", "SD", "constants"])
def config(request):
    return request.param


def steps_of(config):
    return 3 if "midpoints" in config else 10


@pytest.fixture
def dummy():
    return torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def first_step(scheduler, dummy, config, **options):
    scheduler.set_timesteps(steps_of(config))
    t = scheduler.timesteps[0]
    scheduler.scale_model_input(dummy, t)
    return scheduler.step(0.1 * dummy, t, dummy, **options)


def test_save_and_reload_give_the_same_step(config, dummy, tmp_path):
    scheduler = AMEDScheduler(**config)
    scheduler.save_pretrained(tmp_path)
    assert (tmp_path / "scheduler_config.json").is_file()
    again = AMEDScheduler.from_pretrained(tmp_path)
    # Which values were defaults is only known before saving; EDMEulerScheduler does the same.
    assert again.config == {k: v for k, v in scheduler.config.items() if k != "_use_default_values"}
    one, two = (first_step(s, dummy, config).prev_sample for s in (scheduler, again))
    assert (one - two).abs().sum() < 1e-5


def test_save_and_reload_in_the_middle_of_the_configurations(dummy, tmp_path):
    for options in (
        {"num_train_timesteps": 100},
        {"prediction_type": "v_prediction"},
        {"sigma_schedule": "exponential"},
    ):
        for more in ({"sigma_min": 0.02, "sigma_max": 50.0}, {"rho": 5.0}, {"sigma_data": 1.0}):
            scheduler = AMEDScheduler(**options, **more)
            scheduler.save_config(tmp_path)
            again = AMEDScheduler.from_pretrained(tmp_path)
            one, two = (first_step(s, dummy, {}).prev_sample for s in (scheduler, again))
            assert torch.equal(one, two)


def test_configs_go_to_edm_euler_and_back(config):
    scheduler = AMEDScheduler(**config)
    assert scheduler.compatibles
    for other in scheduler.compatibles:
        there = other.from_config(scheduler.config)
        back = AMEDScheduler.from_config(there.config)
        assert {k: v for k, v in back.config.items() if k in scheduler.config} == dict(scheduler.config)


def test_step_keeps_the_shape(config, dummy):
    scheduler = AMEDScheduler(**config)
    scheduler.set_timesteps(steps_of(config))
    for t in scheduler.timesteps[:2]:
        assert scheduler.step(0.1 * dummy, t, dummy).prev_sample.shape == dummy.shape


def test_tuple_and_dict_outputs_agree(config, dummy):
    scheduler = AMEDScheduler(**config)
    as_dict, as_tuple = first_step(scheduler, dummy, config), first_step(scheduler, dummy, config, return_dict=False)
    for one, two in zip(as_dict.values(), as_tuple, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


def test_the_public_interface_is_that_of_a_scheduler(config, dummy):
    scheduler = AMEDScheduler(**config)
    names = list(inspect.signature(scheduler.set_timesteps).parameters)
    assert names == ["num_inference_steps", "device", "timesteps", "sigmas", "mu"]
    assert scheduler.init_noise_sigma > 1
    assert scheduler.order == 2
    assert scheduler.scale_model_input(dummy, scheduler.timesteps[0]).shape == dummy.shape
    assert len(scheduler) == scheduler.config.num_train_timesteps
    assert scheduler.config_name == "scheduler_config.json"


def test_noise_is_added_per_timestep(config, dummy):
    scheduler = AMEDScheduler(**config)
    scheduler.set_timesteps(steps_of(config))
    noise, at = torch.randn_like(dummy), torch.tensor([0, 2, 4, 2])
    noised = scheduler.add_noise(dummy, noise, scheduler.timesteps[at])
    expected = dummy + noise * scheduler.sigmas[at].float().reshape(-1, 1, 1, 1)
    torch.testing.assert_close(noised, expected)


def test_any_number_of_steps_survives_saving(dummy, tmp_path):
    for steps in (2, 5, 50):
        scheduler = AMEDScheduler(**SD)
        scheduler.save_config(tmp_path)
        one, two = scheduler, AMEDScheduler.from_pretrained(tmp_path)
        for made in (one, two):
            made.set_timesteps(steps)
        t = one.timesteps[0]
        assert torch.equal(one.timesteps, two.timesteps)
        assert torch.equal(*(made.step(0.1 * dummy, t, dummy).prev_sample for made in (one, two)))


def test_noise_is_added_on_the_samples_device(config, dummy):
    scheduler = AMEDScheduler(**config)
    scheduler.set_timesteps(steps_of(config))
    away = dummy.to("meta")  # where a tensor of another device cannot be added to
    noised = scheduler.add_noise(away, away, scheduler.timesteps[2][None])
    assert (noised.device, noised.shape) == (away.device, dummy.shape)


@pytest.mark.parametrize("kind", [np.array, list])
def test_trained_betas_are_kept(kind, tmp_path):
    scheduler = AMEDScheduler(trained_betas=kind([0.1, 0.2, 0.3]), num_train_timesteps=3)
    scheduler.save_pretrained(tmp_path)
    again = AMEDScheduler.from_pretrained(tmp_path)
    expected = torch.tensor([0.9, 0.9 * 0.8, 0.9 * 0.8 * 0.7], dtype=torch.float64)
    for made in (scheduler, again):
        torch.testing.assert_close(made.alphas_cumprod, expected)
    assert AMEDScheduler().alphas_cumprod is None


def test_attributes_are_its_own_and_the_configuration_s_only_with_a_warning():
    scheduler = AMEDScheduler()
    scheduler.own = 5
    scheduler.register_to_config(configured=5)
    assert scheduler.own == 5
    with pytest.warns(FutureWarning, match="configured"):
        assert scheduler.configured == 5
    with pytest.raises(AttributeError, match="'AMEDScheduler' object has no attribute 'absent'"):
        _ = scheduler.absent


def test_no_argument_is_swallowed_or_deprecated():
    """**kwargs would hide a misspelt one; diffusers allows them for deprecated names only."""
    kinds = {p.kind for p in inspect.signature(AMEDScheduler.__init__).parameters.values()}
    assert inspect.Parameter.VAR_KEYWORD not in kinds
    assert not AMEDScheduler._deprecated_kwargs


def test_deepcopies_are_independent(network, latents):
    one = AMEDScheduler(midpoints=MIDS, final_sigmas_type="sigma_min")
    one.set_timesteps(3)
    t = one.timesteps[0]
    x = one.step(network(one.scale_model_input(latents, t), t.expand(3)), t, latents).prev_sample
    two = copy.deepcopy(one)
    assert two._state.x.data_ptr() != one._state.x.data_ptr()
    pipeline_loop(two, network, x, start=1)
    assert (two.step_index, one.step_index) == (6, 1)
    assert torch.equal(one._state.x, latents)


def test_given_levels_and_timesteps_are_used(config, dummy):
    scheduler = AMEDScheduler(**{**config, "midpoints": None, "final_sigmas_type": "zero"})
    scheduler.set_timesteps(sigmas=[10.0, 3.0, 1.0, 0.1, 0.0])
    assert scheduler.levels.tolist() == [10.0, 3.0, 1.0, 0.1]
    assert scheduler.num_inference_steps == 4
    told = scheduler.model.timestep(scheduler.levels)
    scheduler.set_timesteps(timesteps=told.tolist())
    torch.testing.assert_close(
        scheduler.levels, torch.tensor([10.0, 3.0, 1.0, 0.1], dtype=torch.float64), rtol=1e-5, atol=0
    )


def test_half_precision_samples_come_back_in_half_precision(config, dummy):
    out = first_step(AMEDScheduler(**config), dummy.half(), config)
    assert out.prev_sample.dtype == torch.float16
    assert out.prev_sample.isfinite().all()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"solver": "heun"}, "two evaluations per interval, not 'heun'"),
        ({"solver_options": {"points": 2}}, "two evaluations per interval"),
        ({"prediction_type": "flow"}, "prediction_type must be one of"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule must be one of"),
        ({"sigma_schedule": "sgm"}, "karras or exponential"),
        ({"rho": 0}, "rho must be a positive number, got 0"),
        ({"rho": None}, "rho must be a positive number, got None"),
        ({"sigma_data": 0.0}, r"sigma_data must be a positive number, .*, got 0\.0"),
        ({"final_sigmas_type": "none"}, "zero or sigma_min"),
        ({"midpoints": 0.5}, "one Midpoint per interval"),
        ({"solver": "dpmpp", "solver_options": {"thresholding": True}, "afs": True}, "set afs=False"),
    ],
)
def test_configurations_that_cannot_work_are_refused(options, match):
    with pytest.raises(ConfigError, match=match):
        AMEDScheduler(**options)


def test_calls_that_cannot_work_are_refused(dummy):
    scheduler = AMEDScheduler(midpoints=MIDS, final_sigmas_type="sigma_min")
    with pytest.raises(ConfigError, match="set_timesteps must be called"):
        scheduler.step(dummy, scheduler.timesteps[0], dummy)
    with pytest.raises(ConfigError, match="a predictor of 3 intervals for 7 intervals"):
        scheduler.set_timesteps(7)
    with pytest.raises(ConfigError, match="pass one of"):
        scheduler.set_timesteps()
    with pytest.raises(ConfigError, match="at least 2 noise levels"):
        AMEDScheduler().set_timesteps(1)
    scheduler.set_timesteps(3)
    with pytest.raises(ConfigError, match=r"none of scheduler\.timesteps"):
        scheduler.step(dummy, 17, dummy)
    with pytest.raises(ConfigError, match="model_output must have the shape of sample"):
        scheduler.step(dummy[:1], scheduler.timesteps[0], dummy)
    with pytest.raises(ConfigError, match=r"takes an AMEDPredictor, .* of one point, got ConstantPredictor"):
        AMEDScheduler.from_predictor(ConstantPredictor(3, points=2))
    scheduler.set_begin_index(1)
    with pytest.raises(ConfigError, match="got index 1 of 6"):
        scheduler.scale_model_input(dummy, scheduler.timesteps[1])


def test_a_predictor_s_scheduler_has_its_number_of_steps(predictor):
    scheduler = AMEDScheduler.from_predictor(predictor)
    scheduler.set_timesteps()
    assert scheduler.num_inference_steps == predictor.plan.intervals
    with pytest.raises(ConfigError, match=f"are for {predictor.plan.intervals} steps, got num_inference_steps=50"):
        scheduler.set_timesteps(50)
    mids = [tuple(m) for m in constants(predictor, predictor.plan.levels)]
    assert [tuple(m) for m in scheduler.config.midpoints] == mids


@pytest.mark.parametrize("prediction", ["sample", "epsilon"])
@pytest.mark.parametrize("solver", ["amed", "ipndm", "dpmpp", "unipc"])
def test_one_buffer_for_samples_and_outputs(solver, prediction):
    """As a pipeline in a CUDA graph has them; what step returns is the pipeline's to write to."""

    def run(one_buffer):
        options = {"thresholding": False} if solver in ("dpmpp", "unipc") else None
        given = {"solver": solver, "solver_options": options, "prediction_type": prediction}
        scheduler = AMEDScheduler(midpoints=[[0.5, 1.0, 1.0]] * 3, **given)
        scheduler.set_timesteps(4)
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma
        buffer = torch.empty_like(x)
        for t in scheduler.timesteps:
            output = scheduler.scale_model_input(x, t).tanh() / 2
            stepped = scheduler.step(buffer.copy_(output) if one_buffer else output, t, x)
            if one_buffer:
                stepped.pred_original_sample.zero_()
            x = x.copy_(stepped.prev_sample) if one_buffer else stepped.prev_sample
        return x

    assert torch.equal(run(True), run(False))
