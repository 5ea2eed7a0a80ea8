"""From a scheduler of diffusers to AMEDScheduler and back: each has its own range of noise levels and its own end again."""

import json

import pytest
import torch

from amed_engine.adapters import wrap

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

from amed_engine.integrations.diffusers import AMEDScheduler  # noqa: E402

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FIELDS = ("final_sigmas_type", "sigma_min", "sigma_max", "rho", "sigma_schedule")
LOW = {"midpoints": [[0.5, 1.0, 1.0]] * 3, "final_sigmas_type": "sigma_min"}
NARROW = {"sigma_min": 0.05, "sigma_max": 10.0, "rho": 5.0, "sigma_schedule": "exponential"}
PRESENT = {
    "DPM-Solver": lambda: diffusers.DPMSolverMultistepScheduler(**SD),
    "DPM-Solver to sigma_min": lambda: diffusers.DPMSolverMultistepScheduler(**SD, final_sigmas_type="sigma_min"),
    "UniPC": lambda: diffusers.UniPCMultistepScheduler(**SD, use_karras_sigmas=True, sigma_max=11.0),
    "Euler": lambda: diffusers.EulerDiscreteScheduler(**SD, use_karras_sigmas=True),
    "Euler narrow": lambda: diffusers.EulerDiscreteScheduler(**SD, use_karras_sigmas=True, sigma_max=12.0),
    "EDM": lambda: diffusers.EDMEulerScheduler(),
    "EDM wide": lambda: diffusers.EDMEulerScheduler(sigma_data=1.0, sigma_max=120.0, rho=6.0),
    "EDM to sigma_min": lambda: diffusers.EDMEulerScheduler(final_sigmas_type="sigma_min"),
}


def saved(scheduler, folder):
    scheduler.save_pretrained(folder)
    return type(scheduler).load_config(folder)


def levels(scheduler):
    scheduler.set_timesteps(3)
    return scheduler.sigmas


@pytest.mark.parametrize("files", [False, True], ids=["in memory", "saved"])
@pytest.mark.parametrize("changes", [LOW, NARROW, LOW | NARROW, {"final_sigmas_type": "zero"}])
@pytest.mark.parametrize("name", PRESENT)
def test_both_have_their_own_again(name, changes, files, tmp_path):
    def passed(scheduler):
        return saved(scheduler, tmp_path) if files else scheduler.config

    present = PRESENT[name]()
    kind = type(present)
    amed = AMEDScheduler.from_config(passed(present), **changes)
    assert {field: amed.settings[field] for field in changes} == changes
    back = kind.from_config(passed(amed))
    own = {field: value for field, value in present.config.items() if field in FIELDS}
    assert {field: back.config[field] for field in own} == own
    assert torch.equal(levels(back), levels(present))
    again = AMEDScheduler.from_config(passed(back))
    assert {field: again.settings[field] for field in FIELDS} == {field: amed.settings[field] for field in FIELDS}
    assert torch.equal(levels(again), levels(amed))


@pytest.mark.parametrize("name", ["DPM-Solver", "Euler narrow", "EDM wide"])
def test_another_class_reads_its_own_in_the_file_itself(name, tmp_path):
    present = PRESENT[name]()
    AMEDScheduler.from_config(present.config, **LOW, **NARROW).save_pretrained(tmp_path)
    back = type(present).from_pretrained(tmp_path)
    assert torch.equal(levels(back), levels(present))
    loaded = AMEDScheduler.from_pretrained(tmp_path)
    assert {field: loaded.settings[field] for field in NARROW} == NARROW
    assert {field: AMEDScheduler.from_config(str(tmp_path)).settings[field] for field in NARROW} == NARROW


def test_a_second_change_is_this_class_s_own_too():
    first = AMEDScheduler.from_config(PRESENT["EDM wide"]().config, sigma_max=40.0, sigma_min=0.1)
    second = AMEDScheduler.from_config(first.config, sigma_max=20.0)
    assert (second.settings["sigma_min"], second.settings["sigma_max"]) == (0.1, 20.0)
    assert second.config["sigma_max"] == 120.0
    assert float(levels(second)[0]) == pytest.approx(20.0)


def test_the_wrapped_network_has_the_range_of_this_class():
    amed = AMEDScheduler.from_config(PRESENT["EDM wide"]().config, sigma_max=40.0)
    assert wrap(lambda x, t: x, scheduler=amed, bottleneck=None).sigma_max == 40.0
    back = diffusers.EDMEulerScheduler.from_config(amed.config)
    assert wrap(lambda x, t: x, scheduler=back, bottleneck=None).sigma_max == 120.0


def test_files_without_an_entry_of_their_own_mean_what_they_say(tmp_path):
    """As they were saved before there was one."""
    amed = AMEDScheduler.from_config(PRESENT["Euler"]().config, **LOW, sigma_max=10.0)
    config = saved(amed, tmp_path)
    flat = {name: value for name, value in config.items() if name != "_amed"} | config["_amed"]
    (tmp_path / "scheduler_config.json").write_text(json.dumps(flat))
    loaded = AMEDScheduler.from_pretrained(tmp_path)
    assert {field: loaded.settings[field] for field in FIELDS} == {field: amed.settings[field] for field in FIELDS}
    assert torch.equal(levels(loaded), levels(amed))


@pytest.mark.parametrize("files", [False, True], ids=["in memory", "saved"])
def test_what_a_class_never_said_is_its_own_default(files, tmp_path):
    """DDIM has no range; DPM-Solver looks for one among the fields that other classes left."""
    amed = AMEDScheduler.from_config(diffusers.DDIMScheduler(**SD, clip_sample=False).config, **LOW, sigma_max=10.0)
    config = saved(amed, tmp_path) if files else amed.config
    options = {"use_karras_sigmas": True}
    back = diffusers.DPMSolverMultistepScheduler.from_config(config, **options)
    assert torch.equal(levels(back), levels(diffusers.DPMSolverMultistepScheduler(**SD, **options)))
