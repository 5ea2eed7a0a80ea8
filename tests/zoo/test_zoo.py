"""Published models by name, and the recipes that run their evaluations."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import amed_engine
from amed_engine import AMEDPredictor, ConfigError, FileFormatError, Sampler, make_plan, networks, save_predictor, zoo
from amed_engine.adapters.fingerprint import fingerprint
from amed_engine.checkpoints import convert, save_model
from amed_engine.evaluation.published.recipes import load_recipe, recipe_names
from amed_engine.evaluation.published.reproduce import draw, recipe_sampler
from amed_engine.networks import EDMPrecond
from amed_engine.zoo.catalogue import CATALOGUE

NAME = "edm-cifar10-32x32-uncond-vp"
EDM = [name for name, entry in CATALOGUE.items() if entry.network == "EDMPrecond"]
MILLIONS = {"cifar10": (55.0, 57.0), "ffhq": (61.0, 63.0), "afhqv2": (61.0, 63.0), "imagenet": (295.0, 297.0)}


# ---- the catalogue


def test_the_published_models_are_known():
    expected = {f"edm-cifar10-32x32-{kind}-{form}" for kind in ("cond", "uncond") for form in ("vp", "ve")}
    expected |= {f"edm-{data}-64x64-uncond-{form}" for data in ("ffhq", "afhqv2") for form in ("vp", "ve")}
    expected |= {"edm-imagenet-64x64-cond-adm", "edm-lsun-bedroom-256x256", "ldm-lsun-bedroom-256x256", "sd-v1-5"}
    assert set(zoo.published()) == expected


@pytest.mark.parametrize("name", EDM)
def test_an_edm_model_has_the_bottleneck_and_about_the_parameters_it_is_published_with(name):
    entry = CATALOGUE[name]
    attention = {"attn_resolutions": [32, 16, 8]} if "imagenet" in name else {"augment_dim": 9}
    with torch.device("meta"):
        model = EDMPrecond(**entry.arguments, **attention)
    assert model.bottleneck_shape == entry.bottleneck
    assert (model.img_channels, model.img_resolution, model.img_resolution) == entry.shape
    assert model.label_dim == entry.label_dim
    if not name.endswith("-ve"):
        low, high = MILLIONS[name.split("-")[1]]
        assert low < sum(p.numel() for p in model.parameters()) / 1e6 < high


@pytest.mark.parametrize(("name", "millions"), [("edm-lsun-bedroom-256x256", 527), ("ldm-lsun-bedroom-256x256", 274)])
def test_a_model_of_openais_has_the_bottleneck_and_parameters(name, millions):
    entry = CATALOGUE[name]
    with torch.device("meta"):
        model = networks.OpenAIUNet(**entry.arguments)
    assert model.bottleneck_shape == entry.bottleneck
    assert abs(sum(p.numel() for p in model.parameters()) / 1e6 - millions) < 1


@pytest.mark.parametrize("name", ["ldm-lsun-bedroom-256x256", "sd-v1-5"])
def test_the_noise_levels_of_a_discrete_model_are_those_of_its_betas(name):
    entry = CATALOGUE[name]
    start, end = entry.betas["start"], entry.betas["end"]
    alphas = (1 - torch.linspace(start**0.5, end**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
    sigmas = ((1 - alphas) / alphas).sqrt()
    assert (entry.sigma_min, entry.sigma_max) == pytest.approx((sigmas[0].item(), sigmas[-1].item()), rel=2e-3)


# ---- weights


@pytest.mark.parametrize("form", ["published", "converted", "directory"])
@pytest.mark.parametrize("how", ["variable", "folder", "path"])
def test_weights_are_found_in_every_form(tmp_path, publish, small, form, how, monkeypatch):
    folder = tmp_path / "weights"
    file = {"published": f"{NAME}.pkl", "converted": f"{NAME}.safetensors", "directory": NAME}[form]
    if form == "published":
        publish.edm(small, folder / file)
    else:
        save_model(small, folder / file)
    if how != "variable":
        monkeypatch.delenv("AMED_WEIGHTS")
    weights = {"variable": None, "folder": folder, "path": folder / file}[how]
    assert fingerprint(amed_engine.load(NAME, weights)) == fingerprint(small)


def test_a_sampler_takes_the_name(publish, small, tmp_path, canary):
    publish.edm(small, tmp_path / "weights" / f"{NAME}.pkl")
    images = Sampler(NAME, nfe=5, solver="ipndm").run([0, 1]).images
    assert torch.equal(images, Sampler(small, nfe=5, solver="ipndm").run([0, 1]).images)
    assert not canary.exists()


@pytest.mark.parametrize("name", sorted(CATALOGUE))
def test_absent_weights_say_which_file_to_fetch(monkeypatch, name, tmp_path):
    monkeypatch.delenv("AMED_WEIGHTS", raising=False)
    entry = CATALOGUE[name]
    with pytest.raises(ConfigError) as raised:
        amed_engine.load(name)
    message = str(raised.value)
    assert all(part in message for part in (name, "AMED_WEIGHTS", entry.url, entry.form, entry.file))
    with pytest.raises(ConfigError, match="has none of"):
        amed_engine.load(name, tmp_path)


def test_weights_of_another_model_are_refused(publish, small, tmp_path):
    other = EDMPrecond(
        8, 1, 0, model_type="SongUNet", model_channels=8, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[]
    )
    publish.edm(other, tmp_path / "other.pkl")
    with pytest.raises(FileFormatError, match=rf"is not {NAME}: its channel_mult is \[1, 2\], expected \[1, 1\]"):
        amed_engine.load(NAME, tmp_path / "other.pkl")
    save_model(small, tmp_path / "edm.safetensors")
    with pytest.raises(FileFormatError, match="is a OpenAIUNet"):
        amed_engine.load("edm-lsun-bedroom-256x256", tmp_path / "edm.safetensors")


def test_a_predictor_is_no_model(publish, small, tmp_path):
    save_predictor(AMEDPredictor(), tmp_path / "p.safetensors")
    with pytest.raises(FileFormatError, match="amed_predictor"):
        amed_engine.load(NAME, tmp_path / "p.safetensors")
    publish.amed(AMEDPredictor(), tmp_path / "p.pkl", {})
    with pytest.raises(FileFormatError, match="no network"):
        amed_engine.load(NAME, tmp_path / "p.pkl")


def test_an_unknown_name_lists_bundled_and_published_ones():
    with pytest.raises(ConfigError, match=r"bundled models: digits.*edm-cifar10-32x32-cond-ve"):
        amed_engine.load("edm-cifar11")
    with pytest.raises(ConfigError, match="leave weights out"):
        amed_engine.load("digits", "x")


# ---- recipes


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_has_a_plan_of_its_evaluations(name):
    recipe = load_recipe(name)
    assert recipe.plan().nfe == recipe.nfe
    assert recipe.plan().afs == recipe.afs
    assert recipe.model in CATALOGUE
    assert 1 < recipe.fid < 400


@pytest.mark.parametrize(
    ("name", "fid"),
    [
        ("cifar10-amed-5", 7.59),
        ("cifar10-amed-plugin-5", 6.61),
        ("cifar10-ipndm-5", 13.59),
        ("ffhq-amed-5", 14.80),
        ("imagenet64-amed-5", 10.74),
        ("lsun-bedroom-amed-5", 13.20),
    ],
)
def test_the_numbers_of_the_abstract_are_there(name, fid):
    assert load_recipe(name).fid == fid


def test_recipes_follow_the_published_settings():
    amed, plugin = load_recipe("cifar10-amed-5").plan(), load_recipe("cifar10-amed-plugin-5").plan()
    assert amed == make_plan(5, solver="amed", schedule="time_uniform", rho=1.0, afs=True)
    assert plugin == make_plan(
        5, solver="ipndm", options={"max_order": 4}, schedule="polynomial", rho=7.0, afs=True, midpoint=True
    )
    assert load_recipe("cifar10-amed-6").plan().afs is False
    assert load_recipe("cifar10-unipc-5").plan().schedule == "logsnr"


@pytest.mark.parametrize("name", ["cifar10-amed-55", "cifar10-amed", "mnist-amed-5", "", "cifar10--5", "ffhq-heun-3"])
def test_an_unknown_recipe_lists_what_there_is(name):
    with pytest.raises(ConfigError, match="cifar10: amed, amed-plugin, euler"):
        load_recipe(name)


@pytest.fixture
def weights(small, publish, tmp_path) -> Path:
    folder = tmp_path / "weights"
    publish.edm(small, folder / f"{NAME}.pkl")
    return folder


@pytest.mark.parametrize("name", ["cifar10-ipndm-5", "cifar10-unipc-4", "cifar10-dpm-5", "cifar10-deis-3"])
def test_a_training_free_recipe_samples_as_its_plan_says(weights, small, name):
    recipe = load_recipe(name)
    sampler = recipe_sampler(recipe)
    assert sampler.plan.sigmas == recipe.plan().sigmas
    pictures = torch.cat(list(draw(sampler, range(5), batch=2)))
    assert pictures.dtype == torch.uint8
    wishes = {"nfe": recipe.nfe, "schedule": recipe.schedule, "rho": recipe.rho, "afs": recipe.afs}
    expected = Sampler(small, solver=recipe.solver, solver_options=recipe.options, **wishes).run(range(5)).images
    assert (pictures.int() - (expected * 127.5 + 128).clip(0, 255).to(torch.uint8).int()).abs().max() <= 1


def test_a_learned_recipe_takes_a_published_predictor(weights, publish, tmp_path):
    recipe = load_recipe("cifar10-amed-5")
    settings = {"sampler_stu": "amed", "num_steps": 4, "schedule_type": "time_uniform", "schedule_rho": 1, "afs": True}
    file = publish.amed(AMEDPredictor(0.01, bottleneck=(4, 4)), tmp_path / "p.pkl", {**settings, "scale_dir": 0.01})
    convert(file, weights / "predictors" / "cifar10-amed-5.safetensors")
    sampler = recipe_sampler(recipe)
    assert sampler.plan == recipe.plan()
    assert len(torch.cat(list(draw(sampler, range(3), batch=3)))) == 3


def test_a_learned_recipe_without_a_predictor_says_how_to_train_one(weights):
    with pytest.raises(ConfigError, match=r"amed distill --model edm-cifar10-32x32-uncond-vp --nfe 5 --solver amed"):
        recipe_sampler(load_recipe("cifar10-amed-5"))
    with pytest.raises(
        ConfigError, match=r"--solver-option max_order=4 --schedule polynomial --rho 7 .*--scale-time 0\.2"
    ):
        recipe_sampler(load_recipe("cifar10-amed-plugin-5"))


def test_a_predictor_of_another_recipe_is_refused(weights):
    predictor = AMEDPredictor(0.01, bottleneck=(4, 4))
    predictor.plan = make_plan(3, solver="amed")
    with pytest.raises(ConfigError, match="needs a predictor for amed"):
        recipe_sampler(load_recipe("cifar10-amed-5"), predictor=predictor)
    with pytest.raises(ConfigError, match="training-free"):
        recipe_sampler(load_recipe("cifar10-ipndm-5"), predictor=predictor)


def test_the_command_draws_and_reports(weights, amed, tmp_path):
    arguments = ("--images", 5, "--batch", 2, "--device", "cpu", "--json", "--outdir", tmp_path / "o")
    code, out, error = amed("reproduce", "cifar10-ipndm-5", *arguments)
    assert code == 0, error
    facts = json.loads(out)
    assert (facts["images"], facts["published_fid"], facts["frechet_distance"]) == (5, 13.59, None)
    assert len(list((tmp_path / "o").rglob("*.png"))) == 5


def test_the_command_measures(weights, amed, tmp_path, monkeypatch):
    """The seam to the metrics: a stream of byte batches, the statistics' file, the features and the device go in."""
    seen = {}

    def frechet(stream, statistics, features, device):
        seen.update(
            images=torch.cat(list(stream)), statistics=Path(statistics).name, features=features, device=str(device)
        )
        return 12.5

    monkeypatch.setitem(sys.modules, "amed_engine.evaluation.metrics", type("metrics", (), {"frechet": frechet}))
    (tmp_path / "s.npz").write_bytes(b"")
    arguments = ("--images", 4, "--batch", 3, "--device", "cpu", "--statistics", tmp_path / "s.npz")
    code, out, error = amed("reproduce", "cifar10-ipndm-5", *arguments)
    assert code == 0, error
    assert "12.50" in out
    assert "13.59" in out
    assert seen["images"].shape == (4, 1, 8, 8)
    assert (seen["images"].dtype, seen["statistics"], seen["features"], seen["device"]) == (
        torch.uint8,
        "s.npz",
        "inception",
        "cpu",
    )


