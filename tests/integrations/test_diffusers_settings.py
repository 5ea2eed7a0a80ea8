"""Configurations of every scheduler of diffusers for AMEDScheduler: the same model, or refused; and back as they were."""

import copy
import inspect

import pytest
import torch

from amed_engine import ConfigError, make_plan
from amed_engine.adapters import decode_latents, wrap

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

from amed_engine.integrations.diffusers import AMEDPipeline, AMEDScheduler  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
NEEDED = {"AmusedScheduler": {"mask_token_id": 1}, "VQDiffusionScheduler": {"num_vec_classes": 5}}
PROTEINS = {"schedule_mode": "log", "noise_mode": "1/t", "tsr_k": 1.0, "tsr_sigma": 1.0}
NEEDED["RFD4ProteinaScheduler"] = PROTEINS
NAMES = [name for name in dir(diffusers) if name.endswith("Scheduler") and name != "AMEDScheduler"]
NAMES = [name for name in NAMES if "dummy" not in getattr(diffusers, name).__module__]
READ = """DDIM DDIMInverse DDIMParallel DDPM DDPMParallel DEISMultistep DPMSolverMultistep DPMSolverMultistepInverse
    DPMSolverSinglestep EDMDPMSolverMultistep EDMEuler EulerAncestralDiscrete EulerDiscrete HeunDiscrete
    KDPM2AncestralDiscrete KDPM2Discrete LMSDiscrete PNDM SASolver UnCLIP UniPCMultistep"""
READ += " DPMSolverSDE" if "DPMSolverSDEScheduler" in NAMES else ""  # with torchsde
FLOWS = ("FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete")
X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def network(x, t):
    return 0.3 * x + 0.1


def make(name, **options):
    return getattr(diffusers, name)(**NEEDED.get(name, {}), **options)


def changed(config, other):
    return {name: (value, other.get(name)) for name, value in config.items() if value != other.get(name)}


def test_exactly_these_schedulers_are_read():
    """The others are of flows, of one jump, of tokens, or say nothing of what is predicted."""

    def is_read(name):
        try:
            return AMEDScheduler.from_config(make(name).config) is not None
        except ConfigError:
            return False

    read = {name.removesuffix("Scheduler") for name in NAMES if is_read(name)}
    assert read == {*READ.split(), "FlowMatchEulerDiscrete"}  # FlowMatchHeun's is, in memory, that of flow maps too


@pytest.mark.parametrize("name", [name for name in NAMES if "AMED" not in name])
def test_a_saved_configuration_is_known_by_its_class(name, tmp_path):
    """Unlike one in memory it names the class, and says the defaults too."""
    clips = (
        {"clip_sample": False}
        if "clip_sample" in inspect.signature(getattr(diffusers, name).__init__).parameters
        else {}
    )
    make(name, **clips).save_config(tmp_path)
    config = getattr(diffusers, name).load_config(tmp_path)
    known = {*READ.split(), *FLOWS} - {"DDIMInverse", "DPMSolverMultistepInverse"}
    if name.removesuffix("Scheduler") not in known:
        with pytest.raises(ConfigError, match=name):
            AMEDScheduler.from_config(config)
        return
    there = AMEDScheduler.from_config(config)
    there.save_config(tmp_path / "there")
    for config_there in (there.config, AMEDScheduler.load_config(tmp_path / "there")):
        back = getattr(diffusers, name).from_config(config_there)
        told = {field: value for field, value in config.items() if not field.startswith("_")}
        assert not changed(told, back.config)


@pytest.mark.parametrize("options", [{}, {"sigma_data": 1.0, "prediction_type": "v_prediction", "sigma_max": 120.0}])
@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
def test_edm_s_settings_are_those_of_the_wrapped_network(name, options):
    present = make(name, **options)
    scheduler, denoiser = AMEDScheduler.from_config(present.config), wrap(network, scheduler=present, bottleneck=None)
    sigma = torch.tensor(2.5)
    raw = network(scheduler.model.scaled(X, sigma), None)
    torch.testing.assert_close(scheduler.model.denoised(X, raw, sigma), denoiser(X, sigma).x0)
    torch.testing.assert_close(wrap(network, scheduler=scheduler, bottleneck=None)(X, sigma).x0, denoiser(X, sigma).x0)
    scheduler.set_timesteps(3)
    assert float(scheduler.levels[0]) == pytest.approx(denoiser.sigma_max)
    assert denoiser.sigma_max == options.get("sigma_max", 80.0)


