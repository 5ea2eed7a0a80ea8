"""State dicts as trainers keep them: what is round a network's tensors is taken off, and a choice is never guessed."""

import pytest
import torch
from safetensors.torch import save_file

from amed_engine import ConfigError, FileFormatError
from amed_engine.checkpoints import convert, load_model, load_published, read
from amed_engine.networks import OpenAIUNet

UNET = {"image_size": 32, "in_channels": 3, "model_channels": 32, "out_channels": 6, "num_res_blocks": 1}
UNET |= {"attention_resolutions": [2], "channel_mult": [1, 2], "num_head_channels": 32}


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return OpenAIUNet(**UNET).state_dict()


@pytest.fixture(scope="module")
def ema(state):
    return {name: value + 1 for name, value in state.items()}


@pytest.fixture
def converted(tmp_path):
    """(data) -> (description, tensors) of its conversion."""

    def run(data, **options):
        torch.save(data, tmp_path / "net_32.pt")
        done = convert(tmp_path / "net_32.pt", num_head_channels=32, **options)
        return done.description, read(done.path)[1]

    return run


def under(prefix: str, state: dict) -> dict:
    return {prefix + name: value for name, value in state.items()}


def same(tensors: dict, state: dict) -> bool:
    return tensors.keys() == state.keys() and all(torch.equal(tensors[name], state[name]) for name in state)


WRAPPINGS = {
    "module": lambda s: under("module.", s),
    "compiled": lambda s: under("_orig_mod.", s),
    "compiled and parallel": lambda s: under("module._orig_mod.", s),
    "parallel and compiled": lambda s: under("_orig_mod.module.", s),
    "in a module of a trainer": lambda s: under("module.model.", s),
    "a name of nobody's": lambda s: under("my.net.", s),
    "parts compiled": lambda s: {k.replace("middle_block.", "middle_block._orig_mod."): v for k, v in s.items()},
    "parts recomputed": lambda s: {k.replace(".0.in", ".0._checkpoint_wrapped_module.in"): v for k, v in s.items()},
    "model": lambda s: {"model": s, "step": 1, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}},
    "state_dict": lambda s: {"state_dict": s, "epoch": 3, "args": {"lr": 1e-4}, "best": None},
    "model_state_dict": lambda s: {"model_state_dict": under("module.", s), "loss": 0.5},
    "lightning": lambda s: {"state_dict": under("model.", s), "callbacks": {}, "hyper_parameters": {"a": [1]}},
    "deepspeed": lambda s: {"module": s, "ds_version": "0.15", "param_shapes": [{"a": torch.Size([3])}]},
    "averaged by torch": lambda s: {**under("module.", s), "n_averaged": torch.tensor(7)},
    "diffusion with buffers": lambda s: {"model": {**under("model.", s), "betas": torch.ones(1000)}},
    "moments by name": lambda s: {
        "model": s,
        "optimizer": {"state": {name: {"exp_avg": value} for name, value in s.items()}},
        "exp_avg": s,
    },
    "nested twice": lambda s: {"checkpoint": {"generator": {"state_dict": under("module.", s)}}},
}


@pytest.mark.parametrize("name", WRAPPINGS)
def test_what_a_trainer_put_round_it_is_taken_off(converted, state, name):
    description, tensors = converted(WRAPPINGS[name](state))
    assert description == "U-Net of guided-diffusion for 3x32x32"
    assert same(tensors, state)


@pytest.mark.parametrize("name", ["module", "compiled and parallel", "a name of nobody's"])
def test_safetensors_are_unwrapped_like_any_other(tmp_path, state, name):
    save_file(WRAPPINGS[name](state), tmp_path / "net_32.safetensors")
    done = convert(tmp_path / "net_32.safetensors", tmp_path / "ours.safetensors", num_head_channels=32)
    assert same(read(done.path)[1], state)


AVERAGES = {
    "ema": lambda s, e: {"model": s, "ema": e},
    "flat": lambda s, e: {**under("model.", s), **under("ema.", e)},
    "ema_model": lambda s, e: {"net": s, "ema_model": under("module.", e)},
    "online": lambda s, e: {
        "model": under("model.", s),
        "ema": {**under("online_model.model.", s), **under("ema_model.model.", e), "step": torch.tensor(3)},
    },
    "state_dict_ema": lambda s, e: {"state_dict": s, "state_dict_ema": e},
    "ema_state_dict": lambda s, e: {"model_state_dict": s, "ema_state_dict": {"module": e, "decay": 0.999}},
    "shadow": lambda s, e: {
        "model": under("module.", s),
        "ema": {"shadow_params": [*e.values()], "decay": 0.999, "num_updates": 5},
    },
    "list": lambda s, e: {"model": s, "ema_params": [*e.values()]},
    "latent": lambda s, e: {
        "state_dict": {
            **under("model.diffusion_model.", s),
            **{"model_ema.diffusion_model" + name.replace(".", ""): value for name, value in e.items()},
            "model_ema.num_updates": torch.tensor(4),
        }
    },
}


