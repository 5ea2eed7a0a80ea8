"""What `wrap` and `shift_of` read of a diffusers scheduler beside D: range, steps and shifts; and what they refuse."""

from typing import Any

import pytest
import torch

from amed_engine.adapters import EDM, Flow, flow_levels, shift_of, wrap
from amed_engine.errors import ConfigError

diffusers = pytest.importorskip("diffusers", reason="needs pip install 'amed-engine[diffusers]'")

X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SVD = {**SD, "prediction_type": "v_prediction", "timestep_type": "continuous", "sigma_min": 0.002, "sigma_max": 700.0}


class Network:
    """Keeps what it was told."""

    def __call__(self, x, t):
        self.t = t
        return 0.3 * x


def make(name, **options):
    return getattr(diffusers, f"{name}Scheduler")(**options)


def test_the_range_is_the_configuration_s():
    def ends(scheduler):
        denoiser = wrap(Network(), scheduler=scheduler, shape=(3, 4, 4), verify=False)
        return denoiser.sigma_min, denoiser.sigma_max

    assert ends(make("EDMEuler", sigma_min=0.01, sigma_max=120.0)) == (0.01, 120.0)
    assert ends(make("EulerDiscrete", **SVD)) == (0.002, 700.0)
    assert ends(make("EulerDiscrete", **SD, sigma_max=10.0)) == pytest.approx((0.0292, 10.0), rel=1e-2)
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}  # of sigma = t/(1 - t)
    assert ends(make("UniPCMultistep", **flow)) == (0.0, float("inf"))
    assert ends(make("UniPCMultistep", **flow, sigma_min=0.01, sigma_max=200.0)) == (0.01, 200.0)
    assert ends(make("DDIM", **SD, rescale_betas_zero_snr=True))[1] == pytest.approx(4096, rel=1e-3)
    assert ends(make("DDIM", rescale_betas_zero_snr=True))[1] > 4096


def test_only_a_configuration_that_says_so_clips():
    """It is DDIM's default, of latents as of pixels, and saved configurations say it."""
    said = diffusers.DDIMScheduler(clip_sample=True)
    with pytest.raises(ConfigError, match=r"has clip_sample=True, expected False.*network's own"):
        wrap(Network(), scheduler=said)
    assert wrap(Network(), scheduler=diffusers.DDIMScheduler()).family.name == "epsilon"


@pytest.mark.parametrize("name", ["DDPM", "DDIM"])
def test_a_saved_scheduler_that_clips_is_taken_as_its_error_says(name, tmp_path):
    make(name).save_pretrained(tmp_path)
    scheduler = getattr(diffusers, f"{name}Scheduler").from_pretrained(tmp_path)
    way = r"pass scheduler=type\(scheduler\).from_config\(scheduler.config, clip_sample=False\)"
    with pytest.raises(ConfigError, match=way):
        wrap(Network(), scheduler=scheduler)
    scheduler = type(scheduler).from_config(scheduler.config, clip_sample=False)
    expected = wrap(Network(), scheduler=make(name), shape=(3, 4, 4))
    got = wrap(Network(), scheduler=scheduler, shape=(3, 4, 4))
    assert torch.equal(got(X, torch.tensor(2.0)).x0, expected(X, torch.tensor(2.0)).x0)


@pytest.mark.parametrize("sigma_data", [0.0, -0.5, float("nan"), None])
def test_data_without_a_spread_are_refused(sigma_data):
    """With 0, say, D would be 0 whatever the network says."""
    with pytest.raises(ConfigError, match=f"sigma_data must be a positive number.*, got {sigma_data}"):
        wrap(Network(), scheduler=make("EDMEuler", sigma_data=sigma_data))


def test_a_field_of_a_later_version_is_refused():
    class DDIMScheduler(diffusers.DDIMScheduler):
        def __init__(self, fresh=3):
            super().__init__(clip_sample=False)
            self.register_to_config(fresh=fresh)

    with pytest.raises(ConfigError, match="DDIMScheduler has fresh=3, which is not understood"):
        wrap(Network(), scheduler=DDIMScheduler())


def test_a_family_says_all():
    both: tuple[dict[str, Any], ...] = ({"scheduler": make("DDIM")}, {"betas": "linear"})
    for more in both:
        with pytest.raises(ConfigError, match="prediction='edm' is a Family, which says all"):
            wrap(Network(), EDM(), **more)


def test_flow_models_are_told_their_own_steps():
    for steps in (1, 250, 1000):
        network = Network()
        scheduler = make("FlowMatchEulerDiscrete", num_train_timesteps=steps)
        wrap(network, scheduler=scheduler, shape=(3, 4, 4))(X, torch.tensor(1.0))
        assert network.t.tolist() == [steps / 2] * 2
    with pytest.raises(ConfigError, match="num_train_timesteps=0, expected a positive number"):
        wrap(Network(), scheduler=FlowMatchOfNothing())
    assert Flow(1).settings() != Flow(250).settings()


class FlowMatchOfNothing:
    config = {"num_train_timesteps": 0}  # noqa: RUF012


@pytest.mark.parametrize("options", [{"shift": 3.0}, {"num_train_timesteps": 250}])
def test_shifts_are_read_or_refused(options):
    scheduler = make("FlowMatchEulerDiscrete", **options)
    scheduler.set_timesteps(sigmas=torch.linspace(0.999, 0.2, 6).tolist())
    sigma = flow_levels(5, shift=shift_of(scheduler, (16, 8, 8)), t_min=0.2, t_max=0.999)
    torch.testing.assert_close((sigma / (1 + sigma)).float(), scheduler.sigmas[:-1], rtol=1e-5, atol=1e-6)
    assert (
        shift_of(
            make("UniPCMultistep", prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0), (16, 8, 8)
        )
        == 3.0
    )
    assert shift_of(make("FlowMatchEulerDiscrete", shift=0.0), (16, 8, 8)) == 0.0  # which flow_levels refuses
    scheduler.set_shift(5.0)
    assert shift_of(scheduler, (16, 8, 8)) == 5.0
    for more in ({"shift_terminal": 0.1}, {"use_karras_sigmas": True}, {"invert_sigmas": True}):
        with pytest.raises(ConfigError, match=f"has {next(iter(more))}=.* its times are no shift"):
            shift_of(make("FlowMatchEulerDiscrete", **more), (16, 8, 8))
