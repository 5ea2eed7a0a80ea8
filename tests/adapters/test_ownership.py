"""What adapters and guidance give to networks is copies, what they hook is let go of, and what is wrapped stays as it was."""

import copy
import functools
import gc
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from amed_engine import ConfigError, Sampler, distill, load, wrap
from amed_engine.adapters import EDM, Adapter, ClassifierFree, ClassifierGuided, Thresholded
from amed_engine.adapters.fingerprint import fingerprint
from amed_engine.engine.model import Model, place
from amed_engine.engine.runner import Runner

DISTILL = {"nfe": 4, "total_kimg": 0.032, "batch": 8, "progress": False}
SHAPE, LABELS = (3, 8, 8), torch.tensor([[0.2, 0.8], [1.0, 0.0]])


class Writes(nn.Module):
    """Zeroes all that it is given, once it knows its answer."""

    def __init__(self, writes=True):
        super().__init__()
        torch.manual_seed(0)
        self.middle_block, self.writes = nn.Conv2d(3, 3, 3, padding=1), writes
        self.time, self.label, self.prompt = nn.Linear(1, 3), nn.Linear(2, 3), nn.Linear(5, 3)
        self.requires_grad_(False)

    def forward(self, x, t, labels=None, prompt=None):
        answer = self.middle_block(x) + self.time(t[:, None] / 1000)[:, :, None, None]
        answer = answer if labels is None else answer + self.label(labels)[:, :, None, None]
        answer = answer if prompt is None else answer + self.prompt(prompt).mean(1)[:, :, None, None]
        for tensor in (x, t, labels, prompt) if self.writes else ():
            if tensor is not None:
                tensor.zero_()
        return answer


class Denoises(Writes):
    """The same as a denoiser, which answers in one buffer."""

    label_dim, sample_shape = 2, SHAPE

    def forward(self, x, sigma, labels=None):
        level = sigma.reshape(-1, 1, 1, 1)
        state = x / (1 + level**2)
        answer = state + 0.1 * super().forward(x, sigma, labels)
        if not self.writes:
            return answer
        if getattr(self, "buffer", answer).shape != answer.shape or not hasattr(self, "buffer"):
            self.buffer = torch.empty_like(answer)
        return self.buffer.copy_(answer)


def labelled(writes):
    return wrap(Writes(writes), "epsilon", shape=SHAPE, label_dim=2)


FORMS = {
    "adapter": lambda writes: labelled(writes),
    "guided by a doubled batch": lambda writes: ClassifierFree(labelled(writes), 2.0),
    "guided by two calls": lambda writes: ClassifierFree(labelled(writes), 2.0, batched=False),
    "thresholded": lambda writes: Thresholded(labelled(writes)),
    "classifier": lambda writes: ClassifierGuided(
        labelled(writes), lambda x, t: x.mean((2, 3)) @ torch.ones(3, 2), 1.0
    ),
    "denoiser": lambda writes: Denoises(writes),
    "denoiser guided by a doubled batch": lambda writes: ClassifierFree(Denoises(writes), 2.0),
    "denoiser guided by two calls": lambda writes: ClassifierFree(Denoises(writes), 2.0, batched=False),
    "denoiser thresholded": lambda writes: Thresholded(Denoises(writes)),
}


@pytest.mark.parametrize("form", FORMS)
def test_networks_may_write_to_what_they_are_given(form):
    def run(writes):
        x, labels = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0)), LABELS.clone()
        given = x.clone()
        options = {"solver_options": {"thresholding": False}, "nfe": 5}
        images = Sampler(FORMS[form](writes), solver="unipc", **options).run(given, labels).images
        assert torch.equal(given, x)
        assert torch.equal(labels, LABELS)
        return images

    assert torch.equal(run(True), run(False))


