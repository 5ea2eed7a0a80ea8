"""Guidance and thresholding as denoisers round a denoiser, each a module that keeps the facts of what it wraps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from amed_engine.adapters.adapter import Adapter, chosen_rows, level_rows
from amed_engine.adapters.family import spread
from amed_engine.adapters.fingerprint import Settled, keep_settings
from amed_engine.adapters.labels import CONTINUOUS, label_rows
from amed_engine.adapters.lookups import null_class_hint
from amed_engine.adapters.precision import Handed, Precision
from amed_engine.errors import ConfigError
from amed_engine.sampling.denoiser import Denoised, answered, ask, dynamic_thresholding, is_tracing, parted
from amed_engine.sampling.kept import Telling, keep_facts
from amed_engine.sampling.modes import differentiable
from amed_engine.sampling.modules import as_module, bare, never_writes, said

FACTS = (
    *("sample_shape", "img_channels", "img_resolution", "channel_axis"),
    *("label_dim", "label_kind", "sigma_min", "sigma_max", "bottleneck_size", "consistency"),
)


class _Around(Telling, Settled):
    """A module round a denoiser, with its facts."""

    sample_shape: tuple[int, ...] | None = None
    label_dim: int = 0
    lends_copies = True
    can_guide = False  # guided already: `Sampler.run(guidance_scale=...)` would guide twice

    def __init__(self, denoiser: Any):
        super().__init__()
        if not callable(denoiser):
            raise ConfigError(f"the denoiser must be callable, got {type(denoiser).__name__}")
        self.denoiser, self._foreign = as_module(denoiser), not never_writes(denoiser)
        for name in FACTS:
            if (value := said(denoiser, name)) is not None:
                setattr(self, name, value)

    def _ask(self, *inputs: Tensor | None, **conditions: Tensor) -> Denoised:
        return ask(self.denoiser, *inputs, foreign=self._foreign, **conditions)

    def check_ready(self) -> None:
        check = said(self.denoiser, "check_ready")
        if check is not None:
            check()

    def explain(self) -> str:
        """What the denoiser inside says, and this wrapper's own line."""
        explain = said(self.denoiser, "explain")
        inside = type(self.denoiser).__name__ if explain is None else explain()
        return f"{inside}\n{type(self).__name__}: {self.extra_repr()}"


