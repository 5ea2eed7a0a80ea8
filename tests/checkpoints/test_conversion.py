"""`amed convert`: what was published becomes ours, equal in every number."""

import json
import pickle
import pickletools
import random
import sys

import pytest
import safetensors
import torch
from safetensors.torch import load_file

from amed_engine import (
    AMEDPredictor,
    ConfigError,
    FileFormatError,
    Sampler,
    UnsafeFileError,
    load_predictor,
    make_plan,
    networks,
)
from amed_engine.adapters.fingerprint import fingerprint
from amed_engine.checkpoints import convert, latent, load_model, load_published, read
from amed_engine.checkpoints.amed import to_predictor
from amed_engine.checkpoints.conversion import edm_network, module_tensors
from amed_engine.checkpoints.pickles import Record
from amed_engine.checkpoints.policy import read_published
from amed_engine.networks import EDMPrecond

OPCODES = [operation.code.encode("latin1") for operation in pickletools.opcodes]
SETTINGS = {
    **{"dataset_name": "cifar10", "img_resolution": 32, "num_steps": 4, "sampler_stu": "amed", "sampler_tea": "heun"},
    **{"M": 1, "guidance_type": None, "guidance_rate": 0.0, "schedule_type": "time_uniform", "schedule_rho": 1.0},
    **{
        "afs": True,
        "scale_dir": 0.01,
        "scale_time": 0.2,
        "max_order": 3,
        "predict_x0": True,
        "lower_order_final": True,
    },
}


def make_predictor(scale_dir: float = 0.01, scale_time: float = 0.2, **options) -> AMEDPredictor:
    predictor = AMEDPredictor(scale_dir, scale_time, **options)
    generator = torch.Generator().manual_seed(0)
    for parameter in predictor.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    return predictor.eval().requires_grad_(False)


def same_answers(a: AMEDPredictor, b: AMEDPredictor) -> bool:
    features, sigma = torch.randn(3, 5, *a.bottleneck), torch.tensor([80.0, 5.0, 0.1])
    return all(
        torch.equal(x, y) for x, y in zip(a(features, sigma, sigma / 3), b(features, sigma, sigma / 3), strict=True)
    )


# ---- AMED predictors


def test_a_published_predictor_becomes_ours(tmp_path, publish, canary):
    predictor = make_predictor()
    done = convert(publish.amed(predictor, tmp_path / "network-snapshot-000010.pkl", SETTINGS))
    again = load_predictor(done.path)
    assert done.path == tmp_path / "network-snapshot-000010.safetensors"
    assert same_answers(predictor, again)
    assert again.plan == make_plan(
        5, solver="amed", schedule="time_uniform", rho=1.0, sigma_min=0.002, sigma_max=80.0, afs=True
    )
    assert not canary.exists()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"sampler_stu": "ipndm", "max_order": 4, "schedule_type": "polynomial", "schedule_rho": 7},
            {"solver": "ipndm", "options": {"max_order": 4}, "schedule": "polynomial", "rho": 7.0},
        ),
        (
            {"sampler_stu": "dpmpp", "max_order": 2, "predict_x0": False, "schedule_type": "logsnr"},
            {
                "solver": "dpmpp",
                # Where data are predicted, all of them were thresholded; nobody could ask for another thing.
                "options": {"max_order": 2, "predict_x0": False, "lower_order_final": True, "thresholding": True},
                "schedule": "logsnr",
            },
        ),
        ({"sampler_stu": "euler", "afs": False, "num_steps": 3}, {"solver": "euler", "afs": False, "nfe": 4}),
        (
            {"sampler_stu": "dpm", "num_steps": 6, "guidance_type": "cfg", "guidance_rate": 7.5},
            {"solver": "dpm", "nfe": 9, "guidance_scale": 7.5},
        ),
        ({"sampler_stu": "amed", "guidance_type": "uncond", "guidance_rate": 1.0}, {"solver": "amed"}),
    ],
    ids=["ipndm", "dpmpp", "euler", "guided", "unconditional"],
)
def test_settings_become_the_plan(tmp_path, publish, settings, expected):
    file = publish.amed(make_predictor(), tmp_path / "p.pkl", {**SETTINGS, **settings})
    plan = load_predictor(convert(file).path).plan
    common = {"schedule": "time_uniform", "rho": 1.0, "afs": True, "nfe": 5}
    if expected.get("schedule") == "logsnr":
        common["rho"] = None
    assert plan == make_plan(**{**common, **expected}, midpoint=True)


