"""Every field of a configuration has a type and a range, checked before anything of its size is built."""

import json
import random

import numpy
import pytest
import torch

from amed_engine import AMEDPredictor, ConfigError, FileFormatError, Plan, make_plan, save_predictor
from amed_engine.checkpoints import load_model, load_predictor
from amed_engine.checkpoints.diffusers_folder import load_diffusers
from amed_engine.checkpoints.files import write
from amed_engine.checkpoints.native import save_model
from amed_engine.networks import DhariwalUNet, EDMPrecond, OpenAIClassifier, OpenAIUNet, SongUNet
from amed_engine.sampling.predictors import CoefficientPredictor, ConstantPredictor

SONG = {
    **{"img_resolution": 8, "img_channels": 1, "label_dim": 2, "use_fp16": False, "sigma_min": 0.0, "sigma_max": 80.0},
    **{"sigma_data": 0.5, "model_type": "SongUNet", "augment_dim": 0, "model_channels": 8, "channel_mult": [1, 2]},
    **{"channel_mult_emb": 4, "num_blocks": 1, "attn_resolutions": [4], "dropout": 0.1, "label_dropout": 0.0},
    **{"embedding_type": "positional", "channel_mult_noise": 1, "encoder_type": "standard"},
    **{"decoder_type": "standard", "resample_filter": [1, 1]},
}
SONG_ALONE = ("embedding_type", "channel_mult_noise", "encoder_type", "decoder_type", "resample_filter")
DHARIWAL = {name: value for name, value in SONG.items() if name not in SONG_ALONE}
DHARIWAL |= {"model_type": "DhariwalUNet", "model_channels": 32}
OPENAI = {
    **{"image_size": 8, "in_channels": 1, "model_channels": 32, "out_channels": 2, "num_res_blocks": 1},
    **{"attention_resolutions": [2], "dropout": 0.1, "channel_mult": [1, 2], "conv_resample": True, "dims": 2},
    **{"use_checkpoint": False, "use_fp16": False, "num_heads": 1, "num_head_channels": -1, "num_heads_upsample": -1},
    **{"use_scale_shift_norm": False, "resblock_updown": False, "use_new_attention_order": False},
}
CLASSIFIER = {**OPENAI, "pool": "attention", "num_head_channels": 32}
AMED = {"scale_dir": 0.1, "scale_time": 0.1, "scales": "bounded", "bottleneck": [4, 4]}
AMED |= {"hidden_dim": 8, "bottleneck_dim": 4, "embedding_dim": 8}
CONSTANT = {"intervals": 3, "points": 2}
COEFFICIENT = {"intervals": 3, "sigma_max": 80.0, "afs": False, "codes": 2, "inputs": 5}
FILES = {
    "song": ("edm_precond", "model", EDMPrecond, SONG),
    "dhariwal": ("edm_precond", "model", EDMPrecond, DHARIWAL),
    "unet": ("openai_unet", "model", OpenAIUNet, {**OPENAI, "num_classes": 3}),
    "classifier": ("openai_classifier", "model", OpenAIClassifier, CLASSIFIER),
    "amed": ("amed_predictor", "predictor", AMEDPredictor, AMED),
    "constant": ("constant_predictor", "predictor", ConstantPredictor, CONSTANT),
    "coefficient": ("coefficient_predictor", "predictor", CoefficientPredictor, COEFFICIENT),
}
ODD = [None, True, 0, -1, 0.5, -0.5, 1e308, 10**9, 10**30, "", "1", [], [1], [0], [True], ["a"], [[1]], [1e308, 1e308]]
ODD += [[1] * 1000, {}, {"a": 1}, [None], 1 << 63, 1.5, [10**9], 10**400]


@pytest.fixture(params=FILES)
def held(request, tmp_path):
    """(its arguments, write a file with others and load it)"""
    kind, key, make, arguments = FILES[request.param]
    torch.manual_seed(0)
    tensors = make(**arguments).state_dict()

    def load(changes: dict):
        write(tmp_path / "x.safetensors", tensors, {"kind": kind, key: {**arguments, **changes}})
        loaded = (load_model if key == "model" else load_predictor)(tmp_path / "x.safetensors")
        assert all(torch.equal(value, tensors[name]) for name, value in loaded.state_dict().items())
        return loaded

    return arguments, load


