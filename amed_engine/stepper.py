"""Runs a static plan on NumPy arrays, or on any library with NumPy's functions, for a host that owns the network.

stepper = Stepper(plan_file.read_plan("plan.json"), x)  # x (B, ...): noise times plan.sigmas[0]
while not stepper.done:
    stepper.advance(network(stepper.points, stepper.sigma))
images = stepper.result
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from amed_engine.errors import ConfigError
from amed_engine.static_plan import BASIS, Evaluation, PredictorWeights, StaticPlan

Array = Any
Combine = Callable[[Sequence[Array], Array], list[Array]]


class Stepper:
    """A plan at work on one batch. `points` and `sigma` are what the network is to be asked for next.

    x: (B, ...) float32 or float64, noise of unit variance times plan.sigmas[0]. xp: the module of NumPy's functions for
    x, numpy unless given. combine: (sources, coeffs (M, J, B or 1)) -> M arrays, Σ_j coeffs[m, j, b] · sources[j][b];
    plain array arithmetic unless given. Arrays are never changed in place. Raises ConfigError.
    """

    def __init__(self, plan: StaticPlan, x: Array, *, xp: Any = None, combine: Combine | None = None):
        self.xp = _numpy() if xp is None else xp
        if x.ndim < 2 or x.dtype not in (self.xp.dtype("float32"), self.xp.dtype("float64")):
            raise ConfigError(f"x must be float32 or float64 (B, ...), got {x.dtype} {tuple(x.shape)}")
        if plan.shape is not None and tuple(x.shape[1:]) != plan.shape:
            raise ConfigError(f"this plan is for samples of shape {plan.shape}, got {tuple(x.shape[1:])}")
        self.plan, self._combine = plan, combine or self._plain_combine
        self._x, self._y, self._directions = x, (x,), ()
        self._next, self._basis, self._sigma = 0, None, None
        self._skip_analytic()

    @property
    def done(self) -> bool:
        return self._next == len(self.plan.evaluations)

    @property
    def points(self) -> Array:
        """(K·B, ...): where to evaluate next."""
        self._expect(done=False)
        return self._y[0] if len(self._y) == 1 else self.xp.concatenate(self._y)

    @property
    def sigma(self) -> Array:
        """(K·B,): the noise level of each, as told to the network."""
        self._expect(done=False)
        if self._evaluation.sigma_net is None:
            return self._sigma
        levels = self.xp.asarray(self._evaluation.sigma_net, dtype=self._x.dtype)
        return self.xp.repeat(levels, self._x.shape[0])

    @property
    def result(self) -> Array:
        """(B, ...): the sample, once done."""
        self._expect(done=True)
        return self._y[0]

    def advance(self, denoised: Array, features: Array | None = None) -> None:
        """Go on with the network's answer: denoised (K·B, ...) and, for a predictor, its bottleneck (B, C, h, w) or None."""
        self._expect(done=False)
        shape = (len(self._y) * self._x.shape[0], *self._x.shape[1:])
        if tuple(denoised.shape) != shape or denoised.dtype != self._x.dtype:
            expected = f"{self._x.dtype} {shape}"
            raise ConfigError(f"denoised must be {expected} like points, got {denoised.dtype} {tuple(denoised.shape)}")
        self._apply(denoised, features)
        self._skip_analytic()

    @property
    def _evaluation(self) -> Evaluation:
        return self.plan.evaluations[self._next]

    def _expect(self, *, done: bool) -> None:
        if self.done is not done:
            raise ConfigError(
                "the trajectory is at its end; take .result" if self.done else "ask again when .done is True"
            )

    def _skip_analytic(self) -> None:
        while not self.done and self._evaluation.analytic:
            self._apply(analytic_first_step(self.xp, self._y[0], self._evaluation.sigma[0]), None)  # type: ignore[index]

    def _apply(self, denoised: Array, features: Array | None) -> None:
        e, k = self._evaluation, len(self._y)
        if e.threshold:
            denoised = dynamic_thresholding(self.xp, denoised)
        if e.predict is not None:
            self._predict(e.predict, features)
        parts = (denoised,) if k == 1 else tuple(self.xp.split(denoised, k))
        points = () if k == 1 and self._y[0] is self._x else self._y
        tensors = (self._x, *points, *parts, *self._directions)
        outputs = self._combine([tensors[j] for j in e.columns], self._coefficients(e))
        new, rest = tuple(outputs[: e.new_directions]) or parts, tuple(outputs[e.new_directions :])
        self._directions = (*new, *self._directions)[: e.keep]
        self._x = rest[0] if e.moves_x else self._x
        self._y = rest[1:] if e.moves_x and not e.x_is_y else rest
        self._next += 1

    def _coefficients(self, e: Evaluation) -> Array:
        """(M, J, B), or (M, J, 1) where nothing is learned."""
        if not e.learned:
            return self.xp.asarray(e.coefficients, dtype=self._x.dtype)[:, :, None]
        zeros = (0.0,) * (len(BASIS) - 1)
        weights = [[c if isinstance(c, tuple) else (c, *zeros) for c in row] for row in e.coefficients]
        return (self.xp.asarray(weights, dtype="float64") @ self._basis).astype(self._x.dtype)

    def _predict(self, interval: tuple[float, float], features: Array | None) -> None:
        xp, weights, batch = self.xp, self.plan.predictor, self._x.shape[0]
        assert weights is not None
        _check_features(features, weights, batch)
        r, c, time = predict(xp, weights, features, *interval)
        m = interval[1] ** r * interval[0] ** (1 - r)
        basis = (xp.ones_like(r), m, 1 / m, c, c * m, c / m, c / r, c / (r * m))
        self._basis = xp.broadcast_to(xp.stack(basis), (len(BASIS), batch))
        self._sigma = xp.broadcast_to(time * m, (batch,)).astype(self._x.dtype)

    def _plain_combine(self, sources: Sequence[Array], coeffs: Array) -> list[Array]:
        outputs = []
        for row in coeffs.reshape(*coeffs.shape, *[1] * (sources[0].ndim - 1)):
            total = row[0] * sources[0]
            for c, source in zip(row[1:], sources[1:], strict=True):
                total = total + c * source
            outputs.append(total)
        return outputs


