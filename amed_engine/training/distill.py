"""`distill`: a predictor for a model, trained against a teacher's trajectories. Zhou et al. 2024 (arXiv:2312.00094)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from amed_engine.engine.graphs import GraphCache
from amed_engine.engine.measure import measured
from amed_engine.engine.model import Model
from amed_engine.engine.notices import tell_of_zero
from amed_engine.engine.resolve import resolve
from amed_engine.engine.runner import Runner
from amed_engine.engine.steps import steps_for
from amed_engine.errors import ConfigError, NonFiniteError
from amed_engine.sampling.denoiser import Denoised, Denoiser, as_denoised, check_features
from amed_engine.sampling.modes import differentiable, exactly, leaving_modes, plain_defaults
from amed_engine.sampling.modules import is_lazy
from amed_engine.sampling.predictors.amed import AMEDPredictor
from amed_engine.solvers import make_solver, solver_names
from amed_engine.solvers.mean import FirstStep
from amed_engine.solvers.plan import Plan, make_plan
from amed_engine.training import report
from amed_engine.training.batches import Batches, Conditions, mean_answer
from amed_engine.training.gauss_newton import Example
from amed_engine.training.held_out import LATENTS, REPORTED, STREAM, HeldOut, default_plan, fine_plan, judge, unseen
from amed_engine.training.presets import Settings, choose, made_for, noise_range
from amed_engine.training.ranks import join
from amed_engine.training.resume import Checkpoints
from amed_engine.training.teacher import Loss, Teacher, squared_error
from amed_engine.training.trainer import Round, Trainer

logger = logging.getLogger("amed_engine")
OBJECTIVES = ("greedy", "end_to_end")
_REMEDY = "train longer (total_kimg=), with another preset, solver or number of evaluations, or fit one"


@leaving_modes
def distill(
    model: Any,
    *,
    nfe: int = 5,
    preset: str = "amed-solver",
    solver: str | None = None,
    solver_options: Mapping[str, Any] | None = None,
    schedule: str | None = None,
    rho: float | None = None,
    afs: FirstStep | None = None,
    scale_dir: float | None = None,
    scale_time: float | None = None,
    scales: str = "bounded",
    teacher: str | None = None,
    teacher_options: Mapping[str, Any] | None = None,
    teacher_intermediate: int | None = None,
    teacher_schedule: str | None = None,
    teacher_rho: float | None = None,
    objective: str = "greedy",
    learn_sigmas: bool = False,
    loss: Loss = squared_error,
    conditions: Conditions = None,
    guidance_scale: float | None = None,
    total_kimg: float | None = None,
    batch: int | None = None,
    accumulate: int = 1,
    lr: float | None = None,
    seed: int = 0,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    shape: tuple[int, ...] | None = None,
    label_dim: int | None = None,
    progress: bool = True,
    on_round: Callable[[Round], None] | None = None,
    out_dir: str | Path | None = None,
    checkpoint_dir: str | Path | None = None,
    checkpoint_seconds: float = 60.0,
    resume: str = "auto",
) -> AMEDPredictor:
    """Train an AMED predictor for a model; minutes for small networks.

        greedy:      loss_i = |x_student(sigma_i+1) - x_teacher(sigma_i+1)|² / B, a step of Adam per interval
        end_to_end:  loss = |x_student(sigma_N) - x_teacher(sigma_N)|² / B, a step per batch, through all evaluations

    Steps go down log(loss), so that intervals whose losses are orders of magnitude apart weigh the same.

    model, sigma_min, sigma_max, shape, label_dim: as `Sampler` takes them; training runs where the model's parameters
    are, and leaves them alone. preset: "amed-solver" or "amed-plugin", the paper's; an option that is None is the
    preset's. solver, solver_options, schedule, rho, afs: the student, "amed" or a plugin on a solver that takes
    one. scale_dir, scale_time, scales: as `AMEDPredictor` takes them. teacher, teacher_options: any
    training-free solver, with teacher_intermediate extra noise levels inside every interval, spaced as the student's or
    by teacher_schedule. learn_sigmas: with end_to_end, train the inner noise levels too. loss: (x, target) -> (B,), not
    negative, in place of the squared distance. conditions: None draws class labels; else see `Batches`. total_kimg:
    thousands of trajectories, `batch` at a time, computed in `accumulate` parts. lr: of Adam, falling to zero over the
    second half. seed: of the weights, latents and labels; the global generators are untouched. on_round: called after
    every batch. out_dir: gets history.csv and history.png.
    checkpoint_dir: gets the whole state of the run every checkpoint_seconds (default: in out_dir, if there is one);
    with resume="auto" a run goes on from the newest, to the same bits on a CPU. Under torchrun the processes share the
    work; the first one reports and writes.
    Returns the predictor, its plan set, and `report`: how it compares with what runs without one, on latents that were not
    trained on; a log line tells, a warning where it lost. Raises ConfigError, FileFormatError, or NonFiniteError after three
    losses or gradients in a row that were not finite: the last checkpoint is from before them.
    """
    resolved = resolve(model, shape=shape, label_dim=label_dim, sigma_min=sigma_min, sigma_max=sigma_max)
    student = {"solver": solver, "solver_options": solver_options, "schedule": schedule, "rho": rho}
    taught = {"teacher": teacher, "teacher_options": teacher_options, "teacher_intermediate": teacher_intermediate}
    rest = {"scale_dir": scale_dir, "scale_time": scale_time, "total_kimg": total_kimg, "batch": batch, "lr": lr}
    settings = choose(preset, {**student, **taught, **rest})
    _check_objective(objective, learn_sigmas)
    plan = _student_plan(resolved, nfe, settings, afs, guidance_scale)
    fine = teacher_schedule, teacher_rho, steps_for(resolved.network, settings.schedule, teacher_schedule)
    teach = Teacher.of(plan, settings.teacher, settings.teacher_options, settings.teacher_intermediate, *fine)
    if out_dir is not None:
        report.prepare(out_dir)
        checkpoint_dir = Path(out_dir) / "checkpoints" if checkpoint_dir is None else checkpoint_dir
    _check_gradients(resolved.module)
    exact = exactly(resolved.device)  # in the backward pass too
    with exact, differentiable("the model"), _frozen(resolved.module), join(resolved.device) as ranks:
        parts = ranks.parts(settings.batch, accumulate)
        teach.cache = _graphs(resolved, settings.batch // (ranks.size * accumulate))
        data = Batches(resolved, plan, settings.batch, torch.Generator().manual_seed(seed), conditions)
        fresh = data.unseen(seed + STREAM)  # now: conditions may end with the training
        predictor = _new_predictor(data, settings, scales, seed)
        rounds = math.ceil(settings.total_kimg * 1000 / settings.batch)
        trainer = Trainer(predictor, teach, data, loss, ranks, lr=settings.lr, length=rounds, learn_sigmas=learn_sigmas)
        saved = Checkpoints(checkpoint_dir, checkpoint_seconds, _identity(trainer, settings, objective, seed))
        saved.resume(trainer, resume)
        ranks.wait()
        leads = ranks.rank == 0
        after = _Reports(saved, out_dir, on_round) if leads else None
        _train(trainer, parts, objective == "end_to_end", after, progress and leads)
        ranks.wait()
        predictor.plan = trainer.plan
        predictor.report = _judge(trainer, fresh, seed, len(range(settings.batch)[parts[0]]))
    level = logging.WARNING if leads and predictor.report.lost else logging.INFO
    logger.log(level, "NFE %d: %s", trainer.plan.nfe, predictor.report, extra=REPORTED)
    return predictor.eval()


def _judge(trainer: Trainer, denoiser: Denoiser, seed: int, rows: int) -> HeldOut:
    """Beside what runs without a predictor, on latents that were not trained on, at most `rows` at a time."""
    model, plan = trainer.data.model, trainer.plan
    fine, x = fine_plan(model, plan.nfe), torch.empty(trainer.data.batch, *trainer.data.shape, device=model.device)
    bound = Example(denoiser, x, x, mean_answer(plan.mean, denoiser))
    examples = list(unseen([bound], fine, seed, min(LATENTS, len(x)), rows))
    return judge(plan, trainer.predictor, [default_plan(model, plan.nfe)], examples, fine, _REMEDY)


def _check_objective(objective: str, learn_sigmas: bool) -> None:
    if objective not in OBJECTIVES:
        raise ConfigError(f"objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}")
    if learn_sigmas and objective != "end_to_end":
        raise ConfigError(
            f"learn_sigmas needs objective='end_to_end', got {objective!r}: the teacher's states are at fixed noise levels"
        )


def _check_gradients(module: nn.Module | None) -> None:
    """Training asks for the predictor's gradients alone, by autograd.grad, which FSDP does not know."""
    sharded = ("FullyShardedDataParallel", "FSDPModule")
    parts = () if module is None else module.modules()
    if any(kind.__name__ in sharded for part in parts for kind in type(part).__mro__):
        raise ConfigError(
            "a model under FSDP gives gradients by backward() alone, which distill cannot use; pass the module that it wraps, "
            "under DistributedDataParallel if need be, or use fit, which needs no gradients"
        )


