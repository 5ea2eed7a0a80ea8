"""A network and its facts, where it runs and in what arithmetic, and what it can be told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from amed_engine.adapters.compiled import compiled_of, holds_compiled
from amed_engine.adapters.labels import CONTINUOUS
from amed_engine.adapters.lookups import null_class_hint, told_floats, wants_index
from amed_engine.adapters.precision import Handed, Precision
from amed_engine.engine.formats import RANKS, check_format, lay_out
from amed_engine.errors import ConfigError
from amed_engine.sampling.denoiser import Denoised, as_denoised, copied
from amed_engine.sampling.modules import device_of, dtype_of, module_of, never_writes, said
from amed_engine.sampling.offloaded import awaited, brings_weights, brought
from amed_engine.sampling.predictors import Predictor
from amed_engine.solvers.arguments import is_finite, told


@dataclass(frozen=True)
class Model:
    """A network and its facts. `network` is (x, sigma[, labels (B, label_dim)]) -> D or (D, features)."""

    network: Callable[..., Any]
    shape: tuple[int, ...] | None  # (C, H, W)
    label_dim: int
    sigma_min: float
    sigma_max: float
    name: str | None = None  # in the zoo
    autocast: torch.dtype | None = None  # of the network's arithmetic
    foreign: bool = True  # see `ask`
    _computes: dict[Any, torch.dtype | None] = field(default_factory=dict, init=False, repr=False, compare=False)
    memory_format: torch.memory_format = torch.contiguous_format
    label_kind: str = "rows"  # see `amed_engine.adapters.labels`
    compile: str | None = None  # the mode that torch.compile was given
    # By NFE, for who asks for nothing else: bundled ones, or those that an engine was given.
    predictors: Mapping[int, Predictor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def shape_asked(self) -> str:
        """`shape=` of a model that does not say its own, for people."""
        axes = said(self.network, "sample_axes")
        return f"shape=({axes if isinstance(axes, str) else 'C, H, W'})"

    @property
    def continuous(self) -> bool:
        """Whether labels are numbers, and no classes."""
        return bool(self.label_dim) and self.label_kind in CONTINUOUS

    @property
    def classes(self) -> int:
        """How many classes labels may be drawn from; 0 where labels are numbers, or there are none."""
        return 0 if self.continuous else self.label_dim

    @property
    def numbers(self) -> str:
        """What continuous labels are of each sample, for people."""
        return "a number" if self.label_dim == 1 else f"{self.label_dim} numbers"

    def label_rows(self, labels: Tensor) -> Tensor:
        """Class numbers (B,) as one-hot rows, numbers (B,) or rows as rows (B, label_dim)."""
        if self.continuous:
            return labels.reshape(len(labels), self.label_dim)
        return labels if labels.is_floating_point() else torch.nn.functional.one_hot(labels, self.label_dim)

    def example_labels(self, count: int) -> Tensor | None:
        """Labels for a look at what happens to a batch, where no seed draws any: numbers between 0 and 1."""
        if not self.continuous:
            return None
        rows = torch.arange(1, count + 1, dtype=torch.float32, device="cpu")[:, None] / count
        return rows.expand(count, self.label_dim)

    @property
    def module(self) -> nn.Module | None:
        """What its weights are in: the network, or the module that a partial or a bound method belongs to."""
        return module_of(self.network)

    @property
    def _dtype(self) -> torch.dtype | None:
        """What most of it computes in, counted once: again where its first parameter is of another dtype than then."""
        parameter = None if self.module is None else next(self.module.parameters(), None)
        first = None if parameter is None else parameter.dtype
        if first not in self._computes:
            self._computes[first] = dtype_of(self.network)
        return self._computes[first]

    @property
    def precision(self) -> str | None:
        """Name of the dtype its arithmetic is in, "float32" etc.; None where a callable does not tell."""
        dtype = self.autocast or self._dtype
        return None if dtype is None else str(dtype).removeprefix("torch.")

    @cached_property
    def _awaited(self) -> list[nn.Module]:
        return awaited(self.network)

    @cached_property
    def _precision(self) -> Precision:
        return Precision(self.network)

    @property
    def device(self) -> torch.device:
        """Where it runs; see `device_of`."""
        return device_of(self.network)

    def denoise(self, x: Tensor, sigma: Tensor, *labels: Tensor, **conditions: Tensor) -> Denoised:
        """The network's answer in x's precision. Networks get float32 unless they compute in float64, those of half precision
        that refuse it get what their layers take. conditions: of an adapter that takes some, in place of labels."""
        dtype = torch.float64 if self._dtype == torch.float64 else torch.float32
        check_format(self.memory_format, x.dim() - 1)
        usual, state = Handed(dtype, dtype), x.contiguous(memory_format=self.memory_format)
        compiled = compiled_of(self.network)

        def ask(handed: Handed) -> Denoised:
            if compiled is not None:  # it says itself what it takes
                return self._call(*compiled.convert(state, sigma, *labels)[0])
            told = (tensor.to(handed.rest) for tensor in (sigma, *labels))
            return self._call(state.to(handed.state), *told, **conditions)

        # The caller's own autocast has no say, and its cache of cast weights none in a graph, which would read them on
        # after they changed.
        with torch.autocast(x.device.type, self.autocast, enabled=self.autocast is not None, cache_enabled=False):
            tells = self.foreign and self.module is not None
            denoised = self._precision.call(self.network, dtype, ask, usual) if tells else ask(usual)
        _check_answer(denoised.x0, x)
        return denoised._replace(x0=denoised.x0.to(x.dtype))

    def _call(self, *inputs: Tensor, **conditions: Tensor) -> Denoised:
        """The network's answer; its own errors say how it was called, which is the cause of most of them."""
        given = [copied(tensor) for tensor in inputs] if self.foreign else inputs  # as `ask` does it
        try:
            runs = inputs[0].device.type != "meta"  # there all is without numbers, and shapes alone are asked for
            with brought(self._awaited) if runs and self._awaited else nullcontext():
                answer = as_denoised(self.network(*given, **conditions))
        except (TypeError, RuntimeError, IndexError) as error:
            if wants_index(error):
                raise told_floats(error, self.network, self.label_dim) from error
            names = ("x", "sigma", "labels")[: len(inputs)]
            named = ", ".join(f"{name} {_named(tensor)}" for name, tensor in zip(names, inputs, strict=True))
            error.add_note(f"the model was called with {named}; {_HOW_TO_WRAP}")
            raise
        return Denoised(*map(copied, answer)) if self.foreign else answer