@pytest.mark.parametrize("kind", ["EulerDiscrete", "DPMSolverMultistep", "UniPCMultistep", "HeunDiscrete"])
@pytest.mark.parametrize("saved", [False, True], ids=["in memory", "saved"])
def test_another_class_has_its_own_range_again(kind, saved, tmp_path):
    """DPM-Solver looks for a sigma_min among the fields that other classes have left."""
    kind = getattr(diffusers, f"{kind}Scheduler")
    present = diffusers.DDIMScheduler(**SD, clip_sample=False)
    direct = kind.from_config(present.config, use_karras_sigmas=True)
    between = AMEDScheduler.from_config(present.config)
    if saved:
        between.save_config(tmp_path)
    config = AMEDScheduler.load_config(tmp_path) if saved else between.config
    back = kind.from_config(config, use_karras_sigmas=True)
    for scheduler in (direct, back):
        scheduler.set_timesteps(6)
    torch.testing.assert_close(back.sigmas, direct.sigmas, rtol=0, atol=0)


def test_what_a_predictor_changed_is_left_behind(predictor):
    predictor.plan = make_plan(predictor.plan.nfe, solver="amed", sigma_min=0.05, sigma_max=10.0)
    present = diffusers.EulerDiscreteScheduler(**SD, use_karras_sigmas=True)
    scheduler = AMEDScheduler.from_predictor(predictor, present.config)
    assert scheduler.init_noise_sigma == pytest.approx(10.0)
    assert scheduler.settings["final_sigmas_type"] == "sigma_min"
    back = diffusers.EulerDiscreteScheduler.from_config(scheduler.config)
    assert not changed({k: v for k, v in present.config.items() if k != "_use_default_values"}, back.config)
    again = AMEDScheduler.from_config(scheduler.config)
    assert {k: again.settings[k] for k in ("final_sigmas_type", "noise_levels", "midpoints", "afs")} == {
        k: scheduler.settings[k] for k in ("final_sigmas_type", "noise_levels", "midpoints", "afs")
    }


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({**SD, "timestep_type": "continuous"}, r"timestep_type='continuous'.*AMEDScheduler\(sigma_data=1\.0"),
        (
            {**SD, "prediction_type": "flow_prediction", "_class_name": "UniPCMultistepScheduler"},
            "without use_flow_sigmas=True",
        ),
        ({"shift": 3.0, "num_train_timesteps": 1000}, "name its class in '_class_name'"),
        ({**SD, "rescale_betas_zero_snr": True, "thresholding": True, "sample_max_value": 0}, "sample_max_value > 0"),
        ({**SD, "snr_shift_scale": 3.0}, r"has snr_shift_scale=3\.0, .* trained_betas"),
        ({**SD, "fresh": 1}, "has fresh=1, which is not understood"),
        ({**SD, "_class_name": "NewScheduler"}, "NewScheduler is not known"),
        ({"eta": 1.0, "s_noise": 1.0}, r"has eta=1\.0"),
        ({"trained_betas": None}, "does not say what the network predicts"),
        ({"sigma_data": 1.0, "solver_order": 2}, "CosineDPMSolverMultistepScheduler"),
        ({"trained_betas": [0.1, 0.2], "prediction_type": "epsilon"}, "trained_betas are of 2 steps"),
        ({"sigma_min": 3.0, "sigma_max": 2.0}, "need sigma_min < sigma_max"),
    ],
)
def test_what_is_not_understood_is_named(config, match):
    with pytest.raises(ConfigError, match=match):
        AMEDScheduler.from_config(config)


@pytest.mark.parametrize("name", sorted(set(READ.split()) - {"DDIMInverse", "DPMSolverMultistepInverse"}))
def test_what_a_configuration_leaves_out_is_its_class_s(name):
    """Those of old name few fields; Heun's betas, say, are others than DDIM's."""
    said = {"_class_name": f"{name}Scheduler", "num_train_timesteps": 500, "_diffusers_version": "0.1.1"}
    scheduler, own = AMEDScheduler.from_config(said), make(f"{name}Scheduler", num_train_timesteps=500)
    family = wrap(network, scheduler=own, bottleneck=None, verify=False).family
    assert type(scheduler.model.family) is type(family)
    sigma = torch.tensor([0.5, 3.0])
    torch.testing.assert_close(scheduler.model.timestep(sigma), family.time(sigma).float(), rtol=1e-4, atol=1e-3)