class ClassifierFree(_Around):
    """Guidance D_u + g·(D_c - D_u), g = scale where lo < sigma <= hi, else 1; the conditional half's bottleneck.

    denoiser: an `Adapter`, or one like it in which a zero row of class_labels means "no class". interval: (lo, hi) in sigma,
    None for all. batched: one evaluation of a doubled batch, or two. Ho & Salimans 2022 (arXiv:2207.12598); the interval:
    Kynkäänniemi et al. 2024 (arXiv:2404.07724). Raises ConfigError for a denoiser that knows no "no class".
    """

    fixed = ("scale", "low", "high", "batched")

    def __init__(
        self,
        denoiser: Any,
        scale: float,
        *,
        interval: tuple[float, float] | None = None,
        batched: bool = True,
    ):
        super().__init__(denoiser)
        if not said(denoiser, "can_guide", True):
            raise ConfigError(
                "classifier-free guidance needs a network trained without its condition too: pass null_conditions={...} or "
                f"{null_class_hint(denoiser, said(denoiser, 'label_dim', 0))} to wrap, and a denoiser that is not guided yet"
            )
        low, high = (0.0, math.inf) if interval is None else interval
        if not math.isfinite(scale) or not 0 <= low < high:
            raise ConfigError(f"need a finite scale and 0 <= lo < hi, got scale={scale}, interval={interval}")
        self.scale, self.low, self.high, self.batched = scale, low, high, batched
        keep_settings(self, scale=float(scale), interval=[float(low), float(high)])
        keep_facts(self)

    def extra_repr(self) -> str:
        calls = "one doubled batch" if self.batched else "two calls"
        return f"scale={self.scale:g}, {self.low:g} < sigma <= {self.high:g}, {calls}"

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None, **conditions: Tensor) -> Denoised:
        """As `Adapter.forward`."""
        sigma = level_rows(sigma, x)
        labels = self._labels(class_labels, x, bool(conditions))
        conditions, null = self._with_null(conditions, x.shape[0])
        if self.batched:
            unconditional, conditional, features = self._once(x, sigma, labels, conditions, null)
        else:
            conditional, features = self._ask(x, sigma, labels, **conditions)
            none = None if labels is None else torch.zeros_like(labels)
            unconditional = self._ask(x, sigma, none, **null).x0
        scale = torch.where((sigma > self.low) & (sigma <= self.high), self.scale, 1.0).to(x.dtype)
        return answered(unconditional + spread(scale, x) * (conditional - unconditional), features)

    def _with_null(self, conditions: dict[str, Tensor], batch: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if not conditions:
            return {}, {}
        adapter = bare(self.denoiser)
        if not isinstance(adapter, Adapter):
            raise ConfigError(
                f"conditions in the call need guidance right round what wrap returns, not round {type(adapter).__name__}"
            )
        return adapter.conditions.with_null(conditions, batch)

    def _labels(self, labels: Tensor | None, x: Tensor, has_conditions: bool) -> Tensor | None:
        if labels is not None or has_conditions:
            return chosen_rows(labels, self.label_dim, x, has_conditions)
        if self.label_dim == 1:
            return x.new_ones(x.shape[0], 1)
        raise ConfigError(f"guidance needs class_labels (of {self.label_dim}) or conditions in the call")

    def _once(self, x, sigma, labels, conditions, null) -> tuple[Tensor, Tensor, Tensor | None]:
        """(unconditional, conditional, its bottleneck) from one doubled batch, the unconditional half first."""
        both = None if labels is None else torch.cat([torch.zeros_like(labels), labels])
        doubled = {name: torch.cat([null[name], value]) for name, value in conditions.items()}
        x0, features = self._ask(torch.cat([x, x]), torch.cat([sigma, sigma]), both, **doubled)
        halves = [x.shape[0]] * 2  # not chunk(2): its count would tie a symbolic batch to one size
        unconditional, conditional = x0.split(halves)
        return unconditional, conditional, parted(features, halves)[1]


class ClassifierGuided(_Around):
    """Guidance by the gradient of a classifier of noisy images: D + sigma²/sqrt(1 + sigma²)·g·∇ log p(y | x_in, time).

    That is eps - sigma/sqrt(1 + sigma²)·g·∇ in terms of the noise. x_in and time are what the adapter's network is given,
    labels the adapter's: one-hot rows, a zero row guiding nowhere. classifier: (x_in, time) -> logits (B, label_dim).
    clamp: D is clamped to -clamp .. clamp, None for not. Dhariwal & Nichol 2021 (arXiv:2105.05233).
    """

    fixed = ("scale", "clamp")

    def __init__(
        self,
        denoiser: Adapter,
        classifier: Callable[[Tensor, Tensor], Tensor],
        scale: float,
        *,
        clamp: float | None = 1.0,
        label_dim: int | None = None,
    ):
        super().__init__(denoiser)
        if not isinstance(bare(denoiser), Adapter):
            raise ConfigError(f"classifier guidance goes round what wrap returns, got {type(denoiser).__name__}")
        if not math.isfinite(scale) or (clamp is not None and not clamp > 0):
            raise ConfigError(f"need a finite scale and a positive clamp or None, got {scale}, {clamp}")
        self.classifier, self.scale, self.clamp = as_module(classifier), scale, clamp
        self._precision, own = Precision(classifier), bare(denoiser).label_dim
        if bare(denoiser).label_kind in CONTINUOUS:
            raise ConfigError(
                "classifier guidance takes classes, and the network's own labels are numbers; give it them in a function "
                "(x, t) -> prediction, and wrap that"
            )
        known = label_dim or said(classifier, "out_channels") or own
        if not known or (own and known != own):
            raise ConfigError(f"the classifier tells {known} classes, the network {own}; pass label_dim=...")
        self.label_dim = int(known)
        keep_settings(self, scale=float(scale), clamp=None if clamp is None else float(clamp))
        keep_facts(self)

    def extra_repr(self) -> str:
        return f"scale={self.scale:g}, clamp={self.clamp}"

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Denoised:
        """As `Adapter.forward`; class_labels must be given. Works under no_grad and under inference_mode."""
        if class_labels is None:
            raise ConfigError(f"classifier guidance needs class_labels, integers (B,) below {self.label_dim}")
        sigma = level_rows(sigma, x).to(x.dtype)
        rows = label_rows(class_labels, self.label_dim, x)
        x0, features = self._ask(x, sigma, rows if bare(self.denoiser).label_dim else None)
        push = self.scale * sigma**2 / (1 + sigma**2).sqrt()
        guided = x0 + spread(push, x) * self._gradient(x, sigma, rows)
        return answered(guided if self.clamp is None else guided.clamp(-self.clamp, self.clamp), features)

    def _gradient(self, x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        if is_tracing() or torch.compiler.is_exporting():
            raise ConfigError(
                "classifier guidance takes the gradient of its classifier in every evaluation, which no traced or exported "
                "graph holds: export the denoiser inside it, or sample without a file"
            )
        with differentiable("the classifier"):
            c = bare(self.denoiser).family(sigma)
            x_in = (spread(c.scale, x) * x).detach().requires_grad_()

            def logits(handed: Handed) -> Tensor:
                # Copies: the classifier may write to what it is given.
                return self.classifier(x_in.to(handed.state, copy=True), c.time.to(handed.rest, copy=True))

            told = self._precision.call(self.classifier, x.dtype, logits).to(x.dtype)
            return torch.autograd.grad((told.log_softmax(dim=1) * rows.clone()).sum(), x_in)[0]


class Thresholded(_Around):
    """The denoiser with dynamic thresholding of D: clamp(D, -s, s)/s, s the quantile of |D|, at least `floor`.

    For data in -floor .. floor, not for latents. Saharia et al. 2022 (arXiv:2205.11487).
    """

    fixed = ("quantile", "floor")

    def __init__(self, denoiser: Any, quantile: float = 0.995, floor: float = 1.0):
        super().__init__(denoiser)
        if not 0 < quantile <= 1 or not floor > 0:
            raise ConfigError(f"need 0 < quantile <= 1 and floor > 0, got {quantile} and {floor}")
        self.quantile, self.floor = quantile, floor
        self.can_guide = said(denoiser, "can_guide", True)
        keep_settings(self, quantile=float(quantile), floor=float(floor))
        keep_facts(self)

    def extra_repr(self) -> str:
        return f"quantile={self.quantile:g}, floor={self.floor:g}"

    def forward(self, x: Tensor, sigma: Tensor, *labels: Tensor, **conditions: Tensor) -> Denoised:
        """As the denoiser's."""
        x0, features = self._ask(x, sigma, *labels, **conditions)
        return answered(dynamic_thresholding(x0, self.quantile, self.floor), features)