def _graphs(model: Model, rows: int) -> GraphCache | None:
    """For the teacher's trajectories of one part of a batch, on a GPU."""
    return Runner(model, model.device, "auto", (rows,), check_finite=False).cache


class _Reports:
    """What the leading process does after every batch, and at the end."""

    def __init__(self, saved: Checkpoints, out_dir: str | Path | None, on_round: Callable[[Round], None] | None):
        self.saved, self.out_dir, self.on_round = saved, out_dir, on_round

    def round(self, trainer: Trainer, seen: Round) -> None:
        if self.saved.due():
            self.saved.write(trainer)
            report.save(self.out_dir, trainer.history, picture=False)
        if self.on_round is not None:
            self.on_round(seen._replace(losses=[*seen.losses], midpoints=[*seen.midpoints]))  # they go into the history

    def end(self, trainer: Trainer) -> None:
        self.saved.write(trainer)
        report.save(self.out_dir, trainer.history, picture=True)


def _train(trainer: Trainer, parts: list[slice], end_to_end: bool, reports: _Reports | None, progress: bool) -> None:
    title = f"distill NFE {trainer.data.plan.nfe}"
    with tqdm(total=trainer.length, initial=trainer.rounds, desc=title, unit="batch", disable=not progress) as bar:
        while trainer.rounds < trainer.length:
            try:
                seen = trainer.round(parts, end_to_end)
            except NonFiniteError as error:
                raise _with_checkpoint(error, reports) from None
            report.show(bar, seen)
            if reports is not None:
                reports.round(trainer, seen)
    if reports is not None:
        reports.end(trainer)


