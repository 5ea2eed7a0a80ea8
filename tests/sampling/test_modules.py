"""What is read of a caller's network: through wrappers, by hooks, from parameters of several kinds."""

import copy
import functools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import amed_engine
from amed_engine.adapters.fingerprint import fingerprint
from amed_engine.sampling.modes import modes_kept
from amed_engine.sampling.modules import (
    as_module,
    bare,
    bound,
    device_of,
    dtype_of,
    dtypes_of,
    never_writes,
    plain_name,
    said,
)
from amed_engine.sampling.offloaded import brings_weights
from amed_engine.sampling.wrappers import computes_nothing, passed_on


class PassesOn(nn.Module):
    """As copies of weights on average, and other wrappers, are written."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *inputs, **keywords):
        return self.module(*inputs, **keywords)


class Average(nn.Module):
    """The same under a name of its own, beside the network that it is an average of; without forward, as some are."""

    def __init__(self, module):
        super().__init__()
        self.online = copy.deepcopy(module)
        self.ema = module
        with torch.no_grad():
            self.online.model.map_layer0.weight += 1

    @torch.no_grad()
    def __call__(self, *inputs, **keywords):
        """A call of the average."""
        return self.ema(*inputs, **keywords)


class MayCompute(nn.Module):
    """Takes anything, and what it does with it is not to be read of its code."""

    def __init__(self, unet, change=lambda answer: answer):
        super().__init__()
        self.unet, self.change = unet, change

    def forward(self, *inputs, **keywords):
        return self.change(self.unet(*inputs, **keywords))


class Computes(PassesOn):
    """Keeps its network under the same name, and does something with what it is given."""

    def forward(self, x, sigma):
        return self.module(2 * x, sigma)


@pytest.fixture(scope="module")
def group():
    """A group of one process, which DistributedDataParallel and FSDP ask for."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def fsdp(module):
    return torch.distributed.fsdp.FullyShardedDataParallel(module, device_id=torch.device("cpu"))