@pytest.mark.parametrize("form", sorted(set(FORMS) - {"denoiser"}))
def test_a_call_leaves_its_arguments(form):
    arguments = torch.randn(2, *SHAPE), torch.tensor([3.0, 3.0]), LABELS.clone()
    before = [tensor.clone() for tensor in arguments]
    FORMS[form](True)(*arguments)
    assert all(torch.equal(tensor, was) for tensor, was in zip(arguments, before, strict=True))


@pytest.mark.parametrize("batched", [True, False])
def test_conditions_bound_or_given_are_copied(batched):
    def run(writes, **told):
        prompts = {"prompt": torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(1))}
        null = {"prompt": torch.ones(1, 4, 5)}
        bound = wrap(Writes(writes), "epsilon", shape=SHAPE, conditions=prompts, null_conditions=null)
        guided, x = ClassifierFree(bound, 2.0, batched=batched), torch.ones(1, *SHAPE)
        row = prompts["prompt"][:1].clone()
        for _ in range(2):
            chosen = guided(x, torch.ones(1), torch.tensor([1])).x0
            given = guided(x, torch.ones(1), prompt=row).x0
        assert torch.equal(row, prompts["prompt"][:1])
        return torch.cat([chosen, given])

    assert torch.equal(run(True), run(False))


# ---- the bottleneck


class InPlace(nn.Module):
    """A layer after the bottleneck that writes to it."""

    def __init__(self, in_place):
        super().__init__()
        torch.manual_seed(0)
        self.middle_block, self.activation = nn.Conv2d(3, 3, 1), nn.Sigmoid()
        self.in_place, self.last = in_place, nn.Conv2d(3, 3, 1)

    def forward(self, x, t):
        h = self.middle_block(x)
        return self.last(h.sigmoid_() if self.in_place else self.activation(h))


def test_the_bottleneck_is_what_the_module_gave():
    networks = [wrap(InPlace(in_place), "epsilon", shape=SHAPE) for in_place in (True, False)]
    x, sigma = torch.randn(2, *SHAPE), torch.ones(2)
    for got, expected in zip(*(network(x, sigma) for network in networks), strict=True):
        assert torch.equal(got, expected)
    trained = [distill(network, **DISTILL).state_dict() for network in networks]
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


def hooks(network):
    return network.middle_block._forward_hooks


def test_hooks_go_with_their_readers():
    network, inputs = Writes(False), (torch.randn(2, *SHAPE), torch.ones(2))
    for _ in range(20):
        wrap(network, "epsilon", shape=SHAPE)(*inputs)
    gc.collect()
    assert not hooks(network)
    readers = [wrap(network, "epsilon", shape=SHAPE) for _ in range(3)]
    expected = readers[0](*inputs).features
    assert all(torch.equal(reader(*inputs).features, expected) for reader in readers)
    del readers[:2]
    gc.collect()
    assert len(hooks(network)) == 1
    assert torch.equal(readers[0](*inputs).features, expected)


COPIES = {"deepcopy": copy.deepcopy, "copy": copy.copy, "pickle": lambda reader: pickle.loads(pickle.dumps(reader))}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_reads_for_itself(how):
    reader, inputs = wrap(Writes(False), "epsilon", shape=SHAPE), (torch.randn(2, *SHAPE), torch.ones(2))
    expected, made = reader(*inputs).features, COPIES[how](reader)
    network = made.network
    assert torch.equal(made(*inputs).features, expected)
    assert torch.equal(reader(*inputs).features, expected)
    del reader
    gc.collect()
    assert torch.equal(made(*inputs).features, expected)
    del made
    gc.collect()
    assert not hooks(network)


def test_a_copied_network_carries_no_reader_along():
    network = Writes(False)
    reader = wrap(network, "epsilon", shape=SHAPE)
    other = copy.deepcopy(network)
    del reader
    again = wrap(other, "epsilon", shape=SHAPE)
    assert len(hooks(other)) == 1
    assert again(torch.randn(2, *SHAPE), torch.ones(2)).features is not None


