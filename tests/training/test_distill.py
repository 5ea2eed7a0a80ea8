"""Distillation: the paper's losses, a predictor that pays off, and a denoiser that is left alone."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from amed_engine import (
    NonFiniteError,
    Sampler,
    distill,
    load_predictor,
    make_plan,
    make_schedule,
    make_solver,
    sample,
    save_predictor,
    wrap,
)
from amed_engine.adapters.fingerprint import fingerprint
from amed_engine.checkpoints import files
from amed_engine.errors import ConfigError
from amed_engine.training.teacher import Teacher

SHAPE = (1, 4, 4)
STUDENTS = {
    "amed": {},
    "euler": {},
    "dpm": {},
    "ipndm": {"max_order": 2},
    "deis": {"max_order": 2},
    "dpmpp": {"max_order": 2},
    "unipc": {"max_order": 2},
}
CENTRES = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(5)) * 0.8
WIDTH = 0.1


def mixture(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The exact denoiser of two Gaussians of standard deviation WIDTH: their posterior means, weighed by probability."""
    variance = (WIDTH**2 + sigma**2).reshape(-1, 1, 1, 1)
    centres = CENTRES.to(x)
    distance = (x[:, None] - centres).square().flatten(2).sum(2)  # (B, 2)
    weights = torch.softmax(-distance / (2 * variance.flatten(1)), dim=1)
    share = WIDTH**2 / variance
    return share * x + (1 - share) * torch.einsum("bk,kchw->bchw", weights, centres)


def train(model=mixture, **options):
    defaults = {"nfe": 5, "total_kimg": 0.032, "batch": 16, "progress": False}
    return distill(model, **(defaults | ({"shape": SHAPE} if model is mixture else {}) | options))


@pytest.fixture(scope="module")
def trained():
    """A predictor for the mixture and the losses it was trained with."""
    rounds = []
    predictor = train(total_kimg=8, batch=64, on_round=rounds.append)
    return predictor, rounds


# ---- it pays off


def test_the_loss_falls(trained):
    _, rounds = trained
    first, last = (torch.tensor([r.losses for r in part]).mean(0) for part in (rounds[:5], rounds[-20:]))
    assert last[-1] < first[-1] / 2
    assert last.sum() < first.sum() / 2


def test_the_trained_solver_beats_dpm_solver_2_at_the_same_nfe(trained):
    """Against the exact solution, by a fine Heun trajectory; on latents that training has not seen."""
    predictor, _ = trained
    student = Sampler(mixture, predictor, shape=SHAPE)
    untrained = Sampler(mixture, solver="dpm", solver_options={"r": 0.5}, nfe=5, shape=SHAPE)
    assert student.nfe == untrained.nfe == 5
    z = torch.randn(256, *SHAPE, generator=torch.Generator().manual_seed(123))
    levels = make_schedule("polynomial", 200, 0.002, 80.0)
    exact = sample(mixture, z.double() * levels[0], levels, make_solver("heun"))

    def error(sampler):
        return (sampler.run(z).images - exact).square().mean().sqrt().item()

    assert error(student) < error(untrained) / 2


def test_rounds_are_reported_in_order(trained):
    _, rounds = trained
    assert [r.images for r in rounds] == list(range(64, 8001, 64))
    assert all(len(r.losses) == 3 for r in rounds)


# ---- what it returns


@pytest.mark.parametrize("solver", STUDENTS)
def test_every_student_trains_and_samples(solver):
    losses = []
    predictor = train(
        solver=solver, solver_options=STUDENTS[solver], scale_time=0.1, on_round=lambda r: losses.append(r.losses)
    )
    assert not predictor.training
    assert len(losses) == 2
    assert torch.tensor(losses).isfinite().all()
    plan = make_plan(5, solver=solver, options=STUDENTS[solver], midpoint=True)
    assert predictor.plan == plan
    calls = []
    sampler = Sampler(lambda x, sigma: (calls.append(1), mixture(x, sigma))[1], predictor, shape=SHAPE)
    result = sampler.run(3)
    assert result.images.isfinite().all()
    assert len(calls) == result.nfe == 5


