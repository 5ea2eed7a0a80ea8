"""Networks of diffusers for sounds and videos, tiny and with random weights: their D, their frames, and who is refused."""

import pytest
import torch
from torch import nn

import amed_engine
from amed_engine import Sampler
from amed_engine.adapters import ClassifierFree, wrap
from amed_engine.errors import ConfigError

diffusers = pytest.importorskip("diffusers", reason="needs pip install 'amed-engine[diffusers]'")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
TEXT = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))
HEADS = {"num_attention_heads": 2, "num_layers": 1, "in_channels": 4}


def unet_1d(**options):
    torch.manual_seed(0)
    kinds = ("DownBlock1DNoSkip", "DownBlock1D", "AttnDownBlock1D"), ("AttnUpBlock1D", "UpBlock1D", "UpBlock1DNoSkip")
    blocks = {"down_block_types": kinds[0], "up_block_types": kinds[1], "block_out_channels": (32, 32, 64)}
    own = {"sample_size": 32, "in_channels": 2, "out_channels": 2, "extra_in_channels": 64}
    return diffusers.UNet1DModel(**own | blocks | options).eval()


def unet_3d(**options):
    torch.manual_seed(0)
    kinds = ("CrossAttnDownBlock3D", "DownBlock3D"), ("UpBlock3D", "CrossAttnUpBlock3D")
    blocks = {"down_block_types": kinds[0], "up_block_types": kinds[1], "block_out_channels": (8, 16)}
    own = {"layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 12, "attention_head_dim": 4}
    return diffusers.UNet3DConditionModel(**blocks | own | options).eval()


def cogvideox(**options):
    torch.manual_seed(0)
    size = {"sample_width": 8, "sample_height": 6, "sample_frames": 9, "max_text_seq_length": 5}
    own = {"attention_head_dim": 16, "out_channels": 4, "time_embed_dim": 8, "text_embed_dim": 12}
    return diffusers.CogVideoXTransformer3DModel(**HEADS | own | size | options).eval()


def latte(**options):
    torch.manual_seed(0)
    size = {"sample_size": 8, "patch_size": 2, "video_length": 3, "caption_channels": 12, "out_channels": 8}
    norm = {"norm_type": "ada_norm_single", "norm_elementwise_affine": False, "num_embeds_ada_norm": 1000}
    own = {"attention_head_dim": 8, "cross_attention_dim": 16, "activation_fn": "gelu-approximate"}
    return diffusers.LatteTransformer3DModel(**HEADS | own | size | norm | options).eval()


def wan(**options):
    torch.manual_seed(0)
    own = {"attention_head_dim": 12, "out_channels": 4, "text_dim": 12, "freq_dim": 16, "ffn_dim": 32}
    return diffusers.WanTransformer3DModel(**HEADS | own | {"rope_max_seq_len": 32} | options).eval()


NETWORKS = {
    "UNet1D": (unet_1d, {"prediction": "epsilon"}, (2, 32)),
    "UNet3D": (unet_3d, {"prediction": "epsilon", "shape": (4, 3, 8, 8)}, (4, 3, 8, 8)),
    "CogVideoX": (cogvideox, {"prediction": "v"}, (3, 4, 6, 8)),
    "Latte": (latte, {"prediction": "epsilon"}, (4, 3, 8, 8)),
    "Wan": (wan, {"shape": (4, 3, 8, 8)}, (4, 3, 8, 8)),
}


def told(name):
    return {} if name == "UNet1D" else {"conditions": {"encoder_hidden_states": TEXT[:1]}}


@pytest.mark.parametrize("name", NETWORKS)
def test_d_is_that_of_the_network_called_by_hand(name):
    make, options, shape = NETWORKS[name]
    network, denoiser = make(), wrap(make(), **options, **told(name))
    assert denoiser.sample_shape == shape
    x, sigma = 3 * torch.randn(2, *shape), torch.tensor([0.7, 2.5])
    c, text = denoiser.family(sigma), {} if name == "UNet1D" else {"encoder_hidden_states": TEXT[:1].expand(2, -1, -1)}
    skip, out, scale = (k.reshape(-1, *[1] * len(shape)) for k in (c.skip, c.out, c.scale))
    with torch.no_grad():
        raw = network(scale * x, timestep=c.time, return_dict=False, **text)[0]
        raw = raw[:, :4] if name == "Latte" else raw  # learned variances
        torch.testing.assert_close(denoiser(x, sigma).x0, skip * x + out * raw)
    sampler = Sampler(denoiser, solver="euler", nfe=3)
    torch.testing.assert_close(sampler.run([0, 1]).images[1:], sampler.run([1]).images, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def video():
    null = {"null_conditions": {"encoder_hidden_states": torch.zeros(1, 5, 12)}}
    return wrap(unet_3d(), "epsilon", shape=(4, 3, 8, 8), conditions={"encoder_hidden_states": TEXT}, **null)


def test_the_frames_of_one_video_are_one_bottleneck(video):
    x, sigma, rows, seen = torch.randn(2, 4, 3, 8, 8), torch.tensor([0.7, 2.5]), torch.tensor([0, 1]), []
    handle = video.network.mid_block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        features = video(x, sigma, rows).features
        handle.remove()
        assert seen[0].shape == (6, 16, 4, 4)
        torch.testing.assert_close(features, torch.stack([seen[0][:3].mean(0), seen[0][3:].mean(0)]))
        for row in range(2):
            alone = video(x[row : row + 1], sigma[row : row + 1], rows[row : row + 1]).features
            torch.testing.assert_close(features[row : row + 1], alone)
        guided = [ClassifierFree(video, 2.0, batched=batched)(x, sigma, rows).features for batched in (True, False)]
    torch.testing.assert_close(guided[0], features)
    torch.testing.assert_close(guided[1], features)


@pytest.mark.parametrize("scale", [None, 3.0])
def test_a_predictor_of_videos_is_trained_and_says_the_same_in_any_batch(video, scale):
    predictor = amed_engine.distill(video, nfe=3, total_kimg=0.008, batch=8, progress=False, guidance_scale=scale)
    assert predictor.bottleneck == (4, 4)
    sampler = Sampler(video, predictor)
    both = sampler.run([0, 1], class_labels=[0, 1], guidance_scale=scale).images
    torch.testing.assert_close(
        both[1:], sampler.run([1], class_labels=[1], guidance_scale=scale).images, rtol=1e-4, atol=1e-4
    )


def test_a_network_with_layers_of_two_ranks_takes_a_memory_format():
    options = {"shape": (4, 3, 8, 8), "conditions": {"encoder_hidden_states": TEXT[:1]}}
    usual = Sampler(wrap(unet_3d(), "epsilon", **options), nfe=4).run([0]).images
    laid_out = (
        Sampler(wrap(unet_3d(), "epsilon", **options), nfe=4, memory_format=torch.channels_last_3d).run([0]).images
    )
    torch.testing.assert_close(laid_out, usual, rtol=1e-4, atol=1e-4)


def test_what_the_configuration_says_of_a_sample_is_checked():
    text = {"conditions": {"encoder_hidden_states": TEXT[:1]}}
    open_size = wrap(unet_3d(), "epsilon", **text)
    assert open_size.notes["samples"] == "not known: pass shape=(C, F, H, W) to Sampler"
    assert Sampler(open_size, nfe=4).run(torch.randn(1, 4, 2, 8, 8)).images.shape == (1, 4, 2, 8, 8)
    assert Sampler(open_size, nfe=4, shape=(4, 2, 8, 8)).run(1).images.shape == (1, 4, 2, 8, 8)
    for shape in ((4, 8, 8), (3, 2, 8, 8)):
        with pytest.raises(ConfigError, match=r"x must have shape \(B, 4, F, H, W\)"):
            Sampler(open_size, nfe=4).run(torch.randn(1, *shape))
    with pytest.raises(ConfigError, match=r"takes samples \(4, F, H, W\), got shape=\(4, 8, 8\)"):
        wrap(unet_3d(), "epsilon", shape=(4, 8, 8))
    with pytest.raises(ConfigError, match=r"takes 4 channels, got shape=\(3, 4, 8, 8\)"):
        wrap(unet_3d(), "epsilon", shape=(3, 4, 8, 8))
    with pytest.raises(ConfigError, match=r"takes 4 channels, got shape=\(4, 3, 6, 8\)"):  # frames come first
        wrap(cogvideox(), "v", shape=(4, 3, 6, 8))
    with pytest.raises(ConfigError, match="the model takes 4 channels"):
        Sampler(wrap(cogvideox(), "v", **text), shape=(3, 3, 6, 8))
    with pytest.raises(ConfigError, match="samples must have its rank"):
        Sampler(wrap(cogvideox(), "v", **text), shape=(4, 6, 8))


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: cogvideox(use_rotary_positional_embeddings=True), "use_rotary_positional_embeddings=True"),
        (lambda: cogvideox(ofs_embed_dim=8), "ofs_embed_dim=8"),
        (lambda: wan(image_dim=8, added_kv_proj_dim=24), "image_dim=8"),
        (lambda: unet_3d(time_cond_proj_dim=8), "time_cond_proj_dim=8"),
    ],
    ids=["CogVideoX rotary", "CogVideoX offset", "Wan of pictures", "UNet3D of guidance"],
)
def test_what_a_network_must_be_told_besides_is_refused(make, field):
    with pytest.raises(ConfigError, match=f"with {field} is not supported"):
        wrap(make(), "epsilon", shape=(4, 3, 8, 8))