def test_no_activation_is_kept_from_other_calls():
    network = Writes(False)
    reader = wrap(network, "epsilon", shape=SHAPE)
    network(torch.randn(2, *SHAPE), torch.ones(2))
    with pytest.raises(RuntimeError):
        reader.network(torch.randn(2, *SHAPE), torch.ones(2), torch.ones(2, 7))
    assert reader._tap.take() is None


# ---- what is wrapped


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "AveragedModel": torch.optim.swa_utils.AveragedModel,
    "twice": lambda network: nn.DataParallel(nn.DataParallel(network)),
    "forward": lambda network: network.forward,
    "partial": functools.partial,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_networks_of_diffusers_are_known(wrapper):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    network = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, num_class_embeds=5, **blocks
    )
    plain, inner, outer = (
        wrap(network, "v"),
        wrap(WRAPPERS[wrapper](network), "v"),
        WRAPPERS[wrapper](wrap(network, "v")),
    )
    expected = Sampler(plain, solver="euler", nfe=3).run([1, 2], class_labels=[0, 4])
    for form in (inner, outer):
        got = Sampler(form, solver="euler", nfe=3).run([1, 2], class_labels=[0, 4])
        torch.testing.assert_close(got.images, expected.images)
        assert fingerprint(form) == fingerprint(plain)
    assert inner.bottleneck == "mid_block"
    assert inner.notes["network"] == "UNet2DModel"


def test_guidance_goes_round_wrapped_adapters():
    inner, outer = ClassifierFree(labelled(False), 2.0), ClassifierFree(nn.DataParallel(labelled(False)), 2.0)
    arguments = torch.randn(2, *SHAPE), torch.ones(2), LABELS
    assert torch.equal(outer(*arguments).x0, inner(*arguments).x0)
    assert (outer.sample_shape, outer.label_dim) == (SHAPE, 2)
    with pytest.raises(ConfigError, match="this is what wrap returns already"):
        wrap(nn.DataParallel(labelled(False)), "epsilon")


def test_a_partial_is_another_network_for_each_of_its_keywords():
    def prompted(value):
        return wrap(functools.partial(Writes(False), prompt=torch.full((1, 4, 5), value)), "epsilon", shape=SHAPE)

    assert fingerprint(prompted(1.0)) == fingerprint(prompted(1.0)) != fingerprint(prompted(2.0))
    assert not torch.equal(*(prompted(value)(torch.ones(1, *SHAPE), torch.ones(1)).x0 for value in (1.0, 2.0)))


@pytest.mark.parametrize("kind", [dict, list, tuple, "numpy"])
def test_arrays_in_a_keyword_of_a_partial_count(kind):
    def given(value):
        long = torch.zeros(3000)  # of which a printed form shows the ends alone
        long[1500] = value
        told = long.numpy() if kind == "numpy" else kind([("name", long)])
        return wrap(functools.partial(Writes(False), prompt=told), "epsilon", shape=SHAPE)

    assert fingerprint(given(1.0)) == fingerprint(given(1.0)) != fingerprint(given(2.0))


def test_a_partial_lends_what_its_keywords_hold():
    class Told(Writes):
        def forward(self, x, t, added):
            answer = super().forward(x, t) + added["shift"]
            added["shift"].add_(1)
            return answer

    shift = torch.zeros(1)
    denoiser = wrap(functools.partial(Told(), added={"shift": shift}), "epsilon", shape=SHAPE)
    answers = [denoiser(torch.ones(1, *SHAPE), torch.ones(1)).x0 for _ in range(2)]
    assert torch.equal(*answers)
    assert shift == 0


def buffered(network):
    """Answers in one buffer, by a hook."""
    kept = []

    def hook(module, inputs, answer):
        kept[:] = kept or [torch.empty_like(answer.x0)]
        return answer._replace(x0=kept[0].copy_(answer.x0))

    network.register_forward_hook(hook)


