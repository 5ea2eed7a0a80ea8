"""The U-Nets of EDM: recorded outputs, published structure, and what torch's compilers make of them."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from amed_engine.errors import ConfigError
from amed_engine.networks import EDMPrecond

DDPMPP = {
    "img_resolution": 8,
    "img_channels": 2,
    "model_type": "SongUNet",
    "model_channels": 8,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
}
NCSNPP = DDPMPP | {
    "label_dim": 3,
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
}
SKIP = NCSNPP | {"encoder_type": "skip", "decoder_type": "skip", "channel_mult": [1, 2, 2], "label_dropout": 0.1}
ADM = {
    "img_resolution": 8,
    "img_channels": 2,
    "label_dim": 3,
    "model_type": "DhariwalUNet",
    "model_channels": 32,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
}
CONFIGS = {"ddpmpp": DDPMPP, "ncsnpp": NCSNPP, "skip": SKIP, "adm": ADM}
OWN_GOLDENS = Path(__file__).resolve().parents[1] / "data" / "edm_tiny.safetensors"


def fill(net: nn.Module) -> None:
    """Weights from a formula, not a generator: none is silenced by its initialisation, no torch release changes them."""
    for index, (name, tensor) in enumerate(net.state_dict().items()):
        if "resample_filter" not in name:
            wave = torch.sin(torch.arange(tensor.numel(), dtype=torch.float64) * 12.9898 + index)
            tensor.copy_((wave * (2 / max(tensor[0].numel(), 1)) ** 0.5).reshape(tensor.shape))


def build(config: dict) -> EDMPrecond:
    net = EDMPrecond(**config)
    fill(net)
    return net.eval().requires_grad_(False)


def assert_near(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to float32 rounding, relative to the largest element: cancellation spoils small ones."""
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def inputs(config: dict, batch: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    size = config["img_resolution"]
    sigma = torch.logspace(-1, 1, batch)
    x = torch.randn(batch, config["img_channels"], size, size, generator=generator) * sigma[:, None, None, None]
    label_dim = config.get("label_dim", 0)
    return x, sigma, torch.arange(batch) % label_dim if label_dim else None


@pytest.fixture(params=CONFIGS, ids=str)
def case(request):
    config = CONFIGS[request.param]
    return build(config), inputs(config)


# ---- recorded numbers


@pytest.mark.parametrize("name", ["ddpmpp_uncond", "ncsnpp_cond", "adm_cond"])
def test_recorded_network_is_reproduced(goldens_dir, name):
    with safe_open(goldens_dir / "networks" / f"{name}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        golden = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    net = EDMPrecond(**config).eval()
    net.load_state_dict({k.removeprefix("weights/"): v for k, v in golden.items() if k.startswith("weights/")})
    bottleneck = sorted(key for key in golden if key.startswith("feature/"))[-1]
    with torch.no_grad():
        x0, features = net(golden["x"], golden["sigma"], golden.get("class_labels"))
        x_in = golden["x"] / (0.25 + golden["sigma"] ** 2).sqrt()[:, None, None, None]
        raw, _ = net.model(x_in, golden["sigma"].log() / 4, golden.get("class_labels"))
    torch.testing.assert_close(x0, golden["denoised"], rtol=0, atol=1e-5)
    torch.testing.assert_close(raw, golden["raw"], rtol=0, atol=1e-5)
    torch.testing.assert_close(features, golden[bottleneck], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_bundled_record_is_reproduced(name):
    """Recorded, and compared in float64, by a version that reproduced the networks of the test above."""
    with safe_open(OWN_GOLDENS, "pt") as file:
        golden = {key: file.get_tensor(f"{name}/{key}") for key in ("x", "sigma", "denoised", "features")}
    net = build(CONFIGS[name]).double()
    x0, features = net(golden["x"].double(), golden["sigma"].double(), inputs(CONFIGS[name])[2])
    torch.testing.assert_close(x0.float(), golden["denoised"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(features.float(), golden["features"], rtol=1e-6, atol=1e-6)


# ---- structure


@pytest.mark.parametrize(
    ("config", "count"),
    [
        ({"img_resolution": 32, "model_type": "SongUNet", "channel_mult": [2, 2, 2], "augment_dim": 9}, 55_733_891),
        ({"img_resolution": 64, "model_type": "DhariwalUNet", "label_dim": 1000}, 295_899_267),
    ],
    ids=["cifar10-ddpmpp", "imagenet64-adm"],
)
def test_published_parameter_counts(config, count):
    with torch.device("meta"):
        net = EDMPrecond(img_channels=3, **config)
    assert sum(p.numel() for p in net.parameters()) == count


def test_skip_skip_has_an_image_branch_at_every_resolution():
    state = build(SKIP).state_dict()
    aux = {key.split(".")[1] + "." + key.split(".")[2]: tuple(v.shape) for key, v in state.items() if "aux" in key}
    lower = {f"enc.{r}x{r}_aux_{kind}" for r in (4, 2) for kind in ("down", "skip")}
    upper = {f"dec.{r}x{r}_aux_{kind}" for r in (8, 4, 2) for kind in ("norm", "conv")}
    assert set(aux) == lower | upper | {"dec.8x8_aux_up", "dec.4x4_aux_up"}
    assert tuple(state["model.enc.4x4_aux_skip.weight"].shape) == (8, 2, 1, 1)
    assert tuple(state["model.enc.2x2_aux_skip.weight"].shape) == (16, 2, 1, 1)
    assert tuple(state["model.dec.2x2_aux_conv.weight"].shape) == (2, 16, 3, 3)
    assert tuple(state["model.dec.4x4_aux_up.resample_filter"].shape) == (1, 1, 4, 4)


def test_skip_decoder_is_the_sum_of_upsampled_images():
    """With every head but the lowest silenced, the output is that head's constant image, upsampled twice."""
    net = build(SKIP | {"resample_filter": [1, 1]})
    for name, parameter in net.model.dec.named_parameters():
        if "aux_conv" in name:
            parameter.data.zero_()
    net.model.dec["2x2_aux_conv"].bias.data = torch.tensor([1.0, -2.0])
    x, sigma, labels = inputs(SKIP)
    raw, _ = net.model(x, sigma, labels)
    torch.testing.assert_close(raw, torch.tensor([1.0, -2.0])[:, None, None].expand(3, 2, 8, 8))


@pytest.mark.parametrize("direction", ["down", "up"])
def test_box_resampling_is_averaging_and_repetition(direction):
    from amed_engine.networks.layers import Conv2d

    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    layer = Conv2d(3, 3, 0, resample=direction)
    expected = (
        nn.functional.avg_pool2d(x, 2) if direction == "down" else x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    )
    torch.testing.assert_close(layer(x), expected)


def test_state_dict_must_match_strictly(case):
    net, _ = case
    state = net.state_dict()
    state.pop("model.map_layer0.bias")
    with pytest.raises(RuntimeError, match=r"model\.map_layer0\.bias"):
        EDMPrecond(**net.config).load_state_dict(state)


def test_config_is_json_and_rebuilds_the_same_network(case):
    net, (x, sigma, labels) = case
    again = EDMPrecond(**json.loads(json.dumps(net.config, allow_nan=False))).eval()
    again.load_state_dict(net.state_dict())
    assert torch.equal(again(x, sigma, labels).x0, net(x, sigma, labels).x0)


def test_bottleneck_is_the_lowest_encoder_block(case):
    net, (x, sigma, labels) = case
    seen = []
    block = [module for name, module in net.model.enc.items() if "_block" in name][-1]
    block.register_forward_hook(lambda module, args, output: seen.append(output))
    features = net(x, sigma, labels).features
    assert torch.equal(features, seen[0])
    assert features.shape[1:] == net.bottleneck_shape


# ---- meaning of the arguments


def test_per_sample_sigma_equals_one_by_one(case):
    net, (x, sigma, labels) = case
    together = net(x, sigma, labels)
    for i in range(len(x)):
        alone = net(x[i : i + 1], sigma[i], None if labels is None else labels[i : i + 1])
        assert_near(together.x0[i : i + 1], alone.x0)
        assert_near(together.features[i : i + 1], alone.features)


def test_tiny_noise_returns_the_image(case):
    net, (x, _, labels) = case
    torch.testing.assert_close(net(x, torch.tensor(1e-7), labels).x0, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [NCSNPP, ADM], ids=["song", "adm"])
def test_integer_labels_are_one_hot_rows(config):
    net = build(config)
    x, sigma, labels = inputs(config)
    one_hot = torch.eye(3)[labels]
    assert torch.equal(net(x, sigma, labels).x0, net(x, sigma, one_hot).x0)
    assert not torch.equal(net(x, sigma, labels).x0, net(x, sigma, labels.flip(0)).x0)


@pytest.mark.parametrize("config", [NCSNPP, ADM], ids=["song", "adm"])
def test_no_label_is_the_zero_label(config):
    net = build(config)
    x, sigma, _ = inputs(config)
    zeros = net(x, sigma, torch.zeros(3, 3)).x0
    torch.testing.assert_close(net(x, sigma, None).x0, zeros)
    torch.testing.assert_close(net(x, sigma, torch.full((3,), -1)).x0, zeros)


@pytest.mark.parametrize("config", [NCSNPP, ADM], ids=["song", "adm"])
def test_label_dropout_acts_in_training_only(config):
    net = build(config | {"label_dropout": 1.0, "dropout": 0.0})
    x, sigma, labels = inputs(config)
    unconditional, conditional = net(x, sigma, None).x0, net(x, sigma, labels).x0
    torch.testing.assert_close(net.train()(x, sigma, labels).x0, unconditional)
    assert not torch.allclose(conditional, unconditional)


@pytest.mark.parametrize("config", [DDPMPP, ADM], ids=["song", "adm"])
def test_augment_labels_condition_the_network(config):
    net = build(config | {"augment_dim": 9})
    x, sigma, labels = inputs(config)
    plain = net(x, sigma, labels).x0
    torch.testing.assert_close(net(x, sigma, labels, torch.zeros(3, 9)).x0, plain)
    assert not torch.allclose(net(x, sigma, labels, torch.ones(3, 9)).x0, plain)


# ---- precision


def test_float64_input_is_preconditioned_in_float32(case):
    net, (x, sigma, labels) = case
    double = net(x.double(), sigma.double(), labels)
    assert double.x0.dtype == torch.float32
    assert torch.equal(double.x0, net(x, sigma, labels).x0)


def test_float64_module_runs_wholly_in_float64(case):
    net, (x, sigma, labels) = case
    single = net(x, sigma, labels)
    double = net.double()(x.double(), sigma.double(), labels)
    assert double.x0.dtype == double.features.dtype == torch.float64
    error = (single.x0 - double.x0).abs().max() / double.x0.abs().max()
    assert 1e-10 < error < 1e-5


def test_bfloat16_module_computes_in_bfloat16_and_returns_float32(case):
    net, (x, sigma, labels) = case
    exact = net(x, sigma, labels).x0
    net = net.bfloat16()
    low, forced = net(x, sigma, labels), net(x, sigma, labels, force_fp32=True)
    assert low.x0.dtype == low.features.dtype == torch.float32
    scale = exact.abs().max()
    assert 1e-5 < (low.x0 - exact).abs().max() / scale < 0.1
    assert not torch.equal(low.x0, forced.x0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_use_fp16_computes_in_float16_on_cuda_only():
    net = build(DDPMPP | {"use_fp16": True})
    x, sigma, _ = inputs(DDPMPP)
    exact = net(x, sigma).x0
    net, x, sigma = net.cuda(), x.cuda(), sigma.cuda()
    half, forced = net(x, sigma).x0.cpu(), net(x, sigma, force_fp32=True).x0.cpu()
    torch.testing.assert_close(forced, exact, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(half, exact, rtol=2e-2, atol=2e-2)
    assert not torch.equal(half, forced)


def test_channels_last_gives_the_same_numbers(case):
    net, (x, sigma, labels) = case
    expected = net(x, sigma, labels)
    got = net.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), sigma, labels)
    assert_near(got.x0, expected.x0)
    assert_near(got.features, expected.features)


# ---- compilers: both outputs, at a batch size other than the traced one


def check_other_batch(compiled, net: EDMPrecond, config: dict) -> None:
    x, sigma, labels = inputs(config, batch=5, seed=1)
    args = (x, sigma) if labels is None else (x, sigma, labels)
    x0, features = compiled(*args)
    expected = net(*args)
    assert_near(x0, expected.x0)
    assert_near(features, expected.features)


def example(case) -> tuple[EDMPrecond, tuple]:
    net, args = case
    return net, tuple(arg for arg in args if arg is not None)


@pytest.mark.parametrize("name", CONFIGS)
def test_jit_trace(name):
    net, args = example((build(CONFIGS[name]), inputs(CONFIGS[name])))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, among them that of group_norm's size check
        traced = torch.jit.trace(net, args)
    check_other_batch(traced, net, CONFIGS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_export_with_dynamic_batch(name):
    net, args = example((build(CONFIGS[name]), inputs(CONFIGS[name])))
    batch = torch.export.Dim("batch", min=1, max=256)
    program = torch.export.export(net, args, dynamic_shapes=[{0: batch} for _ in args])
    check_other_batch(program.module(), net, CONFIGS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["skip", "adm"])
def test_compile_fullgraph(name):
    net, args = example((build(CONFIGS[name]), inputs(CONFIGS[name])))
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend="aot_eager")
    compiled(*args)
    check_other_batch(compiled, net, CONFIGS[name])


@pytest.mark.slow
def test_compile_to_native_code():
    """Code generation takes a minute for a real network: one block at one resolution has every kind of layer."""
    config = NCSNPP | {"channel_mult": [1], "attn_resolutions": [8], "encoder_type": "standard"}
    net = build(config)
    check_other_batch(torch.compile(net, fullgraph=True, dynamic=True), net, config)


# ---- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "UNet"}, "model_type must be one of SongUNet, DhariwalUNet; got 'UNet'"),
        (
            {"chanel_mult": [1]},
            "SongUNet has no option chanel_mult; valid: attn_resolutions, augment_dim, channel_mult",
        ),
        ({"model_type": "DhariwalUNet", "encoder_type": "skip"}, "DhariwalUNet has no option encoder_type"),
        ({"encoder_type": "skipped"}, "encoder_type must be one of standard, skip, residual; got 'skipped'"),
        ({"decoder_type": "residual"}, "decoder_type must be one of standard, skip; got 'residual'"),
        ({"model_channels": 2}, "2 channels cannot be normalised in 0 equal groups; choose model_channels"),
        ({"model_channels": 68, "channel_mult": [1]}, "136 channels cannot be normalised in 32 equal groups"),
        ({"embedding_type": "learned"}, "embedding_type must be one of positional, fourier; got 'learned'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        EDMPrecond(**({"img_resolution": 8, "img_channels": 1, "model_type": "SongUNet"} | options))


@pytest.mark.parametrize("shape", [(3, 1, 8, 8), (3, 2, 4, 8), (3, 2, 64), (2, 8, 8)])
def test_wrong_image_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"x must have shape \(B, 2, 8, 8\), got"):
        build(DDPMPP)(torch.zeros(shape), torch.tensor(1.0))


@pytest.mark.parametrize("labels", [torch.zeros(3, 4), torch.zeros(3), torch.zeros(3, 3, 1), torch.tensor(1)])
def test_wrong_label_shape_is_refused(labels):
    with pytest.raises(ValueError, match=r"class_labels must be integers \(B,\) or a matrix \(B, 3\), got"):
        build(NCSNPP)(*inputs(NCSNPP)[:2], labels)