def _with_checkpoint(error: NonFiniteError, reports: _Reports | None) -> NonFiniteError:
    files = [] if reports is None else reports.saved.files()
    where = f"; the last good checkpoint is {files[-1]}" if files else ""
    return NonFiniteError(f"{error}{where}; lower lr, or look at what the model returns", error.step, error.seeds)


def _identity(trainer: Trainer, settings: Settings, objective: str, seed: int) -> dict[str, Any]:
    """What has to be the same for a checkpoint to be of this run; how it is split need not."""
    return {
        **asdict(settings),
        "student": trainer.data.plan.to_json(),
        "teacher": trainer.teacher.plan.to_json(),
        "predictor": trainer.predictor.config,
        "shape": list(trainer.data.shape),
        "objective": objective,
        "learn_sigmas": trainer.levels is not None,
        "loss": getattr(trainer.loss, "__qualname__", type(trainer.loss).__qualname__),
        "seed": seed,
    }


def _student_plan(
    model: Model, nfe: int, settings: Settings, afs: FirstStep | None, guidance_scale: float | None
) -> Plan:
    solver, options = settings.solver, dict(settings.solver_options)
    if make_solver(solver, **options).takes_predictor == "none":
        raise ConfigError(
            f"solver {solver!r} takes no predictor; students are amed, {', '.join(solver_names('optional'))}"
        )
    if options.get("points", 1) != 1:
        raise ConfigError(f"an AMEDPredictor gives one midpoint, solver options {options} want more points")
    own = {"solver": solver, "options": options, "schedule": settings.schedule, "rho": settings.rho}
    rest = {"afs": afs, "guidance_scale": guidance_scale, **noise_range(model)}
    own["alphas_cumprod"] = steps_for(model.network, settings.schedule)
    plan = make_plan(nfe, midpoint=True, **own, **rest)
    tell_of_zero(afs, plan, logging.INFO)  # training learns to make up for it
    return made_for(model, measured(plan, model))


def _new_predictor(data: Batches, settings: Settings, scales: str, seed: int) -> AMEDPredictor:
    """A predictor for this model's bottleneck, found by one evaluation, with weights drawn from the seed."""
    denoiser, x = data.probe()
    features = _differentiated(denoiser, x, x.new_full((len(x),), data.plan.sigmas[0])).features
    if features is not None:
        check_features(features, rows=len(x))
    size = (8, 8) if features is None else (features.shape[2], features.shape[3])
    with plain_defaults(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed other devices too, and for good
        predictor = AMEDPredictor(settings.scale_dir, settings.scale_time, bottleneck=size, scales=scales)
    return predictor.to(x.device)


def _differentiated(denoiser: Denoiser, x: Tensor, sigma: Tensor) -> Denoised:
    """An answer. Raises ConfigError where its gradient is false: that of the preconditioning round a network without one.

    Which is a number times x for D·x, as that of Gaussian data is too; so what D becomes a step further on has the last word.
    """
    answer = as_denoised(denoiser(x.requires_grad_(), sigma))
    at, x0 = x.detach(), answer.x0
    gradient = torch.autograd.grad((x0 * at).sum(), x)[0] if x0.requires_grad else torch.zeros_like(x)
    if torch.allclose(gradient, at * (gradient / at).flatten()[0], rtol=1e-4, atol=0):
        with torch.no_grad():
            moved = as_denoised(denoiser(1.1 * at, sigma)).x0 - x0
        if not torch.allclose(moved, 0.1 * gradient, rtol=0.1, atol=0.1 * float(moved.abs().max())):
            raise ConfigError(
                "the model answers without gradients, as under torch.no_grad or after detach(), and a predictor is trained "
                "through them; take that out of the model, or use amed_engine.fit, which needs none"
            )
    return answer


@contextmanager
def _frozen(module: nn.Module | None) -> Iterator[None]:
    """The denoiser's parameters without gradients, put back as they were afterwards; DistributedDataParallel waits for none."""
    own = () if module is None else (p for p in module.parameters() if not is_lazy(p) and not p.is_inference())
    trainable = [parameter for parameter in own if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    with ExitStack() as stack:
        for part in () if module is None else module.modules():
            if isinstance(part, nn.parallel.DistributedDataParallel):
                stack.enter_context(part.no_sync())
        try:
            yield
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)
