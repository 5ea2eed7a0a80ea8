"""What a data set draws from: the same bytes in any batch, and an identity that names what decides them."""

import copy
import hashlib
import json
import shutil

import numpy as np
import onnx_graphs
import pytest
import torch

from amed_engine import (
    AMEDPredictor,
    ConfigError,
    ConstantPredictor,
    NonFiniteError,
    Sampler,
    load_package,
    make_plan,
    wrap,
)
from amed_engine.datasets.sources import open_source
from amed_engine.engine.images import to_uint8


@pytest.fixture
def sampler(tiny_conditional):
    return Sampler(tiny_conditional, nfe=3, solver="euler")


def test_pictures_of_a_sampler_are_stored_as_bytes_with_their_seeds_and_classes(sampler):
    source = open_source(sampler)
    assert (source.shape, source.stored) == ((8, 8, 1), "uint8")
    drawn, expected = source.draw([5, 3, 9], None), sampler.run([5, 3, 9])
    assert drawn.seeds == [5, 3, 9]
    assert drawn.arrays.dtype == np.uint8
    assert drawn.labels.dtype == np.int64
    assert np.array_equal(drawn.arrays, to_uint8(expected.images))
    assert drawn.labels.tolist() == expected.labels.tolist()


def test_a_sample_is_its_seed_whatever_else_is_in_the_batch(sampler):
    source = open_source(sampler)
    ones, others = source.draw([1, 2, 3, 4], None), source.draw([4, 9, 1, 7], None)
    assert np.array_equal(ones.arrays[[0, 3]], others.arrays[[2, 0]])
    assert ones.labels[[0, 3]].tolist() == others.labels[[2, 0]].tolist()


def test_a_solver_that_adds_noise_draws_it_from_the_seed(tiny_model):
    source = open_source(Sampler(tiny_model, solver="consistency", nfe=3), stored="float32")
    ones, others = source.draw([1, 2, 3], None), source.draw([3, 8, 1], None)
    assert np.array_equal(ones.arrays[[0, 2]], others.arrays[[2, 0]])


@pytest.mark.parametrize("count", [1, 3, 7, 16])
def test_a_sample_has_the_same_bits_in_every_batch_of_a_size(tiny_model, count):
    source = open_source(Sampler(tiny_model, nfe=3), stored="float32")
    seeds = list(range(40, 40 + count))
    expected = source.draw(seeds, None).arrays
    shuffled = np.random.default_rng(0).permutation(count)
    assert np.array_equal(source.draw([seeds[i] for i in shuffled], None).arrays, expected[shuffled])
    alike = [seeds[-1] + count * i for i in reversed(range(count))]  # one remainder
    assert np.array_equal(source.draw(alike, None).arrays[-1], expected[-1])
    assert np.array_equal(source.draw([seeds[0]] * count, None).arrays, expected[[0] * count])


def test_consecutive_seeds_are_one_run(tiny_model):
    sizes = []

    def counted(x, sigma):
        sizes.append(len(x))
        return tiny_model(x, sigma)

    source = open_source(Sampler(counted, shape=(1, 8, 8), nfe=1, solver="euler", sigma_max=80.0, verify=False))
    source.draw(range(5, 12), None)
    source.draw([5, 6, 6, 6], None)  # what is asked for twice
    assert sizes == [7, 4]


def test_a_batch_is_padded_to_the_size_that_is_asked_for(tiny_model):
    source = open_source(Sampler(tiny_model, nfe=3), stored="float32")
    expected = source.draw(range(30, 37), None).arrays
    assert np.array_equal(source.draw([32, 36], None, 7).arrays, expected[[2, 6]])


def test_a_seed_drawn_with_two_classes_is_two_samples(sampler):
    source = open_source(sampler, stored="float32")
    drawn = source.draw([4, 4, 4], np.array([1, 2, 1]))
    assert drawn.labels.tolist() == [1, 2, 1]
    assert np.array_equal(drawn.arrays[0], drawn.arrays[2])
    assert not np.array_equal(drawn.arrays[0], drawn.arrays[1])


@pytest.mark.parametrize("stored", ["float32", "float16"])
def test_samples_are_stored_in_floating_point_channels_first(sampler, stored):
    source = open_source(sampler, stored=stored)
    drawn = source.draw([0, 1], None).arrays
    assert source.shape == (1, 8, 8)
    assert drawn.dtype == stored
    assert np.array_equal(drawn, sampler.run([0, 1]).images.numpy().astype(stored))