def test_levels_recorded_in_training_come_first_where_they_differ(tmp_path, publish):
    """A discrete schedule comes from the model's betas, which a predictor does not have."""
    levels = torch.tensor([14.6, 5.0, 1.0, 0.03])
    discrete = {**SETTINGS, "schedule_type": "discrete"}
    plan = load_predictor(
        convert(publish.amed(make_predictor(), tmp_path / "p.pkl", discrete, {"t_steps": levels})).path
    ).plan
    assert (plan.schedule, plan.sigmas) == ("discrete", tuple(levels.double().tolist()))
    exact = make_plan(5, solver="amed", schedule="time_uniform", rho=1.0).levels
    rounded = {"t_steps": exact.float()}
    plan = load_predictor(convert(publish.amed(make_predictor(), tmp_path / "q.pkl", SETTINGS, rounded)).path).plan
    assert plan.sigmas == tuple(exact.tolist())


@pytest.mark.parametrize(
    ("student", "predict_x0", "switch", "widths"),
    [
        ("amed", True, False, (0.01, 0.0)),
        ("ipndm", True, True, (0.01, 0.2)),
        ("dpmpp", True, True, (0.05, 0.2)),
        ("dpmpp", False, False, (0.01, 0.0)),
    ],
)
def test_the_first_release_had_fixed_widths(tmp_path, publish, student, predict_x0, switch, widths):
    settings = {k: v for k, v in SETTINGS.items() if k != "scale_dir"}
    settings |= {"sampler_stu": student, "predict_x0": predict_x0, "scale_time": switch}
    predictor = make_predictor(*widths)
    again = load_predictor(convert(publish.amed(predictor, tmp_path / "p.pkl", settings)).path)
    assert (again.scale_dir, again.scale_time) == widths
    assert same_answers(predictor, again)


def test_absent_heads_and_other_sizes_are_read_from_the_tensors(tmp_path, publish):
    predictor = make_predictor(0.0, 0.0, bottleneck=(4, 4), hidden_dim=16, bottleneck_dim=3, embedding_dim=6)
    file = publish.amed(predictor, tmp_path / "p.pkl", {**SETTINGS, "scale_dir": 0, "scale_time": 0})
    assert load_predictor(convert(file).path).config == predictor.config


@pytest.mark.parametrize(
    ("settings", "loss", "said"),
    [
        ({"num_steps": 3}, {"t_steps": torch.tensor([80.0, 1.0])}, "2 noise levels"),
        ({"schedule_type": "discrete"}, {}, "discrete"),
        ({"sampler_stu": "magic"}, {}, "magic"),
        ({"sampler_stu": ["amed"]}, {}, "plan"),
        ({"schedule_type": None}, {}, "plan"),
        ({"num_steps": "four"}, {}, "plan"),
        ({"num_steps": 10**12}, {}, "plan"),
        ({"scale_time": "wide"}, {}, "build"),
        ({"max_order": 9, "sampler_stu": "ipndm"}, {}, "max_order"),
        ({}, {"sigma_min": -1.0}, "plan"),
        ({}, {"sigma_max": "80"}, "plan"),
        ({}, {"t_steps": torch.tensor([1.0, 2.0, 3.0, 4.0])}, "decreas"),
    ],
)
def test_settings_that_make_no_plan_are_refused(tmp_path, publish, settings, loss, said):
    file = publish.amed(make_predictor(), tmp_path / "p.pkl", {**SETTINGS, **settings}, loss)
    with pytest.raises(FileFormatError, match=said):
        convert(file)
    assert not file.with_suffix(".safetensors").exists()


def test_a_setting_that_is_missing_is_named(tmp_path, publish):
    settings = {k: v for k, v in SETTINGS.items() if k != "afs"}
    with pytest.raises(FileFormatError, match="afs"):
        convert(publish.amed(make_predictor(), tmp_path / "p.pkl", settings))


def test_weights_that_are_not_finite_are_refused(tmp_path, publish):
    predictor = make_predictor()
    predictor.fc_r.bias.fill_(float("nan"))
    with pytest.raises(FileFormatError, match=r"fc_r\.bias"):
        convert(publish.amed(predictor, tmp_path / "p.pkl", SETTINGS))