def stable_audio():
    torch.manual_seed(0)
    sizes = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 1, "attention_head_dim": 16}
    widths = {"cross_attention_dim": 12, "cross_attention_input_dim": 12, "global_states_input_dim": 6}
    heads = {"num_attention_heads": 2, "num_key_value_attention_heads": 1, "time_proj_dim": 8}
    return diffusers.StableAudioDiTModel(**sizes | widths | heads).eval()


def stable_video():
    torch.manual_seed(0)
    kinds = ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal")
    up = ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal")
    sizes = {"sample_size": 8, "block_out_channels": (32, 64), "layers_per_block": 1, "num_attention_heads": (2, 2)}
    widths = {
        "cross_attention_dim": 12,
        "projection_class_embeddings_input_dim": 96,
        "addition_time_embed_dim": 32,
    }
    return diffusers.UNetSpatioTemporalConditionModel(
        down_block_types=kinds, up_block_types=up, **sizes, **widths
    ).eval()


class OfAudio(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x, t):
        rows = len(x), -1, -1
        told = {"encoder_hidden_states": TEXT[:1].expand(*rows), "global_hidden_states": torch.ones(len(x), 1, 6)}
        return self.network(x, t, **told, return_dict=False)[0]


class OfVideo(nn.Module):
    """Frames first, the picture that the video starts from beside them in the channels."""

    def __init__(self, network, picture):
        super().__init__()
        self.network, self.picture = network, picture

    def forward(self, x, t):
        frames = torch.cat([x, self.picture.expand(len(x), x.shape[1], -1, -1, -1)], dim=2)
        rows, ids = TEXT[:1, :1].expand(len(x), -1, -1), torch.ones(len(x), 3)
        return self.network(frames, t, rows, added_time_ids=ids, return_dict=False)[0]