def test_what_another_class_left_in_a_configuration_says_nothing():
    """A pipeline names the class of its scheduler; here through others before."""
    discrete, edm = diffusers.DDIMScheduler(**SD), diffusers.EDMEulerScheduler(sigma_data=1.0, sigma_max=50.0)
    flow = diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    for scheduler in (
        diffusers.EDMEulerScheduler.from_config(discrete.config),
        diffusers.EulerDiscreteScheduler.from_config(edm.config, **SD),
        diffusers.DDIMScheduler.from_config(flow.config, prediction_type="epsilon", clip_sample=False),
    ):
        made = AMEDScheduler.from_config({**scheduler.config, "_class_name": type(scheduler).__name__}).model.family
        own = wrap(network, scheduler=scheduler, bottleneck=None).family
        sigma = torch.tensor([0.5, 3.0])
        assert type(made) is type(own)
        torch.testing.assert_close(made.time(sigma), own.time(sigma), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"timestep_spacing": "karras"}, "timestep_spacing must be one of leading, linspace, trailing"),
        ({"use_beta_sigmas": True, "use_karras_sigmas": True}, "pass one schedule of noise levels"),
        ({"timestep_type": "continuous"}, "timestep_type='continuous'"),
        ({"use_flow_sigmas": True}, "is of a flow-matching model"),
        ({"fresh": 1}, "has fresh=1, which is not understood"),
    ],
)
def test_what_is_changed_is_understood_or_named_too(changes, match):
    with pytest.raises(ConfigError, match=match):
        AMEDScheduler.from_config(SD, **changes)
    if not changes.keys() & inspect.signature(AMEDScheduler.__init__).parameters.keys():
        assert AMEDScheduler.from_config(SD, return_unused_kwargs=True, **changes)[1] == changes


def test_settings_of_the_other_kind_of_model_are_refused():
    """Of none would anything be seen in the samples."""
    for options in ({"beta_end": 0.012}, {"beta_start": 0.00085}):
        with pytest.raises(ConfigError, match=f"{next(iter(options))}=.* without a beta_schedule or trained_betas"):
            AMEDScheduler(**options)
    with pytest.raises(ConfigError, match=r"sigma_data=1\.0 says nothing of a model with a beta_schedule"):
        AMEDScheduler(**SD, sigma_data=1.0)


def test_stable_video_diffusion_is_an_edm_model_of_v():
    """What the refusal says to do: the times and D of its own scheduler."""
    options = {"timestep_type": "continuous", "sigma_min": 0.002, "sigma_max": 700.0, "use_karras_sigmas": True}
    svd = diffusers.EulerDiscreteScheduler(**SD, **options, prediction_type="v_prediction")
    svd.set_timesteps(4)
    scheduler = AMEDScheduler(sigma_data=1.0, prediction_type="v_prediction", sigma_min=0.002, sigma_max=700.0)
    scheduler.set_timesteps(4)
    torch.testing.assert_close(scheduler.levels.float(), svd.sigmas[:-1], rtol=1e-5, atol=0)
    assert float(scheduler.timesteps[0]) == pytest.approx(float(svd.timesteps[0]), rel=1e-4)
    assert float(svd.timesteps[0]) == pytest.approx(0.25 * float(torch.tensor(700.0).log()), rel=1e-4)
    x = X * 700
    raw = network(svd.scale_model_input(x, svd.timesteps[0]), None)
    expected = svd.step(raw, svd.timesteps[0], x).pred_original_sample
    torch.testing.assert_close(scheduler.model.denoised(x, raw, svd.sigmas[0]), expected, rtol=1e-4, atol=1e-4)


def test_a_pipeline_names_the_class_of_its_scheduler():
    unet = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )  # fmt: skip
    for scheduler in (diffusers.LTXEulerAncestralRFScheduler(), diffusers.IPNDMScheduler()):
        with pytest.raises(ConfigError, match=type(scheduler).__name__):
            AMEDPipeline(unet, scheduler)


# ---- autoencoders and SDXL


def autoencoder(**options):
    torch.manual_seed(0)
    blocks = {"block_out_channels": (4, 8), "norm_num_groups": 2, "latent_channels": 4, "scaling_factor": 0.3}
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    return diffusers.AutoencoderKL(**blocks, **kinds, **options).eval()


