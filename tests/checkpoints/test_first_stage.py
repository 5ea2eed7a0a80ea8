"""The autoencoder in a latent-diffusion checkpoint: written beside the network, equal to the one it was made from."""

import re
import sys

import pytest
import torch

from amed_engine import ConfigError, FileFormatError, networks
from amed_engine.checkpoints import convert, load_first_stage, load_model

diffusers = pytest.importorskip("diffusers", reason="needs pip install 'amed-engine[diffusers]'")

LEVELS = 3
SHAPE = {
    **{"block_out_channels": [32, 32, 64], "layers_per_block": 1, "latent_channels": 4},
    "down_block_types": ["DownEncoderBlock2D"] * LEVELS,
    "up_block_types": ["UpDecoderBlock2D"] * LEVELS,
}
UNET = {"image_size": 64, "in_channels": 3, "model_channels": 32, "out_channels": 3, "num_res_blocks": 1}
UNET |= {"attention_resolutions": [2], "channel_mult": [1, 2], "num_head_channels": 32}
X = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def published_name(name: str) -> str:
    """What latent diffusion calls what diffusers calls `name`: levels of the decoder count from the image."""
    name = re.sub(r"up_blocks\.(\d)", lambda found: f"up.{LEVELS - 1 - int(found[1])}", name)
    name = re.sub(r"down_blocks\.(\d)", r"down.\1", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("resnets", "block")
    for theirs, ours in {
        **{"downsamplers.0": "downsample", "upsamplers.0": "upsample", "conv_shortcut": "nin_shortcut"},
        **{"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"},
        "conv_norm_out": "norm_out",
    }.items():
        name = name.replace(theirs, ours)
    return name


def published_state(autoencoder) -> dict:
    """Its tensors as latent diffusion keeps them; there, attention is made of convolutions."""
    tensors = {published_name(name): value for name, value in autoencoder.state_dict().items()}
    attention = re.compile(r".*attn_1\.(q|k|v|proj_out)\.weight")
    tensors = {name: value[:, :, None, None] if attention.fullmatch(name) else value for name, value in tensors.items()}
    return {f"first_stage_model.{name}": value.clone() for name, value in tensors.items()}


def make(kind: str, **options):
    torch.manual_seed(0)
    codes = {"num_vq_embeddings": 16, "vq_embed_dim": 3} if kind == "VQModel" else {}
    made = getattr(diffusers, kind)(**{**SHAPE, "latent_channels": 3 if codes else 4, **codes, **options}).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return made


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return networks.OpenAIUNet(**UNET).eval()


@pytest.fixture
def checkpoint(tmp_path, network):
    """Writes a latent-diffusion checkpoint of the unconditional network and an autoencoder."""

    def write(autoencoder, **more):
        state = {f"model.diffusion_model.{name}": value for name, value in network.state_dict().items()}
        extra = {"first_stage_model.loss.logvar": torch.zeros(()), "first_stage_model.model_ema.decay": torch.ones(())}
        torch.save({"state_dict": {**state, **published_state(autoencoder), **extra, **more}}, tmp_path / "model.ckpt")
        return tmp_path / "model.ckpt"

    return write


@pytest.mark.parametrize("kind", ["AutoencoderKL", "VQModel"])
@torch.no_grad()
def test_it_answers_as_the_autoencoder_it_was_made_from(checkpoint, network, kind):
    original = make(kind)
    file = checkpoint(original)
    done = convert(file)
    assert done.path == file.with_name("model")
    assert f"{kind} of diffusers" in done.description
    latents = torch.randn(2, original.config.latent_channels, 4, 4, generator=torch.Generator().manual_seed(1))
    folder = file.with_name("model-vae")
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".safetensors"]
    for again in (load_first_stage(folder), load_first_stage(file)):
        assert type(again) is type(original)
        assert torch.equal(again.decode(latents).sample, original.decode(latents).sample)
        first, second = again.encode(X), original.encode(X)
        code = "latents" if kind == "VQModel" else "latent_dist"
        first, second = getattr(first, code), getattr(second, code)
        assert torch.equal(getattr(first, "parameters", first), getattr(second, "parameters", second))
    assert all(torch.equal(load_model(done.path).state_dict()[k], v) for k, v in network.state_dict().items())


def test_one_that_was_compiled_is_the_same(tmp_path, network):
    original = make("AutoencoderKL")
    named = {
        name.replace("_model.", "_model._orig_mod.", 1): value for name, value in published_state(original).items()
    }
    torch.save({"state_dict": {**network.state_dict(prefix="model.diffusion_model."), **named}}, tmp_path / "last.ckpt")
    again = load_first_stage(tmp_path / "last.ckpt").state_dict()
    assert all(torch.equal(again[name], value) for name, value in original.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "more", "scale"),
    [
        ("AutoencoderKL", {}, 0.18215),
        ("VQModel", {}, 1.0),
        ("AutoencoderKL", {"scale_factor": torch.tensor(0.25)}, 0.25),
        ("AutoencoderKL", {"scale_factor": 0.5}, 0.5),
    ],
)
def test_the_scale_of_its_latents_is_the_files(checkpoint, kind, more, scale):
    file = checkpoint(make(kind), **more)
    convert(file)
    assert load_first_stage(file.with_name("model-vae")).config.scaling_factor == scale


def test_only_the_network_is_converted_where_that_is_asked_for(checkpoint, tmp_path, monkeypatch):
    file = checkpoint(make("VQModel"))
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ConfigError, match=r"'amed-engine\[diffusers\]'; or --set first_stage=false"):
        convert(file)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.ckpt"]
    convert(file, first_stage=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.ckpt"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("first_stage_model.decoder.conv_in.weight"), "decoder.conv_in.weight"),
        (lambda state: state.pop("first_stage_model.decoder.mid.block_1.norm1.bias"), "lacks tensor"),
        (lambda state: state.update({"first_stage_model.encoder.down.1.attn.0.q.weight": X}), "unexpected tensor"),
        (lambda state: state["first_stage_model.encoder.conv_in.bias"].fill_(float("nan")), "NaN"),
        (lambda state: state.update(scale_factor=torch.zeros(2)), "scale_factor"),
        (lambda state: state.update(scale_factor=-1.0), "one positive number"),
    ],
)
def test_a_damaged_one_is_refused_before_anything_is_written(checkpoint, tmp_path, change, said):
    file = checkpoint(make("AutoencoderKL"))
    data = torch.load(file, weights_only=True)
    change(data["state_dict"])
    torch.save(data, file)
    with pytest.raises(FileFormatError, match=re.escape(said)):
        convert(file)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.ckpt"]


def test_what_has_none_says_so(checkpoint, tmp_path, network):
    torch.save(network.state_dict(), tmp_path / "64.pt")
    with pytest.raises(FileFormatError, match="no first stage"):
        load_first_stage(tmp_path / "64.pt")
    with pytest.raises(FileFormatError, match=r"no config\.json"):
        load_first_stage(tmp_path)


def test_the_command_says_where_it_is(checkpoint, tmp_path, amed):
    file = checkpoint(make("AutoencoderKL"))
    code, out, _ = amed("convert", file, "--out", tmp_path / "o" / "net.safetensors")
    assert code == 0
    assert f"AutoencoderKL of diffusers, is in {tmp_path / 'o' / 'net-vae'}" in out
    code, out, _ = amed("convert", file, "--out", tmp_path / "p.safetensors", "--set", "first_stage=false")
    assert code == 0
    assert "first stage" not in out