@pytest.mark.parametrize("schedule", ["polynomial", "logsnr", "time_uniform"])
@pytest.mark.parametrize("nfe", [3, 4])
def test_any_schedule_and_nfe_can_be_trained_for(schedule, nfe):
    predictor = train(schedule=schedule, nfe=nfe)
    assert predictor.plan == make_plan(nfe, solver="amed", schedule=schedule)
    assert Sampler(mixture, predictor, shape=SHAPE, nfe=nfe, schedule=schedule).run(2).nfe == nfe


def test_the_predictor_fits_the_network_it_was_trained_for(tiny_conditional, tiny_model, tmp_path):
    predictor = train(tiny_conditional, guidance_scale=2.0)
    assert predictor.bottleneck == (4, 4)
    assert predictor.plan.model == fingerprint(tiny_conditional)
    assert predictor.plan.guidance_scale == 2.0
    save_predictor(predictor, tmp_path / "p.safetensors")
    expected = Sampler(tiny_conditional, predictor).run([1, 2], guidance_scale=2.0)
    again = Sampler(tiny_conditional, tmp_path / "p.safetensors").run([1, 2], guidance_scale=2.0)
    assert torch.equal(again.images, expected.images)
    assert load_predictor(tmp_path / "p.safetensors").plan == predictor.plan
    with pytest.raises(ConfigError, match="trained for another model"):
        Sampler(tiny_model, predictor)


def test_the_predictor_keeps_the_dtype_it_was_trained_in(tiny_model, tmp_path):
    """In its file too, which says the versions; another is refused unless asked not to, a file without one is read."""
    file = tmp_path / "p.safetensors"
    predictor = train(tiny_model)
    save_predictor(predictor, file)
    assert load_predictor(file).plan.dtype == predictor.plan.dtype == "float32"
    config, tensors = files.read(file)
    assert config["torch"] == torch.__version__
    assert config["amed_engine"]
    with pytest.raises(ConfigError, match=r"trained for a network in float32, got one in bfloat16.*verify=False"):
        Sampler(tiny_model, file, autocast=torch.bfloat16)
    narrow = Sampler(tiny_model, file, autocast=torch.bfloat16, verify=False)
    assert narrow.run(2).images.isfinite().all()
    config["plan"] |= {"version": None, "options": {}, "afs": True}  # as it was before plans had versions
    for name in ("version", "dtype", "mean"):
        del config["plan"][name]
    files.write(file, tensors, config)
    assert load_predictor(file).plan == replace(predictor.plan, dtype=None)
    assert Sampler(tiny_model, file, autocast=torch.bfloat16).run(2).images.isfinite().all()
    with pytest.raises(
        ConfigError, match="trained for another model"
    ):  # its fingerprint or its dtype, whichever is first
        Sampler(copy.deepcopy(tiny_model).double(), predictor)


# ---- reproducible, and nothing else is touched


def state(predictor) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in predictor.state_dict().items()}


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_seed_decides_everything(tiny_conditional):
    first = state(train(tiny_conditional, seed=1))
    torch.manual_seed(99)
    assert equal(state(train(tiny_conditional, seed=1)), first)
    assert not equal(state(train(tiny_conditional, seed=2)), first)


def test_the_global_generators_are_left_alone(monkeypatch):
    """Those of other devices too: torch.manual_seed would seed them, now or when they come to life."""
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    before = torch.get_rng_state()
    train()
    assert torch.equal(torch.get_rng_state(), before)
    assert seeded == []


class Net(nn.Module):
    """A small network with everything that training could disturb: parameters frozen or not, and a buffer."""

    def __init__(self):
        super().__init__()
        self.img_channels, self.img_resolution, self.label_dim = 1, 4, 0
        self.free, self.frozen = nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 1)
        self.frozen.requires_grad_(False)
        self.norm = nn.BatchNorm2d(1)

    def forward(self, x, sigma):
        level = sigma.reshape(-1, 1, 1, 1)
        return self.norm(self.frozen(self.free(x / (1 + level**2).sqrt()))).tanh(), x[:, :, :2, :2]


