"""Which weights count for a fingerprint: those in buffers, packed layers, files and a hook's keeping among them."""

import hashlib

import pytest
import torch
from torch import nn

from amed_engine.adapters.fingerprint import can_tell, fingerprint
from amed_engine.adapters.weights import weights_of


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Held(nn.Module):
    """Tensors as buffers of one layer, beside it a parameter that says nothing of them."""

    def __init__(self, bias=False, **tensors):
        super().__init__()
        self.layer, self.out = nn.Module(), nn.Linear(1, 1)
        for parameter in self.out.parameters():
            nn.init.ones_(parameter)
        for name, tensor in tensors.items():
            self.layer.register_buffer(name, tensor)
        if bias:
            self.layer.bias = nn.Parameter(torch.zeros(2))


STORAGE = {
    "int8 with a scale": lambda seed: Held(q=(50 * drawn(seed, 4, 3)).to(torch.int8), scale=torch.ones(4, 1)),
    "its scale alone differs": lambda seed: Held(q=torch.ones(4, 3, dtype=torch.int8), scale=drawn(seed, 4)),
    "uint8 beside a bias": lambda seed: Held(True, q=(9 * drawn(seed, 4, 3).abs()).to(torch.uint8)),
    "float8": lambda seed: Held(w=drawn(seed, 4, 3).to(torch.float8_e4m3fn)),
    "packed int32": lambda seed: Held(q=(1e5 * drawn(seed, 4, 3)).to(torch.int32)),
}
TABLES = {
    "running statistics": lambda seed: Held(mean=drawn(seed, 4), count=torch.tensor(seed)),
    "table of noise levels": lambda seed: Held(sigmas=drawn(seed, 4, 3)),
    "indices": lambda seed: Held(index=torch.full((4, 3), seed)),
    "indices of 32 bits beside a bias": lambda seed: Held(True, index=torch.full((4, 3), seed, dtype=torch.int32)),
    "mask": lambda seed: Held(mask=drawn(seed, 4, 3) > 0),
    "8-bit vector": lambda seed: Held(v=torch.full((4,), seed, dtype=torch.uint8)),
}


@pytest.mark.parametrize("make", STORAGE.values(), ids=STORAGE)
def test_weights_in_buffers_count(make):
    assert fingerprint(make(1)) == fingerprint(make(1)) != fingerprint(make(2))
    assert {"out.weight", "out.bias"} < weights_of(make(1)).keys()


@pytest.mark.parametrize("make", TABLES.values(), ids=TABLES)
def test_tables_and_statistics_change_no_fingerprint(make):
    assert fingerprint(make(1)) == fingerprint(make(2))
    assert {"out.weight", "out.bias", "layer.bias"} >= weights_of(make(1)).keys()


def test_the_fingerprint_of_parameters_is_what_files_have_recorded():
    network = Held(q=torch.zeros(2, 2))
    expected = hashlib.sha256()
    for name, shape in (("out.bias", (1,)), ("out.weight", (1, 1))):
        expected.update(f"{name}:torch.float32:{shape};".encode() + torch.ones(1).numpy().tobytes())
    assert fingerprint(network) == expected.hexdigest()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.qint8, torch.float16])
def test_packed_weights_count(dtype):
    def make(seed, bias=0.0):
        network = nn.Sequential(nn.Linear(3, 4), nn.Conv1d(1, 1, 1))
        network[0].weight.data = drawn(seed, 4, 3)
        nn.init.constant_(network[0].bias, bias)
        for parameter in network[1].parameters():
            nn.init.ones_(parameter)
        return torch.ao.quantization.quantize_dynamic(network, {nn.Linear}, dtype=dtype)

    assert fingerprint(make(1)) == fingerprint(make(1))
    assert len({fingerprint(each) for each in (make(1), make(2), make(1, bias=1.0))}) == 3


@pytest.mark.filterwarnings("ignore")
def test_scales_of_each_channel_count():
    def make(scale):
        scales, zeros = torch.tensor([0.5, scale], dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
        network = nn.Sequential(nn.Conv1d(1, 1, 1), torch.ao.nn.quantized.Conv2d(1, 2, 1))
        for parameter in network[0].parameters():
            nn.init.ones_(parameter)
        values = torch.tensor([0.5, scale]).reshape(2, 1, 1, 1)  # one step of each scale
        weight = torch.quantize_per_channel(values, scales, zeros, 0, torch.qint8)
        network[1].set_weight_bias(weight, torch.zeros(2))
        return network

    assert fingerprint(make(1.0)) == fingerprint(make(1.0)) != fingerprint(make(2.0))


# ---- offloaded


class Tied(nn.Module):
    def __init__(self, tied=True):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        for k, layer in enumerate((self.a, self.b, self.c)):
            layer.weight.data, layer.bias.data = drawn(k, 3, 3), torch.zeros(3)
        if tied:
            self.b.weight = self.a.weight


class Hook:
    def __init__(self, weights):
        self.weights_map, self.execution_device = weights, "cpu"


def offloaded(network, keep):
    """As accelerate does it: each layer with its own weights on "meta", what they were kept by name."""
    kept = {name: keep(tensor.detach()) for name, tensor in network.state_dict().items()}
    for name, layer in network.named_children():
        layer._hf_hook = Hook({own: kept[f"{name}.{own}"] for own in ("weight", "bias")})
        layer.weight, layer.bias = (nn.Parameter(torch.empty_like(p, device="meta")) for p in layer.parameters())
    return network


def test_a_tied_weight_that_is_offloaded_is_still_one():
    assert fingerprint(offloaded(Tied(), lambda tensor: tensor)) == fingerprint(Tied())
    assert fingerprint(offloaded(Tied(False), lambda tensor: tensor)) == fingerprint(Tied(False)) != fingerprint(Tied())


def test_copies_of_one_weight_may_be_a_tied_one_and_tell_nothing():
    network = offloaded(Tied(), torch.clone)
    assert fingerprint(network) is None
    assert not can_tell(network)
    # Three biases of zeros are three biases.
    assert fingerprint(offloaded(Tied(False), torch.clone)) == fingerprint(Tied(False))


@pytest.mark.filterwarnings("ignore")
def test_weights_on_a_disk_are_read_there_and_are_unknown_without_their_file(tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="needs pip install 'amed-engine[diffusers]'")

    def make():
        torch.manual_seed(0)
        blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "norm_num_groups": 4}
        return diffusers.UNet2DModel(sample_size=8, block_out_channels=(8,), layers_per_block=1, **blocks)

    expected, network = fingerprint(make()), make()
    where = {"onload_device": torch.device("cpu"), "offload_device": torch.device("cpu")}
    network.enable_group_offload(**where, offload_type="leaf_level", offload_to_disk_path=str(tmp_path))
    for parameter in network.parameters():  # between calls it is memory that nobody has written
        parameter.data.fill_(7)
    assert fingerprint(network) == fingerprint(nn.DataParallel(network)) == expected
    next(tmp_path.iterdir()).unlink()
    assert fingerprint(network) is None
    assert not can_tell(network)
