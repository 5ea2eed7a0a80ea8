"""Operators `torch.ops.amed.*`: schemas, fakes, autograd and one implementation per device.

    combine             Tensor[] sources, Tensor coeffs (M, J, B) -> Tensor[]
    combine_out         the same into given tensors
    combine_coeff_grad  the per-sample dot products of its backward
    midpoint            the AMED predictor and the coefficients of its step, one kernel

Which implementation runs: the C++ extension on the CPU and Triton on CUDA where they are there, plain torch
elsewhere; `backends()` says which, `use("reference")` forces plain torch.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from . import cuda, layout, native, reference
from .reference import MidpointStep, MidpointWeights

_library, _tags = torch.library.Library("amed", "DEF"), (torch.Tag.pt2_compliant_tag,)
_library.define("combine(Tensor[] sources, Tensor coeffs) -> Tensor[]", tags=_tags)
_library.define("combine_out(Tensor[] sources, Tensor coeffs, Tensor(a!)[] out) -> ()", tags=_tags)
_library.define("combine_coeff_grad(Tensor[] grads, Tensor[] sources) -> Tensor", tags=_tags)
_library.define(
    "midpoint(Tensor? features, Tensor sigma, Tensor sigma_next, Tensor?[] weights, float scale_dir, float scale_time)"
    " -> Tensor",
    tags=_tags,
)

# A module global, not a ContextVar: torch.compile can read and guard on this one.
_forced: str | None = None
_NAMES = ("reference", "native", "triton", "cuda")
# Where the memory must be that the compiled ones are given addresses of.
_DEVICES = {"native": "cpu", "triton": "cuda", "cuda": "cuda"}


# ---- what callers use ----


def combine(sources: Sequence[Tensor], coeffs: Tensor, *, out: Sequence[Tensor] | None = None) -> list[Tensor]:
    """outputs[m][b] = Σ_j coeffs[m, j, b] · sources[j][b]: every linear update of a step in one pass over memory.

    sources: 1 to 16 tensors (B, ...) of one shape; the first sets the dtype of the outputs, the others may be
    narrower. coeffs: (M, J, B) or (M, J, 1), M <= 8, float32 (float64 with a float64 first source). Accumulates
    in the dtype of coeffs. A coefficient of 0 still reads its source (0 · nan = nan): drop such columns.
    out: M tensors to write; each may be a source itself (the same view), never overlap one in part.
    Differentiable in sources and coeffs unless out is given. Raises ValueError before any launch.
    """
    if out is not None:
        return _combine_into(list(sources), coeffs, list(out))
    if _forced == "reference":
        # Tracing warns about every comparison.
        if not torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
            layout.check_combine(sources, coeffs)
        return reference.combine(sources, coeffs)
    return torch.ops.amed.combine.default(sources, coeffs)


def _combine_into(sources: list[Tensor], coeffs: Tensor, out: list[Tensor]) -> list[Tensor]:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*sources, coeffs, *out)):
        raise ValueError("combine(out=...) has no gradient; leave out= away or call it under torch.no_grad()")
    torch.ops.amed.combine_out.default(sources, coeffs, out)
    return out


def combine_coeff_grad(grads: Sequence[Tensor], sources: Sequence[Tensor]) -> Tensor:
    """result[m, j, b] = Σ_i grads[m][b, i] · sources[j][b, i], (M, J, B) in float32 (float64 for float64 grads)."""
    return torch.ops.amed.combine_coeff_grad.default(grads, sources)


def midpoint(
    features: Tensor | None,
    sigma: Tensor,
    sigma_next: Tensor,
    weights: MidpointWeights,
    scale_dir: float = 0.0,
    scale_time: float = 0.0,
) -> MidpointStep:
    """The AMED predictor and the coefficients of its solver; arguments and formulas in `reference.midpoint`.

    The fused implementations have no gradient: where one is asked for, this is the plain definition.
    """
    arguments = (features, sigma, sigma_next, weights, scale_dir, scale_time)
    tensors = (features, sigma, sigma_next, *weights)
    wanted = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    if wanted or _forced == "reference":
        layout.check_midpoint(*arguments)
        return reference.midpoint(*arguments)
    return reference.split_step(torch.ops.amed.midpoint.default(*arguments))


def decompositions() -> dict:
    """{operator: plain torch definition}, for `ExportedProgram.run_decompositions`."""
    return {
        torch.ops.amed.combine.default: reference.combine,
        torch.ops.amed.combine_coeff_grad.default: reference.combine_coeff_grad,
        torch.ops.amed.midpoint.default: _midpoint_definition,
    }


def backends() -> dict[str, str]:
    """The implementation active on each device: "native", "triton" or "reference" (plain torch)."""
    return {"cpu": _active("cpu"), "cuda": _active("cuda")}


@contextmanager
def use(name: str) -> Iterator[None]:
    """Force one implementation, for the whole process: "reference", "native" (C++ on the CPU), "triton" or "cuda" (C++).

    "reference" is plain torch operators, in traces and exports too.
    """
    global _forced
    if name not in _NAMES:
        raise ValueError(f"implementation must be one of {', '.join(_NAMES)}, got {name!r}")
    if reason := _why_not(name):
        raise ValueError(f"implementation {name!r} cannot be used: {reason}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


# ---- checked arguments and memory for results: all that compile and export see ----


@torch.library.register_fake("amed::combine", lib=_library)
def _empty_outputs(sources: Sequence[Tensor], coeffs: Tensor) -> list[Tensor]:
    layout.check_combine(sources, coeffs)
    return [torch.empty_like(sources[0]) for _ in range(coeffs.shape[0])]


@torch.library.register_fake("amed::combine_out", lib=_library)
def _check_all(sources: Sequence[Tensor], coeffs: Tensor, out: Sequence[Tensor]) -> None:
    layout.check_combine(sources, coeffs)
    layout.check_out(sources, coeffs, out)


@torch.library.register_fake("amed::combine_coeff_grad", lib=_library)
def _empty_dots(grads: Sequence[Tensor], sources: Sequence[Tensor]) -> Tensor:
    layout.check_dots(grads, sources)
    dtype = reference.accumulation_dtype(grads[0].dtype)
    return grads[0].new_empty((len(grads), len(sources), grads[0].shape[0]), dtype=dtype)


@torch.library.register_fake("amed::midpoint", lib=_library)
def _empty_table(features, sigma, sigma_next, weights, scale_dir, scale_time) -> Tensor:
    layout.check_midpoint(features, sigma, sigma_next, MidpointWeights(*weights), scale_dir, scale_time)
    return sigma.new_empty((10, sigma.shape[0] if features is None else features.shape[0]))


# ---- implementations ----


def _why_not(name: str) -> str:
    """Why an implementation cannot be used; empty where it can."""
    if name == "native":
        return native.why_not()
    if name == "cuda":
        return cuda.why_not()
    return "triton is not installed" if name == "triton" and find_spec("triton") is None else ""


def _active(device: str) -> str:
    return _default(device) if _forced is None else _forced


@lru_cache
def _default(device: str) -> str:
    name = {"cpu": "native", "cuda": "triton"}.get(device, "reference")
    return "reference" if _why_not(name) else name


def _implementation(device: torch.device) -> ModuleType:
    """The module whose combine_into, coeff_grad_into and midpoint_into run on that device."""
    kind = device.type
    name = _active(kind)
    if _DEVICES.get(name, kind) != kind:
        raise ValueError(f"implementation {name!r} reads {_DEVICES[name]} memory, got tensors on {device}; move them")
    if name in ("native", "cuda"):
        return native if name == "native" else cuda
    # Not imported above: triton costs a second and is needed on a GPU only.
    return import_module(".triton_backend", __package__) if name == "triton" else reference


def _combine(sources: Sequence[Tensor], coeffs: Tensor) -> list[Tensor]:
    outputs = _empty_outputs(sources, coeffs)
    _combine_in_format(sources, coeffs, outputs)
    return outputs


def _combine_out(sources: Sequence[Tensor], coeffs: Tensor, out: Sequence[Tensor]) -> None:
    _check_all(sources, coeffs, out)
    layout.check_memory(sources, coeffs, out)
    _combine_in_format(sources, coeffs, out)


def _combine_in_format(sources: Sequence[Tensor], coeffs: Tensor, out: Sequence[Tensor]) -> None:
    """Every sample dense in one order, as implementations expect: copies are made, and copied back, of what is not."""
    combine_into = _implementation(coeffs.device).combine_into
    if sources[0].numel():
        order = layout.sample_format(sources[0])
        targets = layout.targets_in(order, out)
        combine_into(layout.sources_in(order, sources), coeffs, targets)
        layout.hand_over(targets, out)


def _coeff_grad(grads: Sequence[Tensor], sources: Sequence[Tensor]) -> Tensor:
    result = _empty_dots(grads, sources)
    coeff_grad_into = _implementation(result.device).coeff_grad_into
    if grads[0].numel() == 0:
        return result.zero_()
    order = layout.sample_format(grads[0])
    coeff_grad_into(layout.sources_in(order, grads), layout.sources_in(order, sources), result)
    return result


def _midpoint_definition(features, sigma, sigma_next, weights, scale_dir, scale_time) -> Tensor:
    arguments = (features, sigma, sigma_next, MidpointWeights(*weights), scale_dir, scale_time)
    layout.check_midpoint(*arguments)
    return reference.midpoint_table(*arguments)


def _midpoint(features, sigma, sigma_next, weights, scale_dir, scale_time) -> Tensor:
    table = _empty_table(features, sigma, sigma_next, weights, scale_dir, scale_time)
    midpoint_into = _implementation(sigma.device).midpoint_into
    if table.numel():
        maps = None if features is None else layout.as_maps(features)
        weights = MidpointWeights(*[t if t is None else t.contiguous() for t in weights])  # pyright: ignore
        midpoint_into(maps, sigma, sigma_next, weights, scale_dir, scale_time, table)
    return table


_library.impl("combine", _combine, "CompositeExplicitAutograd")
_library.impl("combine_out", _combine_out, "CompositeExplicitAutograd")
_library.impl("combine_coeff_grad", _coeff_grad, "CompositeExplicitAutograd")
_library.impl("midpoint", _midpoint, "CompositeExplicitAutograd")


# ---- gradients ----


def _save(ctx, inputs, output) -> None:
    sources, coeffs = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(coeffs, *sources)


def _combine_backward(ctx, grads):
    """d sources = combine with the transposed coefficients, d coeffs = per-sample dot products."""
    coeffs, *sources = ctx.saved_tensors
    wanted, coeffs_wanted = ctx.needs_input_grad
    used = [m for m, grad in enumerate(grads) if grad is not None]
    present = [grads[m] for m in used]
    if not present:
        return [None] * len(sources), None
    grad_sources = _transposed(present, torch.stack([coeffs.unbind(0)[m] for m in used]), sources, wanted)
    if not coeffs_wanted:
        return grad_sources, None
    dots = combine_coeff_grad(present, sources)
    # Not index_copy: an index made here would lie on the host.
    rows = dict(zip(used, dots.unbind(0), strict=True))
    grad_coeffs = torch.stack([rows[m] if m in rows else torch.zeros_like(rows[used[0]]) for m in range(len(grads))])
    return grad_sources, grad_coeffs.sum(2, keepdim=True) if coeffs.shape[2] == 1 else grad_coeffs


def _transposed(grads, coeffs, sources, wanted) -> list[Tensor | None]:
    """Σ_m coeffs[m, j] · grads[m] for each source j that wants a gradient, in the dtype of the source."""
    result: list[Tensor | None] = [None] * len(sources)
    needed = [j for j, flag in enumerate(wanted) if flag]
    for start in range(0, len(needed), layout.MAX_OUTPUTS):
        rows = needed[start : start + layout.MAX_OUTPUTS]
        for j, grad in zip(rows, combine(grads, torch.stack([coeffs.unbind(1)[j] for j in rows])), strict=True):
            result[j] = grad.to(sources[j].dtype)
    return result


def _save_dots(ctx, inputs, output) -> None:
    grads, sources = inputs
    ctx.count = len(grads)
    ctx.save_for_backward(*grads, *sources)


def _dots_backward(ctx, grad):
    """The dot product is linear in either list: each gradient is a combination of the other list."""
    grads, sources = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
    grads_wanted, sources_wanted = ctx.needs_input_grad
    return (
        _transposed(sources, grad.transpose(0, 1), grads, grads_wanted),
        _transposed(grads, grad, sources, sources_wanted),
    )


torch.library.register_autograd("amed::combine", _combine_backward, setup_context=_save, lib=_library)
torch.library.register_autograd("amed::combine_coeff_grad", _dots_backward, setup_context=_save_dots, lib=_library)