def replaced(network):
    """Zeroes its input, by a forward of the caller's own."""
    own = network.forward

    def forward(x, *told):
        answer = own(x, *told)
        x.zero_()
        return answer

    network.forward = forward


@pytest.mark.parametrize("alter", [buffered, replaced])
def test_a_model_of_ours_that_a_caller_altered_is_anothers(alter):
    options = {"solver": "unipc", "solver_options": {"thresholding": False}, "nfe": 5}
    altered, x = load("digits"), torch.randn(2, 1, 8, 8)
    alter(altered)
    images = [Sampler(model, **options).run(x, class_labels=3).images for model in (altered, load("digits"))]
    assert torch.equal(*images)


def test_a_look_at_a_network_leaves_its_modes():
    network = Writes(False).train()
    network.label.eval()
    wrap(network, "v", shape=SHAPE)
    assert [part.training for part in network.modules()] == [True, True, True, False, True]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_frozen_torchscript_has_no_mode():
    network, inputs = Writes(False).eval(), (torch.randn(2, *SHAPE), torch.ones(2))
    frozen = torch.jit.freeze(torch.jit.trace(network, inputs))
    samplers = [Sampler(wrap(each, "v", shape=SHAPE), solver="euler", nfe=3) for each in (frozen, network)]
    torch.testing.assert_close(*(sampler.run([1]).images for sampler in samplers))


def test_a_family_stays_where_it_is():
    family = EDM(sigma_data=1.0)
    denoiser = wrap(Writes(False), family, shape=SHAPE)
    assert denoiser.family is not family
    assert denoiser.family.settings() == family.settings()


# ---- weights that hooks bring


class Brought(Writes):
    """Weights on meta between calls, as accelerate leaves them."""

    def __init__(self):
        super().__init__(writes=False)
        kept = {name: tensor.detach().clone() for name, tensor in self.named_parameters()}
        self.to("meta")
        self._hf_hook = SimpleNamespace(execution_device="cpu", weights_map=kept)

    def forward(self, x, t):
        return torch.func.functional_call(Writes(writes=False), self._hf_hook.weights_map, (x, t))


@pytest.mark.parametrize("device", [None, "cpu"])
def test_offloaded_networks_run(device):
    denoiser = wrap(Brought(), "v", shape=SHAPE, bottleneck=None)
    expected = wrap(Writes(writes=False), "v", shape=SHAPE, bottleneck=None)
    got, want = (Sampler(d, solver="euler", nfe=3, device=device).run([1]).images for d in (denoiser, expected))
    assert torch.equal(got, want)


def test_offloaded_weights_are_not_moved():
    model = Model(wrap(Brought(), "epsilon", shape=SHAPE, bottleneck=None), SHAPE, 0, 0.002, 80.0)
    with pytest.raises(ConfigError, match=r"device 'meta' was asked for, but hooks bring the model's weights to 'cpu'"):
        place(model, "meta")
    assert place(model, "cpu") == place(model, None) == torch.device("cpu")
    assert all(parameter.device.type == "meta" for parameter in model.network.network.parameters())


def test_what_is_put_round_offloaded_weights_goes_where_they_run():
    denoiser = wrap(Brought(), "epsilon", shape=SHAPE, bottleneck=None)
    denoiser.network._hf_hook.execution_device = "meta"
    assert place(Model(denoiser, SHAPE, 0, 0.002, 80.0), None) == torch.device("meta")
    assert {buffer.device.type for buffer in denoiser.family.buffers()} == {"meta"}


@pytest.mark.parametrize("raw", [True, False])
def test_weights_that_nothing_brings_are_refused(raw):
    """A convolution of torch takes weights on meta, and answers with what is in memory."""
    network = Writes(writes=False).to("meta")
    model = wrap(network, "epsilon", shape=SHAPE) if raw else Denoises(writes=False).to("meta")
    sampler = Sampler(model, solver="euler", nfe=3, shape=SHAPE)
    with pytest.raises(ConfigError, match=r"the weights of (Conv2d|Linear) are on 'meta', .*load them, or offload"):
        sampler.run(1)
    assert not any(part._forward_pre_hooks for part in network.modules())


