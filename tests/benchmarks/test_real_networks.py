"""The yardstick of networks that are not ours: their architecture, its sweep and its tables, by hand."""

import functools
import io
import json
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import amed_engine
from amed_engine import Sampler, measure_mean
from amed_engine.evaluation.metrics import per_image_rmse
from amed_engine.sampling.denoiser import Denoised, known_first
from amed_engine.sampling.loop import sample
from amed_engine.solvers.plan import make_plan

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SIZE, PATCHES = 8, 4
SPREAD, CENTRE = 0.5, 3.0


@pytest.fixture(autouse=True)
def bench(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import real_networks
    import real_sweep

    monkeypatch.setattr(real_sweep, "FOLDER", tmp_path)
    yield real_networks
    # The modules of benchmarks/ have everyday names; leave none behind.
    for name in ("harness", "flow_digits", "galaxygrad", "real_sweep", "real_tables", "real_networks"):
        sys.modules.pop(name, None)


def arrays(rng):
    """Random leaves of a network of 8 x 8 pixels in the order and the shapes of its file."""
    mlp = [[(512, n), (512,), (n, 512), (n,)] for n in (PATCHES, 64)]
    block = [*mlp[0], *mlp[1], *[(64, PATCHES)] * 2, *[(PATCHES, 64)] * 2]
    shapes = [(64, 2, 4, 4), (64, 1, 1), (1, 64, 4, 4), (1, 1, 1), *block * 4, *[(64, PATCHES)] * 2]
    return [0.2 * rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def by_hand(leaves, y, t):
    """F of one image (8, 8) at t, in NumPy."""
    leaves = iter([leaf.astype(np.float64) for leaf in leaves])
    take = lambda count: [next(leaves) for _ in range(count)]  # noqa: E731
    cut = lambda image: image.reshape(2, 4, 2, 4).transpose(0, 2, 1, 3).reshape(PATCHES, 4, 4)  # noqa: E731
    norm = lambda h, w, b: w * (h - h.mean()) / np.sqrt(h.var() + 1e-5) + b  # noqa: E731
    mlp = lambda h, w1, b1, w2, b2: np.maximum(h @ w1.T + b1, 0) @ w2.T + b2  # noqa: E731
    encode, bias, decode, last = take(4)
    h = np.einsum("ocij,cpij->op", encode, np.stack([cut(y), cut(np.full_like(y, t / 10))])) + bias.reshape(64, 1)
    for _ in range(4):
        patch, hidden, before, after = take(4), take(4), take(2), take(2)
        h = h + mlp(norm(h, *before), *patch)
        h = h + mlp(norm(h.T, *after), *hidden).T
    made = np.einsum("cij,cp->pij", decode[0, :, ::-1, ::-1], norm(h, *take(2))) + last.item()
    return made.reshape(2, 2, 4, 4).transpose(0, 2, 1, 3).reshape(SIZE, SIZE)


def test_the_network_is_what_its_arrays_say_by_hand(bench):
    galaxygrad, rng = bench.galaxygrad, np.random.default_rng(0)
    leaves, y = arrays(rng), rng.standard_normal((2, SIZE, SIZE))
    score = galaxygrad.ScoreNetwork(SIZE)
    galaxygrad.fill(score, iter([*leaves, np.array(10.0)]))
    t = np.array([0.3, 7.0])
    made = score(torch.from_numpy(y[:, None]).float(), torch.from_numpy(t).float())
    expected = np.stack([by_hand(leaves, *each) for each in zip(y, t, strict=True)])
    torch.testing.assert_close(made[:, 0].double(), torch.from_numpy(expected), rtol=1e-4, atol=1e-4)


def test_arrays_that_do_not_fit_are_refused(bench):
    leaves, fill = arrays(np.random.default_rng(0)), bench.galaxygrad.fill
    with pytest.raises(ValueError, match=r"expected an array of shape \(64, 2, 4, 4\)"):
        fill(bench.galaxygrad.ScoreNetwork(SIZE), iter(leaves[1:]))
    with pytest.raises(ValueError, match="after the weights"):
        fill(bench.galaxygrad.ScoreNetwork(SIZE), iter([*leaves, np.zeros(())]))


def test_a_pickle_among_the_arrays_is_refused(bench):
    file = io.BytesIO()
    np.save(file, np.zeros(2))
    np.save(file, np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle"):
        list(bench.galaxygrad.leaves(file.getvalue()))


def test_another_wheel_is_refused(bench, tmp_path):
    (tmp_path / bench.galaxygrad.WHEEL).write_bytes(b"another")
    with pytest.raises(ValueError, match="SHA-256"):
        bench.galaxygrad.download(tmp_path)


def test_the_denoiser_of_an_exact_score_is_exact(bench):
    """Data N(0, v): the score of y is -y / (1 + (v - 1) e^-t), and D = x v / (v + sigma²)."""
    v = 0.3
    score = lambda y, t: -y / (1 + (v - 1) * torch.exp(-t)).reshape(-1, 1, 1, 1)  # noqa: E731
    denoiser = bench.galaxygrad.Denoiser(torch.nn.Identity(), SIZE)
    denoiser.score.forward = score
    x, sigma = torch.randn(3, 1, SIZE, SIZE, dtype=torch.float64), torch.tensor([0.01, 1.0, 100.0], dtype=torch.float64)
    expected = x * (v / (v + sigma**2)).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(denoiser(x, sigma), expected, rtol=1e-7, atol=1e-9)


def test_a_network_is_written_for_the_commands(bench, tmp_path, amed):
    torch.manual_seed(0)
    denoiser = bench.galaxygrad.Denoiser(bench.galaxygrad.ScoreNetwork(SIZE), SIZE).eval()
    path = tmp_path / "galaxy.pt2"
    bench.galaxygrad.save(denoiser, path)
    for count in (1, 3):
        expected = Sampler(denoiser, solver="euler", nfe=3).run(range(count)).images
        torch.testing.assert_close(Sampler(path, solver="euler", nfe=3).run(range(count)).images, expected)
    code, out, _ = amed("sample", "--model", path, "--solver", "euler", "--seeds", "0-2", "--out", tmp_path / "a.png")
    assert (code, "3 images" in out) == (0, True)


def test_a_file_for_the_commands_is_a_pt2(bench, tmp_path):
    refused = CliRunner().invoke(bench.galaxygrad.app, ["hsc32", str(tmp_path / "hsc32.onnx")])
    assert refused.exit_code == 2
    assert "name it" in refused.output
    assert "hsc32.pt2" in refused.output


def gaussian(x, sigma):
    """D of data N(CENTRE, SPREAD²), bent a little so that no solver is exact."""
    sigma = sigma.reshape(-1, 1, 1, 1)
    return CENTRE + (x - CENTRE) * SPREAD**2 / (SPREAD**2 + sigma**2) + 0.05 * torch.sin(x / (1 + sigma))


@pytest.mark.parametrize("solver", ["deis", "dpmpp", "unipc"])
def test_a_measured_first_step_is_its_formula(bench, solver):
    plan = make_plan(4, solver=solver, options={} if solver == "deis" else {"thresholding": False}, afs="mean")
    latents, sigma = torch.randn(2, 1, 4, 4, dtype=torch.float64), plan.sigmas[0]
    mean = torch.full((1, 1, 4, 4), 2.9, dtype=torch.float64)
    x = sigma * latents
    first = Denoised(mean + (x - mean) * (1 - sigma / (1 + sigma**2) ** 0.5))
    expected = sample(known_first(gaussian, first), x, plan.levels, plan.make_solver())
    part = bench.real_sweep.Part(gaussian, latents, None)
    torch.testing.assert_close(bench.real_sweep.solve(plan, part, mean), expected, rtol=1e-9, atol=1e-9)


@pytest.fixture
def small(bench, monkeypatch):
    """The sweep on that Gaussian in place of a network: 20 latents, two batches."""
    latents = torch.randn(20, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    yard = bench.real_sweep.Yard(gaussian, latents, None, (0.002, 80.0))
    monkeypatch.setattr(bench.real_sweep, "yard", lambda name, samples: yard)
    mean = torch.full((1, 1, 4, 4), CENTRE)
    monkeypatch.setattr(bench.real_sweep, "measure_mean", lambda network: mock.Mock(rows=lambda: mean))
    return yard


def test_errors_are_those_of_an_evaluation_by_hand(bench, small):
    found = bench.real_sweep.measure("gaussian", 20, 4, "polynomial")
    plan = make_plan(4, solver="ipndm", options={"max_order": 3}, schedule="polynomial", afs=True)
    exact = make_plan(80, solver="deis", options={"max_order": 4}, schedule="polynomial", rho=7.0, afs=False)
    made, truth = (
        sample(gaussian, each.sigmas[0] * small.latents, each.levels, each.make_solver(), afs=each.afs)
        for each in (plan, exact)
    )
    errors = per_image_rmse(made, truth)
    expected = errors.square().mean().sqrt().item(), errors.median().item()
    assert found["zero"]["ipndm-3"] == pytest.approx(expected, rel=1e-3)
    assert found["mean"]["ipndm-3"][0] < found["plain"]["ipndm-3"][0] < found["zero"]["ipndm-3"][0]
    assert {first: "heun" in solvers for first, solvers in found.items()} == {
        "plain": True,
        "zero": False,
        "mean": False,
    }


def test_no_point_is_evaluated_twice(bench):
    calls = []
    remembering = bench.real_sweep.Remembering(lambda x, sigma: calls.append(0) or gaussian(x, sigma))
    x, sigma = torch.randn(2, 1, 4, 4), torch.tensor([2.0, 2.0])
    asked = [(x, sigma), (x.clone(), sigma), (x, 2 * sigma), (x + 1, sigma)]
    for each in asked:
        assert torch.equal(remembering(*each), gaussian(*each))
    assert len(calls) == 3


class Classes(torch.nn.Module):
    """D of data N(m_k, SPREAD²) with m = 1, 2 for two classes and 0 for none, as rows of labels choose."""

    label_dim, sample_shape = 2, (1, 4, 4)

    def forward(self, x, sigma, labels):
        centre = (labels @ torch.tensor([1.0, 2.0])).reshape(-1, 1, 1, 1)
        return centre + (x - centre) * (SPREAD**2 / (SPREAD**2 + sigma**2)).reshape(-1, 1, 1, 1)


def guided_yard(bench):
    labels = torch.eye(2)[torch.tensor([0, 1, 1])]
    latents = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    return bench.real_sweep.Yard(Classes(), latents, labels, (0.002, 80.0), 3.0)


def test_a_guided_network_is_asked_for_the_guided_answer(bench):
    """D_u + 3 (D_c - D_u): as D is linear in the centre, that of data about 3 m_k."""
    yard = guided_yard(bench)
    part, sigma = yard.part(0), torch.full((3,), 2.0)
    centre = 3 * torch.tensor([1.0, 2.0, 2.0]).reshape(-1, 1, 1, 1)
    expected = centre + (yard.latents - centre) * SPREAD**2 / (SPREAD**2 + 4)
    torch.testing.assert_close(part.denoise(yard.latents, sigma), expected)


def test_a_guided_start_is_the_engine_s_own(bench):
    yard = guided_yard(bench)
    mean = measure_mean(yard.network)
    plan = yard.plan(nfe=4, solver="ipndm", options={"max_order": 3}, schedule="polynomial", afs="mean", mean=mean)
    own = Sampler(yard.network, plan=plan, backend="eager").run(
        yard.latents, torch.tensor([0, 1, 1]), guidance_scale=3.0
    )
    made = bench.real_sweep.solve(plan, yard.part(0), mean.rows())
    torch.testing.assert_close(made, own.images, rtol=1e-5, atol=1e-5)


def test_the_flow_s_velocity_is_that_of_an_exact_one(bench):
    """With F = (x_t - E[x0 | x_t]) / t for a data set of one image nothing is left of the loss, and D is that image."""
    digits = pytest.importorskip("amed_engine.zoo.train_digits")
    image = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8)
    data, told = digits.Digits(image, torch.zeros(1, dtype=torch.int64)), []

    def exact(x, time, labels):
        told.append((time, labels))
        return (x - image) / (time / 1000).reshape(-1, 1, 1, 1), None

    flow = sys.modules["flow_digits"]
    loss = flow.velocity_loss(exact, data, flow.Recipe(batch=256, label_dropout=0.5), 3, to_image=True)
    assert loss.item() < 1e-5
    (time, labels), *_ = told
    assert [time.min().item(), time.mean().item(), time.max().item()] == pytest.approx([2, 500, 998], abs=3)
    assert 0.4 < (labels == digits.UNLABELLED).float().mean() < 0.6
    denoiser = amed_engine.wrap(lambda x, t: exact(x, t, None)[0], "flow", shape=(1, 8, 8))
    x, sigma = 3 * torch.randn(2, 1, 8, 8), torch.tensor([0.5, 40.0])
    torch.testing.assert_close(denoiser(x, sigma).x0, image.expand(2, -1, -1, -1), rtol=1e-4, atol=1e-4)


@pytest.fixture
def flow(bench, monkeypatch):
    """The flow's training with two steps of a smaller network."""
    pytest.importorskip("sklearn")
    flow = sys.modules["flow_digits"]
    monkeypatch.setattr(flow, "NETWORK", {**flow.NETWORK, "model_channels": 8, "attn_resolutions": []})
    monkeypatch.setattr(flow, "HELD_OUT", 1)
    threads = torch.get_num_threads()
    yield flow
    torch.set_num_threads(threads)


def test_a_training_goes_on_where_it_was(flow, tmp_path):
    recipe, file = flow.Recipe(steps=2, batch=8), tmp_path / "flow.safetensors"
    data = flow.load_digits(torch.device("cpu"))
    begun = flow.Run(recipe)
    begun.advance(data)
    begun.write(file)
    resumed = flow.train(file, recipe)
    at_once = flow.train(tmp_path / "another.safetensors", recipe)
    for name, value in at_once.average.state_dict().items():
        assert torch.equal(value, resumed.average.state_dict()[name]), name
    assert not torch.equal(flow.Run(recipe).net.state_dict()["map_layer0.weight"], begun.net.map_layer0.weight)
    with pytest.raises(ValueError, match="another recipe"):
        flow.Run.read(file, flow.Recipe(steps=3, batch=8))


def test_the_flow_is_trained_before_it_is_measured(bench, flow, monkeypatch):
    monkeypatch.setattr(flow, "Recipe", functools.partial(flow.Recipe, steps=1, batch=8))
    sweep = bench.real_sweep
    sweep.prepare(["digits", "flow-digits"])  # without the wheel, which neither needs
    assert [file.name for file in sweep.FOLDER.iterdir()] == ["flow-digits.safetensors"]
    yard = sweep.yard("flow-digits", 32)
    assert (yard.latents.shape, yard.range, yard.guidance) == ((32, 1, 8, 8), (0.002, 80.0), None)
    assert torch.equal(yard.labels.sum(1), torch.ones(32))
    said = sweep._own_facts("flow-digits", yard)["training"]
    assert (said["steps"], said["step"], said["loss_to_velocity"] > 0) == (1, 1, True)


def test_guided_digits_are_the_bundled_ones_at_their_scale(bench):
    yard = bench.real_sweep.yard("digits-g3", 32)
    assert yard.guidance == 3.0
    assert bench.real_sweep._own_facts("digits-g3", yard) == {"guidance_scale": 3.0}


RULES = {("mean", "a", "s"): {"one": 1.0, "two": 3.0}, ("mean", "b", "s"): {"one": 2.0, "two": 1.0}}


def test_a_rule_is_judged_by_the_best_of_every_network(bench):
    import real_tables

    networks = {
        name: {"sweep": {"5": {"s": {"mean": {"a": [a, 1], "b": [b, 1]}, "plain": {"a": [9.0, 1]}}}}}
        for name, a, b in (("one", 0.1, 0.2), ("two", 0.6, 0.2))
    }
    found = real_tables.costs(networks, 5, "rmse")
    assert {rule: found[rule] for rule in RULES} == {rule: pytest.approx(cost) for rule, cost in RULES.items()}
    assert real_tables.ranked(found, "mean")[0] == ("mean", "b", "s")
    assert real_tables.score(RULES["mean", "a", "s"]) == pytest.approx((3**0.5, 3.0))


@pytest.mark.parametrize(("first", "mean", "worst"), [("mean", 1.4, 2.4), ("plain", 1.8, 4.2)])
def test_the_default_keeps_near_to_the_best_of_every_network(bench, first, mean, worst):
    """In what is committed: at 5 evaluations, over six networks, times the best combination."""
    tables = sys.modules["real_tables"]
    networks = json.loads((BENCHMARKS / "results/real-networks-cpu.json").read_text("utf-8"))["networks"]
    found = tables.costs({name: networks[name] for name in tables.YARDSTICK}, 5, "rmse")
    rule = next(rule for rule in tables.defaults(5) if rule[0] == first)
    geometric_mean, largest = tables.score(found[rule])
    assert geometric_mean <= mean
    assert largest <= worst


def test_networks_beside_the_yardstick_have_a_table_of_their_own(bench):
    import real_tables

    sweep = {"5": {"s": {first: {"a": [0.5, 1], "b": [1.0, 1]} for first in ("mean", "plain", "zero")}}}
    networks = {name: {"sweep": sweep, "fit": {}} for name in ("digits", "hsc32", "flow-digits")}
    six, beside = real_tables.report(networks, (), [5], "rmse", 1).split("\n\n")
    assert six.splitlines()[0].split() == ["NFE", "5,", "rmse", "hsc32", "digits"]
    assert beside.splitlines()[0].split() == ["NFE", "5,", "rmse", "flow-digits"]


def test_a_network_left_out_has_no_say(bench):
    import real_tables

    chosen = real_tables.left_out(RULES, "mean")
    assert chosen == {"one": (("mean", "b", "s"), 2.0), "two": (("mean", "a", "s"), 3.0)}


def test_a_file_of_other_latents_is_not_added_to(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench.galaxygrad, "download", lambda folder: folder)
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"networks": {"digits": {"samples": 48, "sweep": {}, "fit": {}}}}))
    command = ["sweep", "--network", "digits", "--samples", "32", "--out", str(file)]
    done = CliRunner().invoke(bench.main, command)
    assert done.exit_code == 2
    assert "has 48 latents of digits" in done.output


def test_a_file_is_read_as_it_was_written(bench):
    data = {"networks": {"a": {"sweep": {"5": {"s": {"mean": {"x": [1.5, 2]}}}}, "fit": {}}}, "commands": ["c"]}
    assert json.loads(bench.dump(data)) == data