# ---- EDM networks


def test_a_published_network_samples_as_the_one_it_was_made_from(tmp_path, publish, canary, tiny_conditional):
    file = publish.edm(tiny_conditional, tmp_path / "edm-tiny-8x8-cond-vp.pkl")
    again = load_model(convert(file).path)
    ours = Sampler(tiny_conditional, nfe=5, solver="ipndm").run([0, 1, 2], class_labels=[3, 4, 5])
    theirs = Sampler(again, nfe=5, solver="ipndm").run([0, 1, 2], class_labels=[3, 4, 5])
    assert theirs.nfe == 5
    assert torch.equal(ours.images, theirs.images)
    assert fingerprint(again) == fingerprint(tiny_conditional)
    assert again.config == tiny_conditional.config
    assert not canary.exists()


@pytest.mark.parametrize("model_type", ["SongUNet", "DhariwalUNet"])
def test_every_architecture_is_read(tmp_path, publish, model_type):
    extra = {
        "embedding_type": "fourier",
        "encoder_type": "residual",
        "resample_filter": [1, 3, 3, 1],
        "channel_mult_noise": 2,
    }
    options = extra if model_type == "SongUNet" else {}
    model = EDMPrecond(
        8,
        3,
        4,
        model_type=model_type,
        model_channels=32,
        channel_mult=[1, 2],
        num_blocks=1,
        augment_dim=9,
        attn_resolutions=[4],
        **options,
    )
    again = load_model(convert(publish.edm(model, tmp_path / "edm.pkl")).path)
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_network_of_another_preconditioning_is_named(tmp_path, publish, tiny_model):
    with pytest.raises(FileFormatError, match=r"ema \(VPPrecond\).*known are AMED predictor"):
        convert(publish.edm(tiny_model, tmp_path / "vp.pkl", class_name="VPPrecond"))


def test_a_network_with_wrong_arguments_is_refused(tmp_path, publish, tiny_model):
    tiny_model._options["num_blocks"] = 2
    with pytest.raises(FileFormatError, match="lacks tensor"):
        convert(publish.edm(tiny_model, tmp_path / "edm.pkl"))
    tiny_model._options["attn_implementation"] = "x"
    with pytest.raises(FileFormatError, match="attn_implementation"):
        convert(publish.edm(tiny_model, tmp_path / "edm.pkl"))


def test_arguments_without_names_are_those_of_the_published_constructor(tmp_path, publish, tiny_conditional):
    own = tiny_conditional.config
    given = (8, 1, own["label_dim"], False, 0.01, 50.0, 0.25, own["model_type"])
    again = load_model(convert(publish.edm(tiny_conditional, tmp_path / "edm.pkl", positional=given)).path)
    assert again.config == {**own, "sigma_min": 0.01, "sigma_max": 50.0, "sigma_data": 0.25}
    with pytest.raises(FileFormatError, match="its configuration does not build"):
        convert(publish.edm(tiny_conditional, tmp_path / "edm.pkl", positional=(*given, 3)))


def test_a_module_inside_itself_ends(tmp_path, publish):
    state: dict = {"_parameters": {}, "_modules": {}}
    record = publish.object("EDMPrecond", {"_modules": {"model": torch.nn.ModuleDict()}, "_init_kwargs": {}})
    inner = record.how[1][0]["state"]["_modules"]["model"]
    inner.__dict__["_modules"] = {"model": inner}
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"ema": record, **state}))
    with pytest.raises(FileFormatError, match="no module"):
        convert(tmp_path / "x.pkl")


# ---- state dicts of guided-diffusion and the consistency models