def test_the_denoiser_is_left_as_it_was():
    torch.manual_seed(0)
    net = Net()
    before = copy.deepcopy(net.state_dict())
    train(net)
    assert equal(net.state_dict(), before)
    assert all(p.grad is None for p in net.parameters())
    assert {name: p.requires_grad for name, p in net.named_parameters()} == {
        "free.weight": True,
        "free.bias": True,
        "frozen.weight": False,
        "frozen.bias": False,
        "norm.weight": True,
        "norm.bias": True,
    }


def test_the_denoiser_is_left_as_it_was_after_an_error_too():
    net = Net()

    def stop(_):
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        train(net, on_round=stop)
    assert net.free.weight.requires_grad
    assert net.free.weight.grad is None


def test_gradients_of_an_enclosing_no_grad_are_no_concern():
    expected = state(train())
    with torch.no_grad():
        assert equal(state(train()), expected)


def test_a_callers_autocast_is_no_concern(tiny_model):
    expected = train(tiny_model)
    with torch.autocast("cpu", torch.bfloat16):
        assert equal(state(train(tiny_model)), state(expected))


def test_a_callback_may_write_to_what_it_gets():
    def spoil(seen):
        seen.losses[:] = [1e9 for _ in seen.losses]
        seen.midpoints.clear()

    spoiled, expected = train(on_round=spoil, total_kimg=0.064), train(total_kimg=0.064)
    assert equal(state(spoiled), state(expected))


class Detached(nn.Module):
    """Answers without gradients."""

    sample_shape = SHAPE

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.how = nn.Conv2d(1, 1, 3, padding=1), how

    def forward(self, x, sigma):
        if self.how == "detach":
            return self.inner(x).detach()
        with torch.no_grad() if self.how == "no_grad" else torch.inference_mode():
            return self.inner(x)


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("how", ["detach", "no_grad", "inference_mode"])
def test_a_network_without_gradients_is_refused(how, raw):
    model = wrap(Detached(how), "epsilon", shape=SHAPE) if raw else Detached(how)
    with pytest.raises(ConfigError, match=r"the model answers without gradients.*use amed_engine\.fit"):
        train(model)


def test_gradients_that_are_the_same_everywhere_may_be_true():
    def gaussian(x, sigma):
        return x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2)

    for model in (gaussian, lambda x, sigma: torch.zeros_like(x)):
        assert train(model, shape=SHAPE).plan is not None


class Spoils(nn.Module):
    """Writes to what its gradients need, or keeps its answers' history."""

    sample_shape = SHAPE

    def __init__(self, how):
        super().__init__()
        self.inner, self.how, self.kept = nn.Conv2d(1, 1, 3, padding=1), how, torch.zeros(16, *SHAPE)

    def forward(self, x, sigma):
        answer = self.inner(x)
        if self.how == "writes":
            x.zero_()
            return answer
        if len(answer) != len(self.kept):
            return answer
        return self.kept.copy_(answer)


@pytest.mark.parametrize(
    ("how", "why"),
    [("writes", "writes to tensors that its own gradients need"), ("keeps", "keeps tensors from one call")],
)
def test_networks_that_spoil_their_gradients_are_refused(how, why):
    with pytest.raises(ConfigError, match=rf"the model {why}.*amed_engine\.fit"):
        train(Spoils(how))


def test_progress_goes_to_stderr_and_can_be_off(capsys):
    train(progress=False)
    assert capsys.readouterr().err == ""
    train(progress=True)
    assert "distill NFE 5" in capsys.readouterr().err


# ---- the paper's losses


def first_losses(monkeypatch, **options):
    """The losses of the first batch with a predictor that does not learn, that predictor, and the batch."""
    drawn = []
    original = torch.randn

    def recorded(*args, **kwargs):
        value = original(*args, **kwargs)
        drawn.append(value)
        return value

    rounds = []
    monkeypatch.setattr(torch, "randn", recorded)
    predictor = train(total_kimg=0.016, lr=1e-30, on_round=rounds.append, **options)
    monkeypatch.undo()
    (batch,) = [value for value in drawn if value.shape == (16, *SHAPE)]
    return rounds[0].losses, predictor, batch