WRAPPERS = {
    "AveragedModel": torch.optim.swa_utils.AveragedModel,
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "FSDP": fsdp,
    "fully_shard": lambda module: torch.distributed.fsdp.fully_shard(module),
    "compile": functools.partial(torch.compile, backend="eager"),
    "of another's making": PassesOn,
    "DataParallel of a compiled one": lambda module: nn.DataParallel(torch.compile(module, backend="eager")),
    "compiled DataParallel": lambda module: torch.compile(nn.DataParallel(module), backend="eager"),
    "partial": functools.partial,
    "forward": lambda module: module.forward,
    "__call__": lambda module: module.__call__,
    "average": Average,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_network_is_the_network(tiny_conditional, wrapper, group):
    def images(network, **told):
        sampler = amed_engine.Sampler(network, solver="euler", nfe=3)
        assert (sampler.model.shape, sampler.model.label_dim) == ((1, 8, 8), 10)
        assert (sampler.model.sigma_min, sampler.model.sigma_max) == (0.002, 80.0)
        assert sampler.model.precision == "float32"
        return sampler.run([1, 2], **told)

    wrapped = WRAPPERS[wrapper](copy.deepcopy(tiny_conditional))
    for told in ({}, {"class_labels": [3, 4]}, {"class_labels": 3, "guidance_scale": 2.0}):
        got, expected = images(wrapped, **told), images(tiny_conditional, **told)
        torch.testing.assert_close(got.images, expected.images)
        assert torch.equal(got.labels, expected.labels)
    assert fingerprint(wrapped) == fingerprint(tiny_conditional)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrapper", [name for name in WRAPPERS if name not in ("partial", "forward", "__call__")])
def test_a_wrapped_network_is_saved_without_its_wrapper(tiny_model, wrapper, group, tmp_path):
    amed_engine.save_pretrained(WRAPPERS[wrapper](copy.deepcopy(tiny_model)), tmp_path / "saved")
    assert fingerprint(amed_engine.from_pretrained(tmp_path / "saved")) == fingerprint(tiny_model)


def test_a_wrapper_that_may_compute_is_not_lost_in_a_file(tiny_model, tmp_path):
    with pytest.raises(amed_engine.ConfigError, match=r"MayCompute may compute .* pass its \.unet instead"):
        amed_engine.save_pretrained(nn.DataParallel(MayCompute(tiny_model)), tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_wrapper_that_may_compute_is_asked_as_its_network_and_known_for_another(tiny_conditional):
    sampler = amed_engine.Sampler(MayCompute(tiny_conditional), solver="euler", nfe=3)
    assert (sampler.model.shape, sampler.model.label_dim) == ((1, 8, 8), 10)
    expected = amed_engine.Sampler(tiny_conditional, solver="euler", nfe=3).run([1, 2], class_labels=3).images
    torch.testing.assert_close(sampler.run([1, 2], class_labels=3).images, expected)
    inside = copy.deepcopy(tiny_conditional)
    inside.model = MayCompute(inside.model)
    assert len({fingerprint(model) for model in (tiny_conditional, MayCompute(tiny_conditional), inside)}) == 3
    assert fingerprint(nn.DataParallel(MayCompute(tiny_conditional))) == fingerprint(MayCompute(tiny_conditional))


def test_a_predictor_of_the_network_is_refused_by_a_wrapper_that_computes():
    halved = MayCompute(amed_engine.load("digits"), lambda answer: answer._replace(x0=answer.x0 / 2))
    predictor = amed_engine.zoo.bundled_predictor("digits", 5)
    with pytest.raises(amed_engine.ConfigError, match="the fingerprints differ"):
        amed_engine.Sampler(halved, predictor)
    amed_engine.Sampler(halved, predictor, verify=False)


def test_a_block_that_takes_anything_leaves_its_networks_fingerprint():
    # A part of a network of another's making: predictors for it are there already.
    network = nn.Sequential(MayCompute(nn.Conv2d(1, 1, 1)))
    plain = nn.Sequential(network[0].unet)
    assert fingerprint(network) == fingerprint(plain)


class Choice(nn.Module):
    """Several networks, of which its code says which one answers."""

    def __init__(self, module):
        super().__init__()
        self.first, self.second = module, copy.deepcopy(module)

    def forward(self, *inputs):
        chosen = self.second if len(inputs) > 2 else self.first
        return chosen(*inputs)


@pytest.mark.parametrize("ask", [amed_engine.Sampler, functools.partial(amed_engine.wrap, prediction="denoised")])
def test_classes_that_may_be_reached_are_not_left_out_silently(tiny_conditional, tiny_model, ask):
    choice = Choice(tiny_conditional)
    with pytest.raises(amed_engine.ConfigError, match=r"Choice takes any inputs.*its \.first.*pass the module"):
        ask(choice, shape=(1, 8, 8))
    for count in (0, 10):
        made = ask(choice, shape=(1, 8, 8), label_dim=count)
        assert getattr(made, "model", made).label_dim == count
    labels = nn.functional.one_hot(torch.tensor([3]), 10)
    ask(functools.partial(choice, class_labels=labels), shape=(1, 8, 8))
    ask(Choice(tiny_model), shape=(1, 8, 8))


def lightning(module, precision):
    """As lightning_fabric's: the module under two names, and a setting that says in which precision it computes."""

    def forward(self, *args, **kwargs):
        answer = self._forward_module(*args, **kwargs)
        return answer

    kind = type("_FabricModule", (nn.Module,), {"forward": forward, "__module__": "lightning_fabric.wrappers"})
    wrapped = kind()
    wrapped._forward_module = wrapped._original_module = module
    wrapped._strategy = SimpleNamespace(precision=SimpleNamespace(precision=precision))
    return wrapped


def test_lightnings_wrapper_is_the_network_unless_it_rounds(tiny_conditional):
    plain, mixed = (lightning(tiny_conditional, precision) for precision in ("32-true", "bf16-mixed"))
    assert bare(plain) is bare(mixed) is tiny_conditional
    assert fingerprint(plain) == fingerprint(tiny_conditional) != fingerprint(mixed)


def plain_call(self, *inputs, **keywords):
    """A docstring changes nothing."""
    return self.net(*inputs, **keywords)


def first_alone(self, *inputs, **keywords):
    return self.net(*inputs[:1], **keywords)


def without_keywords(self, *inputs, **keywords):
    return self.net(*inputs)


def of_the_answer(self, *inputs, **keywords):
    return self.net(*inputs, **keywords).sample


def of_an_attribute(self, *inputs, **keywords):
    return self.net.other(*inputs, **keywords)


@pytest.mark.parametrize(
    ("call", "plain"),
    [
        (plain_call, True),
        (torch.no_grad()(plain_call), True),
        (torch.inference_mode()(plain_call), True),
        (torch.autocast("cpu")(plain_call), False),
        (first_alone, False),
        (without_keywords, False),
        (of_the_answer, False),
        (of_an_attribute, False),
    ],
)
def test_code_alone_says_that_a_wrapper_computes_nothing(call, plain):
    for name in ("forward", "__call__"):
        wrapper = type("Wrapper", (nn.Module,), {name: call})()
        wrapper.net = nn.Linear(1, 1)
        assert computes_nothing(wrapper) is plain
        assert passed_on(wrapper) == ("net", wrapper.net)


def test_what_computes_is_no_wrapper(tiny_model):
    network = Computes(tiny_model)
    assert bare(network) is network
    assert said(network, "sigma_max") is None
    assert plain_name(network, "module.model.map_layer0.weight") == "module.model.map_layer0.weight"


def test_a_list_of_one_module_is_no_wrapper():
    network = nn.Module()
    network.blocks = nn.ModuleList([nn.Linear(1, 1)])
    assert plain_name(network, "blocks.0.weight") == "blocks.0.weight"
    assert bare(network) is network
    exported = torch.export.export(nn.Sequential(nn.Linear(1, 1)), (torch.ones(1, 1),)).module()
    assert bare(exported) is exported


def test_the_outermost_wrapper_that_says_something_counts(tiny_model):
    wrapped = PassesOn(PassesOn(tiny_model))
    assert said(wrapped, "sigma_max") == 80.0
    wrapped.module.sigma_max = 50.0
    assert said(wrapped, "sigma_max") == 50.0
    assert said(wrapped, "no_such_thing", 7) == 7


def test_a_partial_keeps_what_it_gives(tiny_conditional):
    labels = nn.functional.one_hot(torch.tensor([3, 3]), 10).float()
    given = functools.partial(tiny_conditional, class_labels=labels)
    assert bound(given) == bound(as_module(given)) == {"class_labels"}
    sampler = amed_engine.Sampler(given, solver="euler", nfe=3)
    assert sampler.model.label_dim == 0
    expected = amed_engine.Sampler(tiny_conditional, solver="euler", nfe=3).run([1, 2], class_labels=3).images
    torch.testing.assert_close(sampler.run([1, 2]).images, expected)


# ---- who may write


def test_only_networks_of_this_package_are_known_never_to_write(tiny_model):
    class Own(type(tiny_model)):
        pass

    assert never_writes(tiny_model)
    assert not never_writes(PassesOn(tiny_model))
    assert not never_writes(nn.Sequential(nn.ReLU(inplace=True)))
    assert not never_writes(lambda x, sigma: x)
    changed = copy.deepcopy(tiny_model)
    changed.__class__ = Own
    assert not never_writes(changed)
    changed = copy.deepcopy(tiny_model)
    changed.extra = PassesOn(nn.ReLU(inplace=True))
    assert not never_writes(changed)


# ---- where it runs


class Hook:
    """As accelerate's: it says where the module runs."""

    def __init__(self, device, weights=None):
        self.execution_device, self.weights_map = device, weights


def offloaded(device, sequence=False):
    network = nn.Sequential(nn.Conv2d(3, 3, 1))
    weights = {name: tensor.detach().clone() for name, tensor in network[0].named_parameters()}
    network.to("meta")
    hook = Hook(device, weights)
    network[0]._hf_hook = SimpleNamespace(hooks=[Hook(None), hook]) if sequence else hook
    return network, weights


@pytest.mark.parametrize("sequence", [False, True])
def test_hooks_say_where_an_offloaded_network_runs(sequence):
    assert device_of(offloaded("cpu", sequence)[0]) == torch.device("cpu")
    assert device_of(offloaded(1, sequence)[0]) == torch.device("cuda:1")
    assert device_of(offloaded(torch.device("cuda:0"), sequence)[0]) == torch.device("cuda:0")
    assert brings_weights(offloaded("cpu", sequence)[0])


def test_group_offloading_says_where_the_network_runs():
    network = nn.Conv2d(3, 3, 1)
    hook = SimpleNamespace(config=SimpleNamespace(onload_device=torch.device("cuda:0")))
    network._diffusers_hook = SimpleNamespace(get_hook={"group_offloading": hook}.get)
    assert device_of(network) == torch.device("cuda:0")
    assert brings_weights(network)


def test_weights_without_a_place_are_asked_for_on_the_cpu():
    network = nn.Conv2d(3, 3, 1).to("meta")
    assert device_of(network) == torch.device("cpu")
    network.register_buffer("resident", torch.zeros(1))
    assert device_of(network) == torch.device("cpu")
    assert device_of(lambda x, t: x) == torch.device("cpu")
    assert not brings_weights(nn.Conv2d(3, 3, 1))


def test_an_offloaded_network_is_known_by_what_its_hooks_keep():
    network, weights = offloaded("cpu")
    whole = nn.Sequential(nn.Conv2d(3, 3, 1))
    whole[0].load_state_dict(weights)
    assert fingerprint(network) == fingerprint(whole)
    del network[0]._hf_hook
    assert fingerprint(network) is None


# ---- what it computes in


def parameters(*kinds):
    module = nn.Module()
    for k, (size, dtype) in enumerate(kinds):
        tensor = torch.zeros(size, dtype=torch.float32).to(dtype)
        setattr(module, f"p{k}", nn.Parameter(tensor, requires_grad=False))
    return module


def test_most_of_the_numbers_say_the_dtype():
    assert dtypes_of(parameters((1, torch.float32), (5, torch.bfloat16))) == [torch.bfloat16, torch.float32]
    assert dtype_of(parameters((9, torch.int8), (1, torch.float16))) == torch.float16
    assert dtype_of(parameters((9, torch.float8_e4m3fn), (1, torch.bfloat16))) == torch.bfloat16
    assert dtype_of(parameters((9, torch.int8))) is None
    assert dtype_of(nn.Module()) is None
    assert dtype_of(lambda x, t: x) is None


def test_scales_in_buffers_say_it_where_all_parameters_are_storage():
    module = parameters((9, torch.int8))
    module.register_buffer("scale", torch.ones(3, dtype=torch.bfloat16))
    assert dtype_of(module) == torch.bfloat16
    # The tables of this package are float64 whatever the network is.
    assert dtype_of(amed_engine.wrap(lambda x, t: x, "epsilon", shape=(1, 8, 8))) is None


def test_layerwise_casting_says_what_it_casts_to():
    module = parameters((9, torch.float8_e4m3fn), (3, torch.float32))
    hook = SimpleNamespace(compute_dtype=torch.bfloat16)
    module._diffusers_hook = SimpleNamespace(get_hook={"layerwise_casting": hook}.get)
    assert dtypes_of(module) == [torch.bfloat16]
    assert brings_weights(module)


# ---- modes


def test_every_part_is_left_in_the_mode_it_was_in():
    network = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Dropout(), nn.Sequential(nn.Dropout()))
    network.train()
    network[1].eval()
    with modes_kept(network):
        assert not any(part.training for part in network.modules())
    assert [part.training for part in network.modules()] == [True, True, False, True, True]
