"""Files from before plans had a version mean what they meant: thresholding where it was not named, afs about zero."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from comfy_standin import folder_paths
from safetensors.torch import save_file

from amed_engine import Plan, Sampler, load_predictor, make_plan
from amed_engine.engine.export.package import PackageFacts
from amed_engine.integrations.comfyui import NODE_CLASS_MAPPINGS
from amed_engine.integrations.comfyui.webui import sampler_entry

PLAN = """{"solver": "%s", "sigmas": [80.0, 10.0, 1.0, 0.002], "schedule": "custom", "rho": null, "options": {"max_order": 2},
"afs": %s, "denoise_to_zero": false, "midpoint": true, "guidance_scale": null, "model": null, "dtype": null}"""
FACTS = """{"kind": "amed_package", "format": "exported", "inputs": [], "outputs": [], "shape": [1, 8, 8], "label_dim": 0,
"dtype": "float32", "device": "cpu", "max_batch": 4, "nfe": 5, "sigma_max": 80.0, "sigma_min": 0.002, "plan": %s,
"versions": {"torch": "2.10.0"}}"""
SCHEDULER = """{"_class_name": "AMEDScheduler", "_diffusers_version": "0.35.0", "afs": false, "beta_end": 0.02,
"beta_schedule": null, "beta_start": 0.0001, "final_sigmas_type": "sigma_min", "guidance_scale": null,
"midpoints": [[0.4, 1.02, 0.99], [0.6, 1.0, 1.0], [0.5, 0.98, 1.01]], "noise_levels": [80.0, 10.0, 1.0, 0.002],
"num_train_timesteps": 1000, "prediction_type": "epsilon", "rho": 7.0, "sigma_data": 0.5, "sigma_max": 80.0,
"sigma_min": 0.002, "sigma_schedule": "karras", "solver": "%s", "solver_options": %s, "trained_betas": null}"""

SOLVERS = pytest.mark.parametrize("solver", ["dpmpp", "unipc"])


def meant(solver):
    """What such a plan says, in full."""
    options = {"max_order": 2, "thresholding": True}
    levels = torch.tensor([80.0, 10.0, 1.0, 0.002], dtype=torch.float64)
    return make_plan(None, solver=solver, options=options, schedule=levels, midpoint=True, afs=True)


@pytest.fixture
def file(about_mean, tmp_path, request):
    """A predictor as they were saved, its plan of the solver that the test is about."""
    said = {"kind": "amed_predictor", "predictor": about_mean.config, "amed_engine": "0.1.0"}
    plan = json.loads(PLAN % (request.getfixturevalue("solver"), "true"))
    path = tmp_path / "amed" / "old.safetensors"
    path.parent.mkdir()
    save_file(about_mean.state_dict(), path, {"amed_config": json.dumps({**said, "plan": plan})})
    return path


@SOLVERS
def test_a_plan(solver, tmp_path):
    (tmp_path / "plan.json").write_text(PLAN % (solver, "true"))
    read = Plan.load(tmp_path / "plan.json")
    assert read == meant(solver)
    assert dict(read.options)["thresholding"] is True
    assert read.afs is True
    assert read.mean is None


@SOLVERS
def test_the_facts_of_a_package(solver):
    facts = PackageFacts.from_text(FACTS % (PLAN % (solver, "true")), Path("old.pt2"))
    assert facts.plan == meant(solver)
    assert facts.plan.make_solver().thresholds


@SOLVERS
def test_a_predictor(file, solver, tiny_model, latents):
    predictor = load_predictor(file)
    assert predictor.plan == meant(solver)
    latents = latents * 3
    drawn = Sampler(tiny_model, file).run(latents).images
    predictor.plan = replace(predictor.plan, options=(("max_order", 2), ("thresholding", False)))
    assert (drawn - Sampler(tiny_model, predictor).run(latents).images).abs().max() > 1e-3


@SOLVERS
def test_a_workflow_of_comfyui_with_such_a_predictor(file, solver, monkeypatch, tiny_model, latents):
    monkeypatch.setitem(sys.modules, "folder_paths", folder_paths(file.parents[1]))
    (predictor,) = NODE_CLASS_MAPPINGS["AMEDPredictorLoader"]().load("old.safetensors")
    (sigmas,) = NODE_CLASS_MAPPINGS["AMEDSchedule"]().get_sigmas(predictor)
    _, function, _, _ = sampler_entry(predictor)
    drawn = function(lambda x, sigma: tiny_model(x, sigma).x0, latents * 240, sigmas=sigmas, disable=True)
    predictor.plan = meant(solver)
    denoiser = Sampler(lambda x, sigma: tiny_model(x, sigma).x0, predictor, shape=(1, 8, 8))
    assert (drawn - denoiser.run(latents * 3).images).abs().max() < 1e-5


class TestScheduler:
    """Of diffusers."""

    @pytest.fixture(autouse=True)
    def _diffusers(self):
        pytest.importorskip("diffusers", reason="diffusers is not installed")

    @pytest.fixture
    def kind(self):
        from amed_engine.integrations.diffusers import AMEDScheduler

        return AMEDScheduler

    @SOLVERS
    @pytest.mark.parametrize("options", ["null", '{"max_order": 2}'])
    def test_a_configuration(self, kind, solver, options, tmp_path):
        (tmp_path / "scheduler_config.json").write_text(SCHEDULER % (solver, options))
        for made in (kind.from_pretrained(tmp_path), kind.from_config(json.loads(SCHEDULER % (solver, options)))):
            made.set_timesteps(3)
            assert made.program(made.levels).solver.thresholds
            assert made.config.solver_options["thresholding"] is True
            made.save_pretrained(tmp_path / "again")
            again = kind.from_pretrained(tmp_path / "again")
            assert again.config == {name: value for name, value in made.config.items() if name != "_use_default_values"}

    def test_a_first_step_about_zero(self, kind):
        config = {**json.loads(SCHEDULER % ("amed", "null")), "afs": True}
        made = kind.from_config(config)
        made.set_timesteps(3)
        program = made.program(made.levels)
        assert (program.afs, program.mean, program.nfe) == (True, None, 5)

    @SOLVERS
    def test_calls_of_now_mean_what_is_so_now(self, kind, solver, tmp_path):
        """Also when they went through another scheduler of diffusers, and where only a change names the solver."""
        for made in (kind(solver=solver), kind.from_config(kind().config, solver=solver)):
            other = made.compatibles[0].from_config(made.config)
            made.save_pretrained(tmp_path)
            for again in (made, kind.from_config(made.config), kind.from_config(other.config)):
                assert again.config.solver_options["thresholding"] is False
            assert kind.from_pretrained(tmp_path).config.solver_options == made.config.solver_options