def test_what_is_no_picture_is_stored_in_float32(gaussian_denoiser):
    source = open_source(Sampler(gaussian_denoiser, shape=(4, 2, 2), sigma_max=80.0))
    assert (source.shape, source.stored) == ((4, 2, 2), "float32")
    assert source.draw([0], None).arrays.shape == (1, 4, 2, 2)
    with pytest.raises(ConfigError, match="'float32'"):
        open_source(Sampler(gaussian_denoiser, shape=(4, 2, 2)), stored="uint8")


def test_latents_that_would_be_cut_as_pictures_are_told(caplog):
    wide = Sampler(
        lambda x, sigma: 3 * x / (1 + sigma.reshape(-1, 1, 1, 1)), shape=(3, 4, 4), sigma_max=80.0, verify=False
    )
    source = open_source(wide)
    source.draw([0], None)
    source.draw([1], None)
    assert caplog.text.count("if these samples are latents") == 1


def test_a_model_with_noise_of_its_own_is_refused():
    noisy = Sampler(lambda x, sigma: x / 2 + torch.randn_like(x), shape=(1, 4, 4), sigma_max=80.0, verify=False)
    before = torch.get_rng_state()
    with pytest.raises(ConfigError, match="the model draws from torch's global generator"):
        open_source(noisy).draw([0], None)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("stored", ["png", "float64", True, np.uint8])
def test_another_way_to_store_is_refused(sampler, stored):
    with pytest.raises(ConfigError, match="stored must be one of uint8, float32, float16"):
        open_source(sampler, stored=stored)


# ---- labels ----


def test_classes_reach_the_network_and_travel(sampler):
    source = open_source(sampler)
    labels = source.check_labels([3, 1, 4], 3)
    drawn = source.draw([0, 1, 2], labels)
    assert labels.dtype == np.int64
    assert drawn.labels.tolist() == [3, 1, 4]
    assert np.array_equal(drawn.arrays, to_uint8(sampler.run([0, 1, 2], [3, 1, 4]).images))


def test_one_class_for_ten_million_seeds_takes_no_memory(sampler):
    labels = open_source(sampler).check_labels(7, 10_000_000)
    assert labels.shape == (10_000_000,)
    assert labels.strides == (0,)
    assert labels[-1] == 7


def test_labels_are_copied(sampler):
    own = np.array([3, 1, 4], np.uint16)
    labels = open_source(sampler).check_labels(own, 3)
    own[:] = 0
    assert labels.tolist() == [3, 1, 4]


def test_rows_of_labels_are_float32(sampler):
    source = open_source(sampler)
    rows = np.eye(10)[[2, 5]]
    labels = source.check_labels(rows, 2)
    assert labels.dtype == np.float32
    drawn = source.draw([0, 1], labels)
    assert np.array_equal(drawn.arrays, source.draw([0, 1], np.array([2, 5])).arrays)
    assert np.array_equal(drawn.labels, rows)


@pytest.mark.parametrize(
    "labels",
    [
        *([1, 2], [1, 2, 10], [1, 2, -1], [True, False, True], ["a", "b", "c"], [1, None, 2], [[1], [2, 3], [4]]),
        *(np.full((3, 10), np.nan), np.full((3, 10), 1e300), [1.0, 2.0, 3.0], "cat", object()),
    ],
)
def test_labels_that_the_model_has_not_are_refused_before_anything_is_drawn(sampler, labels):
    with pytest.raises(ConfigError, match="labels"):
        open_source(sampler).check_labels(labels, 3)


def test_a_model_without_classes_takes_no_labels(tiny_model):
    source = open_source(Sampler(tiny_model))
    assert source.check_labels(None, 5) is None
    assert source.draw([0], None).labels is None
    with pytest.raises(ConfigError, match="unconditional"):
        source.check_labels([1], 1)


def numbered(x, sigma, labels):
    return x / (1 + sigma.reshape(-1, 1, 1, 1)) + labels.reshape(-1, 1, 1, 1) / 10


