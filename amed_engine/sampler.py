"""`Sampler(model).run(batch)`: what users call."""

from __future__ import annotations

import copy
import logging
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from amed_engine import zoo
from amed_engine.checkpoints import load_predictor
from amed_engine.errors import ConfigError, NonFiniteError
from amed_engine.loop import Program, integrate
from amed_engine.models import Model, resolve
from amed_engine.plan import Plan, clamp_range
from amed_engine.planning import Wishes, check_model, choose_plan
from amed_engine.predictor import AMEDPredictor
from amed_engine.requests import Request, bind_labels, make_request

logger = logging.getLogger("amed_engine")


class StepInfo(NamedTuple):
    """What a callback gets after each interval: step 1 .. steps, and the state x at noise level sigma."""

    step: int
    steps: int
    sigma: float
    x: Tensor


@dataclass(frozen=True)
class SampleResult:
    """Images (B, C, H, W) in the sampler's dtype and how they came about.

    seeds: one per image, None for latents the caller gave. labels: class indices or the given vectors, None for an
    unconditional model. nfe: network evaluations per image. backend: what ran. chunks: 1, or more where memory was short.
    """

    images: Tensor
    nfe: int
    seeds: list[int] | None
    labels: Tensor | None
    backend: str
    plan: Plan
    chunks: int
    seconds: float


class Sampler:
    """Draws samples from a model in a fixed number of network evaluations.

    model: a zoo name, a path, an nn.Module (torch.compile'd and TorchScript ones too), an ExportedProgram, or a callable
        (x, sigma (B,)[, labels (B, label_dim)]) -> D or (D, features).
    predictor: an AMEDPredictor, or a path to one. Its plan decides solver, schedule and NFE; arguments that contradict
        it raise. Without one, a zoo model brings its own for this NFE; otherwise a training-free solver runs.
    solver, solver_options: a name and options of `make_solver`. nfe: network evaluations per sample, 5 unless the
        predictor or the schedule says otherwise. schedule, rho: a name of `make_schedule`, or the noise levels themselves.
    afs: analytic first step; None uses it wherever the NFE allows.
    sigma_min, sigma_max, shape (C, H, W), label_dim: facts of the model, where its attributes do not tell.
    device: the model is moved there; None leaves it. dtype: float32 or float64, of state and coefficients.
    verify: compare the model with the fingerprint in the predictor's plan.
    Raises ConfigError for anything that cannot work, before sampling.

    A Sampler keeps no state between runs and may be shared by threads.
    """

    def __init__(
        self,
        model: Any,
        predictor: AMEDPredictor | str | os.PathLike | None = None,
        *,
        solver: str | None = None,
        solver_options: Mapping[str, Any] | None = None,
        nfe: int | None = None,
        schedule: str | Tensor | None = None,
        rho: float | None = None,
        afs: bool | None = None,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        shape: tuple[int, ...] | None = None,
        label_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        verify: bool = True,
    ):
        if dtype not in (torch.float32, torch.float64):
            raise ConfigError(f"dtype is the state's and must be torch.float32 or torch.float64, got {dtype}")
        self.model = resolve(model, shape=shape, label_dim=label_dim, sigma_min=sigma_min, sigma_max=sigma_max)
        self.dtype, self.device = dtype, _place(self.model, device)
        sigma_low, sigma_high = clamp_range(self.model.sigma_min, self.model.sigma_max)
        wishes = Wishes(solver, solver_options, nfe, schedule, rho, afs, sigma_low, sigma_high)
        if isinstance(predictor, (str, os.PathLike)):
            predictor = load_predictor(predictor)
        bundled = predictor is None and wishes.open
        if bundled and self.model.name:
            predictor = zoo.bundled_predictor(self.model.name, nfe or 5)
        self.plan = choose_plan(wishes, predictor)
        if predictor is not None and verify:
            check_model(self.model, self.plan)
        # A bundled predictor steps aside where a run asks for guidance it was not trained for; a given one raises.
        self._fallback = wishes if bundled and predictor is not None else None
        self._programs = {self.plan.guidance_scale: self._build(self.plan, predictor)}
        if predictor is None and wishes.open:
            logger.warning(
                "no predictor for this model at NFE %d: sampling with %s; amed_engine.distill(model, nfe=%d) trains one",
                self.plan.nfe,
                self.plan.describe(),
                self.plan.nfe,
            )

    @property
    def nfe(self) -> int:
        """Network evaluations per sample."""
        return self.plan.nfe

    def run(
        self,
        batch: int | Sequence[int] | Tensor,
        class_labels: int | Sequence[int] | Tensor | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | None = None,
        callback: Callable[[StepInfo], None] | None = None,
        progress: bool = False,
        out: Tensor | None = None,
    ) -> SampleResult:
        """Draw samples.

        batch: how many; or the seeds, one per sample; or latents (B, C, H, W) of unit variance. The same seed gives the
            same noise and label in any batch, order or device; the global generators are untouched.
        class_labels: one class for all, or one per sample, or vectors (B, label_dim). None on a conditional model draws
            each label from its sample's seed (for latents, from the row number).
        guidance_scale: classifier-free guidance D_u + g (D_c - D_u). generator: draws the seeds where batch is a number.
        callback: called with a StepInfo after each interval. progress: a bar on stderr. out: a tensor that receives the images.
        Raises ConfigError, or NonFiniteError naming step and seeds.
        """
        started = time.perf_counter()
        request = make_request(self.model, batch, class_labels, generator, dtype=self.dtype, device=self.device)
        _check_out(out, request.latents)
        program, plan = self._program(guidance_scale, request)
        images, chunks = self._run_chunks(program, plan, request, guidance_scale, _observer(callback, progress, plan))
        if out is not None:
            images = out.copy_(images)
        seconds = time.perf_counter() - started
        return SampleResult(images, plan.nfe, request.seeds, request.classes, "eager", plan, chunks, seconds)

    def _build(self, plan: Plan, predictor: AMEDPredictor | None) -> Program:
        if predictor is not None:
            # A copy: the caller's predictor keeps its device, precision and mode.
            predictor = copy.deepcopy(predictor).to(self.device, self.dtype).eval()
        program = Program.build(
            plan.make_solver(), plan.levels, predictor, afs=plan.afs, denoise_to_zero=plan.denoise_to_zero
        )
        return program.on(self.device, self.dtype)

    def _program(self, guidance_scale: float | None, request: Request) -> tuple[Program, Plan]:
        if guidance_scale is not None and not self.model.label_dim:
            raise ConfigError("guidance_scale needs a class-conditional model; this one has label_dim 0")
        program = self._programs.get(guidance_scale)
        if program is not None:
            return program, self.plan
        program = self._programs[self.plan.guidance_scale]
        if program.predictor is None:
            return program, self.plan
        if self._fallback is None:
            raise ConfigError(
                f"this predictor was trained with guidance_scale={self.plan.guidance_scale}, got {guidance_scale}; pass that "
                f"value, or train one with amed_engine.distill(model, guidance_scale={guidance_scale})"
            )
        plan = self._fallback.plan(midpoint=False)
        logger.warning(
            "the bundled predictor is not for guidance_scale=%s: sampling with %s", guidance_scale, plan.describe()
        )
        return self._build(plan, None), plan

    def _run_chunks(
        self,
        program: Program,
        plan: Plan,
        request: Request,
        scale: float | None,
        observe: Callable[[int, Tensor], None],
    ) -> tuple[Tensor, int]:
        """The whole batch, or pieces of half the size each time memory runs out."""
        total = size = len(request.latents)
        images: list[Tensor] = []
        start = 0
        while start < total:
            try:
                images.append(self._draw(program, request.rows(start, start + size), scale, observe))
                start += size
            except RuntimeError as error:
                if not _is_out_of_memory(error) or size == 1:
                    raise
                if size == total:
                    warnings.warn(
                        f"out of memory for a batch of {total}: sampling in smaller chunks",
                        RuntimeWarning,
                        stacklevel=3,
                    )
                size = (size + 1) // 2
                _free_memory(self.device)
        return (images[0] if len(images) == 1 else torch.cat(images)), len(images)

    @torch.no_grad()
    def _draw(
        self, program: Program, request: Request, scale: float | None, observe: Callable[[int, Tensor], None]
    ) -> Tensor:
        denoiser = bind_labels(self.model, request.labels, scale)
        x = request.latents * program.sigmas[0]
        states = integrate(program, denoiser, x, observe)
        if not bool(torch.isfinite(states[-1]).all()):
            raise _non_finite(states, request)
        return states[-1]


