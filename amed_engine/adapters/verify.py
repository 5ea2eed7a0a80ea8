"""What is said of a network after a look at its answers: errors for what cannot be sampled, a sentence for what looks wrong."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amed_engine.adapters import look
from amed_engine.adapters.adapter import Adapter
from amed_engine.adapters.discrete import PREDICTS, DiscreteSteps
from amed_engine.adapters.labels import CONTINUOUS
from amed_engine.errors import ConfigError
from amed_engine.sampling.modes import modes_kept
from amed_engine.sampling.modules import bare, device_of, is_lazy, layers, module_of
from amed_engine.sampling.offloaded import brings_weights

logger = logging.getLogger("amed_engine")

CONSISTENCY = (
    'wrap(network, "consistency"), or adapters.Consistency(boundary=True), and Sampler(solver="consistency") draw it, '
    "--prediction consistency --solver consistency on the command line"
)
# The number that a network is told where it is told numbers, and nobody has said which.
GUESS = 0.5
# A noise level at which steps of other betas are of another noise: the answers take too much of it away, or too little.
BETAS_TELL = 3.0
DOUBLE = 1.5  # times the noise in the answer: more than the state had
# What most likely answers so, by what was said to be predicted.
_TOLD_SIGMA = 'or "score", "edm" or "denoised" of one told sigma'
_NOISE_EXPECTED = f'a network that predicts v or the data answers so: prediction="v" or "x0", {_TOLD_SIGMA}'
_OTHER = "a network of another prediction answers so"
_RAW = "a raw network answers so: amed_engine.wrap(network, prediction=...)"
_NOISES = ("epsilon", "vp", "iddpm")
_KEEPS: dict[str, str] = dict.fromkeys((*_NOISES, "ve", "score"), _NOISE_EXPECTED) | {"denoised": _RAW}
# Twice the noise and more is left: it is added where it had to be taken away.
_DOUBLES: dict[str, str] = dict.fromkeys(_NOISES, 'the score answers so: prediction="score" or "ve"')
_DOUBLES |= dict.fromkeys(("ve", "score"), 'a network told steps answers so: prediction="epsilon", "v" or "x0"')
_OPPOSES: dict[str, str] = {
    "epsilon": 'other betas than it was trained with, or prediction="flow"',
    "vp": 'other noise levels than it was trained with, prediction="epsilon" with its betas=, or "flow"',
    "v": 'it predicts the noise: prediction="epsilon", or "flow" for the noise less the data',
    "x0": 'a score, prediction="score" or "ve", or v, answers so',
    "ve": 'a score, prediction="score", or the noise, alone or less the data, prediction="epsilon" or "flow", answers so',
    "score": "the score of a VP process, amed_engine.adapters.VPScore(), or a network that predicts the noise answers so",
    "denoised": f'{_RAW}, "ve" or "flow", say',
}


class Verdict(NamedTuple):
    """kind: "keeps", "opposes", "noise" or "consistency". level: where it is seen. text: the figures and the likely fix."""

    kind: str
    level: float
    text: str

    @property
    def is_sample(self) -> bool:
        """Whether a consistency function answers so, for data of unit variance with the noise itself."""
        return self.kind in ("consistency", "noise")


def verdict(seen: look.Figures, name: str) -> Verdict | None:
    """What does not look like a denoiser; name: of the family."""
    high, below = seen.high, seen.below
    if look.keeps_noise(seen):
        fix = (_DOUBLES if high.kept > DOUBLE else _KEEPS).get(name, _KEEPS.get(name, _OTHER))
        figure = f"at sigma={high.sigma:.3g} its answers keep {high.kept:.0%} of the noise; a denoiser's keep little"
        return Verdict("keeps", high.sigma, f"{figure} unless the data are wider than sigma_max: {fix}")
    if (level := look.opposing(seen)) is not None:
        fix = _OPPOSES.get(name, _OTHER)
        figure = f"at sigma={level.sigma:.3g} its answers run against the noise (cosine {level.likeness:.2f}, "
        return Verdict(
            "opposes", level.sigma, f"{figure}{level.kept:.2g} of it), which the mean of clean data never does: {fix}"
        )
    if name in PREDICTS and look.widens(seen):
        figure = f"at sigma={below.sigma:.3g} its answers keep {below.kept:.2g} of the noise, "
        figure += f"at {high.sigma:.3g} {high.kept:.2g}"
        text = f"{figure}, as if the data were wider there: {_OPPOSES['epsilon' if name == 'epsilon' else 'vp']}"
        return Verdict("opposes", below.sigma, text)
    if not look.stays(seen):
        return None
    levels = f"at sigma={high.sigma:.3g} and {below.sigma:.3g} alike"
    if look.is_noise(seen):
        figure = f"{levels} its answers are the noise of the latents (cosine {high.likeness:.2f}, size {high.gain:.2f})"
        return Verdict("noise", high.sigma, f"{figure}: {_noise_fix(name)}")
    figure = f"{levels} its answers vary from latent to latent by {high.spread:.2g}, as samples do"
    return Verdict(
        "consistency",
        high.sigma,
        f"{figure}; the mean of clean data would vary {look.RATIO:g} times less at the higher: a consistency function, whose "
        f"ODE ends in noise ({CONSISTENCY}), or another prediction than {name!r}",
    )


def _noise_fix(name: str) -> str:
    """For answers that are the noise itself."""
    if name == "flow":  # D = (x - sigma F)/(1 + sigma), and F took nothing away
        return _NOISE_EXPECTED
    wrapped, end = ("amed_engine.wrap(network, ", ")") if name == "denoised" else ("", "")
    return (
        f'a network that predicts the noise is for {wrapped}prediction="epsilon"{end}, one that predicts the noise '
        f'less the data for "flow", and a consistency function answers so for data of unit variance ({CONSISTENCY})'
    )


@torch.no_grad()
def looked_at(
    network: Any,
    asked: look.Asked,
    name: str = "denoised",
    *,
    guessed: bool = False,
    first: Callable[[], None] | None = None,
) -> Verdict | None:
    """The verdict on a denoiser round a network, in evaluation mode and left in its own.

    guessed: it was told numbers that may be none of its own, so what it refuses then is no fault of it. first: asked before.
    None too for a network that raises, as one of a fixed batch does, and without memory for a look: sampling, in batches of
    its own, will tell. Raises ConfigError.
    """
    try:
        with modes_kept(module_of(network)), _left_alone(asked.device), _eager(network):
            if first is not None:
                first()
            found = verdict(look.figures_of(asked), name)
            return found._replace(text=f"told {GUESS:g}, {found.text}") if found and guessed else found
    except Exception as error:
        if isinstance(error, ConfigError) and not guessed:
            raise
        logger.debug("no look at %s: %s", type(network).__name__, error)
        return None


def of_class_0(
    denoise: Callable[..., Tensor], label_dim: int, *, continuous: bool
) -> Callable[[Tensor, Tensor], Tensor]:
    """(x, sigma) -> D of a denoiser (x, sigma[, labels]) -> D; labels: classes (B,), or numbers (B, label_dim), all `GUESS`."""

    def ask(x: Tensor, sigma: Tensor) -> Tensor:
        if not label_dim:
            return denoise(x, sigma)
        classes = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        return denoise(x, sigma, x.new_full((len(x), label_dim), GUESS) if continuous else classes)

    return ask


def verify_adapter(adapter: Adapter, shape: tuple[int, ...] | None = None) -> Adapter:
    """The adapter, looked at where it can be: shape and conditions known, weights here. Logs what is wrong; what only solvers
    of the ODE must know, of a network that was said to be a consistency function, it keeps in `beware`.

    Raises ConfigError as the adapter does, and for a network that predicts the noise and was said to predict v.
    """
    shape = shape or adapter.sample_shape
    ready, continuous = adapter.conditions.count or not adapter.conditions.names, adapter.label_kind in CONTINUOUS
    if shape is None or not ready or not can_look(adapter.network):
        return adapter
    adapter.looked_at = True
    family, device = adapter.family, device_of(adapter.network)
    low, high = ends(adapter.sigma_min, adapter.sigma_max)
    ask = of_class_0(lambda *inputs: adapter(*inputs).x0, adapter.label_dim, continuous=continuous)
    middle = min(BETAS_TELL, high / 4) if isinstance(family, DiscreteSteps) else None
    asked = look.Asked(
        ask, shape, low, high, device, lambda sigma: family(sigma).skip, getattr(family, "nearest", float), middle
    )
    table = adapter.label_kind == "index" and not adapter.conditions.count
    first = partial(_ask_last_classes, adapter, asked) if table else None
    found = looked_at(adapter.network, asked, family.name, guessed=continuous, first=first)
    if found is None or (family.consistency and found.is_sample):
        return adapter
    if family.name == "v" and found.kind == "opposes" and found.level == high and not continuous:
        raise ConfigError(f"prediction='v' was asked for, but {found.text}, or verify=False")
    if family.name == "cm" and found.is_sample:
        adapter.beware = found.text
    else:
        logger.warning(
            "%s wrapped as %r: %s; verify=False (--no-verify) skips this look",
            *_named(adapter, family.name),
            found.text,
        )
        adapter.notes["beware"] = found.text
    return adapter


def _ask_last_classes(adapter: Adapter, asked: look.Asked) -> None:
    """Of the last class and, where it may be said, of none: a table without their rows raises."""
    x = torch.zeros((2, *asked.shape), dtype=torch.float32, device=asked.device)
    rows = x.new_zeros(2, adapter.label_dim)
    rows[0 if adapter.can_guide else slice(None), -1] = 1
    adapter(x, x.new_full((2,), asked.sigma_max), rows)


def _named(adapter: Adapter, name: str) -> tuple[str, str]:
    inner = bare(adapter.network)
    return getattr(inner, "__name__", type(inner).__name__), name


def can_look(network: Any) -> bool:
    """Whether a few calls cost little and mean something: not where weights come, go or are not made, or batches are fixed."""
    module, signature = module_of(network), getattr(bare(network), "signature", None)
    least, most = getattr(signature, "batch", (1, look.ROWS))
    unmade = module is not None and (brings_weights(module) or any(map(is_lazy, module.parameters())))
    return not unmade and least <= look.ROWS // 4 and most >= look.ROWS


def ends(sigma_min: float, sigma_max: float) -> tuple[float, float]:
    """The noise levels to look at: a network without a highest is sampled from 80."""
    return sigma_min, sigma_max if math.isfinite(sigma_max) else 80.0


@contextmanager
def _left_alone(device: torch.device) -> Iterator[None]:
    """The caller's random numbers, where a network draws some."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def _eager(network: Any) -> Any:
    """A compiled network is asked as it was written: nothing is compiled for a look."""
    compiled = any(hasattr(layer, "_orig_mod") for layer in layers(network))
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()