def test_odd_values_load_the_same_tensors_or_are_refused_in_a_line(held):
    arguments, load = held
    rng, told = random.Random(len(arguments)), []
    for name in arguments:
        for value in rng.sample(ODD, 4):
            try:
                load({name: value})
            except FileFormatError as error:
                told.append(str(error))
    assert len(told) > len(arguments)
    assert max(map(len, told)) < 600


def test_an_unknown_field_is_refused(held):
    with pytest.raises(FileFormatError, match="colour"):
        held[1]({"colour": "red"})


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        *(("song", "dropout", value) for value in (1.0, -0.1, True, "0.1", None, [0.1])),
        *(("song", "sigma_data", value) for value in (0, 0.0, -0.5, True, "half", None, 10**400)),
        *(("song", "sigma_min", value) for value in (80.0, 100.0, -1, None, True)),
        *(("song", "label_dim", value) for value in (-1, 2.0, True, "2", None)),
        *(("song", "img_resolution", value) for value in (0, -8, 8.0, True, 1, 10**6, None)),
        *(("song", "use_fp16", value) for value in (0, 1, "yes", None)),
        *(("song", "channel_mult", value) for value in ([], [1, 0], [1, -2], "12", 5, [1, True], [1] * 10**5)),
        *(("song", "attn_resolutions", value) for value in ([4.0], [True], 4, None, [4] * 100)),
        *(("song", "resample_filter", value) for value in ([], [0, 0], [1, -1], ["1"], [1e308, 1e308])),
        *(("song", "label_dropout", value) for value in (1.1, -1, "0")),
        *(("dhariwal", "dropout", value) for value in (1, -1e-9, False)),
        *(("unet", "dropout", value) for value in (1.0, -0.1, True, None)),
        *(("unet", "num_classes", value) for value in (0, -1, True, 3.0)),
        *(("unet", "num_head_channels", value) for value in (0, -2, True, 32.0)),
        *(("unet", "use_checkpoint", value) for value in (0, "no", None)),
        *(("unet", "image_size", value) for value in (0, 1, True, 8.0, 10**9)),
        *(("classifier", "pool", value) for value in ("max", None, ["attention"])),
        *(("amed", "hidden_dim", value) for value in (True, 8.0, 0)),
        *(("amed", "scale_dir", value) for value in (True, "0.1", None, -0.1)),
        *(("amed", "bottleneck", value) for value in ([4, True], [4.0, 4], [4], "44")),
        *(("constant", "points", value) for value in (True, 2.0, 8, 0)),
        *(("coefficient", "sigma_max", value) for value in ("80", 0, -1, True, None, [80])),
        *(("coefficient", "afs", value) for value in (0, "no", None)),
        *(("coefficient", "codes", value) for value in (True, 2.0, -1)),
    ],
)
def test_a_field_of_another_type_or_out_of_range_is_named(name, field, value):
    make, arguments = FILES[name][2:]
    with pytest.raises(ConfigError, match=rf"{field}|channel_mult"):
        make(**{**arguments, field: value})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("field", ["dropout", "sigma_data", "sigma_min"])
def test_numbers_that_are_none_are_refused(field, value):
    with pytest.raises(ConfigError, match=field):
        EDMPrecond(**{**SONG, field: value})


