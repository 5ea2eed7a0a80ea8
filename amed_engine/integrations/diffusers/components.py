"""Whether the components of a pipeline belong together: network and autoencoder, network and predictor."""

from __future__ import annotations

import logging
import math
from typing import Any

from torch import nn

from amed_engine.adapters import wrap
from amed_engine.adapters.discrete import DiscreteSteps
from amed_engine.adapters.facts import facts_of
from amed_engine.adapters.fingerprint import is_model
from amed_engine.adapters.recorded import difference
from amed_engine.errors import ConfigError
from amed_engine.integrations.diffusers.parameterization import Parameterization
from amed_engine.solvers.plan import Plan

logger = logging.getLogger("amed_engine")


def check_network(unet: Any, vae: Any) -> None:
    """Raise ConfigError for a network of other samples than images, or an autoencoder of other latents than the network's."""
    facts = facts_of(unet)
    if facts.axes not in ("", "CHW"):
        raise ConfigError(
            f"AMEDPipeline draws images, {type(unet).__name__} takes samples ({facts.rank}): amed_engine.wrap makes a denoiser "
            "of it for amed_engine.Sampler, and AMEDScheduler serves the network's own pipeline"
        )
    if vae is not None and vae.config.latent_channels != unet.config.in_channels:
        raise ConfigError(
            f"the VAE has latents of {vae.config.latent_channels} channels, the network takes {unet.config.in_channels}: they "
            "belong to different models"
        )


def check_trained_for(plan: Plan | None, unet: Any, scheduler: Any, null_class: int | None) -> None:
    """Raise ConfigError where the plan has the fingerprint of another network, or of another wrapping than `wrap`'s; warn where
    it has other noise levels.

    A plan without a fingerprint, and EDM's networks of x0 prediction, which `wrap` does not know, are not compared.
    """
    model: Parameterization = scheduler.model
    if plan is not None:
        warn_of_range(plan, scheduler)
    if plan is None or plan.model is None or not isinstance(unet, nn.Module):
        return
    if model.prediction_type == "sample" and not isinstance(model.family, DiscreteSteps):
        return
    wrapped = wrap(unet, scheduler=scheduler, null_class=null_class, verify=False)
    try:
        differs = None if is_model(wrapped, plan.model) else difference(wrapped, plan)
    finally:
        if wrapped._tap is not None:
            wrapped._tap.detach()
    if differs is not None:
        raise ConfigError(
            "this predictor was trained for another model (or other weights, another precision or another wrapping of it): the "
            f"fingerprints differ; {differs}; pass its own predictor, or AMEDPipeline(..., verify=False) to use it all the same"
        )


def warn_of_range(plan: Plan, scheduler: Any) -> None:
    """Noise levels of a model and of a predictor's plan that differ are not passed over in silence."""
    model, config = scheduler.model, scheduler.settings
    ends = model.range(config["sigma_min"], config["sigma_max"])
    told = isinstance(model.family, DiscreteSteps)  # others have a range where their configuration says one
    unsaid = () if told else config.get("_use_default_values", ())
    # A hundredth is rounding of the tables of discrete steps.
    differ = [
        name not in unsaid and not math.isclose(own, planned, rel_tol=0.01)
        for name, own, planned in zip(("sigma_min", "sigma_max"), ends, (plan.sigmas[-1], plan.sigmas[0]), strict=True)
    ]
    if any(differ):
        logger.warning(
            "the model's noise levels are %g to %g, this predictor's %g to %g: what lies outside the latter is left out, and "
            "outside the former the model is asked what it was not trained for; pass a predictor of this model",
            *(*reversed(ends), plan.sigmas[0], plan.sigmas[-1]),
        )
