"""A predictor as a sampler of ComfyUI, and whether all that is connected to it is what it was trained for."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

from torch import Tensor

from amed_engine.adapters.taps import Bottleneck
from amed_engine.errors import ConfigError, require
from amed_engine.integrations.comfyui.features import ConditionalFeatures
from amed_engine.integrations.comfyui.flow import INSIDE, flow_of
from amed_engine.integrations.comfyui.host import noise_range
from amed_engine.integrations.comfyui.sampling import Recipe, draw
from amed_engine.integrations.common import SAME_LEVEL, make_program, one_mean, without_zero
from amed_engine.sampling.predictors import AMEDPredictor, CoefficientPredictor, ConstantPredictor, Predictor
from amed_engine.solvers.plan import Plan
from amed_engine.solvers.program import Program

SPLITS = ("multigpu_clones", "context_handler")  # model_options under which one evaluation has several bottlenecks


def plan_of(predictor: Predictor) -> Plan:
    if predictor.plan is None:
        raise ConfigError("this predictor does not say which noise levels it is for; save it with its plan")
    return predictor.plan


def options_of(predictor: Predictor) -> dict[str, Any]:
    """What `sample_amed` is told of a predictor. Raises ConfigError for one that starts where each class has its own mean."""
    plan = plan_of(predictor)
    mean = one_mean(plan)
    return {"predictor": predictor, "afs": plan.afs, "mean": None if mean is None else mean.rows()}


def reads_bottleneck(predictor: Predictor) -> bool:
    """Whether a predictor says something else where it sees the middle of a U-Net."""
    return isinstance(predictor, AMEDPredictor) or (isinstance(predictor, CoefficientPredictor) and predictor.codes > 0)


class Trained:
    """The recipe of a predictor: its own levels, to the last digit, in whatever form the host gave them."""

    def __init__(self, predictor: Predictor, features: ConditionalFeatures | None):
        self.predictor, self.plan, self.features = predictor, plan_of(predictor), features
        self.options = options_of(predictor)
        self.bottleneck: Bottleneck | None = None if features is None else self._heard

    def program(self, levels: Tensor, like: Tensor) -> Program:
        own = self.part(levels)
        mean = own.options["mean"]
        mean = None if mean is None else mean.to(like.device)
        return make_program(own.predictor, own.plan.levels, own.plan.afs, like, mean)

    def part(self, sigmas: Tensor) -> Trained:
        """The recipe for as many of its last steps as these levels have."""
        steps = len(without_zero(sigmas)) - 1
        if not 0 < steps < self.plan.intervals or not stands_alone(self.predictor):
            return self
        return Trained(last_steps(self.predictor, steps), self.features)

    def _heard(self) -> Tensor:
        assert self.features is not None
        h = self.features.take()
        if h is None:
            raise ConfigError(
                "the middle block of this MODEL was not heard, though this predictor reads it; remove what replaces the "
                "model's own forward pass (compilation, caching nodes), or set bottleneck to none in AMED Sampler"
            )
        check_middle(self.predictor, h)
        return h

    def check(self, guider: Any, sigmas: Tensor, model_options: dict[str, Any], noise: Tensor) -> None:
        """A ConfigError where guider, SIGMAS, MODEL or latent are not what the predictor was trained with."""
        sampling, own = guider.inner_model.model_sampling, self.part(sigmas)
        check_guider(guider, own.plan)
        check_levels(self.plan, own.plan, sigmas, sampling)
        check_range(own.plan, sampling)
        check_latent(own.options["mean"], noise)
        if self.features is not None:
            check_heard(self.features, model_options)


def stands_alone(predictor: Predictor) -> bool:
    """Whether what a predictor says of a step needs none of the steps before."""
    return isinstance(predictor, (AMEDPredictor, ConstantPredictor)) and not plan_of(predictor).make_solver().memory


def last_steps(predictor: Predictor, steps: int) -> Predictor:
    """The predictor for its last steps, which no analytic one precedes."""
    plan = plan_of(predictor)
    if isinstance(predictor, ConstantPredictor):
        predictor = ConstantPredictor.of(predictor.choices()[-steps:])
    else:
        predictor = copy.copy(predictor)
    last = plan.sigmas[-steps - 1 :]
    predictor.plan = replace(plan, sigmas=last, schedule="custom", rho=None, afs=False, mean=None)
    return predictor


def check_guider(guider: Any, plan: Plan) -> None:
    usual = require("comfy.samplers", INSIDE).CFGGuider
    if type(guider).predict_noise is not usual.predict_noise:
        raise ConfigError(
            f"this predictor was trained with one prompt and one negative prompt, and {type(guider).__name__.lstrip('_')} puts "
            "other parts together: use CFG Guider, or AMED Solver, which works with any guider"
        )
    wanted = plan.guidance_scale or 1.0
    if not math.isclose(guider.cfg, wanted, rel_tol=1e-4):
        raise ConfigError(f"this predictor was trained with cfg {wanted:g}, got {guider.cfg:g}; set cfg to that")


def check_levels(whole: Plan, plan: Plan, sigmas: Tensor, sampling: Any) -> None:
    """SIGMAS are the levels of `plan`, a part of the `whole`, in float32: a flow model's have few digits near t = 1."""
    flow, got = flow_of(sampling), without_zero(sigmas).cpu().double()
    if flow is not None and bool((got > 1).any()):
        raise ConfigError(
            f"a flow model's noise levels lie below 1, got {float(got.max()):g}; connect AMED Schedule with this MODEL"
        )
    wanted = plan.levels if flow is None else flow.time(plan.levels)
    near = SAME_LEVEL * wanted * (1 if flow is None else 1 - wanted) + (0 if flow is None else 2e-7)
    first = whole.levels[0] if flow is None else flow.time(whole.levels[0])
    if len(got) != len(wanted) or bool(((got - wanted).abs() > near).any()):
        raise ConfigError(
            f"this predictor was trained for {whole.intervals} steps from noise level {first:g} to {wanted[-1]:g}, got "
            f"SIGMAS of {len(got) - 1} from {got[0]:g} to {got[-1]:g}; connect those of AMED Schedule, with "
            "the MODEL that samples, or use AMED Solver, which works off any"
        )