@pytest.mark.parametrize("name", AVERAGES)
def test_averaged_weights_come_first_and_the_others_on_request(converted, state, ema, name):
    description, tensors = converted(AVERAGES[name](state, ema))
    assert same(tensors, ema)
    assert "--weights" in description
    assert same(converted(AVERAGES[name](state, ema), weights="ema")[1], ema)
    if name != "online":  # which has the trained ones twice
        assert same(converted(AVERAGES[name](state, ema), weights="model")[1], state)


def test_a_place_in_the_file_chooses_as_well(converted, state, ema):
    other = {name: value + 2 for name, value in state.items()}
    data = {"net": state, "ema_0.999": ema, "ema_0.9999": under("module.", other)}
    with pytest.raises(
        ConfigError, match=r"2 networks; there are 'net' \(trained\), 'ema_0.999' \(averaged\), 'ema_0.9999"
    ):
        converted(data)
    assert same(converted(data, weights="ema_0.9999.module")[1], other)
    assert same(converted(data, weights="model")[1], state)
    for name in ("best", "", "EMA"):
        with pytest.raises(ConfigError, match=rf"has no '{name}' weights; there are 'net'"):
            converted(data, weights=name)
    with pytest.raises(ConfigError, match=r"has no 'ema' weights; there is 'model' \(trained\)"):
        converted({"model": state}, weights="ema")


def test_networks_of_which_none_is_an_average_are_a_choice(converted, state, ema):
    with pytest.raises(ConfigError, match=r"'student' .*'teacher'"):
        converted({"student": state, "teacher": ema})
    assert same(converted({**under("student.", state), **under("teacher.", ema)}, weights="teacher")[1], ema)


def test_averages_without_names_are_not_left_out_silently(converted, state):
    lists = {"model": state, "ema": {"shadow_params": [torch.ones(3), torch.ones(4)]}}
    parts = {"model": state, "ema": dict(list(state.items())[:4])}
    for data, said in ((lists, "its 2 tensors have no names"), (parts, "of its 4 tensors no whole network")):
        for options in ({}, {"weights": "ema"}):
            with pytest.raises(FileFormatError, match=f"{said}.*--weights model"):
                converted(data, **options)
        assert same(converted(data, weights="model")[1], state)


def test_averages_of_some_tensors_are_refused(converted, state, ema):
    data = AVERAGES["latent"](state, ema)["state_dict"]
    del data["model_ema.diffusion_modelout2weight"]
    with pytest.raises(FileFormatError, match=r"averages of \d+ of its network's \d+ tensors, none of 'out.2.weight'"):
        converted({"state_dict": data})
    assert same(converted({"state_dict": data}, weights="model")[1], state)


@pytest.mark.parametrize("outer", ["", "module.", "_orig_mod."])
@pytest.mark.parametrize("prefix", ["model._orig_mod.diffusion_model.", "model.diffusion_model._orig_mod."])
def test_latent_diffusion_with_compiled_parts_is_latent_diffusion(tmp_path, state, ema, outer, prefix):
    """Its size of latents, its width of heads and its averages are those of latent diffusion."""
    inner = under(prefix.removeprefix("model."), ema)
    averages = {"model_ema." + name.replace(".", ""): value for name, value in inner.items()}
    for data, expected in (({}, state), (averages, ema)):
        torch.save({"state_dict": under(outer, {**under(prefix, state), **data})}, tmp_path / "last.ckpt")
        config, tensors = read(convert(tmp_path / "last.ckpt", tmp_path / "out.safetensors").path)
        assert same(tensors, expected)
        assert (config["model"]["image_size"], config["model"]["num_head_channels"]) == (64, 32)


def test_averages_of_another_network_are_not_left_out_silently(converted, state):
    data = {"state_dict": {**under("model.diffusion_model.", state), "model_ema.other": torch.ones(3)}}
    with pytest.raises(FileFormatError, match="averages of 0 of its network's"):
        converted(data)
    assert same(converted(data, weights="model")[1], state)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model."])