@pytest.fixture
def recorded(goldens_dir):
    def load(name: str) -> tuple[dict, dict]:
        file = goldens_dir / "networks" / f"{name}.safetensors"
        with safetensors.safe_open(file, "pt") as opened:
            config = json.loads(opened.metadata()["config"])
        weights = {k.removeprefix("weights/"): v for k, v in load_file(file).items() if k.startswith("weights/")}
        return config.get("unet", config), weights

    return load


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize("name", ["openai_cm_uncond", "openai_adm_classifier_guided"])
def test_a_state_dict_tells_its_architecture(tmp_path, recorded, name, old_format):
    config, weights = recorded(name)
    torch.save(weights, tmp_path / "net.pt", _use_new_zipfile_serialization=not old_format)
    done = convert(tmp_path / "net.pt", image_size=16, num_heads=2, num_head_channels=-1)
    written, tensors = read(done.path)
    assert written["kind"] == "openai_unet"
    told = {key: value for key, value in config.items() if key not in ("dropout", "num_heads_upsample")}
    assert written["model"] == told
    assert tensors.keys() == weights.keys()
    assert all(torch.equal(tensors[key], weights[key]) for key in weights)
    network = networks.OpenAIUNet(**config)
    network.load_state_dict(weights)
    assert fingerprint(load_model(done.path)) == fingerprint(network)


def unet_state(levels: int = 3, per_level: int = 2, updown: bool = False, channels: int = 8) -> dict:
    """Names of guided-diffusion's U-Net as far as the architecture is told by them."""
    names = {
        "time_embed.0.weight": (4 * channels, channels),
        "input_blocks.0.0.weight": (channels, 3, 3, 3),
        "out.2.weight": (6, channels, 3, 3),
    }
    block, out = 1, 0
    for level in range(levels):
        for _ in range(per_level):
            names[f"input_blocks.{block}.0.out_layers.3.weight"] = (channels << level, 1)
            names[f"input_blocks.{block}.0.emb_layers.1.weight"] = (channels << level, 1)
            if level:
                names[f"input_blocks.{block}.1.qkv.weight"] = (1, 1, 1)
            block += 1
        if level < levels - 1:
            names[f"input_blocks.{block}.0.{'in_layers.0' if updown else 'op'}.weight"] = (1, 1)
        block += 1
        for k in range(per_level + 1):
            names[f"output_blocks.{out}.0.in_layers.0.weight"] = (1,)
            if k == per_level and level:
                names[f"output_blocks.{out}.1.{'in_layers.0' if updown else 'conv'}.weight"] = (1, 1)
            out += 1
    return {name: torch.zeros(shape) for name, shape in names.items()}


@pytest.mark.parametrize("updown", [False, True])
@pytest.mark.parametrize(("levels", "per_level"), [(1, 1), (3, 2), (6, 3)])
def test_levels_and_blocks_are_counted(tmp_path, monkeypatch, levels, per_level, updown):
    monkeypatch.setattr("amed_engine.checkpoints.native._check_fit", lambda *_: None)
    torch.save(unet_state(levels, per_level, updown), tmp_path / "256x256_diffusion.pt")
    config = read(convert(tmp_path / "256x256_diffusion.pt").path)[0]["model"]
    assert (len(config["channel_mult"]), config["num_res_blocks"]) == (levels, per_level)
    assert config["attention_resolutions"] == [2**k for k in range(1, levels)]
    assert config["channel_mult"] == [2**k for k in range(levels)]
    assert config["resblock_updown"] == (updown or levels == 1)
    assert config["image_size"] == 256
    assert config["out_channels"] == 6


def test_what_a_state_dict_does_not_tell_is_asked_for(tmp_path):
    torch.save(unet_state(), tmp_path / "ema.pt")
    with pytest.raises(FileFormatError, match="--set image_size=256"):
        convert(tmp_path / "ema.pt")


def test_a_damaged_state_dict_names_what_it_lacks(tmp_path):
    state = unet_state()
    del state["input_blocks.1.0.emb_layers.1.weight"]
    torch.save(state, tmp_path / "64.pt")
    with pytest.raises(FileFormatError, match=r"input_blocks\.1\.0\.emb_layers"):
        convert(tmp_path / "64.pt")


def test_averaged_weights_of_a_latent_checkpoint_come_first(tmp_path, monkeypatch):
    monkeypatch.setattr("amed_engine.checkpoints.native._check_fit", lambda *_: None)
    state = {f"model.diffusion_model.{name}": value for name, value in unet_state().items()}
    ones = {"model_ema.diffusion_model" + name.replace(".", ""): torch.ones_like(v) for name, v in unet_state().items()}
    torch.save(
        {"state_dict": {**state, **ones, "cond_stage_model.x": torch.zeros(1)}, "global_step": 3},
        tmp_path / "model.ckpt",
    )
    config, tensors = read(convert(tmp_path / "model.ckpt").path)
    assert tensors.keys() == unet_state().keys()
    assert all(bool((tensor == 1).all()) for tensor in tensors.values())
    assert (config["model"]["image_size"], config["model"]["num_head_channels"]) == (64, 32)