def test_numbers_are_told_to_a_model_of_one(tiny_model):
    source = open_source(Sampler(numbered, shape=(1, 4, 4), label_dim=1, sigma_max=80.0), stored="float32")
    with pytest.raises(ConfigError, match="labels are missing"):
        source.check_labels(None, 2)
    labels = source.check_labels([0.25, -1.5], 2)
    assert labels.shape == (2, 1)
    assert labels.dtype == np.float32
    drawn = source.draw([0, 1], labels)
    assert np.array_equal(drawn.labels, labels)
    assert not np.array_equal(drawn.arrays, source.draw([0, 1], -labels).arrays)
    assert source.check_labels(0.5, 3).tolist() == [[0.5]] * 3


# ---- what cannot be stored ----


def positive(seeds):
    """Those whose noise of 16 numbers has a positive mean."""
    noise = (torch.randn(16, generator=torch.Generator().manual_seed(seed)) for seed in seeds)
    return [seed for seed, z in zip(seeds, noise, strict=True) if z.mean() > 0]


def test_nan_is_named_by_its_seeds_and_never_stored():
    def broken(x, sigma):
        return torch.where(x.flatten(1).mean(1).reshape(-1, 1, 1, 1) > 0, x * torch.nan, x)

    source = open_source(Sampler(broken, shape=(1, 4, 4), nfe=1, solver="euler", sigma_max=80.0, check_finite=False))
    expected = positive(range(6))
    with pytest.raises(NonFiniteError) as caught:
        source.draw(range(6), None)
    assert caught.value.seeds == expected
    assert str(expected) in str(caught.value)


def test_what_float16_cannot_hold_is_named(tiny_model):
    large = Sampler(lambda x, sigma: torch.full_like(x, 1e5), shape=(1, 4, 4), nfe=1, solver="euler", sigma_max=80.0)
    assert open_source(large, stored="float32").draw([4], None).arrays.max() > 65504
    with pytest.raises(NonFiniteError, match="seeds \\[4\\] are too large for float16; store them as 'float32'"):
        open_source(large, stored="float16").draw([4], None)


def test_a_batch_that_is_drawn_in_smaller_pieces_is_refused(tiny_model):
    def short(x, sigma):
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return tiny_model(x, sigma)

    source = open_source(Sampler(short, shape=(1, 8, 8), sigma_max=80.0))
    assert len(source.draw([0, 1], None).seeds) == 2
    with pytest.warns(RuntimeWarning, match="out of memory"), pytest.raises(ConfigError, match="pass a smaller batch"):
        source.draw([0, 1, 2, 3], None)


@pytest.mark.parametrize("shape", [None])
def test_a_model_that_does_not_say_its_shape_is_asked_for_it(gaussian_denoiser, shape):
    with pytest.raises(ConfigError, match="pass shape="):
        open_source(Sampler(gaussian_denoiser, shape=shape))


@pytest.mark.parametrize("source", ["digits", None, torch.nn.Identity(), torch.zeros(1)])
def test_what_is_no_source_is_refused(source):
    with pytest.raises(ConfigError, match="drawn from an amed_engine"):
        open_source(source)


def test_options_of_another_kind_of_source_are_refused(sampler):
    with pytest.raises(ConfigError, match="takes no prompt"):
        open_source(sampler, prompt="a cat")


# ---- the caller's modes of torch ----


def test_the_caller_s_modes_change_nothing(sampler, tiny_conditional):
    source = open_source(sampler)
    expected = source.draw([0, 1], None).arrays
    tiny_conditional.train()
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert np.array_equal(source.draw([0, 1], None).arrays, expected)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert np.array_equal(source.draw([0, 1], None).arrays, expected)
    finally:
        torch.set_default_dtype(torch.float32)
        tiny_conditional.eval()


# ---- identity ----


def identity(*args, guidance_scale=None, stored=None, **options):
    return open_source(Sampler(*args, **options), guidance_scale=guidance_scale, stored=stored).identity


EULER = {"nfe": 3, "solver": "euler"}


def test_the_identity_is_small_json_and_the_same_twice(tiny_conditional):
    own, again = identity(tiny_conditional, **EULER), identity(copy.deepcopy(tiny_conditional), **EULER)
    assert own == again == json.loads(json.dumps(own))
    assert own["kind"] == "sampler"
    assert own["plan"]["solver"] == "euler"
    assert own["fingerprint"]