def teacher_states(plan, x, intermediate: int):
    stride = intermediate + 1
    levels = make_schedule("time_uniform", plan.intervals * stride + 1, 0.002, 80.0)
    return sample(mixture, x, levels, make_solver("heun"), trajectory=True)[::stride]


@pytest.mark.parametrize("intermediate", [1, 3])
@pytest.mark.parametrize("afs", [True, False])
def test_single_step_students_start_every_interval_from_the_teacher(monkeypatch, afs, intermediate):
    """By the formulas of AMED-Solver, written out."""
    losses, predictor, noise = first_losses(
        monkeypatch, nfe=5 if afs else 6, afs=afs, scale_time=0.1, teacher_intermediate=intermediate
    )
    plan = predictor.plan
    teacher = teacher_states(plan, noise * plan.levels[0].float(), intermediate)
    expected = []
    for i in range(plan.intervals):
        x, s, s_next = teacher[i], plan.levels[i].float(), plan.levels[i + 1].float()
        with torch.no_grad():
            r, scale_dir, scale_time = (
                f.reshape(-1, 1, 1, 1) for f in predictor(None, s.expand(16), s_next.expand(16))
            )
        d = x / (1 + s**2).sqrt() if afs and i == 0 else (x - mixture(x, s.expand(16))) / s
        m = s_next**r * s ** (1 - r)
        y = x + (m - s) * d
        e = (y - mixture(y, (scale_time * m).flatten())) / m
        student = x + scale_dir * (s_next - s) * e
        expected.append((student - teacher[i + 1]).square().sum().item() / 16)
    assert losses == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("solver", ["ipndm", "deis", "dpmpp"])
def test_multistep_students_go_their_own_way(monkeypatch, solver):
    losses, predictor, noise = first_losses(monkeypatch, solver=solver, solver_options=STUDENTS[solver])
    plan = predictor.plan
    x = noise * plan.levels[0].float()
    teacher = teacher_states(plan, x, 1)
    with torch.no_grad():
        own = sample(mixture, x, plan.levels, plan.make_solver(), predictor, afs=plan.afs, trajectory=True)
    expected = [(own[i] - teacher[i]).square().sum().item() / 16 for i in range(1, plan.intervals + 1)]
    assert losses == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("schedule", ["polynomial", "logsnr", "time_uniform"])
@pytest.mark.parametrize("rho", [None, 3.0])
@pytest.mark.parametrize("intermediate", [0, 1, 4])
@pytest.mark.parametrize("sigma_range", [(0.002, 80.0), (0.03, 15.0)])
def test_the_teachers_levels_hold_the_students(schedule, rho, intermediate, sigma_range):
    low, high = sigma_range
    student = make_plan(5, solver="amed", schedule=schedule, rho=rho, sigma_min=low, sigma_max=high)
    levels = Teacher.of(student, "heun", None, intermediate).plan.levels
    assert len(levels) == 3 * (intermediate + 1) + 1
    torch.testing.assert_close(levels[:: intermediate + 1], student.levels, rtol=1e-9, atol=0)