# ---- what is none of these


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"net": 1, "epoch": 3}, "keys net, epoch; known are AMED predictor"),
        ({}, r"keys \(none\)"),
        ([1], "holds a list"),
        ({"model": {"a": 1}}, "keys model"),
        ({str(k): k for k in range(50)}, "and 30 more"),
    ],
)
def test_an_unknown_layout_lists_what_it_saw_and_what_is_known(tmp_path, data, said):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(data))
    with pytest.raises(FileFormatError, match=said) as raised:
        convert(tmp_path / "x.pkl")
    assert "latent-diffusion checkpoint" in str(raised.value)


def test_settings_that_a_file_tells_itself_are_refused(tmp_path, publish):
    with pytest.raises(ConfigError, match="leave out image_size"):
        convert(publish.amed(make_predictor(), tmp_path / "p.pkl", SETTINGS), image_size=32)


def test_a_file_is_not_replaced_by_its_conversion(tmp_path, publish):
    file = publish.amed(make_predictor(), tmp_path / "p.safetensors", SETTINGS)
    before = file.read_bytes()
    with pytest.raises(ConfigError, match="replaced"):
        convert(file)
    assert file.read_bytes() == before


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"no\.pkl does not exist"):
        convert(tmp_path / "no.pkl")


# ---- the command line


def test_the_command_converts_and_says_what_it_was(tmp_path, publish, amed):
    file = publish.amed(make_predictor(), tmp_path / "p.pkl", SETTINGS)
    code, out, _ = amed("convert", file, "--out", tmp_path / "deep" / "mine.safetensors")
    assert code == 0
    assert "AMED predictor" in out
    assert "NFE 5" in out
    assert load_predictor(tmp_path / "deep" / "mine.safetensors").plan is not None


def test_the_command_passes_settings(tmp_path, amed, monkeypatch):
    monkeypatch.setattr("amed_engine.checkpoints.native._check_fit", lambda *_: None)
    torch.save(unet_state(), tmp_path / "ema.pt")
    assert amed("convert", tmp_path / "ema.pt", "--set", "image_size=96", "--set", "use_fp16=true")[0] == 0
    config = read(tmp_path / "ema.safetensors")[0]["model"]
    assert (config["image_size"], config["use_fp16"]) == (96, True)
    code, _, error = amed("convert", tmp_path / "ema.pt", "--set", "image_size")
    assert code == 2
    assert "name=value" in error


