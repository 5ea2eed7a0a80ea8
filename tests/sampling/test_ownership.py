"""The caller's tensors are the caller's: what networks, predictors and callbacks write to, and answer in, changes no result."""

import functools

import pytest
import torch
from torch import nn

import amed_engine
from amed_engine import AMEDPredictor, Sampler, make_schedule, make_solver, sample
from amed_engine.evaluation.comparison import compare
from amed_engine.evaluation.metrics import read_features
from amed_engine.integrations.k_diffusion import sample_amed
from amed_engine.integrations.physicsnemo import AMEDSolver
from amed_engine.solvers.stage import Midpoint

SHAPE = (2, 4, 4)
SOLVERS = {
    "euler": {},
    "heun": {},
    "dpm": {},
    "ipndm": {},
    "deis": {},
    "dpmpp": {"thresholding": False},
    "unipc": {"thresholding": False},
}
FIT = {"nfe": 3, "samples": 16, "batch": 8, "starts": 1, "early": 1, "late": 1, "progress": False}
DISTILL = {"nfe": 4, "total_kimg": 0.032, "batch": 8, "progress": False}


def clean(x, sigma, *labels):
    s = sigma.reshape(-1, 1, 1, 1)
    shift = 0.1 * labels[0].sum(1).reshape(-1, 1, 1, 1) if labels else 0
    return x.tanh() * 0.3 / (1 + s) + x / (1 + s**2) + shift


class Writes:
    """Answers in one buffer, and leaves nothing of what it is given."""

    def __init__(self, answer=clean):
        self.answer, self.buffer = answer, None

    def __call__(self, x, *told):
        answer = self.answer(x, *told)
        for tensor in (x, *told):
            tensor.zero_()
        if self.buffer is None or self.buffer.shape != answer.shape or self.buffer.dtype != answer.dtype:
            self.buffer = torch.empty_like(answer)
        return self.buffer.copy_(answer)


def noise(batch=2, dtype=torch.float32):
    return torch.randn(batch, *SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)


def numbers(predictor):
    return torch.cat([parameter.detach().flatten() for parameter in predictor.parameters()])


def plainly(name, denoiser, **options):
    return Sampler(denoiser, solver=name, solver_options=SOLVERS[name], nfe=6, shape=SHAPE, **options)


# ---- Sampler


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", SOLVERS)
def test_a_denoiser_that_writes_and_answers_in_one_buffer(name, dtype):
    z = noise(dtype=dtype)
    got = plainly(name, Writes(), dtype=dtype).run(z).images
    assert torch.equal(got, plainly(name, clean, dtype=dtype).run(z).images)
    assert torch.equal(z, noise(dtype=dtype))


@pytest.mark.parametrize("guidance", [None, 2.0])
def test_labels_are_written_to_by_nobody(guidance):
    labels = torch.rand(2, 3)
    given = labels.clone()
    runs = (plainly("unipc", network, label_dim=3).run(noise(), given, guidance) for network in (Writes(), clean))
    got, expected = runs
    assert torch.equal(got.images, expected.images)
    assert torch.equal(given, labels)
    given.zero_()
    assert torch.equal(got.labels, labels)


@pytest.mark.parametrize(
    "answer",
    [
        lambda x, sigma: x,
        lambda x, sigma: x.view_as(x),
        lambda x, sigma: x.mean((2, 3), keepdim=True).expand_as(x),
        lambda x, sigma: clean(x, sigma).to(memory_format=torch.channels_last),
        lambda x, sigma: clean(x, sigma).mT.contiguous().mT,
    ],
    ids=["its input", "a view of it", "expanded", "channels last", "transposed"],
)
@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp", "unipc"])
def test_answers_that_are_views(name, answer):
    got = plainly(name, answer).run(noise()).images
    expected = plainly(name, lambda x, sigma: answer(x.clone(), sigma).clone().contiguous()).run(noise()).images
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_a_callback_gets_what_it_may_write_to():
    expected, kept = plainly("unipc", clean).run(noise()).images, []

    def callback(step):
        kept.append(step.x)
        step.x.zero_()

    assert torch.equal(plainly("unipc", clean).run(noise(), callback=callback).images, expected)
    assert len({tensor.data_ptr() for tensor in kept}) == len(kept)


# ---- sample


@pytest.mark.parametrize("trajectory", [False, True])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("name", SOLVERS)
def test_sample_with_such_a_denoiser(name, zero, trajectory):
    x, levels, denoiser = noise() * 80, make_schedule("polynomial", 5, 0.002, 80.0), Writes()
    given, told = x.clone(), levels.clone()
    options = {"denoise_to_zero": zero, "trajectory": trajectory}
    got = sample(denoiser, given, told, make_solver(name, **SOLVERS[name]), **options)
    assert torch.equal(got, sample(clean, x, levels, make_solver(name, **SOLVERS[name]), **options))
    assert torch.equal(given, x)
    assert torch.equal(told, levels)
    kept = got.clone()
    denoiser(noise(), torch.ones(2))
    assert torch.equal(got, kept)