def test_more_intermediate_levels_make_a_better_teacher():
    student = make_plan(5, solver="amed")
    x = torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 80
    levels = make_schedule("time_uniform", 241, 0.002, 80.0)
    exact = sample(mixture, x, levels, make_solver("heun"), trajectory=True)[::80]
    errors = [(Teacher.of(student, "heun", None, k).states(mixture, x) - exact).abs().max().item() for k in (1, 4, 15)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 10


@pytest.mark.parametrize("teacher", ["heun", "dpm", "ipndm", "euler", "unipc"])
def test_any_training_free_solver_teaches(teacher):
    assert train(teacher=teacher, teacher_intermediate=2).plan.nfe == 5


# ---- numbers that are none


def test_three_bad_losses_in_a_row_stop_the_training():
    seen = []
    with pytest.raises(NonFiniteError, match=r"loss or gradient was NaN or infinite 3 times in a row"):
        train(lambda x, sigma: x * float("nan"), shape=SHAPE, on_round=seen.append)
    assert len(seen) <= 1


def test_one_bad_evaluation_costs_one_step_only():
    """The student's first evaluation of the second round breaks; the teacher's do not."""
    calls = []

    def denoise(x, sigma):
        calls.append(len(x))
        x0 = mixture(x, sigma)
        return x0 * float("nan") if len(calls) == bad else x0

    def run():
        calls.clear()
        rounds = []
        predictor = train(denoise, shape=SHAPE, nfe=3, total_kimg=0.064, on_round=rounds.append)
        return predictor, torch.tensor([r.losses for r in rounds])

    # Per round: the teacher's 4 intervals of Heun, then 1 + 2 evaluations of the student; one before to see features.
    bad = 0
    good_predictor, good = run()
    assert len(calls) == 1 + 4 * (8 + 3) + 32 + 3 + 3  # and the comparison at the end
    bad = 1 + (8 + 3) + 8 + 1
    predictor, losses = run()
    assert losses.isnan().nonzero().tolist() == [[1, 0]]
    assert all(p.isfinite().all() for p in predictor.parameters())
    assert torch.equal(losses[0], good[0])
    assert not equal(state(predictor), state(good_predictor))


# ---- bad arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nfe": 0}, "nfe must be a positive integer, got 0"),
        ({"nfe": 4, "afs": True}, "amed spends 2 evaluations per interval, the first one free: nfe=4 is not"),
        ({"solver": "rk4"}, "unknown solver 'rk4'; valid names: euler, heun"),
        ({"solver": "heun"}, "solver 'heun' takes no predictor; students are amed, euler, dpm"),
        ({"solver_options": {"max_order": 2}}, "solver 'amed' has no option max_order; valid options: points"),
        ({"solver_options": {"points": 2}}, "points"),
        ({"solver": "ipndm", "solver_options": {"max_order": 5}}, "max_order must be an integer from 1 to 4, got 5"),
        ({"schedule": "cosine"}, "unknown schedule 'cosine'; valid names: polynomial, logsnr"),
        (
            {"schedule": "discrete"},
            "is spaced over the training steps of a network, and this one is known to have none",
        ),
        ({"rho": -1.0}, "rho must be a positive number or None, got -1"),
        ({"scale_dir": 1.0}, r"scale_dir must be in \[0, 1\), got 1"),
        ({"scale_time": -0.1}, r"scale_time must be in \[0, 1\), got -0\.1"),
        ({"teacher": "rk4"}, "unknown solver 'rk4'"),
        ({"teacher": "amed"}, "teacher 'amed' needs a predictor itself; use heun"),
        ({"teacher_options": {"r": 0.5}}, "solver 'heun' has no option r"),
        ({"teacher_intermediate": -1}, "teacher_intermediate must .*negative, got -1"),
        ({"teacher_intermediate": 1.5}, "teacher_intermediate must .*got 1.5"),
        ({"guidance_scale": 2.0}, "guidance_scale needs a class-conditional model; this one has label_dim 0"),
        ({"total_kimg": 0}, "batch, total_kimg and lr must be positive"),
        ({"total_kimg": float("nan")}, "batch, total_kimg and lr must be positive"),
        ({"batch": 0}, "batch, total_kimg and lr must be positive"),
        ({"batch": 1.5}, r"batch.*1\.5"),
        ({"lr": -1.0}, "batch, total_kimg and lr must be positive"),
        ({"sigma_min": 5.0, "sigma_max": 2.0}, "need sigma_min < sigma_max, got 5.0 and 2.0"),
        ({"shape": None}, r"does not say what shape its samples have; pass shape=\(C, H, W\)"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        train(**options)


def test_a_bottleneck_that_is_no_picture_is_named():
    with pytest.raises(ConfigError, match=r"features.*\(B, C, h, w\), got"):
        train(lambda x, sigma: (mixture(x, sigma), torch.zeros(len(x), 5, 3)), shape=SHAPE)
