"""Training a predictor against a teacher's trajectories, interval by interval: the paper's algorithm.

For every interval the student's step is compared with the teacher's state at its end,

    loss_i = |x_student(sigma_{i+1}) - x_teacher(sigma_{i+1})|² / B,

and the predictor takes one Adam step per interval. Single-step solvers start each interval from the teacher's state,
multistep ones from their own, whose history they need. The denoiser is frozen. Zhou et al. 2024 (arXiv:2312.00094).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from amed_engine.checkpoints import fingerprint
from amed_engine.denoiser import Denoiser
from amed_engine.errors import ConfigError, NonFiniteError
from amed_engine.loop import Program, State, Trajectory, sample
from amed_engine.models import Model, resolve
from amed_engine.plan import Plan, clamp_range, make_plan
from amed_engine.predictor import AMEDPredictor
from amed_engine.requests import bind_labels, vectors
from amed_engine.schedule import make_schedule
from amed_engine.solvers import make_solver

MAX_SKIPPED = 3  # non-finite losses in a row after which training stops


class Round(NamedTuple):
    """What `on_round` gets after each batch: images seen, and the loss of every interval."""

    images: int
    losses: list[float]


def distill(
    model: Any,
    *,
    nfe: int = 5,
    solver: str = "amed",
    solver_options: Mapping[str, Any] | None = None,
    schedule: str = "time_uniform",
    rho: float | None = None,
    afs: bool | None = None,
    scale_dir: float = 0.01,
    scale_time: float = 0.0,
    teacher: str = "heun",
    teacher_options: Mapping[str, Any] | None = None,
    teacher_intermediate: int = 1,
    guidance_scale: float | None = None,
    total_kimg: float = 10,
    batch: int = 128,
    lr: float = 5e-3,
    seed: int = 0,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    shape: tuple[int, ...] | None = None,
    label_dim: int | None = None,
    progress: bool = True,
    on_round: Callable[[Round], None] | None = None,
) -> AMEDPredictor:
    """Train an AMED predictor for a model; minutes for small networks.

    model, sigma_min, sigma_max, shape, label_dim: as `Sampler` takes them; training runs where the model's parameters
    are. nfe, solver, solver_options, schedule, rho, afs: the student ("amed", or a plugin on euler, dpm, ipndm, deis,
    dpmpp, unipc). scale_dir, scale_time: half-widths of the two scales, 0 for none. teacher: any training-free solver,
    with teacher_intermediate extra noise levels inside every interval. total_kimg: thousands of trajectories, `batch`
    at a time. lr: of Adam. seed: of the weights, latents and labels; the global generators are untouched.
    Returns the predictor, its plan set. Raises ConfigError, or NonFiniteError after three non-finite losses in a row.
    """
    resolved = resolve(model, shape=shape, label_dim=label_dim, sigma_min=sigma_min, sigma_max=sigma_max)
    plan = _student_plan(resolved, nfe, solver, solver_options, schedule, rho, afs, guidance_scale)
    teach = Teacher.of(plan, teacher, teacher_options, teacher_intermediate)
    if not isinstance(batch, int) or batch < 1 or not total_kimg > 0 or not lr > 0:
        raise ConfigError(f"batch, total_kimg and lr must be positive, batch whole, got {batch}, {total_kimg}, {lr}")
    generator = torch.Generator().manual_seed(seed)
    with _frozen(resolved.module), torch.enable_grad():
        data = Batches(resolved, plan, batch, generator)
        predictor = _new_predictor(data, scale_dir, scale_time, seed)
        rounds = math.ceil(total_kimg * 1000 / batch)
        with tqdm(total=rounds, desc=f"distill NFE {plan.nfe}", unit="batch", disable=not progress) as bar:
            _train(predictor, plan, teach, data, rounds, lr, _reporter(bar, batch, on_round))
    predictor.plan = plan
    return predictor.eval()


def _student_plan(model: Model, nfe, solver, options, schedule, rho, afs, guidance_scale) -> Plan:
    if make_solver(solver, **dict(options or {})).midpoint == "none":
        raise ConfigError(
            f"solver {solver!r} takes no predictor; students are amed, euler, dpm, ipndm, deis, dpmpp, unipc"
        )
    if guidance_scale is not None and not model.label_dim:
        raise ConfigError("guidance_scale needs a class-conditional model; this one has label_dim 0")
    if dict(options or {}).get("points", 1) != 1:
        raise ConfigError(f"an AMEDPredictor gives one midpoint, solver options {dict(options or {})} want more points")
    low, high = clamp_range(model.sigma_min, model.sigma_max)
    plan = make_plan(
        nfe,
        solver=solver,
        options=options,
        schedule=schedule,
        rho=rho,
        sigma_min=low,
        sigma_max=high,
        afs=afs,
        midpoint=True,
        guidance_scale=guidance_scale,
    )
    return replace(plan, model=fingerprint(model.module))


class Teacher(NamedTuple):
    """A training-free solver on a refinement of the student's noise levels."""

    plan: Plan
    stride: int

    @classmethod
    def of(cls, student: Plan, solver: str, options: Mapping[str, Any] | None, intermediate: int) -> Teacher:
        if not isinstance(intermediate, int) or intermediate < 0:
            raise ConfigError(f"teacher_intermediate must be an integer that is not negative, got {intermediate}")
        stride = intermediate + 1
        count = student.intervals * stride + 1
        levels = make_schedule(student.schedule, count, student.sigmas[-1], student.sigmas[0], student.rho)
        if not torch.allclose(levels[::stride], student.levels, rtol=1e-6):
            raise ConfigError(f"schedule {student.schedule!r} does not refine: its levels move with their number")
        plan = make_plan(None, solver=solver, options=options, schedule=levels, afs=False)
        if plan.midpoint:
            raise ConfigError(f"teacher {solver!r} needs a predictor itself; use heun, dpm, ipndm, ...")
        return cls(plan, stride)

    def states(self, denoiser: Denoiser, x: Tensor) -> Tensor:
        """The teacher's states at the student's noise levels, (intervals + 1, B, ...)."""
        with torch.no_grad():
            states = sample(denoiser, x, self.plan.levels, self.plan.make_solver(), trajectory=True)
        return states[:: self.stride]