@pytest.mark.parametrize("batch", [1, 2])
def test_sample_with_a_predictor_that_writes(batch):
    def predictor(features, sigma, sigma_next):
        sigma.zero_()
        sigma_next.zero_()
        return Midpoint(torch.full_like(sigma, 0.5))

    x, levels = noise(batch, torch.float64) * 80, make_schedule("polynomial", 5, 0.002, 80.0)
    expected = sample(clean, x, levels, make_solver("amed"), [Midpoint(0.5)] * 4)
    torch.testing.assert_close(sample(clean, x, levels, make_solver("amed"), predictor), expected)


# ---- hosts


def test_k_diffusion_and_its_callbacks():
    def run(denoiser, spoil):
        seen, x, levels = [], noise() * 80, make_schedule("polynomial", 5, 0.002, 80.0)
        given = x.clone()

        def callback(step):
            seen.append(step["denoised"].clone())
            if spoil:
                step["x"].zero_()
                step["denoised"].zero_()

        images = sample_amed(denoiser, given, levels, predictor=[Midpoint(0.5)] * 4, callback=callback, disable=True)
        assert torch.equal(given, x)
        return torch.stack([*seen, images])

    assert torch.equal(run(Writes(), spoil=True), run(clean, spoil=False))


def test_what_k_diffusion_tells_its_model_besides():
    def told(x, sigma, shift):
        answer = clean(x, sigma) + shift
        shift.add_(1)
        return answer

    x, levels, shift = noise() * 80, make_schedule("polynomial", 5, 0.002, 80.0), torch.full((1,), 0.1)
    options = {"predictor": [Midpoint(0.5)] * 4, "disable": True}
    got = sample_amed(told, x, levels, extra_args={"shift": shift}, **options)
    assert torch.equal(got, sample_amed(lambda x, sigma: clean(x, sigma) + 0.1, x, levels, **options))
    assert torch.equal(shift, torch.full((1,), 0.1))


@pytest.mark.parametrize("scales", ["bounded", "wide"])
@pytest.mark.parametrize("host", ["sample", "k-diffusion", "physicsnemo"])
def test_a_callers_autocast_is_not_for_predictors(host, scales):
    """What answers here computes nothing that autocast would round."""
    torch.manual_seed(0)
    predictor = AMEDPredictor(0.01, 0.01, bottleneck=(4, 4), scales=scales)
    x, levels = 80 * noise(), make_schedule("polynomial", 4, 0.002, 80.0)
    hosts = {
        "sample": lambda: sample(lambda x, sigma: (clean(x, sigma), x), x, levels, make_solver("amed"), predictor),
        "k-diffusion": lambda: sample_amed(
            lambda x, sigma: (clean(x, sigma), x), x, levels, predictor=predictor, disable=True
        ),
        "physicsnemo": lambda: AMEDSolver(
            lambda x, t: (x - clean(x, t)) / t.reshape(-1, 1, 1, 1), predictor, lambda: noise()
        ).step(x, torch.full((2,), 80.0), torch.full((2,), 5.0)),
    }
    expected = hosts[host]()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(hosts[host](), expected)


@pytest.mark.parametrize("place", ["keyword", "dictionary", "list", "argument"])
def test_what_a_partial_gives_is_written_to_by_nobody(place):
    def told(x, sigma, given=None):
        shift = {"dictionary": lambda: given["shift"], "list": lambda: given[0]}.get(place, lambda: given)()
        answer = clean(x, sigma) + shift
        shift.add_(1)
        return answer

    shift = torch.full((1,), 0.1)
    given = {"dictionary": {"shift": shift}, "list": [shift]}.get(place, shift)
    bound = (
        functools.partial(lambda given, x, sigma: told(x, sigma, given), given)
        if place == "argument"
        else functools.partial(told, given=given)
    )
    levels = make_schedule("polynomial", 5, 0.002, 80.0)
    expected = plainly("ipndm", lambda x, sigma: clean(x, sigma) + 0.1).run(noise()).images
    assert torch.equal(plainly("ipndm", bound).run(noise()).images, expected)
    sample(bound, noise() * 80, levels, make_solver("ipndm"))
    assert torch.equal(shift, torch.full((1,), 0.1))


def test_a_right_hand_side_of_physicsnemo():
    def slope(x, t):
        return (x - clean(x, t)) / t.reshape(-1, 1, 1, 1)

    levels = torch.tensor([80.0, 80.0]), torch.tensor([5.0, 0.0])
    got, expected = (AMEDSolver(side, Midpoint(0.5)).step(noise() * 80, *levels) for side in (Writes(slope), slope))
    torch.testing.assert_close(got, expected)


# ---- training


def test_fit_and_search_with_such_a_denoiser():
    for variant in ("nonstationary", "epd"):
        got, expected = (amed_engine.fit(d, shape=SHAPE, variant=variant, **FIT) for d in (Writes(), clean))
        assert torch.equal(numbers(got), numbers(expected))
    options = {"shape": SHAPE, "nfe": 4, "samples": 8, "grid": 12, "progress": False}
    got, expected = (amed_engine.search_schedule(d, **options) for d in (Writes(), clean))
    assert torch.equal(got, expected)