@pytest.mark.parametrize(
    "change",
    [
        *({"nfe": 4}, {"solver": "ipndm"}, {"sigma_max": 40.0}, {"shape": (1, 16, 16)}, {"dtype": torch.float64}),
        *({"autocast": torch.bfloat16}, {"memory_format": torch.channels_last}, {"compile": "default"}),
        {"guidance_scale": 2.0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_changes_the_bytes_changes_the_identity(tiny_conditional, change):
    assert identity(tiny_conditional, **EULER | change) != identity(tiny_conditional, **EULER)


def test_other_weights_and_their_precision_change_the_identity(tiny_conditional):
    own = identity(tiny_conditional, **EULER)
    assert identity(copy.deepcopy(tiny_conditional).bfloat16(), **EULER) != own
    with torch.no_grad():
        next(tiny_conditional.parameters()).flatten()[0] += 1
    assert identity(tiny_conditional, **EULER) != own


def test_how_torch_multiplies_is_part_of_the_identity(tiny_conditional):
    own = identity(tiny_conditional, **EULER)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert identity(tiny_conditional, **EULER) != own
        torch.set_float32_matmul_precision("highest")
        assert identity(tiny_conditional, **EULER) == own
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_predictor_is_part_of_the_identity(tiny_model):
    plan = make_plan(4, solver="amed")

    def made(r):
        predictor = ConstantPredictor(plan.intervals)
        torch.nn.init.constant_(predictor.r, r)
        predictor.plan = plan
        return identity(tiny_model, predictor)["predictor"]

    assert made(0.4) == made(0.4) != made(0.6)


def test_the_identity_of_a_predictor_names_its_kind_and_its_arguments(tiny_model):
    def made(scales):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            predictor = AMEDPredictor(0.1, 0.05, bottleneck=(4, 4), scales=scales)
        predictor.plan = make_plan(4, solver="amed")
        return identity(tiny_model, predictor)["predictor"]

    assert made("bounded") != made("wide")  # the same tensors


def test_the_identity_holds_the_plan_that_runs_under_guidance(caplog):
    sampler = Sampler("digits", nfe=5)
    plain, guided = open_source(sampler), open_source(sampler, guidance_scale=2.0)
    assert plain.identity["predictor"]
    assert guided.identity["predictor"] is None
    assert plain.identity["plan"]["solver"] == sampler.plan.solver != guided.identity["plan"]["solver"]
    for _ in range(3):
        guided.draw([0], None)
    assert caplog.text.count("not for guidance_scale=2.0") == 1
    assert sampler.run([0], guidance_scale=2.0).plan.to_json()["sigmas"] == guided.identity["plan"]["sigmas"]


def test_guidance_that_cannot_be_is_refused_when_the_source_is_opened(tiny_model):
    with pytest.raises(ConfigError, match="class-conditional"):
        open_source(Sampler(tiny_model), guidance_scale=2.0)


def test_a_mean_answer_is_told_by_its_hash(tiny_model):
    own = identity(tiny_model, nfe=3, afs="mean")
    assert own["plan"]["mean"]["data"].startswith("sha256:")
    assert len(json.dumps(own)) < 4000


def test_conditions_that_are_bound_are_part_of_the_identity():
    class Prompted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(1))

        def forward(self, x, t, text):
            return self.scale * x + text.mean((1, 2)).reshape(-1, 1, 1, 1)

    def source(text):
        given = {"conditions": {"text": text}, "shape": (1, 4, 4), "verify": False}
        return open_source(Sampler(wrap(Prompted(), "flow", **given), nfe=2, solver="euler"))

    one, other = source(torch.zeros(2, 3, 4)), source(torch.ones(2, 3, 4))
    assert one.identity["fingerprint"] == other.identity["fingerprint"]
    assert one.identity != other.identity
    assert one.draw([0, 1], one.check_labels([0, 1], 2)).labels.tolist() == [0, 1]


def test_statistics_that_a_network_saves_are_part_of_the_identity():
    class Normed(torch.nn.Module):
        def __init__(self, mean):
            super().__init__()
            self.norm = torch.nn.BatchNorm2d(1)
            self.norm.running_mean.fill_(mean)

        def forward(self, x, sigma):
            return self.norm(x) / (1 + sigma.reshape(-1, 1, 1, 1))

    options = {"shape": (1, 4, 4), "sigma_max": 80.0}
    assert identity(Normed(0.0), **options) == identity(Normed(0.0), **options) != identity(Normed(1.0), **options)


def test_the_device_names_the_processor(sampler):
    kind, _, name = open_source(sampler).device.partition(": ")
    assert kind == "cpu"
    assert name


# ---- files of whole loops, and of models


class Small(torch.nn.Module):
    """A denoiser of ten classes that is exported in no time."""

    sample_shape, label_dim = (1, 4, 4), 10

    def __init__(self):
        super().__init__()
        self.shift = torch.nn.Parameter(torch.linspace(-1, 1, 10)[:, None])

    def forward(self, x, sigma, labels):
        return x / (1 + sigma.reshape(-1, 1, 1, 1)) + (labels @ self.shift)[..., None, None]


@pytest.fixture(scope="module", params=["exported", "onnx"])
def package(request, tmp_path_factory):
    if request.param == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    path = tmp_path_factory.mktemp("package") / ("loop.onnx" if request.param == "onnx" else "loop.pt2")
    sampler = Sampler(Small(), nfe=1, solver="euler", sigma_max=80.0)
    sampler.export(path, request.param, max_batch=4, verify=False)
    return path, sampler


def test_a_package_draws_what_its_sampler_draws(package):
    path, sampler = package
    source, own = open_source(load_package(path)), open_source(sampler)
    assert (source.shape, source.stored, source.device) == (own.shape, own.stored, own.device)
    labels = source.check_labels([1, 2, 3, 4, 5, 6], 6)
    drawn, expected = source.draw(range(6), labels), own.draw(range(6), labels)
    assert drawn.labels.tolist() == expected.labels.tolist() == [1, 2, 3, 4, 5, 6]
    assert np.abs(drawn.arrays.astype(int) - expected.arrays).max() <= 1
    assert source.draw([3, 5], None, 6).labels.tolist() == own.draw([3, 5], None, 6).labels.tolist()


def test_the_identity_of_a_package_is_of_its_file(package):
    path, sampler = package
    own = open_source(load_package(path)).identity
    assert own == json.loads(json.dumps(open_source(load_package(path)).identity))
    assert own["file"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert own["fingerprint"] == open_source(sampler).identity["fingerprint"]


def test_a_package_whose_file_has_changed_is_to_be_loaded_again(package, tmp_path):
    path = shutil.copy(package[0], tmp_path)
    loaded = load_package(path)
    with open(path, "ab") as file:
        file.write(b" ")
    with pytest.raises(ConfigError, match="has changed since it was loaded"):
        open_source(loaded)


def test_a_package_takes_no_guidance_but_its_own_and_no_classes_it_has_not(package):
    source = open_source(load_package(package[0]))
    with pytest.raises(ConfigError, match="exported with guidance_scale=None"):
        open_source(load_package(package[0]), guidance_scale=2.0)
    with pytest.raises(ConfigError, match="got 10"):
        source.check_labels([10], 1)
    with pytest.raises(ConfigError, match="a package takes no prompt"):
        open_source(load_package(package[0]), prompt="a cat")


def test_nan_of_a_package_is_found(tmp_path):
    def broken(x, sigma):
        return torch.where(x.flatten(1).mean(1).reshape(-1, 1, 1, 1) > 0, x * torch.nan, x)

    path = tmp_path / "loop.pt2"
    Sampler(broken, shape=(1, 4, 4), nfe=1, solver="euler", sigma_max=80.0).export(path, "exported", verify=False)
    with pytest.raises(NonFiniteError) as caught:
        open_source(load_package(path)).draw(range(6), None)
    assert caught.value.seeds == positive(range(6))


def test_the_file_of_an_onnx_model_is_part_of_a_sampler_s_identity(tmp_path):
    inputs = {"x": ("float32", ("B", 1, 4, 4)), "sigma": ("float32", ("B",))}
    one = onnx_graphs.network(tmp_path / "one.onnx", inputs, answer="denoised")
    other = onnx_graphs.network(tmp_path / "other.onnx", inputs, answer="denoised", metadata={"note": "another"})
    options = {"sigma_max": 80.0, "verify": False}
    own = identity(one, **options)
    assert own["files"] == [hashlib.sha256(one.read_bytes()).hexdigest()]
    assert identity(one, **options) == own != identity(other, **options)