def test_a_prefix_of_some_names_alone_is_refused(converted, state, prefix):
    names = list(state)
    half = {(prefix if k % 2 else "") + name: state[name] for k, name in enumerate(names)}
    with pytest.raises(FileFormatError, match=rf"no prefix in common: \d+ without \(.*\d+ with '{prefix}' \({prefix}"):
        converted(half)
    with pytest.raises(FileFormatError, match="no prefix in common"):
        converted({"model": half})


def test_a_name_with_and_without_a_wrapper_is_refused(converted, state):
    twice = {**state, "middle_block._orig_mod.0.in_layers.0.weight": state["middle_block.0.in_layers.0.weight"]}
    with pytest.raises(FileFormatError, match=r"'middle_block\.0\.in_layers\.0\.weight' twice"):
        converted(twice)


def test_what_is_no_part_of_the_network_is_named(converted, state):
    for prefix in ("", "module."):
        with pytest.raises(FileFormatError, match=r"unexpected tensor 'extra\.weight'"):
            converted(under(prefix, {**state, "extra.weight": torch.ones(3)}))
    with pytest.raises(FileFormatError, match=r"'module.out.2.bias' is a list, expected a tensor"):
        converted(under("module.", {**state, "out.2.bias": [1.0, 2.0]}))
    lacking = {name: value for name, value in state.items() if name != "time_embed.2.bias"}
    with pytest.raises(FileFormatError, match=r"net_32\.pt lacks tensor 'time_embed\.2\.bias'"):
        converted({"model": under("module.", lacking)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_tensors_of_any_floating_point_are_read(tmp_path, state, dtype):
    torch.save({"model": {name: value.to(dtype) for name, value in state.items()}}, tmp_path / "net_32.pt")
    done = convert(tmp_path / "net_32.pt", num_head_channels=32)
    for network in (load_model(done.path), load_published(tmp_path / "net_32.pt", num_head_channels=32)):
        assert same(network.state_dict(), {name: value.to(dtype).float() for name, value in state.items()})


def test_numbers_that_are_not_finite_are_refused_whatever_is_round_them(converted, state):
    with pytest.raises(FileFormatError, match=r"'out\.2\.bias' holds NaN"):
        converted({"model": under("module.", {**state, "out.2.bias": torch.full((6,), float("nan"))})})


def test_a_network_of_a_latent_checkpoint_is_found_under_any_prefix(tmp_path, state):
    for data in ({"state_dict": under("module.model.diffusion_model.", state)}, under("model.diffusion_model.", state)):
        torch.save({**data, "global_step": 3}, tmp_path / "net.ckpt")
        done = convert(tmp_path / "net.ckpt", tmp_path / "ours.safetensors")
        config, tensors = read(done.path)
        assert same(tensors, state)
        assert (config["model"]["image_size"], config["model"]["num_head_channels"]) == (64, 32)


def test_the_command_takes_the_choice(tmp_path, state, ema, amed):
    torch.save({"model": state, "ema": ema}, tmp_path / "net_32.pt")
    options = ("--set", "num_head_channels=32", "--out", tmp_path / "ours.safetensors")
    code, out, _ = amed("convert", tmp_path / "net_32.pt", "--weights", "model", *options)
    assert code == 0
    assert "of the file's 'model', not of 'ema'" in out
    assert same(read(tmp_path / "ours.safetensors")[1], state)
    code, _, error = amed("convert", tmp_path / "net_32.pt", "--weights", "swa", *options)
    assert code == 2
    assert "'model' (trained), 'ema' (averaged)" in error


def test_a_pickle_that_says_all_about_itself_has_no_choice(tmp_path, publish, tiny_model):
    file = publish.edm(tiny_model, tmp_path / "edm.pkl")
    assert convert(file, weights="ema").path.is_file()
    with pytest.raises(ConfigError, match="no 'model' weights: it is an EDM network"):
        convert(file, weights="model")


@pytest.mark.parametrize("made", [lambda v: v.to("meta"), lambda v: v.to_sparse()])
def test_tensors_without_plain_values_are_refused_by_name(converted, state, made):
    with pytest.raises(FileFormatError, match=r"'out\.2\.weight' has .*save it again"):
        converted({**state, "out.2.weight": made(state["out.2.weight"])})


@pytest.mark.parametrize("wrapped", [lambda s: s, lambda s: {"ema": under("module.", s)}])
def test_a_state_dict_of_edm_is_told_what_it_lacks(converted, tiny_model, wrapped):
    with pytest.raises(FileFormatError, match=r"of an EDM network, .* convert its pickle, or load them into"):
        converted(wrapped(tiny_model.state_dict()))
