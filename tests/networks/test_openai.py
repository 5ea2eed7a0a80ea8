"""The U-Net of guided-diffusion and the consistency models, and its classifier: recorded outputs, options, compilers."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from amed_engine.errors import ConfigError
from amed_engine.networks import OpenAIClassifier, OpenAIUNet
from amed_engine.networks.openai_layers import Pointwise, attend, timestep_embedding

BASE = {
    "image_size": 8,
    "in_channels": 3,
    "model_channels": 32,
    "out_channels": 3,
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "channel_mult": [1, 2],
}
OPTIONS = {
    "plain": {},
    "learned variance": {"out_channels": 6, "num_head_channels": 16},
    "new order": {"use_new_attention_order": True, "num_heads": 2, "num_heads_upsample": 4},
    "scale shift": {"use_scale_shift_norm": True, "resblock_updown": True, "attention_resolutions": [1, 2]},
    "pooling": {"conv_resample": False, "num_res_blocks": 2},
    "classes": {"num_classes": 4, "channel_mult": [1, 1.5, 2], "model_channels": 64, "num_heads": 4},
}
POOLS = ("adaptive", "attention", "spatial", "spatial_v2")
OWN_GOLDENS = Path(__file__).resolve().parents[1] / "data" / "openai_tiny.safetensors"


def build(kind=OpenAIUNet, **options):
    """Weights from a formula, not a generator: none is silenced by its initialisation, no torch release changes them."""
    network = kind(**(BASE | options)).eval().requires_grad_(False)
    for index, tensor in enumerate(network.state_dict().values()):
        wave = torch.sin(torch.arange(tensor.numel(), dtype=torch.float64) * 12.9898 + index)
        tensor.copy_((wave * (2 / max(tensor[0].numel(), 1)) ** 0.5).reshape(tensor.shape))
    return network


def build_named(name):
    """A network of OPTIONS, or a classifier of this pooling."""
    if name in OPTIONS:
        return build(**OPTIONS[name])
    return build(OpenAIClassifier, pool=name, out_channels=5, num_head_channels=16)


def tiny_inputs(name):
    """x, timesteps and labels, in float64."""
    x = torch.sin(torch.arange(2 * 3 * 8 * 8, dtype=torch.float64) * 0.7).reshape(2, 3, 8, 8)
    labels = (torch.tensor([0, 3]),) if "num_classes" in OPTIONS.get(name, {}) else ()
    return x, torch.tensor([3.0, 500.5], dtype=torch.float64), *labels


def golden(path, prefix):
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    return config, tensors, {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


@pytest.mark.parametrize("name", ["openai_cm_uncond", "openai_adm_classifier_guided"])
def test_recorded_network_is_reproduced(goldens_dir, name):
    config, recorded, weights = golden(goldens_dir / "networks" / f"{name}.safetensors", "weights/")
    network = OpenAIUNet(**config.get("unet", config)).eval()
    network.load_state_dict(weights, strict=True)
    with torch.no_grad():
        raw, bottleneck = network(recorded["x"], recorded["timesteps"], recorded.get("class_index"))
    torch.testing.assert_close(raw, recorded["raw"], rtol=0, atol=1e-5)
    torch.testing.assert_close(bottleneck, recorded["feature/middle_block"], rtol=1e-5, atol=2e-5)


def test_recorded_classifier_is_reproduced(goldens_dir):
    path = goldens_dir / "networks" / "openai_adm_classifier_guided.safetensors"
    config, recorded, weights = golden(path, "classifier_weights/")
    classifier = OpenAIClassifier(**config["classifier"]).eval()
    classifier.load_state_dict(weights, strict=True)
    with torch.no_grad():
        logits = classifier(recorded["x"] * 0.5, recorded["timesteps"])
    torch.testing.assert_close(logits, recorded["classifier_logits"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [*OPTIONS, *POOLS])
def test_bundled_record_is_reproduced(name):
    """Recorded, and compared in float64, by a version that reproduced the networks above and those of diffusers."""
    with safe_open(OWN_GOLDENS, "pt") as file:
        expected = file.get_tensor(name)
    output = build_named(name).double()(*tiny_inputs(name))
    raw = output if isinstance(output, torch.Tensor) else output[0]
    torch.testing.assert_close(raw.float(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "count"),
    [
        # guided-diffusion's ImageNet-64 and 256 x 256 classes, consistency models' LSUN-256: sizes of the published files
        ({"image_size": 64, "model_channels": 192, "out_channels": 6, "num_res_blocks": 3, "num_classes": 1000,
          "attention_resolutions": [2, 4, 8], "channel_mult": [1, 2, 3, 4], "num_head_channels": 64,
          "use_scale_shift_norm": True, "resblock_updown": True}, 295_904_454),
        ({"image_size": 256, "model_channels": 256, "out_channels": 6, "num_res_blocks": 2, "num_classes": 1000,
          "attention_resolutions": [8, 16, 32], "channel_mult": [1, 1, 2, 2, 4, 4], "num_head_channels": 64,
          "use_scale_shift_norm": True, "resblock_updown": True}, 553_838_086),
    ],
    ids=["imagenet64", "imagenet256"],
)  # fmt: skip
def test_published_configuration_has_its_number_of_parameters(options, count):
    with torch.device("meta"):
        network = OpenAIUNet(**(BASE | options))
    assert sum(p.numel() for p in network.parameters()) == count


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_gives_finite_output_of_the_right_shape(name):
    options = BASE | OPTIONS[name]
    network, x = build(**OPTIONS[name]), torch.randn(2, 3, 8, 8)
    labels = torch.tensor([0, 3]) if options.get("num_classes") else None
    raw, bottleneck = network(x, torch.tensor([3.0, 500.5]), labels)
    assert raw.shape == (2, options["out_channels"], 8, 8)
    assert tuple(bottleneck.shape[1:]) == network.bottleneck_shape
    assert raw.isfinite().all()
    assert raw.std() > 0.01
    again = OpenAIUNet(**network.config).eval()
    again.load_state_dict(network.state_dict(), strict=True)
    torch.testing.assert_close(again(x, torch.tensor([3.0, 500.5]), labels)[0], raw)


@pytest.mark.parametrize("pool", POOLS)
def test_every_pooling_of_the_classifier_gives_logits(pool):
    logits = build_named(pool)(torch.randn(2, 3, 8, 8), torch.tensor([3.0, 500.0]))
    assert logits.shape == (2, 5)
    assert logits.std() > 1e-3


def test_parameters_have_the_published_names():
    names = set(build(num_classes=3, num_heads=2).state_dict())
    assert {
        "time_embed.2.weight",
        "label_emb.weight",
        "input_blocks.2.0.op.weight",
        "middle_block.1.proj_out.weight",
    } < names
    assert {"output_blocks.1.2.conv.weight", "out.2.bias", "input_blocks.3.0.skip_connection.weight"} < names
    names = set(build(OpenAIClassifier, pool="spatial_v2", out_channels=5).state_dict())
    assert {"out.0.weight", "out.1.weight", "out.3.weight"} < names


@pytest.mark.parametrize("new_order", [False, True])
def test_attention_is_softmax_over_the_heads_of_its_order(new_order):
    heads, width, length = 3, 4, 5
    qkv = torch.randn(2, 3 * heads * width, length, dtype=torch.float64)
    expected = torch.empty(2, heads * width, length, dtype=torch.float64)
    for h in range(heads):
        starts = (
            [k * heads * width + h * width for k in range(3)] if new_order else [(3 * h + k) * width for k in range(3)]
        )
        q, k, v = (qkv[:, start : start + width] for start in starts)
        weights = (q.transpose(1, 2) @ k / math.sqrt(width)).softmax(dim=-1)  # (B, query, key)
        expected[:, h * width : (h + 1) * width] = v @ weights.transpose(1, 2)
    torch.testing.assert_close(attend(qkv, heads, new_order), expected)


def test_timestep_embedding_is_cosines_then_sines():
    embedded = timestep_embedding(torch.tensor([7.0]), 5)
    w = [1.0, 0.01]
    expected = torch.tensor([[*(math.cos(7 * k) for k in w), *(math.sin(7 * k) for k in w), 0.0]])
    torch.testing.assert_close(embedded, expected, rtol=0, atol=1e-6)


def test_pointwise_weights_load_from_both_published_shapes():
    layer, weight = Pointwise(2, 3), torch.randn(3, 2)
    for shape in ((3, 2, 1), (3, 2, 1, 1)):
        layer.load_state_dict({"weight": weight.reshape(shape), "bias": torch.zeros(3)}, strict=True)
        assert torch.equal(layer.weight[:, :, 0], weight)


def test_one_hot_rows_are_the_integers_and_a_zero_row_adds_nothing():
    network = build(num_classes=4)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 500.0])
    labels = torch.tensor([1, 3])
    torch.testing.assert_close(network(x, t, torch.eye(4)[labels])[0], network(x, t, labels)[0])
    network.label_emb.weight[2] = 0
    torch.testing.assert_close(network(x, t, torch.zeros(2, 4))[0], network(x, t, torch.tensor([2, 2]))[0])


def test_double_and_half_follow_the_parameters():
    network = build()
    x, t = torch.randn(1, 3, 8, 8), torch.tensor([3.0])
    single = network(x, t)[0]
    assert network.double()(x.double(), t.double())[0].dtype == torch.float64
    half = network.bfloat16()(x, t)[0]
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, single, rtol=0, atol=0.1 * single.abs().max().item())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_channels": 40}, "32 groups"),
        ({"num_head_channels": 48}, "attention heads"),
        ({"dims": 3}, "dims must be 2"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        build(**options)


def test_inputs_that_cannot_work_are_refused():
    t = torch.tensor([1.0])
    with pytest.raises(ConfigError, match="needs class labels"):
        build(num_classes=4)(torch.zeros(1, 3, 8, 8), t)
    with pytest.raises(ConfigError, match="unconditional"):
        build()(torch.zeros(1, 3, 8, 8), t, torch.tensor([0]))
    with pytest.raises(ConfigError, match="shape"):
        build()(torch.zeros(1, 4, 8, 8), t)
    with pytest.raises(ConfigError, match="pool must be one of"):
        build(OpenAIClassifier, pool="max")