@pytest.mark.parametrize("name", ["song", "dhariwal", "unet", "classifier"])
def test_more_layers_than_the_tensors_of_a_file_fill_are_not_built(tmp_path, name, monkeypatch):
    kind, key, make, arguments = FILES[name]
    blocks = "num_blocks" if "num_blocks" in arguments else "num_res_blocks"
    tensors, built = make(**arguments).state_dict(), []
    init = torch.nn.Module.__init__
    monkeypatch.setattr(torch.nn.Module, "__init__", lambda self, *a, **k: (built.append(1), init(self, *a, **k))[1])
    make(**arguments)
    usual = len(built)
    write(tmp_path / "x.safetensors", tensors, {"kind": kind, key: {**arguments, blocks: 10**9}})
    with pytest.raises(FileFormatError, match=f"more layers than the {len(tensors)} tensors"):
        load_model(tmp_path / "x.safetensors")
    assert len(built) < 12 * usual
    assert torch.is_grad_enabled()  # as it was before


def test_the_raw_networks_check_theirs():
    for network in (SongUNet, DhariwalUNet):
        with pytest.raises(ConfigError, match="num_blocks must be an integer"):
            network(8, 1, 1, num_blocks=1.5)


def test_the_arguments_of_published_networks_are_taken():
    for published in (
        SONG | {"dropout": 0.13, "augment_dim": 9, "sigma_max": float("inf")},
        DHARIWAL | {"sigma_min": 0},
    ):
        network = EDMPrecond(**published)
        again = EDMPrecond(**json.loads(json.dumps(network.config)))
        assert again.config == network.config


DIFFUSERS = {
    "layers_per_block": (10**9, "it asks for more layers than the [0-9]+ tensors of the file can fill"),
    "down_block_types": (["DownBlock2D"] * 3000, "holds no U-Net of diffusers"),
    "num_class_embeds": (10**9, "it asks for [0-9]+ tensors of [0-9]+ numbers, the file holds [0-9]+ of"),
    "class_embed_type": ("timestep", "it asks for [0-9]+ tensors"),
    "flip_sin_to_cos": ("no", "flip_sin_to_cos must be bool, got 'no'"),
    "norm_eps": ([1] * 1000, r"norm_eps must be int or float, got \[1, 1"),
    "freq_shift": (True, "freq_shift must be int, got True"),
    "act_fn": ({}, "act_fn must be str, got {}"),
    "block_out_channels": ([10**400, 8], "holds no U-Net of diffusers"),
}


def test_fields_of_diffusers_have_types_and_no_more_layers_than_the_file(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    down, up = ("DownBlock2D",) * 2, ("UpBlock2D",) * 2
    small = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
    model = diffusers.UNet2DModel(8, **small, down_block_types=down, up_block_types=up, attention_head_dim=8)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert set(DIFFUSERS) < {*config}
    for name, (value, message) in DIFFUSERS.items():
        (tmp_path / "config.json").write_text(json.dumps({**config, name: value}))
        with pytest.raises(FileFormatError, match=message) as told:
            load_diffusers(diffusers.UNet2DModel, tmp_path, "U-Net")
        assert len(str(told.value)) < 600
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_diffusers(diffusers.UNet2DModel, tmp_path, "U-Net").state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())


def test_sizes_may_be_numpys_integers_and_are_plain_in_files(tmp_path):
    count = {value: numpy.int64(value) for value in range(9)}
    networks = {
        "model": EDMPrecond(count[8], 1, model_channels=count[8], channel_mult=[count[1]], num_blocks=count[1]),
        "amed": AMEDPredictor(0.1, bottleneck=(count[4], 4), hidden_dim=count[8], embedding_dim=count[4]),
        "constant": ConstantPredictor(count[3], numpy.uint8(2)),
        "coefficient": CoefficientPredictor(count[3], 80.0, codes=count[2], inputs=count[5]),
    }
    for name, network in networks.items():
        (save_model if name == "model" else save_predictor)(network, file := tmp_path / f"{name}.safetensors")
        loaded = (load_model if name == "model" else load_predictor)(file)
        assert loaded.config == network.config
    plan = make_plan(count[5], solver="ipndm", options={"max_order": count[3]})
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan == make_plan(5, solver="ipndm", options={"max_order": 3})
    for size in (True, numpy.bool_(True), 8.0, numpy.float32(8)):
        with pytest.raises(ConfigError, match="hidden_dim must be an integer of at least 1"):
            AMEDPredictor(hidden_dim=size)
