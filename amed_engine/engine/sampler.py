"""`Sampler(model).run(batch)`: what users call."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from amed_engine.engine.arrays import check_out, check_output_type, delivered, writable
from amed_engine.engine.export.write import Exported, Job, export
from amed_engine.engine.graphs import Stats, WarmupReport
from amed_engine.engine.model import place, tune
from amed_engine.engine.prepared import Wishes, prepare
from amed_engine.engine.request import make_request
from amed_engine.engine.resolve import resolve
from amed_engine.engine.result import SampleResult, StepInfo, make_observer
from amed_engine.engine.runner import BoundLoop, Runner
from amed_engine.engine.verification import verify_model
from amed_engine.errors import ConfigError
from amed_engine.sampling.predictors import Predictor
from amed_engine.solvers.mean import FirstStep
from amed_engine.solvers.plan import Plan
from amed_engine.solvers.program import Program


class Sampler:
    """Draws samples from a model in a fixed number of network evaluations.

    model: a zoo name, a path, an nn.Module (torch.compile'd and TorchScript ones too), an ExportedProgram, or a callable
        (x, sigma (B,)[, labels (B, label_dim)]) -> D or (D, features).
    predictor: an AMEDPredictor, ConstantPredictor or CoefficientPredictor, or a path to one. Its plan decides solver,
        schedule and NFE; arguments that contradict it raise. For None, a zoo model by name brings its own where nothing but
        the NFE is asked for, and otherwise, as for "none", a training-free solver runs.
    plan: a `Plan` or the path of one (`Plan.save`, `amed search-schedule`): the recipe, which decides solver, options, noise
        levels, NFE, afs and denoise_to_zero. What contradicts it raises, a predictor's own plan too.
    solver, solver_options: a name and options of `make_solver`. nfe: network evaluations per sample, 5 unless the
        predictor or the schedule says otherwise. schedule, rho: a name of `make_schedule`, or the noise levels themselves.
    afs: the first step, see `make_plan`: False, True (analytic, for data about zero) or "mean" (about the model's mean
        answer, which is measured now unless the plan has it, see `measure_mean`). None never measures: "mean" where a zoo
        model brings its own, else an evaluation, or True where the NFE leaves no other choice.
    sigma_min, sigma_max, shape (C, H, W), label_dim: facts of the model, where its attributes do not tell. weights: file or
        folder of a published model's; None looks where the environment variable AMED_WEIGHTS says.
    device: the model is moved there; None leaves it. dtype: float32 or float64, of state and coefficients.
    verify: compare the model with the fingerprint and the dtype in the plan, given or the predictor's, and look at what a
        module of unknown make answers to 16 latents at most, as `wrap` does: what is no denoiser is logged, once.
    backend: "auto" captures the whole loop as a CUDA graph on a GPU and runs eagerly elsewhere; "graph" insists, "eager"
        never captures. batch_sizes: what is captured; other batches are padded or split.
    compile: a mode of torch.compile ("default", "max-autotune-no-cudagraphs") for the network. memory_format: e.g.
        torch.channels_last. autocast: dtype of the network's arithmetic. check_finite: one look at the result, which waits
        for the device.
    Raises ConfigError for anything that cannot work, before sampling.

    Runs keep no state but captured graphs; a Sampler may be shared by threads.
    """

    def __init__(
        self,
        model: Any,
        predictor: Predictor | str | os.PathLike | None = None,
        *,
        plan: Plan | str | os.PathLike | None = None,
        solver: str | None = None,
        solver_options: Mapping[str, Any] | None = None,
        nfe: int | None = None,
        schedule: str | Tensor | None = None,
        rho: float | None = None,
        afs: FirstStep | None = None,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        shape: tuple[int, ...] | None = None,
        label_dim: int | None = None,
        weights: str | os.PathLike | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        verify: bool = True,
        backend: str = "auto",
        batch_sizes: Sequence[int] = (1, 8, 64),
        compile: str | None = None,
        memory_format: torch.memory_format | None = None,
        autocast: torch.dtype | None = None,
        check_finite: bool = True,
    ):
        if dtype not in (torch.float32, torch.float64):
            raise ConfigError(f"dtype is the state's and must be torch.float32 or torch.float64, got {dtype!r}")
        facts = {"shape": shape, "label_dim": label_dim, "sigma_min": sigma_min, "sigma_max": sigma_max}
        self.model = resolve(model, weights=weights, **facts)
        self.dtype, self.device = dtype, place(self.model, device)
        self._unseen = verify and self.model.shape is None  # then the first latents tell it
        tuned = tune(self.model, compile=compile, memory_format=memory_format, autocast=autocast)
        wishes = Wishes(predictor, plan, solver, solver_options, nfe, schedule, rho, afs, sigma_min, sigma_max)
        self._prepared = prepare(self.model, tuned, wishes, verify=verify, device=self.device, dtype=dtype)
        self._runner = Runner(tuned, self.device, backend, batch_sizes, check_finite)

    def __repr__(self) -> str:
        model = self.model.name or getattr(self.model.network, "__name__", type(self.model.network).__name__)
        return f"Sampler({model}, {self.plan.describe()}, backend {self._runner.backend} on {self.device})"

    @property
    def plan(self) -> Plan:
        """Everything but the network and the predictor's weights that decides what a latent becomes."""
        return self._prepared.plan

    @property
    def program(self) -> Program:
        """The linear program that runs, on the sampler's device."""
        return self._prepared.program

    @property
    def nfe(self) -> int:
        """Network evaluations per sample."""
        return self.plan.nfe

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the last bits of a sample beside model, plan and predictor, JSON-able."""
        return {"dtype": str(self.dtype).removeprefix("torch."), **self._runner.settings}

    def running(self, guidance_scale: float | None = None) -> tuple[Plan, Predictor | None]:
        """The plan and the predictor that run under this guidance; a bundled predictor steps aside where it is not for it.

        Raises ConfigError where nothing can.
        """
        program, plan = self._prepared.under(guidance_scale)
        return plan, self._prepared.predictor if program is self.program else None

    def run(
        self,
        batch: int | Sequence[int] | Tensor,
        class_labels: int | float | Sequence | Tensor | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | None = None,
        callback: Callable[[StepInfo], None] | None = None,
        progress: bool = False,
        out: Tensor | None = None,
        output_type: str = "torch",
    ) -> SampleResult:
        """Draw samples.

        batch: how many; or the seeds, one per sample; or latents (B, C, ...) of unit variance (not where the solver adds fresh
            noise, which seeds draw). The same seed gives the same noise and label in any batch, order or device; the global
            generators are untouched.
        class_labels: one class for all, or one per sample, or vectors (B, label_dim). None on a conditional model draws
            each label from its sample's seed (for latents, from the row number). Of a model that is told numbers, one for all
            or one per sample, or label_dim of them; no seed draws these.
        guidance_scale: classifier-free guidance D_u + g (D_c - D_u). generator: draws the seeds where batch is a number.
        callback: called with a StepInfo after each interval. progress: a bar on stderr. Either one runs eagerly.
        out: a tensor that receives the images.
        output_type: "torch"; "numpy"; or "dlpack", the kind of array that the latents are, in the tensor's own memory.
        Latents, seeds, labels and out may be any DLPack array (NumPy, CuPy, JAX); none is copied.
        Raises ConfigError, NonFiniteError naming step and seeds, or StaleGraphError.
        """
        started = time.perf_counter()
        check_output_type(output_type)
        out = writable("out", out)
        program, plan = self._prepared.under(guidance_scale)
        look = self._runner.may_wait()
        request = make_request(
            self.model,
            batch,
            class_labels,
            generator,
            dtype=self.dtype,
            device=self.device,
            look=look,
            noises=program.noises,
        )
        _check_shape(program, request.latents)
        check_out(out, request.latents)
        if self._unseen:
            self._unseen = False
            verify_model(replace(self.model, shape=tuple(request.latents.shape[1:])), plan)
        drawn = self._runner.run(program, request, guidance_scale, make_observer(callback, progress, plan))
        images = drawn.images if out is None else out.copy_(drawn.images)
        images = delivered(images, output_type, like=batch)
        seconds = time.perf_counter() - started
        return SampleResult(
            images, plan.nfe, request.seeds, request.classes, drawn.backend, plan, drawn.chunks, seconds
        )

    def warmup(self, guidance_scale: float | None = None) -> WarmupReport:
        """Capture the graphs of every batch size now instead of in the first run; seconds and bytes of each.

        Needs the model's sample shape. Without a GPU, or with backend="eager", there is nothing to capture.
        """
        program, _ = self._prepared.under(guidance_scale)
        kind: dict[str, Any] = {"dtype": self.dtype, "device": self.device, "noises": program.noises}
        example = make_request(self.model, [0], self.model.example_labels(1), None, **kind)
        return self._runner.warmup(program, example, guidance_scale)

    def clear_graphs(self) -> None:
        """Drop all captured graphs and their memory; the next run captures anew."""
        if self._runner.cache is not None:
            self._runner.cache.clear()

    def stats(self) -> Stats:
        """Captures, replays and eager runs of this Sampler so far."""
        return replace(self._runner.stats)

    def export(
        self,
        path: str | os.PathLike,
        format: str = "pt2",
        *,
        guidance_scale: float | None = None,
        max_batch: int = 256,
        verify: bool = True,
        options: Mapping[str, Any] | None = None,
    ) -> Exported:
        """Write the whole loop, network and predictor included, to one file; `amed_engine.load_package` reads it back.

        format: "pt2", compiled by AOTInductor for this kind of machine, which C++ runs too; "exported", the same graph as an
            ExportedProgram; "onnx"; or without the network, as JSON, "plan" and "schedule". Inputs are latents (B, C, H, W)
            of unit variance and, for a conditional model, labels (B, label_dim), for every B from 1 to max_batch; the
            output is images. guidance_scale is fixed in the file.
        verify: run the file and refuse it where its images differ. options: of AOTInductor, or of torch.onnx.export; for a
            plan freeze=True, for a schedule alphas_cumprod, as of `write_plan` and `write_schedule`.
        Raises ConfigError, or AmedError where a compiler fails.
        """
        program, plan = self._prepared.under(guidance_scale)
        plan = replace(plan, guidance_scale=guidance_scale)
        loop = BoundLoop(self._runner.model, program, guidance_scale)
        return export(Job(loop, plan, self.device, self.dtype, max_batch, options or {}), path, format, verify=verify)


def _check_shape(program: Program, latents: Tensor) -> None:
    if program.mean is not None and program.mean.shape[1:] != latents.shape[1:]:
        raise ConfigError(
            f"this plan starts about a mean answer of shape {tuple(program.mean.shape[1:])}, got latents of "
            f"{tuple(latents.shape[1:])}; measure it for that shape: pass shape={tuple(latents.shape[1:])} to the Sampler"
        )