@pytest.mark.parametrize(
    ("make", "module", "shape", "inputs"),
    [
        (stable_audio, OfAudio, (4, 8), "hidden_states, timestep, encoder_hidden_states, global_hidden_states"),
        (
            stable_video,
            lambda network: OfVideo(network, torch.zeros(1, 1, 4, 8, 8)),
            (2, 4, 8, 8),
            "sample, timestep, encoder_hidden_states, added_time_ids",
        ),
    ],
    ids=["StableAudio", "StableVideoDiffusion"],
)
def test_a_network_that_no_reader_knows_is_refused_with_the_way_that_works(make, module, shape, inputs):
    network = make()
    with pytest.raises(ConfigError, match=rf"{type(network).__name__} is a network of diffusers .*\({inputs}"):
        wrap(network, "v", shape=shape)
    own = module(network).eval()
    denoiser = wrap(own, "x0", shape=shape)
    x, sigma = torch.randn(2, *shape), torch.tensor([0.7, 2.5])
    with torch.no_grad():
        c = denoiser.family(sigma)
        expected = own(c.scale.reshape(-1, *[1] * len(shape)) * x, c.time)
        torch.testing.assert_close(denoiser(x, sigma).x0, expected)
    assert Sampler(denoiser, nfe=4).run(2).images.shape == (2, *shape)


def test_a_class_of_ones_own_on_the_base_of_diffusers_is_a_network_like_any():
    class Own(diffusers.ModelMixin, diffusers.ConfigMixin):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv1d(2, 2, 3, padding=1)

        def forward(self, x, t):
            return self.layer(x)

    assert Sampler(wrap(Own(), "epsilon", shape=(2, 8)), nfe=4).run(2).images.shape == (2, 2, 8)