def test_denoisers_with_their_conditions_bound():
    got, expected = (amed_engine.fit(clean, shape=SHAPE, conditions=[d], **FIT) for d in (Writes(), clean))
    assert torch.equal(numbers(got), numbers(expected))


class Labelled(nn.Module):
    label_dim, sample_shape = 3, SHAPE

    def forward(self, x, sigma, labels):
        return clean(x, sigma, labels)


@pytest.mark.parametrize(
    "train", [lambda **o: amed_engine.fit(**o, **FIT), lambda **o: amed_engine.distill(**o, **DISTILL)]
)
def test_conditions_that_come_in_one_buffer(train):
    def conditions(one_buffer):
        generator, buffer = torch.Generator().manual_seed(1), torch.empty(8, 3)
        while True:
            rows = torch.rand(8, 3, generator=generator)
            yield buffer.copy_(rows) if one_buffer else rows

    got, expected = (train(model=Labelled(), conditions=conditions(one)) for one in (True, False))
    assert torch.equal(numbers(got), numbers(expected))


@pytest.mark.parametrize("options", [{}, {"solver": "ipndm"}, {"objective": "end_to_end"}], ids=str)
def test_a_loss_that_writes(options):
    def in_place(x, target):
        return x.sub_(target).square_().flatten(1).sum(1)

    def plain(x, target):
        return (x - target).square().flatten(1).sum(1)

    got, expected = (amed_engine.distill(Labelled(), loss=loss, **DISTILL, **options) for loss in (in_place, plain))
    assert torch.equal(numbers(got), numbers(expected))


# ---- metrics


def test_features_of_batches_that_come_in_one_buffer():
    def batches():
        buffer = torch.empty(2, 1, 4, 4)
        for value in (0.0, 0.5, 1.0):
            yield buffer.fill_(value)

    assert read_features(batches(), "pixels")[::2, 0].tolist() == [0.0, 0.5, 1.0]


def test_an_extractor_that_writes():
    images = torch.rand(2, 1, 4, 4)
    given = images.clone()
    assert read_features(given, lambda batch: batch.zero_().flatten(1)).sum() == 0
    assert torch.equal(given, images)


# ---- under inference mode


def inside(work):
    with torch.inference_mode():
        return work()


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.middle_block = nn.Conv2d(2, 2, 1)
        for parameter in self.parameters():
            nn.init.constant_(parameter, 0.1)

    def forward(self, x, t):
        return self.middle_block(x)


def wrapped(network=None):
    return amed_engine.wrap(network or Small(), "epsilon", shape=SHAPE)


def test_training_under_inference_mode_is_training():
    for train, options in ((amed_engine.distill, DISTILL), (amed_engine.fit, FIT)):
        denoiser = wrapped()
        predictor = inside(lambda train=train, denoiser=denoiser, options=options: train(denoiser, **options))
        assert torch.equal(numbers(predictor), numbers(train(denoiser, **options)))
        assert not any(parameter.is_inference() for parameter in predictor.parameters())


def test_a_network_made_under_inference_mode_is_refused_where_gradients_go_through_it():
    network = inside(Small)
    with pytest.raises(amed_engine.ConfigError, match=r"made under torch.inference_mode.* make or load it outside"):
        amed_engine.distill(wrapped(network), **DISTILL)
    assert amed_engine.fit(wrapped(network), **FIT).plan is not None


def test_what_wrap_makes_under_inference_mode_serves_outside():
    network = Small()
    amed_engine.distill(inside(lambda: wrapped(network)), **DISTILL)
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_conditions_made_under_inference_mode():
    rows = inside(lambda: torch.rand(8, 3))
    assert amed_engine.distill(Labelled(), conditions=[rows], **DISTILL).plan is not None


# ---- modes


class Drops(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.drop, self.frozen = nn.Conv2d(2, 2, 1), nn.Dropout(0.5), nn.Dropout(0.5)

    def forward(self, x, t):
        return self.frozen(self.drop(self.scale(x)))


@pytest.mark.parametrize(
    ("work", "options"),
    [
        (amed_engine.fit, FIT),
        (amed_engine.distill, DISTILL),
        (amed_engine.calibrate, {"nfe": 3, "progress": False}),
        (amed_engine.search_schedule, {"nfe": 3, "samples": 8, "grid": 9, "progress": False}),
        (amed_engine.measure_mean, {}),
        (compare, {"samples": 2, "curve_samples": 0, "nfe": 3}),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
@pytest.mark.parametrize("named", [True, False])
def test_a_network_in_training_goes_on_training_after_work_on_it(work, options, named):
    network = Drops().train()
    network.frozen.eval()
    denoiser = amed_engine.wrap(network, "epsilon", shape=SHAPE)
    work(model=denoiser, **options) if named else work(denoiser, **options)
    assert (network.training, network.drop.training, network.frozen.training) == (True, True, False)