class BroughtByItself(Brought):
    """Without a hook that says so."""

    def __init__(self):
        super().__init__()
        self.kept = self._hf_hook.weights_map
        del self._hf_hook

    def forward(self, x, t):
        return torch.func.functional_call(Writes(writes=False), self.kept, (x, t))


def test_weights_that_a_network_brings_itself_are_its_own_affair():
    denoisers = [
        wrap(network, "epsilon", shape=SHAPE, bottleneck=None) for network in (BroughtByItself(), Writes(False))
    ]
    got, expected = (Sampler(denoiser, solver="euler", nfe=3).run([1]).images for denoiser in denoisers)
    assert torch.equal(got, expected)


class Lazy(nn.Module):
    """Its weights are made by its first call."""

    def __init__(self):
        super().__init__()
        self.middle_block = nn.LazyConv2d(3, 3, padding=1)

    def forward(self, x, t):
        return self.middle_block(x)


def test_weights_that_the_first_call_makes():
    torch.manual_seed(0)
    denoiser = wrap(Lazy(), "epsilon", shape=SHAPE)
    assert fingerprint(denoiser) is None
    images = Sampler(denoiser, solver="euler", nfe=3).run([1]).images
    assert torch.equal(images, Sampler(denoiser, solver="euler", nfe=3).run([1]).images)
    assert fingerprint(denoiser) is not None
    assert distill(wrap(Lazy(), "epsilon", shape=SHAPE), **DISTILL).plan.model is None


class Drops(Writes):
    """Drops half of its answer, and counts statistics, while it trains."""

    def __init__(self):
        super().__init__(writes=False)
        self.dropout, self.norm = nn.Dropout(0.5), nn.BatchNorm2d(3)

    def forward(self, x, t):
        return self.norm(self.dropout(super().forward(x, t)))


@pytest.mark.parametrize("how", ["network", "a part"])
def test_a_network_that_trains_on_is_sampled_as_it_is_evaluated(how):
    network, x = Drops(), torch.randn(2, *SHAPE)
    sampler = Sampler(wrap(network, "epsilon", shape=SHAPE), solver="euler", nfe=3)
    expected = sampler.run(x).images
    (network if how == "network" else network.dropout).train()
    modes = [part.training for part in network.modules()]
    before = copy.deepcopy(network.state_dict())
    assert torch.equal(sampler.run(x).images, expected)
    assert [part.training for part in network.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_weights_that_come_and_go_are_not_captured():
    model = Model(wrap(Brought(), "epsilon", shape=SHAPE, bottleneck=None), SHAPE, 0, 0.002, 80.0)
    with pytest.raises(ConfigError, match="backend='graph' needs weights that stay where they are"):
        Runner(model, torch.device("cuda"), "graph", (1,), check_finite=True)
    assert Runner(model, torch.device("cuda"), "auto", (1,), check_finite=True).cache is None


def test_the_bundled_model_is_asked_without_copies(monkeypatch):
    model, seen = load("digits"), []
    monkeypatch.setattr(model, "forward", lambda x, *told: seen.append(x.data_ptr()) or x / 2)
    x = torch.randn(2, 1, 8, 8)
    Model(model, (1, 8, 8), 10, 0.002, 80.0, foreign=False).denoise(x, torch.ones(2), torch.zeros(2, 10))
    assert seen == [x.data_ptr()]
    assert Sampler(model, nfe=5).model.foreign  # whose forward is another's
    monkeypatch.undo()
    assert not Sampler(model, nfe=5).model.foreign
    assert Sampler(nn.DataParallel(model), nfe=5).model.foreign
    assert not Sampler(labelled(True), nfe=5).model.foreign
    assert isinstance(labelled(True), Adapter)