def test_a_refused_file_is_one_line_of_the_command(tmp_path, amed):
    (tmp_path / "x.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    code, out, error = amed("convert", tmp_path / "x.pkl")
    assert (code, out) == (1, "")
    assert "os.system" in error
    assert len(error.strip().splitlines()) == 1


def test_torch_archives_are_read_without_their_code(tmp_path):
    torch.save({"state_dict": torch.nn.Linear(1, 1)}, tmp_path / "x.ckpt")
    with pytest.raises(UnsafeFileError, match="Linear"):
        convert(tmp_path / "x.ckpt")


# ---- latent diffusion with a condition, through diffusers


def latent_name(name: str, layers: int) -> str:
    """The name in a latent-diffusion checkpoint of what diffusers calls `name`, with `layers` blocks per level."""
    parts = name.split(".")
    outer = {
        "time_embedding": "time_embed",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    if parts[0] in outer:
        rest = [{"linear_1": "0", "linear_2": "2"}.get(part, part) for part in parts[1:]]
        return ".".join([outer[parts[0]], *rest])
    inner = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0"}
    inner |= {"conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
    if parts[0] == "mid_block":
        place = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}[".".join(parts[1:3])]
        rest = parts[3:] if parts[1] == "attentions" else [inner[parts[3]], *parts[4:]]
        return ".".join(["middle_block", place, *rest])
    level, kind, j = int(parts[1]), parts[2], int(parts[3])
    down = parts[0] == "down_blocks"
    block = level * (layers + 1) + j + (1 if down else 0)
    if kind == "downsamplers":
        return f"input_blocks.{(level + 1) * (layers + 1)}.0.op.{parts[5]}"
    if kind == "upsamplers":
        return f"output_blocks.{level * (layers + 1) + layers}.{1 + (level > 0)}.conv.{parts[5]}"
    rest = ["0", inner[parts[4]], *parts[5:]] if kind == "resnets" else ["1", *parts[4:]]
    return ".".join(["input_blocks" if down else "output_blocks", str(block), *rest])


SMALL = {
    **{"sample_size": 8, "block_out_channels": [32, 64], "layers_per_block": 1, "cross_attention_dim": 16},
    **{"attention_head_dim": 4, "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"]},
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}


@pytest.fixture
def conditional(tmp_path):
    """A small U-Net of diffusers with random weights, and a latent-diffusion checkpoint of it."""
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DConditionModel(in_channels=4, out_channels=4, **SMALL).eval()
    state = {f"model.diffusion_model.{latent_name(k, 1)}": v for k, v in unet.state_dict().items()}
    torch.save({"state_dict": {**state, "cond_stage_model.x": torch.zeros(2)}, "global_step": 7}, tmp_path / "v1.ckpt")
    return unet, tmp_path / "v1.ckpt"


def test_a_latent_checkpoint_answers_as_the_network_it_was_made_from(conditional):
    unet, file = conditional
    done = convert(file, **SMALL)
    assert sorted(p.suffix for p in done.path.iterdir()) == [".json", ".safetensors"]
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([7, 900]), torch.randn(2, 3, 16)
    for again in (latent.load(done.path), load_published(file, **SMALL)):
        with torch.no_grad():
            assert torch.equal(again(*inputs).sample, unet(*inputs).sample)


def test_a_latent_checkpoint_of_another_size_says_what_to_pass(conditional, tmp_path):
    with pytest.raises(FileFormatError, match="--set cross_attention_dim"):
        convert(conditional[1])
    with pytest.raises(ConfigError, match="must be a directory"):
        convert(conditional[1], tmp_path / "x.safetensors", **SMALL)
    with pytest.raises(FileFormatError, match="no U-Net of diffusers"):
        latent.load(tmp_path)


def test_without_diffusers_the_extra_is_named(conditional, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ConfigError, match=r"pip install 'amed-engine\[diffusers\]'"):
        convert(conditional[1], **SMALL)


def test_a_published_file_is_not_taken_for_ours(tmp_path, publish, tiny_model):
    file = publish.amed(make_predictor(), tmp_path / "p.pkl", SETTINGS)
    with pytest.raises(FileFormatError, match=r"amed convert .*p\.pkl"):
        load_predictor(file)
    file = publish.edm(tiny_model, tmp_path / "edm.pkl")
    with pytest.raises(ConfigError, match=r"amed convert .*edm\.pkl"):
        Sampler(str(file))


def test_mutated_pickles_convert_or_raise_our_errors(tmp_path, publish, canary, tiny_model):
    """1,000 damaged files of two kinds: bits, bytes, operations, lengths and cuts."""
    files = [
        publish.amed(make_predictor(hidden_dim=8), tmp_path / "p.pkl", SETTINGS),
        publish.edm(tiny_model, tmp_path / "e.pkl"),
    ]
    rng, target, escaped, refused = random.Random(0), tmp_path / "fuzz.pkl", {}, 0
    contents = [file.read_bytes() for file in files]
    for k in range(1000):
        data = bytearray(contents[k % 10 == 0])  # mostly the small one
        for _ in range(rng.choice([1, 1, 2, 8])):
            at = rng.randrange(len(data))
            change = rng.choice([rng.randbytes(1), rng.choice(OPCODES), rng.randbytes(4), b""])
            data[at : at + rng.choice([1, 1, len(change), 30])] = change
        target.write_bytes(data if rng.random() < 0.95 else data[: rng.randrange(len(data))])
        try:
            data = read_published(target)
            if isinstance(data, dict) and isinstance(data.get("model"), Record):
                to_predictor(data["model"], data.get("loss_fn"), module_tensors(data["model"]), target)
            elif isinstance(data, dict) and isinstance(data.get("ema"), Record):
                edm_network(data["ema"], target)
        except FileFormatError:
            refused += 1
        except Exception as error:
            escaped.setdefault(f"{type(error).__name__}: {str(error)[:60]}", k)
    assert escaped == {}, f"other errors, each with the number of its first file: {escaped}"
    assert refused > 200
    assert not canary.exists()