MEAN, STD = [1.0, -1.0, 0.5, 0.0], [2.0, 0.5, 1.0, 3.0]


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"shift_factor": 0.2}, {"latents_mean": MEAN, "latents_std": STD}])
def test_latents_are_scaled_as_the_autoencoder_says(options):
    vae, shift = autoencoder(**options), options.get("shift_factor", 0.0)
    mean, std = (
        torch.tensor(options.get(k, d)).view(-1, 1, 1) for k, d in (("latents_mean", [0.0]), ("latents_std", [1.0]))
    )
    expected = vae.decode(X * std / 0.3 + mean + shift).sample.clamp(-1, 1)
    torch.testing.assert_close(decode_latents(vae, X), expected)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"latents_mean": MEAN}, r"latents_std=None.*expected 4 numbers in both"),
        ({"latents_mean": MEAN, "latents_std": STD[:3]}, "expected 4 numbers in both"),
        ({"latents_mean": MEAN, "latents_std": STD, "shift_factor": 0.1}, r"shift_factor=0\.1"),
    ],
)
def test_latents_that_are_scaled_otherwise_are_refused(options, match):
    with pytest.raises(ConfigError, match=match):
        decode_latents(autoencoder(**options), X)
    vae = autoencoder()
    vae.register_to_config(scaling_factor=None)
    with pytest.raises(ConfigError, match="AutoencoderKL has scaling_factor=None"):
        decode_latents(vae, X)


@torch.no_grad()
def test_an_autoencoder_that_overflows_in_half_precision_is_run_in_float32():
    vae = autoencoder(force_upcast=True)
    vae.decoder.conv_in.weight.mul_(1e3)  # float16 ends at 65504
    vae.decoder.conv_in.bias.fill_(1e5).mul_(0.6)
    half, latents = copy.deepcopy(vae).half(), 100 * X
    expected = copy.deepcopy(half).float().decode(latents / 0.3).sample.clamp(-1, 1)
    torch.testing.assert_close(decode_latents(half, latents), expected)
    assert half.dtype == torch.float16
    half.register_to_config(force_upcast=False)
    assert not decode_latents(half, latents).isfinite().all()


@torch.no_grad()
def test_an_autoencoder_may_keep_its_mean_beside_its_configuration():
    """As LTX's, of videos."""
    torch.manual_seed(0)
    coder = {"block_out_channels": (4,) * 4, "layers_per_block": (1,) * 5, "spatio_temporal_scaling": (False,) * 4}
    decoder = {f"decoder_{name}": value for name, value in coder.items()}
    plain = {"decoder_inject_noise": (False,) * 5, "upsample_residual": (False,) * 4, "upsample_factor": (1,) * 4}
    vae = diffusers.AutoencoderKLLTXVideo(latent_channels=4, patch_size=1, **coder, **decoder, **plain).eval()
    vae.latents_mean.copy_(torch.tensor(MEAN))
    vae.latents_std.copy_(torch.tensor(STD))
    video = X[:, :, None]
    scaled = video * torch.tensor(STD).view(-1, 1, 1, 1) + torch.tensor(MEAN).view(-1, 1, 1, 1)
    torch.testing.assert_close(decode_latents(vae, video), vae.decode(scaled).sample.clamp(-1, 1))


def test_a_predictor_of_another_range_is_told(predictor, caplog):
    def lines(config, low, high):
        caplog.clear()
        predictor.plan = make_plan(predictor.plan.nfe, solver="amed", sigma_min=low, sigma_max=high)
        AMEDScheduler.from_predictor(predictor, config)
        return [record.getMessage() for record in caplog.records if "noise levels" in record.getMessage()]

    model = diffusers.EulerDiscreteScheduler(**SD).config  # 14.6 to 0.029
    assert not lines(model, 0.0292, 14.6)
    assert not lines(None, 0.05, 10.0)  # nothing says what the model's are
    (left_out,) = lines(model, 0.0292, 10.0)
    assert left_out.startswith("the model's noise levels are 14.6146 to 0.0291672, this predictor's 10 to 0.0292")
    assert len(lines(model, 0.002, 80.0)) == 1
    large = diffusers.EDMEulerScheduler(sigma_data=16.0, sigma_max=2560.0).config
    assert len(lines(large, 0.002, 80.0)) == 1
    assert not lines(large, 0.002, 2560.0)