def _place(model: Model, device: torch.device | str | None) -> torch.device:
    if device is None:
        return model.device
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"unknown device {device!r}; pass e.g. 'cpu' or 'cuda:0'") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {str(device)!r} was asked for, but torch sees no CUDA device; pass device='cpu'")
    if model.module is not None:
        model.module.to(device)
    return device


def _check_out(out: Tensor | None, latents: Tensor) -> None:
    if out is None:
        return
    got, expected = (tuple(out.shape), out.dtype, out.device), (tuple(latents.shape), latents.dtype, latents.device)
    if got != expected:
        raise ConfigError(f"out must be {expected} (shape, dtype, device), got {got}")


def _observer(callback: Callable[[StepInfo], None] | None, progress: bool, plan: Plan) -> Callable[[int, Tensor], None]:
    bar = tqdm(total=plan.intervals, desc="sampling", unit="step", leave=False) if progress else None

    def observe(interval: int, x: Tensor) -> None:
        if callback is not None:
            callback(StepInfo(interval + 1, plan.intervals, plan.sigmas[interval + 1], x))
        if bar is not None:
            # A chunk that was tried again starts over.
            bar.n = interval + 1
            bar.refresh()
            if interval + 1 == plan.intervals:
                bar.close()

    return observe


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _free_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _non_finite(states: list[Tensor], request: Request) -> NonFiniteError:
    """Find the first interval and the samples, from the states that the loop has made anyway."""
    broken = [~torch.isfinite(state).flatten(1).all(1) for state in states]
    step = next(i for i, rows in enumerate(broken) if bool(rows.any()))
    rows = broken[-1].nonzero().flatten().tolist()
    named = rows if request.seeds is None else [request.seeds[row] for row in rows]
    what = "rows" if request.seeds is None else "seeds"
    return NonFiniteError(
        f"samples became NaN or infinite in step {step} of {len(states) - 1}, {what} {named}; check the model's output at that "
        "noise level, and its precision (bfloat16 or float32 instead of float16)",
        step,
        named,
    )
