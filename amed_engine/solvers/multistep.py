"""Solvers of one evaluation per step that remember earlier ones: Euler, iPNDM, DEIS, DPM-Solver++, UniPC."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from amed_engine.solvers import rules
from amed_engine.solvers.arguments import in_range, is_bool, one_of
from amed_engine.solvers.base import Past, Solver, UseOfPredictor
from amed_engine.solvers.stage import Midpoint, Row, Stage


class _Multistep(Solver):
    """A rule applied once per interval, or twice on the refined grid."""

    takes_predictor: ClassVar[UseOfPredictor] = "optional"
    max_order = 1  # an option where it says how many noise levels a rule reads

    @property
    def memory(self) -> int:
        return self.max_order - 1

    def evaluations(self, with_midpoint: bool) -> int:
        return 2 if with_midpoint else 1

    def substep(self, sigmas: Past, sigma_next: Tensor, k: int, n: int, scale: Tensor | float) -> Stage:
        """Sub-step k of n; sigmas are all levels so far, newest first."""
        raise NotImplementedError

    def step(
        self, past: Past, sigma: Tensor, sigma_next: Tensor, midpoint: Midpoint | None, i: int, n: int
    ) -> list[Stage]:
        if midpoint is None:
            return [self.substep((sigma, *past), sigma_next, i, n, 1.0)]
        m = rules.midpoint_level(sigma, sigma_next, midpoint.r)
        first = self.substep((sigma, *past), m, 2 * i, 2 * n, 1.0)
        second = self.substep((m, sigma, *past), sigma_next, 2 * i + 1, 2 * n, midpoint.scale_dir)
        return [first._replace(sigma=m, sigma_net=midpoint.scale_time * m), second]


class _Rule(_Multistep):
    """A multistep solver whose anchor goes where it evaluates next."""

    def row(self, sigmas: Past, sigma_next: Tensor, k: int, n: int) -> Row:
        raise NotImplementedError

    def substep(self, sigmas: Past, sigma_next: Tensor, k: int, n: int, scale: Tensor | float) -> Stage:
        return Stage((self.row(sigmas, sigma_next, k, n).scaled(scale),), x_is_y=True)


@dataclass(frozen=True)
class Euler(_Rule):
    """x' = x + (s' - s) d, which is DDIM. Song et al. 2021 (arXiv:2010.02502)."""

    tabulated: ClassVar[bool] = True

    def row(self, sigmas: Past, sigma_next: Tensor, k: int, n: int) -> Row:
        return rules.adams_bashforth(sigmas[:1], sigma_next)


@dataclass(frozen=True)
class IPNDM(_Rule):
    """iPNDM of order max_order (1 to 4): Adams-Bashforth with equal-step weights. arXiv:2202.09778, arXiv:2204.13902."""

    max_order: int = 4
    tabulated: ClassVar[bool] = True
    compared: ClassVar = {f"-{order}": {"max_order": order} for order in (2, 3, 4)}

    def __post_init__(self):
        in_range("ipndm", "max_order", self.max_order, 1, 4)

    def row(self, sigmas: Past, sigma_next: Tensor, k: int, n: int) -> Row:
        return rules.adams_bashforth(sigmas[: self.max_order], sigma_next)


@dataclass(frozen=True)
class DEIS(_Rule):
    """DEIS of order max_order (1 to 4), polynomials in VP time ("tab") or in sigma ("rhoab"). arXiv:2204.13902."""

    max_order: int = 4
    deis_mode: str = "tab"
    compared: ClassVar = {"-3": {"max_order": 3}}

    def __post_init__(self):
        in_range("deis", "max_order", self.max_order, 1, 4)
        one_of("deis", "deis_mode", self.deis_mode, ("tab", "rhoab"))

    def row(self, sigmas: Past, sigma_next: Tensor, k: int, n: int) -> Row:
        time = rules.vp_time if self.deis_mode == "tab" else rules.identity
        return rules.deis(sigmas[: self.max_order], sigma_next, time)


@dataclass(frozen=True)
class _Exponential(_Multistep):
    """What DPM-Solver++ and UniPC share: steps in log sigma, in data or noise prediction.

    predict_x0: data prediction, else noise prediction. thresholding: every data prediction is thresholded dynamically, as
    published for pixels in -1 .. 1; other data it would clip.
    lower_order_final: the last sub-steps use orders 2, 1.
    """

    max_order: int = 3
    predict_x0: bool = True
    lower_order_final: bool = True
    thresholding: bool = False

    def __post_init__(self):
        name = type(self).__name__.lower()
        in_range(name, "max_order", self.max_order, 1, 3)
        for option in ("predict_x0", "lower_order_final", "thresholding"):
            is_bool(name, option, getattr(self, option))

    @property
    def data_prediction(self) -> bool:
        return self.predict_x0

    @property
    def thresholds(self) -> bool:
        return self.thresholding and self.predict_x0

    def order(self, k: int, n: int) -> int:
        """Of sub-step k of n: what history allows at the start, and lower at the end if asked."""
        if k + 1 < self.max_order:
            return k + 1
        return min(self.max_order, n - k) if self.lower_order_final else self.max_order


@dataclass(frozen=True)
class DPMpp(_Exponential, _Rule):
    """DPM-Solver++ of order max_order (1 to 3). arXiv:2211.01095."""

    compared: ClassVar = {
        **{f"-{order} noise": {"max_order": order, "predict_x0": False} for order in (2, 3)},
        **{f"-{order} data": {"max_order": order, "predict_x0": True} for order in (2, 3)},
    }

    def row(self, sigmas: Past, sigma_next: Tensor, k: int, n: int) -> Row:
        return rules.dpmpp(sigmas[: self.order(k, n)], sigma_next, data=self.predict_x0)


@dataclass(frozen=True)
class UniPC(_Exponential):
    """UniPC of order max_order (1 to 3), predictor-corrector at one evaluation per step. arXiv:2302.04867.

    variant: bh1 or bh2. The anchor trails one evaluation: a step first corrects the state at sigma from the old anchor,
    then predicts. The last step is not corrected. Under a midpoint, scale_dir scales the predictor of the second half.
    """

    variant: str = "bh2"
    corrects: ClassVar[bool] = True
    compared: ClassVar = {f"-{order}": {"max_order": order, "predict_x0": True} for order in (2, 3)}

    def __post_init__(self):
        super().__post_init__()
        one_of("unipc", "variant", self.variant, ("bh1", "bh2"))

    @property
    def memory(self) -> int:
        return self.max_order

    def substep(self, sigmas: Past, sigma_next: Tensor, k: int, n: int, scale: Tensor | float) -> Stage:
        predicted = self._interval(sigmas, sigma_next, k, n).predictor().scaled(scale)
        if k == 0:
            return Stage((predicted,))
        corrected = self._interval(sigmas[1:], sigmas[0], k - 1, n).corrector()
        return Stage((predicted.after(corrected),), corrected)

    def _interval(self, sigmas: Past, sigma_next: Tensor, k: int, n: int) -> rules.UniPCWeights:
        return rules.UniPCWeights(sigmas[: self.order(k, n)], sigma_next, data=self.predict_x0, variant=self.variant)


@dataclass(frozen=True)
class Nonstationary(Solver):
    """x_{i+1} = a_i x_0 + Σ_{j<=i} b_ij D_j, every coefficient from a predictor: a Row per interval, newest D first.

    The anchor stays at x_0; the noise levels are those the network is told, nothing else depends on them. Shaul et al.
    2024 (arXiv:2403.01329).
    """

    takes_predictor: ClassVar[UseOfPredictor] = "required"
    answer: ClassVar[type] = Row

    @property
    def memory(self) -> int:
        return 1 << 10  # every evaluation so far

    @property
    def data_prediction(self) -> bool:
        return True

    def evaluations(self, with_midpoint: bool) -> int:
        return 1

    def step(self, past: Past, sigma: Tensor, sigma_next: Tensor, midpoint: Row, i: int, n: int) -> list[Stage]:
        return [Stage((midpoint,))]
