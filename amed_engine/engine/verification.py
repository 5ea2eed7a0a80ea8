"""A look at what a `Sampler` is given, where nobody looked before: raw networks, and what `wrap` could not judge."""

from __future__ import annotations

import logging
from weakref import WeakSet

from torch import Tensor, nn

from amed_engine.adapters import Adapter
from amed_engine.adapters.compiled import Compiled
from amed_engine.adapters.look import Asked
from amed_engine.adapters.verify import can_look, ends, looked_at, of_class_0, verify_adapter
from amed_engine.engine.model import Model
from amed_engine.sampling.denoiser import one_hot
from amed_engine.sampling.modes import plain_tensors
from amed_engine.sampling.modules import OWN, bare, said
from amed_engine.sampling.wrappers import COMPILED
from amed_engine.solvers.plan import Plan

logger = logging.getLogger("amed_engine")
_SEEN: WeakSet[nn.Module] = WeakSet()  # raw networks, once each


def verify_model(model: Model, plan: Plan) -> None:
    """Log what does not look like a denoiser, or is not one for this plan's solver. Raises ConfigError for answers that no
    solver can use."""
    module = model.module
    adapter = None if module is None else next((part for part in module.modules() if isinstance(part, Adapter)), None)
    if adapter is not None:
        if not adapter.looked_at and adapter is bare(model.network):
            verify_adapter(adapter, model.shape)
        if adapter.beware and plan.solver != "consistency":
            logger.warning("%s steps along an ODE, but %s", plan.solver, adapter.beware)
    elif isinstance(module, nn.Module) and _is_unknown(model, module):
        _SEEN.add(module)
        _look(model, module, plan)


def _is_unknown(model: Model, module: nn.Module) -> bool:
    inner = bare(model.network)
    if isinstance(inner, Compiled):  # of ours, or of others where the file does not say
        ours = bool(inner.facts)
    else:
        ours = any(kind.__module__.partition(".")[0] == OWN for kind in type(inner).__mro__)
    known = ours or model.name is not None or isinstance(inner, COMPILED) or module in _SEEN
    return not known and model.shape is not None and can_look(model.network)


def _look(model: Model, module: nn.Module, plan: Plan) -> None:
    def denoise(x: Tensor, sigma: Tensor, *classes: Tensor) -> Tensor:
        rows = (each if model.continuous else one_hot(each, model.label_dim, x) for each in classes)
        return model.denoise(x, sigma, *rows).x0

    assert model.shape is not None
    low, high = ends(model.sigma_min, model.sigma_max)
    ask = of_class_0(denoise, model.label_dim, continuous=model.continuous)
    asked = Asked(ask, model.shape, low, high, model.device)
    with plain_tensors():
        found = looked_at(model.network, asked, guessed=model.continuous)
    known = said(model.network, "consistency", False) or plan.solver == "consistency"
    if found is not None and not (found.is_sample and known):
        logger.warning(
            "%s taken as a denoiser: %s; verify=False (--no-verify) skips this look",
            type(bare(module)).__name__,
            found.text,
        )