LARGEST_GUIDANCE = 1e6  # far beyond any use; larger ones only overflow, which would look like the network's fault

_HOW_TO_WRAP = (
    "a raw network becomes a denoiser by amed_engine.wrap(network, prediction=...); one with classes needs label_dim="
)


def _named(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _check_answer(x0: Tensor, x: Tensor) -> None:
    """D is an estimate of x without its noise. Looks at no values. Raises ConfigError."""
    if x0.shape != x.shape:
        raise ConfigError(
            f"the model returned shape {tuple(x0.shape)} for an input of {tuple(x.shape)}; a denoiser returns an estimate "
            "of the clean data in its input's shape"
        )
    if not x0.is_floating_point() or x0.device != x.device:
        raise ConfigError(
            f"the model returned {x0.dtype} on {x0.device} for an input on {x.device}; a denoiser returns an estimate of "
            "the clean data, in floating point and where its input is"
        )


def usable(device: torch.device | str) -> torch.device:
    """The device of that name as tensors have it: with its index on a GPU, without one on the CPU. Raises ConfigError."""
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"unknown device {device!r}; pass e.g. 'cpu' or 'cuda:0'") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {str(device)!r} was asked for, but torch sees no CUDA device; pass device='cpu'")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {str(device)!r} cannot be used: {str(error).splitlines()[0]}") from error


def place(model: Model, device: torch.device | str | None) -> torch.device:
    """Move the model to a device, None leaves it; the device it is on then. Raises ConfigError.

    Weights that hooks bring (offloaded ones) stay where they are; what this package puts round them goes where they run.
    """
    if device is None:
        device = torch.empty(0, device=model.device).device  # with its index, as below
        if model.module is not None and brings_weights(model.module):
            _move(model.module, device)
        return device
    device = usable(device)
    if model.module is None:
        return device
    if brings_weights(model.module) and device != (own := torch.empty(0, device=model.device).device):
        raise ConfigError(
            f"device {str(device)!r} was asked for, but hooks bring the model's weights to {str(own)!r} for each call; leave "
            "device out, or offload the model to that device"
        )
    _move(model.module, device)
    return device


