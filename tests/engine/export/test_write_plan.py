"""Plans and schedules by `Sampler.export` and `amed export`: the sampler's images in a host's own loop, or a refusal."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from amed_engine import (
    AMEDPredictor,
    CoefficientPredictor,
    ConfigError,
    ConstantPredictor,
    FileFormatError,
    Sampler,
    Stepper,
    load_package,
    make_plan,
    read_plan,
    read_schedule,
)
from amed_engine.cli.commands.export import FORMATS as OFFERED
from amed_engine.engine.export.write import FORMATS
from amed_engine.engine.request import make_request
from amed_engine.sampling.denoiser import bind_labels

SHAPE, LABELS = (2, 6, 6), [2, 0, 1, 1]


class Network(nn.Module):
    """A conditional denoiser with a bottleneck of 3 x 3: linear in x, so that a small network shows every error."""

    img_channels, img_resolution, label_dim, sigma_min, sigma_max = 2, 6, 3, 0.002, 80.0

    def forward(self, x, sigma, labels):
        sigma = sigma.view(-1, 1, 1, 1)
        bottleneck = nn.functional.avg_pool2d(x, 2) / (1 + sigma) + sigma.log()
        return (x + (labels @ torch.tensor([[1.0], [-2.0], [0.5]])).view(-1, 1, 1, 1)) / (1 + sigma**2), bottleneck


def learned(solver: str, **options) -> AMEDPredictor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        predictor = AMEDPredictor(0.1, 0.2, **{"bottleneck": (3, 3), "hidden_dim": 4, **options})
    predictor.plan = make_plan(4, solver=solver, midpoint=True)
    return predictor


def constant(solver: str, intervals: int = 2, points: int = 1, scale: float = 1.0) -> ConstantPredictor:
    predictor = ConstantPredictor(intervals, points)
    options = {"points": points} if points > 1 else None
    predictor.plan = make_plan(intervals * (1 + points), solver=solver, midpoint=True, options=options)
    with torch.no_grad():
        predictor.r += torch.arange(intervals).view(-1, 1) / 10
        predictor.scale_dir *= scale
        predictor.scale_time /= scale
    return predictor


def coefficients(codes: int = 0) -> CoefficientPredictor:
    predictor = CoefficientPredictor(4, 80.0, codes=codes, inputs=11 if codes else 0)
    predictor.plan = make_plan(4, solver="nonstationary", midpoint=True, afs=False)
    with torch.no_grad():
        for i in range(4):
            predictor.coefficients[i, : i + 2] = 1 / (i + 2)
    return predictor


def hosted(sampler: Sampler, path, guidance: float | None = None) -> np.ndarray:
    """Largest difference between the plan in a host's loop and the sampler, relative to the largest value."""
    plan, batch = read_plan(path), len(LABELS)
    request = make_request(sampler.model, range(batch), LABELS, None, dtype=torch.float32, device=torch.device("cpu"))
    stepper = Stepper(plan, (request.latents * np.float32(plan.sigmas[0])).numpy())
    while not stepper.done:
        points = torch.from_numpy(stepper.points)
        denoise = bind_labels(sampler.model.denoise, request.labels.repeat(len(points) // batch, 1), guidance)
        denoised, features = denoise(points, torch.from_numpy(np.ascontiguousarray(stepper.sigma)))
        stepper.advance(denoised.numpy(), features.numpy())
    truth = sampler.run(range(batch), LABELS, guidance_scale=guidance).images.numpy()
    return np.abs(stepper.result - truth).max() / np.abs(truth).max()


PREDICTORS = {
    "euler": None,
    "unipc": None,
    "learned amed": lambda: learned("amed"),
    "learned ipndm": lambda: learned("ipndm"),
    "constant deis": lambda: constant("deis", scale=1.02),
    "epd": lambda: constant("amed", points=3),
    "nonstationary": coefficients,
}


@pytest.mark.parametrize("guidance", [None, 2.5])
@pytest.mark.parametrize("name", PREDICTORS)
def test_a_host_with_the_plan_draws_what_the_sampler_draws(name, guidance, tmp_path):
    """Labels and guidance are the host's; the plan says for which guidance it is."""
    make = PREDICTORS[name]
    predictor = make and make()
    if predictor is not None and guidance:
        predictor.plan = make_plan(
            None,
            solver=predictor.plan.solver,
            schedule=predictor.plan.levels,
            options=dict(predictor.plan.options),
            afs=False,
            midpoint=True,
            guidance_scale=guidance,
        )
    sampler = Sampler(Network(), predictor) if predictor else Sampler(Network(), solver=name, nfe=4)
    done = sampler.export(tmp_path / "plan.json", "plan", guidance_scale=guidance)
    assert hosted(sampler, done.path, guidance) < 1e-5
    plan = read_plan(done.path)
    assert (plan.guidance_scale, plan.shape, plan.nfe) == (guidance, SHAPE, sampler.nfe)
    assert plan.description == done.plan.describe()


# ---- schedules


def test_the_schedule_of_amed_in_a_loop_of_one_s_own(tmp_path):
    """As docs/export.md tells a host."""
    sampler = Sampler(Network(), constant("amed", scale=1.05))
    sampler.export(tmp_path / "s.json", "schedule")
    table, network = read_schedule(tmp_path / "s.json"), Network()
    request = make_request(sampler.model, range(4), LABELS, None, dtype=torch.float32, device=torch.device("cpu"))
    x = request.latents * table["sigmas"][0]
    for i, scale in enumerate(table["scale_dir"]):
        sigma, m, sigma_next = table["sigmas"][2 * i : 2 * i + 3]
        told = [torch.full((4,), 4 * t).exp() for t in table["timesteps"][2 * i : 2 * i + 2]]
        y = x + (m - sigma) * (x - network(x, told[0], request.labels)[0]) / sigma
        x = x + scale * (sigma_next - sigma) * (y - network(y, told[1], request.labels)[0]) / m
    truth = sampler.run(range(4), LABELS).images
    torch.testing.assert_close(x, truth, rtol=0, atol=2e-5 * float(truth.abs().max()))
    assert table["scale_dir"] == pytest.approx([1.05] * 2)
    assert table["scale_time"] == pytest.approx([1 / 1.05] * 2)


def test_the_schedule_of_a_plugin_in_diffusers_own_scheduler(tmp_path):
    """Euler on learned levels, by EDMEulerScheduler."""
    diffusers = pytest.importorskip("diffusers")

    def network(scaled, timestep):
        return scaled * torch.tanh(timestep)

    def denoiser(x, sigma):
        sigma = sigma.view(-1, 1, 1, 1)
        norm = (sigma**2 + 0.25).sqrt()
        return 0.25 / norm**2 * x + sigma * 0.5 / norm * network(x / norm, sigma.log() / 4)

    sampler = Sampler(denoiser, constant("euler", intervals=3), shape=SHAPE)
    sampler.export(tmp_path / "s.json", "schedule")
    table, scheduler = read_schedule(tmp_path / "s.json"), diffusers.EDMEulerScheduler(sigma_data=0.5)
    scheduler.set_timesteps(6)
    scheduler.sigmas, scheduler.timesteps = torch.tensor(table["sigmas"]), torch.tensor(table["timesteps"][:-1])
    latents = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    x = latents * table["sigmas"][0]
    for t in scheduler.timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x).prev_sample
    truth = sampler.run(latents).images
    torch.testing.assert_close(x, truth, rtol=0, atol=1e-5 * float(truth.abs().max()))


BAD = {
    "another format": lambda d: d.update(format="amed_plan"),
    "a newer version": lambda d: d.update(version=2),
    "an entry more": lambda d: d.update(extra=1),
    "an entry less": lambda d: d.pop("afs"),
    "levels that rise": lambda d: d["sigmas"].reverse(),
    "a level of zero": lambda d: d["sigmas"].__setitem__(-1, 0.0),
    "a timestep less": lambda d: d["timesteps"].pop(),
    "a timestep that is no number": lambda d: d["timesteps"].__setitem__(0, "1"),
    "timesteps of another kind": lambda d: d.update(timestep_type="linear"),
    "a scale less": lambda d: d["scale_time"].pop(),
    "a second free evaluation": lambda d: d["afs"].__setitem__(2, True),
    "a flag that is a number": lambda d: d["afs"].__setitem__(0, 1),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_schedules_are_refused(name, tmp_path):
    path = tmp_path / "s.json"
    Sampler(Network(), solver="ipndm", nfe=4).export(path, "schedule")
    data = json.loads(path.read_text())
    assert read_schedule(path) == data
    BAD[name](data)
    path.write_text(json.dumps(data))
    with pytest.raises(FileFormatError, match=r"s\.json: .*expected"):
        read_schedule(path)


@pytest.mark.parametrize("read", [read_plan, read_schedule])
def test_files_that_are_none_are_refused(read, tmp_path):
    path = tmp_path / "s.json"
    Sampler(Network(), solver="ipndm", nfe=4).export(path, "plan" if read is read_plan else "schedule")
    whole = path.read_bytes()
    assert read(path)
    for content in (
        b"",
        whole[:-4],
        whole[: len(whole) // 2],
        b"\xff\xfe",
        b"[" * 100_000,
        whole.replace(b"0.", b"NaN"),
    ):
        path.write_bytes(content)
        with pytest.raises(FileFormatError, match=r"s\.json"):
            read(path)
    path.write_bytes(b" " * ((32 << 20) + 1))
    with pytest.raises(FileFormatError, match="more than"):
        read(path)
    with pytest.raises(FileFormatError, match="does not exist or is not a file"):
        read(tmp_path)


# ---- what cannot be written


@pytest.mark.parametrize(
    ("predictor", "format", "message"),
    [
        (lambda: learned("amed", scales="wide"), "plan", "cannot say 'wide' scales; pass freeze=True"),
        (lambda: learned("deis"), "plan", "no combination of .* pass freeze=True"),
        (
            lambda: learned("amed", embedding_dim=80),
            "plan",
            "no reader of plans would take this one: predictor.noise_ch",
        ),
        (lambda: coefficients(codes=2), "plan", "depend on the sample"),
        (lambda: coefficients(codes=2), "schedule", "depend on the sample"),
        (coefficients, "schedule", "cannot say the coefficients of 'nonstationary'"),
        (lambda: constant("amed", points=2), "schedule", "parallel points; export format='plan'"),
    ],
)
def test_what_a_format_cannot_say_is_refused(predictor, format, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        Sampler(Network(), predictor()).export(tmp_path / "a.json", format)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["plan", "schedule"])
def test_a_predictor_of_nan_is_refused(format, tmp_path):
    predictor = constant("amed")
    with torch.no_grad():
        predictor.scale_dir[0] = float("nan")
    with pytest.raises(ConfigError, match=r"NaN|not JSON compliant"):
        Sampler(Network(), predictor).export(tmp_path / "a.json", format)
    assert list(tmp_path.iterdir()) == []


def test_more_evaluations_than_a_plan_may_have_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="1 to 1000 entries"):
        Sampler(Network(), solver="euler", nfe=1200).export(tmp_path / "a.json", "plan")


@pytest.mark.parametrize("options", [{"scales": "wide"}, {"embedding_dim": 80}])
def test_what_a_plan_cannot_say_it_says_frozen(options, tmp_path):
    """The answers of the predictor without features, in place of it."""
    predictor = learned("amed", **options)
    Sampler(Network(), predictor).export(tmp_path / "a.json", "plan", options={"freeze": True})
    levels = predictor.plan.levels.float()
    with torch.no_grad():
        said = [predictor(None, a.view(1), b.view(1)) for a, b in pairwise(levels)]
    frozen = ConstantPredictor.of(said)
    frozen.plan = predictor.plan
    assert hosted(Sampler(Network(), frozen), tmp_path / "a.json") < 1e-5


@pytest.mark.parametrize(
    ("path", "format", "options", "message"),
    [
        ("a.pt2", "plan", {}, r"format 'plan' is written to a \.json file, got '.*a\.pt2'"),
        ("a.json", "plan", {"alphas_cumprod": 1}, r"format 'plan' takes freeze, got \['alphas_cumprod'\]"),
        ("a.json", "schedule", {"freeze": True}, r"format 'schedule' takes alphas_cumprod, got \['freeze'\]"),
        ("a.json", "plan", ["freeze"], "options must be a dict"),
        ("a.json", "schedule", {"alphas_cumprod": torch.ones(9)}, "alphas_cumprod must be a vector"),
    ],
)
def test_bad_arguments_are_refused(path, format, options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        Sampler(Network(), solver="euler", nfe=3).export(tmp_path / path, format, options=options)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_not_written_over(tmp_path):
    (tmp_path / "a.json").mkdir()
    with pytest.raises(ConfigError, match="is written to a"):
        Sampler(Network(), solver="euler", nfe=3).export(tmp_path / "a.json", "plan")


# ---- the command


def test_the_command_offers_every_format():
    assert tuple(FORMATS) == OFFERED


def test_the_command_writes_plans_and_schedules(amed, tmp_path):
    plan, schedule = tmp_path / "new" / "plan.json", tmp_path / "schedule.json"
    code, out, error = amed("export", "--model", "digits", "--nfe", 5, "--format", "plan", "--out", plan)
    assert (code, error) == (0, "")
    assert out.splitlines()[-1] == f"wrote {plan}, {plan.stat().st_size:,} bytes"
    assert (read_plan(plan).nfe, read_plan(plan).shape) == (5, (1, 8, 8))
    wishes = ("--solver", "deis", "--solver-option", "max_order=2", "--no-afs", "--nfe", 4)
    code, out, error = amed("export", *wishes, "--format", "schedule", "--out", schedule)
    assert (code, error, out.splitlines()[0].partition(",")[0]) == (0, "", "deis max_order=2")
    assert len(read_schedule(schedule)["sigmas"]) == 5


def test_the_command_names_the_plan_that_was_written(amed, tmp_path):
    """For guidance the bundled predictor steps aside."""
    code, out, error = amed("export", "--guidance", 2, "--format", "plan", "--out", tmp_path / "a.json")
    assert code == 0
    assert "the model's own predictor is not for guidance_scale=2.0" in error
    assert out.splitlines()[0] == read_plan(tmp_path / "a.json").description
    assert read_plan(tmp_path / "a.json").guidance_scale == 2


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--format", "torchscript", "--out", "a.pt2"), 2, "'torchscript' is not one of 'pt2', 'exported', 'onnx'"),
        (("--format", "onnx", "--out", "a.pt2"), 2, "format 'onnx' is written to a .onnx file"),
        (("--format", "schedule", "--out", "a.json"), 2, "cannot say the coefficients of 'nonstationary'"),
        (("--format", "onnx", "--freeze", "--out", "a.onnx"), 2, "--freeze is for --format plan, got onnx"),
        (("--format", "plan", "--out", "/proc/nowhere/a.json"), 1, "cannot write to folder"),
        (("--format", "plan"), 2, "--out"),
    ],
)
def test_the_command_says_what_is_wrong(amed, arguments, code, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    got, out, error = amed("export", *arguments)
    assert (got, out) == (code, "")
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_a_loop(amed, tmp_path):
    """The compiled format is tested at length elsewhere; this is the way from options to file."""

    class Denoiser(nn.Module):
        def forward(self, x, sigma):
            return x / (1 + sigma.view(-1, 1, 1, 1) ** 2)

    model, loop, batch = tmp_path / "model.pt2", tmp_path / "loop.pt2", {0: torch.export.Dim("batch", min=1, max=64)}
    inputs = torch.zeros(2, *SHAPE), torch.ones(2)
    torch.export.save(torch.export.export(Denoiser(), inputs, dynamic_shapes=(batch, batch)), model)
    arguments = ("--solver", "euler", "--nfe", 2, "--format", "exported", "--max-batch", 4, "--out", loop)
    code, out, _ = amed("export", "--model", model, *arguments)
    assert code == 0
    assert "largest difference to the sampler on a batch of 2: " in out
    expected = Sampler(model, solver="euler", nfe=2).run([3, 4]).images
    torch.testing.assert_close(load_package(loop).run([3, 4]).images, expected, atol=1e-5, rtol=1e-5)