def check_range(plan: Plan, sampling: Any) -> None:
    low, high = noise_range(sampling)
    kind = "a flow model" if flow_of(sampling) is not None else "not a flow model"
    below = flow_of(sampling) is None and plan.sigmas[-1] < low * (1 - 1e-3)
    if plan.sigmas[0] > high * (1 + 1e-3) or below:
        raise ConfigError(
            f"this predictor goes from noise level {plan.sigmas[0]:g} to {plan.sigmas[-1]:g}, and this MODEL ({kind}) knows "
            f"{high:g} to {low:g}: it was trained for another model; load one that was trained for this, or use AMED Solver"
        )


def check_latent(mean: Tensor | None, noise: Tensor) -> None:
    if mean is not None and mean.shape[1:] != noise.shape[1:]:
        raise ConfigError(
            f"this predictor starts about a mean image with latents of {_sizes(mean.shape[1:])}, got "
            f"{_sizes(noise.shape[1:])}; set width and height of the latent image to those it was trained with"
        )


def check_heard(features: ConditionalFeatures, model_options: dict[str, Any]) -> None:
    if not features.hears(model_options):
        raise ConfigError(
            "the MODEL that samples is not that of AMED Sampler, which listens to its middle block; connect the MODEL output "
            "of AMED Sampler to the sampler or guider, or set bottleneck to none there"
        )
    if any(model_options.get(name) for name in SPLITS):
        raise ConfigError(
            "this predictor reads one middle block in every evaluation, and here an evaluation is split (context windows, "
            "several GPUs); remove that node, or set bottleneck to none in AMED Sampler"
        )


def check_middle(predictor: Predictor, h: Tensor) -> None:
    """The middle block's h (B, C, h, w) is of the size that the predictor reads."""
    if isinstance(predictor, CoefficientPredictor):
        wanted, got = f"{predictor.inputs} numbers", f"{h[0, 0].numel() + h.shape[1]}"
    else:
        assert isinstance(predictor, AMEDPredictor)
        wanted, got = _sizes(predictor.bottleneck), _sizes(h.shape[2:])
        got += " numbers" if h.dim() != 4 else ""
    if wanted.removesuffix(" numbers") != got:
        raise ConfigError(
            f"this predictor reads a middle block of {wanted}, and here it is {got}; set width and height of the latent image "
            "to those it was trained with, or bottleneck to none in AMED Sampler"
        )


def check_middle_block(model: Any, predictor: Predictor) -> None:
    """A ConfigError where the MODEL has no middle block for a predictor that reads one."""
    network = getattr(model.model, "diffusion_model", None)
    if network is not None and getattr(network, "middle_block", None) is None:
        raise ConfigError(
            f"this predictor reads the middle block of a U-Net, and this MODEL ({type(network).__name__}) has none; set "
            "bottleneck to none, with which it works as constants, or load a predictor that reads none"
        )


def _sizes(shape: Any) -> str:
    return " x ".join(map(str, shape))


def sampler(recipe: Recipe, check: Any = None) -> Any:
    """ComfyUI's sampler object for a recipe. check: called before it starts, with guider, SIGMAS, model options and noise."""

    class Sampler(require("comfy.samplers", INSIDE).KSAMPLER):
        def max_denoise(self, model_wrap: Any, sigmas: Tensor) -> bool:
            # Elsewhere the latents of the highest level have variance 1 + sigma²; predictors were trained from sigma².
            return False

        def sample(
            self,
            model_wrap: Any,
            sigmas: Tensor,
            extra_args: Any,
            callback: Any,
            noise: Tensor,
            *rest: Any,
            **named: Any,
        ) -> Tensor:
            if check is not None:
                check(model_wrap, sigmas, extra_args.get("model_options") or {}, noise)
            return super().sample(model_wrap, sigmas, extra_args, callback, noise, *rest, **named)

    return Sampler(draw, extra_options={"recipe": recipe})
