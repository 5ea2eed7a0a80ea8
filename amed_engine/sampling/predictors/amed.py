"""The AMED predictor: 9,000 parameters that read a network's bottleneck and choose the middle of a step.

Zhou et al. 2024, "Fast ODE-based Sampling for Diffusion Models in Around 5 Steps" (arXiv:2312.00094).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import amed_engine.kernels as kernels
from amed_engine.errors import ConfigError
from amed_engine.kernels import MidpointStep
from amed_engine.kernels.reference import frequencies, predict
from amed_engine.sampling.denoiser import Denoiser, check_features, is_tracing
from amed_engine.sampling.loop import sample
from amed_engine.sampling.modules import device_of, dtype_of, said
from amed_engine.sampling.predictors.constant import ConstantPredictor
from amed_engine.solvers import AMED, Solver
from amed_engine.solvers.arguments import in_range, is_number, is_whole, one_of, told
from amed_engine.solvers.plan import Plan
from amed_engine.solvers.stage import Midpoint, Update

# Each parameterisation, with what its half-widths must stay below.
SCALES = {"bounded": 1, "wide": 5}


class AMEDPredictor(nn.Module):
    """(features, sigma, sigma_next) -> Midpoint(r, scale_dir, scale_time), each (B,).

        u = silu(map_layer0(emb(sigma))), v = the same of sigma_next
        z = [enc_layer1(silu(enc_layer0(mean of features over channels))), u, v]
        r = sigmoid(fc_r(z))
        bounded: scale = 1 + s (2 sigmoid(fc_scale(z)) - 1)  in (1 - s, 1 + s)
        wide:    scale = exp(s tanh(fc_scale(z)))            in (exp(-s), exp(s))

    scale_dir, scale_time: the half-widths s of the two scales, below 1 where they are bounded; 0 leaves that head out
    and its scale at 1. scales: "bounded" as published, or "wide" for optima that lie outside those bounds.
    bottleneck: (h, w) of the features, (B, C, h, w). Features None stand for zeros: models without a bottleneck, and
    AMED's analytic first step. sigma, sigma_next: () or (B,). `plan` says what it was trained for, None if not known.
    Parameter names are those of published checkpoints.
    """

    frequencies: Tensor

    def __init__(
        self,
        scale_dir: float = 0.01,
        scale_time: float = 0.0,
        *,
        scales: str = "bounded",
        bottleneck: tuple[int, int] = (8, 8),
        hidden_dim: int = 128,
        bottleneck_dim: int = 4,
        embedding_dim: int = 8,
    ):
        super().__init__()
        one_of("AMEDPredictor", "scales", scales, tuple(SCALES))
        for name, scale in (("scale_dir", scale_dir), ("scale_time", scale_time)):
            if not 0 <= is_number("AMEDPredictor", name, scale, below := f"in [0, {SCALES[scales]})") < SCALES[scales]:
                raise ConfigError(f"AMEDPredictor: {name} must be {below}, got {told(scale)}")
        sized = isinstance(bottleneck, (tuple, list)) and len(bottleneck) == 2
        if not sized or not all(is_whole(size, 1) for size in bottleneck):
            raise ConfigError(f"AMEDPredictor: bottleneck must be two positive sizes (h, w), got {told(bottleneck)}")
        in_range("AMEDPredictor", "hidden_dim", hidden_dim, 1)
        in_range("AMEDPredictor", "bottleneck_dim", bottleneck_dim, 1)
        if not is_whole(embedding_dim, 4) or embedding_dim % 2:
            raise ConfigError(f"AMEDPredictor: embedding_dim must be even and at least 4, got {told(embedding_dim)}")
        self.plan: Plan | None = None
        self.report: Any = None  # of `distill`: how it compares with what runs without it; not saved
        self.scale_dir, self.scale_time, self.scales = float(scale_dir), float(scale_time), scales
        self.bottleneck = (int(bottleneck[0]), int(bottleneck[1]))
        self.hidden_dim, self.bottleneck_dim = int(hidden_dim), int(bottleneck_dim)
        self.embedding_dim = int(embedding_dim)
        width = bottleneck_dim + 2 * embedding_dim
        self.enc_layer0 = nn.Linear(self.bottleneck[0] * self.bottleneck[1], hidden_dim)
        self.enc_layer1 = nn.Linear(hidden_dim, bottleneck_dim)
        self.map_layer0 = nn.Linear(embedding_dim, embedding_dim)
        self.fc_r = nn.Linear(width, 1)
        self.fc_scale_dir = nn.Linear(width, 1) if scale_dir else None
        self.fc_scale_time = nn.Linear(width, 1) if scale_time else None
        self.register_buffer("frequencies", frequencies(embedding_dim), persistent=False)

    @property
    def reads_bottleneck(self) -> bool:
        """Whether what it says depends on the network's bottleneck."""
        return True

    @property
    def config(self) -> dict:
        """The constructor's arguments, JSON-able."""
        names = ("scale_dir", "scale_time", "scales", "bottleneck", "hidden_dim", "bottleneck_dim", "embedding_dim")
        return {name: getattr(self, name) for name in names} | {"bottleneck": list(self.bottleneck)}

    def choices(self) -> AMEDPredictor:
        """What the loop asks, interval by interval: the predictor itself."""
        return self

    def freeze(self, denoiser: Denoiser, latents: Tensor | int) -> ConstantPredictor:
        """Its answers averaged over latents (B, C, H, W) of unit variance: constants, for models without a bottleneck at hand.

        denoiser: (x, sigma) -> (D, features), the one it was trained for with its conditions bound. latents: or how many to
        draw, for a network that tells its sample_shape, or its img_channels and img_resolution. Raises ConfigError where
        shape or plan are unknown.
        """
        if self.plan is None:
            raise ConfigError(
                "freeze needs to know solver and noise levels; set predictor.plan, or load it from a file"
            )
        z = _latents(denoiser, latents) if isinstance(latents, int) else latents
        heard: list[Midpoint] = []

        def listening(features: Tensor | None, sigma: Tensor, sigma_next: Tensor) -> Midpoint:
            heard.append(self(features, sigma, sigma_next))
            return heard[-1]

        plan = self.plan
        with torch.no_grad():
            x = z * plan.sigmas[0]
            mean = None if plan.mean is None else plan.mean.rows()[:1]
            sample(denoiser, x, plan.levels, plan.make_solver(), listening, afs=plan.afs, mean=mean)
        frozen = ConstantPredictor.of([Midpoint(*(torch.as_tensor(f).double().mean() for f in mid)) for mid in heard])
        frozen.plan = plan
        return frozen

    def fused(
        self, solver: Solver, features: Tensor | None, sigma: Tensor, sigma_next: Tensor
    ) -> tuple[Midpoint | None, tuple[Update, ...] | None]:
        """`forward` by one kernel, which writes AMED-Solver's updates of the interval as well; sigma, sigma_next: (B,).

        Without updates for any other solver. Neither where there is no kernel for it: "wide" scales, a gradient that is
        wanted, a program that is being traced, another precision, plain torch.
        """
        if not self._has_kernel(features, sigma):
            return None, None
        if features is not None:
            check_features(features, self.bottleneck, sigma.shape[0])
        step = kernels.midpoint(features, sigma, sigma_next, self._weights(), self.scale_dir, self.scale_time)
        return Midpoint(*step[:3]), _updates(step) if solver == AMED() else None

    def _has_kernel(self, features: Tensor | None, sigma: Tensor) -> bool:
        weight = self.enc_layer0.weight
        if self.scales == "wide" or kernels.backends().get(weight.device.type, "reference") == "reference":
            return False
        if torch.compiler.is_compiling() or is_tracing():
            return False
        learning = (features is not None and features.requires_grad) or any(p.requires_grad for p in self.parameters())
        learning = learning and torch.is_grad_enabled()
        return not learning and weight.dtype == sigma.dtype and weight.device == sigma.device

    def _weights(self) -> kernels.MidpointWeights:
        layers = (self.map_layer0, self.enc_layer0, self.enc_layer1, self.fc_r, self.fc_scale_dir, self.fc_scale_time)
        pairs = [(None, None) if layer is None else (layer.weight, layer.bias) for layer in layers]
        return kernels.MidpointWeights(*(tensor for pair in pairs for tensor in pair))  # type: ignore[arg-type]

    def forward(self, features: Tensor | None, sigma: Tensor, sigma_next: Tensor) -> Midpoint:
        if features is not None:
            check_features(features, self.bottleneck, sigma.shape[0] if sigma.dim() else None)
            features = features.mean(dim=1)
        widths = (self.scale_dir, self.scale_time)
        return Midpoint(*predict(features, sigma, sigma_next, self._weights(), self.frequencies, *widths, self.scales))


def _updates(step: MidpointStep) -> tuple[Update, ...]:
    """y from [x, D], then x' from [x, y, D at y]: the same two matrices that `fold` makes of AMED-Solver's step."""
    middle = Update(step.to_midpoint, (0, 1), 0, 0, False, False, (step.sigma,), (step.sigma_net,))
    return middle, Update(step.to_next, (0, 1, 2), 0, 0, True, True, None, None)


def _latents(network: Denoiser, count: int) -> Tensor:
    channels, size = (said(network, name) for name in ("img_channels", "img_resolution"))
    shape = said(network, "sample_shape") or (None if channels is None or size is None else (channels, size, size))
    if shape is None or count < 1:
        raise ConfigError(
            f"freeze cannot draw {count} latents for this model; pass latents (B, C, ...) of unit variance"
        )
    drawn = torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))
    return drawn.to(device_of(network), dtype_of(network) or drawn.dtype)