def analytic_first_step(xp: Any, x: Array, sigma: float) -> Array:
    """AFS: D = x - s·x / sqrt(1 + s²), rounded as the engine does. arXiv:2210.05475."""
    s = xp.asarray(sigma, dtype=x.dtype)
    return x - s * (1 / xp.sqrt(1 + s * s)) * x


def dynamic_thresholding(xp: Any, x0: Array, quantile: float = 0.995, floor: float = 1.0) -> Array:
    """clamp(x0, -s, s) / s with s the per-sample quantile of |x0|, at least `floor`. Saharia et al. 2022 (arXiv:2205.11487)."""
    magnitude = xp.abs(x0).reshape(x0.shape[0], -1)
    rank = quantile * (magnitude.shape[1] - 1)
    low, high = int(rank), min(int(rank) + 1, magnitude.shape[1] - 1)
    part = xp.partition(magnitude, (low, high), axis=1)
    below, above = part[:, low], part[:, high]
    # The end that is nearer is the one to start from.
    weight = xp.asarray(rank - low, dtype=x0.dtype)
    s = below + weight * (above - below) if rank - low < 0.5 else above - (above - below) * (1 - weight)
    s = xp.maximum(s, xp.asarray(floor, dtype=x0.dtype)).reshape(-1, *[1] * (x0.ndim - 1))
    return xp.clip(x0, -s, s) / s


def predict(xp: Any, weights: PredictorWeights, features: Array | None, *interval: float) -> tuple[Array, Array, Array]:
    """r, scale_dir and scale_time of the AMED predictor, (B,) or (1,) float64; formulas in `AMEDPredictor`."""

    def linear(name: str, values: Array) -> Array:
        weight, bias = (xp.asarray(weights.parameters[f"{name}.{kind}"]) for kind in ("weight", "bias"))
        return values @ weight.reshape(len(bias), -1).T + bias

    def scale(name: str, width: float) -> Array:
        return 1 + width * (2 * _sigmoid(xp, linear(name, z)[:, 0]) - 1) if width else xp.ones(len(z))

    pixels = weights.bottleneck[0] * weights.bottleneck[1]
    mean = xp.zeros((1, pixels)) if features is None else features.astype("float64").mean(1).reshape(-1, pixels)
    code = linear("enc_layer1", _silu(xp, linear("enc_layer0", mean)))
    waves = [_waves(xp, weights, level) for level in interval]
    embedded = [xp.broadcast_to(_silu(xp, linear("map_layer0", wave)), (len(code), wave.shape[1])) for wave in waves]
    z = xp.concatenate([code, *embedded], axis=1)
    r = _sigmoid(xp, linear("fc_r", z)[:, 0])
    return r, scale("fc_scale_dir", weights.scale_dir), scale("fc_scale_time", weights.scale_time)


def _waves(xp: Any, weights: PredictorWeights, sigma: float) -> Array:
    angles = sigma * xp.asarray(weights.frequencies)
    return xp.concatenate([xp.sin(angles), xp.cos(angles)])[None]


def _sigmoid(xp: Any, x: Array) -> Array:
    return 1 / (1 + xp.exp(-x))


def _silu(xp: Any, x: Array) -> Array:
    return x * _sigmoid(xp, x)


def _check_features(features: Array | None, weights: PredictorWeights, batch: int) -> None:
    if features is None:
        return
    if features.ndim != 4 or features.shape[0] != batch or tuple(features.shape[2:]) != weights.bottleneck:
        h, w = weights.bottleneck
        raise ConfigError(f"features must be ({batch}, C, {h}, {w}) or None, got {tuple(features.shape)}")


def _numpy() -> Any:
    import numpy

    return numpy