class Batches:
    """Endless batches: a denoiser with its conditions bound, and starting points x = sigma_0 · noise."""

    def __init__(self, model: Model, plan: Plan, batch: int, generator: torch.Generator):
        if model.shape is None:
            raise ConfigError("the model does not say what shape its samples have; pass shape=(C, H, W)")
        self.model, self.plan, self.batch, self.generator = model, plan, batch, generator
        self.shape: tuple[int, ...] = model.shape

    def draw(self, batch: int | None = None) -> tuple[Denoiser, Tensor]:
        batch, device = batch or self.batch, self.model.device
        x = torch.randn((batch, *self.shape), generator=self.generator).to(device) * self.plan.sigmas[0]
        labels = None
        if self.model.label_dim:
            classes = torch.randint(self.model.label_dim, (batch,), generator=self.generator)
            labels = vectors(classes, self.model.label_dim).to(x)
        return bind_labels(self.model, labels, self.plan.guidance_scale), x


def _new_predictor(data: Batches, scale_dir: float, scale_time: float, seed: int) -> AMEDPredictor:
    """A predictor for this model's bottleneck, found by one evaluation, with weights drawn from the seed."""
    denoiser, x = data.draw(1)
    with torch.no_grad():
        features = denoiser(x, torch.full((1,), data.plan.sigmas[0], device=x.device)).features  # type: ignore[union-attr]
    if features is not None and features.dim() != 4:
        raise ConfigError(
            f"the model's features must be (B, C, h, w), got {tuple(features.shape)}; return D alone instead"
        )
    size = (8, 8) if features is None else (features.shape[2], features.shape[3])
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed other devices too, and for good
        return AMEDPredictor(scale_dir, scale_time, bottleneck=size).to(x.device)


def _train(
    predictor: AMEDPredictor,
    plan: Plan,
    teacher: Teacher,
    data: Batches,
    rounds: int,
    lr: float,
    report: Callable[[int, list[float]], None],
) -> None:
    program = Program.build(plan.make_solver(), plan.levels, predictor, afs=plan.afs).on(
        data.model.device, torch.float32
    )
    optimizer = torch.optim.Adam(predictor.parameters(), lr=lr)
    skipped = 0
    for r in range(rounds):
        denoiser, x = data.draw()
        losses = []
        for loss in _interval_losses(program, denoiser, teacher.states(denoiser, x)):
            losses.append(loss.item())
            skipped = 0 if _descend(optimizer, predictor, loss) else skipped + 1
            if skipped == MAX_SKIPPED:
                raise NonFiniteError(f"loss or gradient was NaN or infinite {skipped} times in a row", r, [])
        report(r, losses)


def _interval_losses(program: Program, denoiser: Denoiser, targets: Tensor) -> Iterator[Tensor]:
    """The loss of each interval in turn; the caller may change the predictor in between."""
    run = Trajectory(program, denoiser)
    multistep = program.solver.memory > 0
    state = State.start(targets[0])
    for i in range(program.intervals):
        if not multistep:
            state = State.start(targets[i])
        state = run.interval(state, i)[-1]
        yield (state.y[0] - targets[i + 1]).square().sum() / len(state.x)
        state = state.detach()
        run.walk.detach()


def _descend(optimizer: torch.optim.Optimizer, predictor: nn.Module, loss: Tensor) -> bool:
    """One step down the loss; False, and no step, where loss or gradient is not finite."""
    parameters = list(predictor.parameters())
    # autograd.grad reaches the predictor only: nothing accumulates in the denoiser.
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    if not all(bool(torch.isfinite(g).all()) for g in (loss, *grads) if g is not None):
        return False
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad
    optimizer.step()
    return True


@contextmanager
def _frozen(module: nn.Module | None) -> Iterator[None]:
    """The denoiser's parameters without gradients, put back as they were afterwards."""
    trainable = [] if module is None else [p for p in module.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def _reporter(bar: tqdm, batch: int, on_round: Callable[[Round], None] | None) -> Callable[[int, list[float]], None]:
    def report(r: int, losses: list[float]) -> None:
        bar.set_postfix(loss=" ".join(f"{loss:.3g}" for loss in losses), refresh=False)
        bar.update()
        if on_round is not None:
            on_round(Round((r + 1) * batch, losses))

    return report