def test_the_command_lists_its_recipes(amed):
    code, out, _ = amed("reproduce", "--list")
    assert code == 0
    assert len(out.splitlines()) == len(recipe_names())
    assert "cifar10-amed-5" in out
    assert amed("reproduce")[0] == 2
    assert amed("reproduce", "nothing-5")[0] == 2


# ---- models that need a preconditioning of another part of the package


@pytest.mark.parametrize("name", ["edm-lsun-bedroom-256x256", "ldm-lsun-bedroom-256x256"])
def test_a_state_dict_becomes_a_denoiser(monkeypatch, tmp_path, name):
    from amed_engine.adapters import alphas_cumprod, wrap

    small = {"image_size": 16, "in_channels": 3, "model_channels": 32, "out_channels": 3, "num_res_blocks": 1}
    small |= {"attention_resolutions": [2], "channel_mult": [1, 2], "num_head_channels": 32}
    monkeypatch.setitem(CATALOGUE, name, replace(CATALOGUE[name], arguments=small, shape=(3, 16, 16)))
    network = networks.OpenAIUNet(**small).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    state, entry = network.state_dict(), CATALOGUE[name]
    if entry.betas:
        state = {"state_dict": {f"model.diffusion_model.{key}": value for key, value in state.items()}}
    torch.save(state, tmp_path / entry.file)
    betas = {"betas": alphas_cumprod(steps=1000, **entry.betas)} if entry.betas else {}
    ours = Sampler(amed_engine.load(name, tmp_path), nfe=5, solver="ipndm").run([0, 1])
    theirs = Sampler(wrap(network, entry.prediction, shape=(3, 16, 16), **betas), nfe=5, solver="ipndm").run([0, 1])
    assert torch.equal(ours.images, theirs.images)


def test_stable_diffusion_becomes_a_denoiser_that_is_told_the_text(monkeypatch, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    small = {"block_out_channels": [32, 64], "layers_per_block": 1, "cross_attention_dim": 16, "sample_size": 8}
    small |= {"down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "attention_head_dim": 4}
    small |= {"up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "in_channels": 4, "out_channels": 4}
    monkeypatch.setitem(CATALOGUE, "sd-v1-5", replace(CATALOGUE["sd-v1-5"], arguments=small, shape=(4, 8, 8)))
    network = diffusers.UNet2DConditionModel(**small).eval()
    network.save_pretrained(tmp_path / "sd-v1-5")
    denoiser = amed_engine.load("sd-v1-5", tmp_path)
    x, sigma, text = torch.randn(2, 4, 8, 8), torch.tensor([14.0, 0.5]), torch.randn(2, 3, 16)
    denoised = denoiser(x, sigma, encoder_hidden_states=text)
    other = denoiser(x, sigma, encoder_hidden_states=text + 1)
    assert denoised.x0.shape == x.shape
    assert not torch.equal(denoised.x0, other.x0)
    assert denoised.features.shape == (2, 64, 4, 4)