def _move(module: nn.Module, device: torch.device) -> None:
    if not brings_weights(module):
        module.to(device)
    elif never_writes(module):  # of this package, round a network that brings its own
        for child in module.children():
            _move(child, device)


def tune(
    model: Model, *, compile: str | None, memory_format: torch.memory_format | None, autocast: torch.dtype | None
) -> Model:
    """The model with its network compiled, in another memory format or under autocast; see `Sampler`."""
    _check_compile(model, compile)
    if autocast not in (None, torch.float16, torch.bfloat16):
        raise ConfigError(f"autocast must be torch.float16, torch.bfloat16 or None, got {autocast!r}")
    if memory_format not in (None, torch.contiguous_format, torch.channels_last, torch.channels_last_3d):
        raise ConfigError(
            "memory_format must be torch.channels_last, torch.channels_last_3d, torch.contiguous_format or None, got "
            f"{memory_format!r}"
        )
    if memory_format in RANKS and holds_compiled(model.network):
        raise ConfigError(f"memory_format={memory_format}: compiled models and ONNX graphs take none; leave it out")
    if model.shape is not None:
        check_format(memory_format, len(model.shape))
    if memory_format is not None and model.module is not None:
        lay_out(model.module, memory_format)
    if autocast is not None and holds_compiled(model.network):
        raise ConfigError(
            f"autocast={autocast!r} has no say in a compiled model or an ONNX graph, whose arithmetic is in the file; leave it "
            "out, or export the network in that dtype"
        )
    network = model.network if compile is None else torch.compile(model.network, mode=compile)
    tuned = {"autocast": autocast, "memory_format": memory_format or torch.contiguous_format, "compile": compile}
    return replace(model, network=network, **tuned)


def _check_compile(model: Model, mode: Any) -> None:
    if mode in ("reduce-overhead", "max-autotune"):
        raise ConfigError(
            f"compile={mode!r} captures graphs of its own inside ours; use 'default' or 'max-autotune-no-cudagraphs'"
        )
    if mode not in (None, "default", "max-autotune-no-cudagraphs"):
        raise ConfigError(f"compile must be 'default', 'max-autotune-no-cudagraphs' or None, got {mode!r}")
    if mode is not None and holds_compiled(model.network):
        raise ConfigError(f"compile={mode!r}: a compiled model or an ONNX graph is compiled already; leave compile out")
    if mode is not None and isinstance(model.network, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
        raise ConfigError(
            "torch.compile takes no TorchScript model; leave compile out, or pass the module it was made of"
        )


def check_integrable(model: Model) -> None:
    """A consistency function's answer is a sample, of which no solver of an ODE makes another. Raises ConfigError."""
    if said(model.network, "consistency", False):
        raise ConfigError(
            "this model is a consistency function: it answers with a sample, not with the mean of the data, and no ODE leads "
            "on from there; draw with Sampler(model, solver='consistency'), nfe=1 being one-step generation; --solver "
            "consistency on the command line"
        )


def check_guidance(model: Model, guidance_scale: Any) -> None:
    """Whether a model can be guided at all, by this number. Raises ConfigError."""
    if guidance_scale is None:
        return
    if not is_finite(guidance_scale) or abs(guidance_scale) > LARGEST_GUIDANCE:
        raise ConfigError(
            f"guidance_scale must be a finite number of at most {LARGEST_GUIDANCE:g} in size, got {told(guidance_scale)}"
        )
    if not model.label_dim:
        raise ConfigError("guidance_scale needs a class-conditional model; this one has label_dim 0")
    if model.continuous:
        raise ConfigError(
            f'guidance_scale={guidance_scale} leads away from "no class", and this model is told numbers, none of which means '
            "that; leave guidance_scale out"
        )
    if not said(model.network, "can_guide", True):
        raise ConfigError(
            'guidance_scale needs a network that knows "no class", and is not guided already; wrap it with null_conditions or '
            f"{null_class_hint(model.network, model.label_dim)}, or leave guidance_scale out"
        )
