"""EDM's preconditioning round a raw network: the class of the published EDM checkpoints.

Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models" (arXiv:2206.00364), table 1.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn

from amed_engine.errors import ConfigError
from amed_engine.networks.arguments import check_arguments, check_sigmas
from amed_engine.networks.dhariwal_unet import DhariwalUNet
from amed_engine.networks.song_unet import SongUNet
from amed_engine.sampling.denoiser import Denoised, is_tracing
from amed_engine.solvers.arguments import one_of, plain

NETWORKS: dict[str, type[SongUNet] | type[DhariwalUNet]] = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}
# Set by the preconditioning itself, so not options of the network.
_OWN = {"self", "img_resolution", "in_channels", "out_channels", "label_dim"}


class EDMPrecond(nn.Module):
    """Denoiser D(x; sigma) = c_skip·x + c_out·F(c_in·x; c_noise) with the bottleneck of F.

        c_skip = sd² / (sigma² + sd²)          c_in    = 1 / sqrt(sigma² + sd²)
        c_out  = sigma·sd / sqrt(sigma² + sd²) c_noise = log(sigma) / 4          sd = sigma_data

    The arguments are those of the published constructor; `network_options` go to the network that `model_type`
    names. Raises ConfigError for an unknown network or option, with the list of valid names, and for an argument of another
    type or out of its range.

    Precision: the preconditioning runs in float32 whatever x's dtype is, as published, and in float64 where the
    parameters are float64 (``module.double()``). The network runs in the dtype of its parameters; with `use_fp16` in
    float16 on a CUDA device; with ``force_fp32=True`` in float32.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        use_fp16: bool = False,
        sigma_min: float = 0.0,
        sigma_max: float = math.inf,
        sigma_data: float = 0.5,
        model_type: str = "DhariwalUNet",
        **network_options: Any,
    ):
        super().__init__()
        _check_options(model_type, network_options)
        own = {"img_resolution": img_resolution, "img_channels": img_channels, "label_dim": label_dim}
        check_arguments("EDMPrecond", {**own, "use_fp16": use_fp16, "sigma_data": sigma_data})
        check_sigmas("EDMPrecond", sigma_min, sigma_max)
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        self.use_fp16, self.model_type = use_fp16, model_type
        self.sigma_min, self.sigma_max, self.sigma_data = sigma_min, sigma_max, sigma_data
        self._options = {k: list(v) if isinstance(v, tuple) else v for k, v in network_options.items()}
        self.model = NETWORKS[model_type](
            img_resolution, img_channels, img_channels, label_dim=label_dim, **network_options
        )

    @property
    def config(self) -> dict[str, Any]:
        """JSON-able arguments that rebuild this module; an infinite sigma_max, the default, is left out."""
        names = ("img_resolution", "img_channels", "label_dim", "use_fp16", "sigma_min", "sigma_data", "model_type")
        config = {name: getattr(self, name) for name in names}
        if math.isfinite(self.sigma_max):
            config["sigma_max"] = self.sigma_max
        return {name: plain(value) for name, value in (config | self._options).items()}

    @property
    def bottleneck_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the features that `forward` returns."""
        size = int(list(self.model.enc)[-1].split("x")[0])
        return self.model.bottleneck_channels, size, size

    @property
    def bottleneck_size(self) -> tuple[int, int]:
        """(h, w) of the same."""
        return self.bottleneck_shape[1:]

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        force_fp32: bool = False,
    ) -> Denoised:
        """x (B, C, R, R); sigma () or (B,); class_labels integers (B,), a one-hot or float matrix (B, label_dim), or None
        for the unconditional (zero) label; augment_labels (B, augment_dim) or None.

        Returns the denoised image (B, C, R, R) and the output of the last encoder block (B, C', h, w), both float32
        (float64). A label outside 0 .. label_dim - 1 acts as None: nothing here waits for the device.
        Raises ValueError for a wrong shape of x or class_labels.
        """
        self._check_image(x)
        state, compute = self._dtypes(x, force_fp32)
        x, sigma = x.to(state), sigma.to(state).reshape(-1, 1, 1, 1)
        variance, sd = sigma**2 + self.sigma_data**2, self.sigma_data
        c_skip, c_out, c_in = sd**2 / variance, sigma * sd / variance.sqrt(), 1 / variance.sqrt()
        c_noise = (sigma.log() / 4).flatten()
        raw, bottleneck = self.model((c_in * x).to(compute), c_noise, class_labels, augment_labels)
        return Denoised(c_skip * x + c_out * raw.to(state), bottleneck.to(state))

    def _dtypes(self, x: Tensor, force_fp32: bool) -> tuple[torch.dtype, torch.dtype]:
        """(of the preconditioning, of the network)"""
        stored = self.model.map_layer0.weight.dtype
        if stored == torch.float64:
            return stored, stored
        if force_fp32:
            return torch.float32, torch.float32
        # Half precision is worth nothing on a CPU; the published networks fall back to float32 there as well.
        return torch.float32, torch.float16 if self.use_fp16 and x.is_cuda else stored

    def _check_image(self, x: Tensor) -> None:
        if is_tracing():
            return
        expected = (self.img_channels, self.img_resolution, self.img_resolution)
        if x.ndim != 4 or tuple(x.shape[1:]) != expected:
            shape = ", ".join(str(n) for n in expected)
            raise ValueError(f"x must have shape (B, {shape}), got {tuple(x.shape)}")


def _check_options(model_type: str, options: dict[str, Any]) -> None:
    one_of("EDMPrecond", "model_type", model_type, tuple(NETWORKS))
    valid = set(inspect.signature(NETWORKS[model_type].__init__).parameters) - _OWN
    unknown = sorted(set(options) - valid)
    if unknown:
        raise ConfigError(f"{model_type} has no option {', '.join(unknown)}; valid: {', '.join(sorted(valid))}")
