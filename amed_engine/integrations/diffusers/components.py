"""Whether the components of a pipeline belong together: network and autoencoder, network and predictor."""

from __future__ import annotations

from typing import Any

from torch import nn

from amed_engine.adapters import wrap
from amed_engine.adapters.discrete import DiscreteSteps
from amed_engine.adapters.fingerprint import is_model
from amed_engine.errors import ConfigError
from amed_engine.integrations.diffusers.parameterization import Parameterization
from amed_engine.solvers.plan import Plan


def check_channels(unet: Any, vae: Any) -> None:
    """Raise ConfigError for an autoencoder of other latents than the network's."""
    if vae is not None and vae.config.latent_channels != unet.config.in_channels:
        raise ConfigError(
            f"the VAE has latents of {vae.config.latent_channels} channels, the network takes {unet.config.in_channels}: they "
            "belong to different models"
        )


def check_trained_for(plan: Plan | None, unet: Any, scheduler: Any, null_class: int | None) -> None:
    """Raise ConfigError where the plan has the fingerprint of another network, or of another wrapping than `wrap`'s.

    A plan without a fingerprint, and EDM's networks of x0 prediction, which `wrap` does not know, are not compared.
    """
    model: Parameterization = scheduler.model
    if plan is None or plan.model is None or not isinstance(unet, nn.Module):
        return
    if model.prediction_type == "sample" and not isinstance(model.family, DiscreteSteps):
        return
    wrapped = wrap(unet, scheduler=scheduler, null_class=null_class, verify=False)
    try:
        same = is_model(wrapped, plan.model)
    finally:
        if wrapped._tap is not None:
            wrapped._tap.detach()
    if not same:
        raise ConfigError(
            "this predictor was trained for another model (or other weights, another precision or another wrapping of it): the "
            "fingerprints differ; pass its own predictor, or AMEDPipeline(..., verify=False) to use it all the same"
        )
