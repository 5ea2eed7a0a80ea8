"""What a route is, and what all of them draw from: one network, one predictor with random weights, one batch of latents."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import ROOT
from torch import Tensor
from workloads import WORKLOADS

from amed_engine import AMEDPredictor, Sampler, make_plan
from amed_engine.engine.images import to_uint8

BUNDLED, CLASS, NFE = "digits", 3, 5
ROUNDING, TRACED, GREY_LEVEL = 1e-5, 1e-4, 1 / 255  # largest differences allowed, relative to the largest element
Draw = Callable[[], Tensor]

_TRIVIA = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


@dataclass(frozen=True)
class Route:
    """A way to the engine's images.

    docs, needs: its page under docs/, and what a user must have. files: globs of the code that is this route's own, counted
    as its lines. group: the `Bench` method that draws the same through `Sampler.run`. setup: (bench, stack) -> what is timed;
    what must be closed goes on the stack. tolerance: of the difference. pictures: what comes back are PNG files.
    """

    name: str
    docs: str
    needs: str
    files: tuple[str, ...]
    group: str
    setup: Callable[[Bench, ExitStack], Draw]
    tolerance: float = ROUNDING
    pictures: bool = False

    @property
    def lines(self) -> int:
        """Lines of code, without comments, docstrings and blank ones."""
        found = sorted({path for pattern in self.files for path in ROOT.glob(pattern)})
        return sum(code_lines(path.read_text(), path.suffix) for path in found)


class Bench:
    """The workload's network with one class bound where it has classes, and how the engine draws from it."""

    def __init__(self, workload: str, batch: int):
        chosen = WORKLOADS[workload]
        self.network, self.shape = chosen.build(), chosen.shape
        self.block = self.network.get_submodule("model.enc." + list(self.network.model.enc)[-1])
        self.batch, self.classes = batch, CLASS if chosen.classes else None
        rows = torch.tensor([CLASS] * batch)
        self.labels = torch.nn.functional.one_hot(rows, chosen.classes).float() if chosen.classes else None
        self.predictor = self._predictor(make_plan(NFE, solver="amed"))
        self.latents = torch.randn(batch, *self.shape, generator=torch.Generator().manual_seed(0))
        self.sigmas = self.predictor.plan.levels.float()

    def _predictor(self, plan: Any) -> AMEDPredictor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            predictor = AMEDPredictor(0.1, 0.05, bottleneck=(4, 4)).requires_grad_(False).eval()
        predictor.plan = plan
        return predictor

    def features(self, x: Tensor, sigma: Tensor) -> Any:
        return self.network(x, sigma, self.labels)

    def denoised(self, x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
        return self.features(x, sigma).x0

    # ---- `Sampler.run` of each group

    def per_sample(self) -> Draw:
        sampler = self.sampler()
        return lambda: sampler.run(self.latents, class_labels=self.classes).images

    def constants(self) -> Draw:
        """The same predictor on a network without a bottleneck."""
        sampler = Sampler(self.denoised, self.predictor, shape=self.shape, backend="eager")
        return lambda: sampler.run(self.latents).images

    def whole_steps(self) -> Draw:
        """Without an analytic first step."""
        sampler = Sampler(self.network, self.whole, backend="eager")
        return lambda: sampler.run(self.latents, class_labels=self.classes).images

    def multistep(self) -> Draw:
        """iPNDM, which has no predictor: the routes that run its plan have the same bits where they have the same kernels."""
        sampler = self.plain()
        return lambda: sampler.run(self.latents).images

    def by_seeds(self) -> Draw:
        """The bundled model with its own predictor, as the servers hold it."""
        sampler = Sampler(BUNDLED, nfe=NFE, backend="eager")
        return lambda: sampler.run(list(range(self.batch)), class_labels=CLASS).images

    def by_seeds_beside_ray(self) -> Draw:
        """The same once more: Ray's own processes take time from whoever is measured beside them."""
        return self.by_seeds()

    def sampler(self) -> Sampler:
        return Sampler(self.network, self.predictor, backend="eager")

    def plain(self) -> Sampler:
        return Sampler(self.denoised, solver="ipndm", nfe=NFE, shape=self.shape, backend="eager")

    @property
    def whole(self) -> AMEDPredictor:
        return self._predictor(make_plan(NFE + 1, solver="amed", afs=False))


def as_pictures(images: Tensor) -> Tensor:
    """(B, C, H, W) as the grey levels or colours of a PNG file, in [0, 1]."""
    return torch.from_numpy(to_uint8(images)).double() / 255


def code_lines(text: str, suffix: str) -> int:
    return len(_python_lines(text)) if suffix == ".py" else _c_lines(text)


def _python_lines(text: str) -> set[int]:
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    used = {n for t in tokens if t.type not in _TRIVIA for n in range(t.start[0], t.end[0] + 1)}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            used -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return used


def _c_lines(text: str) -> int:
    bare = re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.DOTALL)
    return sum(bool(line.strip()) for line in bare.splitlines())


def temporary_folder(stack: ExitStack) -> Path:
    from tempfile import TemporaryDirectory

    return Path(stack.enter_context(TemporaryDirectory()))
