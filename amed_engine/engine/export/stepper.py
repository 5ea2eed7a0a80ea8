"""Runs a table (`Tableau`) on NumPy arrays, or on any library with NumPy's functions, for a host that owns the network.

stepper = Stepper(read_plan("plan.json"), x)  # x (B, ...): noise times plan.sigmas[0]
while not stepper.done:
    stepper.advance(network(stepper.points, stepper.sigma))
images = stepper.result
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy

from amed_engine.engine.export.tableau import BASIS, Evaluation, MeanRows, PredictorWeights, Tableau, basis_at
from amed_engine.errors import ConfigError

Array = Any
Combine = Callable[[Sequence[Array], Array, Sequence[Array]], None]


class Stepper:
    """A table at work on one batch. `points` and `sigma` are what the network is to be asked for next.

    x: (B, ...) float32 or float64, noise of unit variance times plan.sigmas[0]; kept, not copied or changed. classes: (B,)
    integers, -1 for none, where plan.mean has classes and only there; in an array of another library than numpy they are not
    looked at, and the sample of a class that the plan does not have is NaN. xp: the module of NumPy's functions for x, numpy
    unless given. combine: (sources, coeffs (M, J, B or 1), outputs) writes outputs[m][b] =
    Σ_j coeffs[m, j, b] · sources[j][b]; plain array arithmetic unless given. Constants go to x's device here, once; from then
    on nothing waits for it. Raises ConfigError.
    """

    def __init__(self, plan: Tableau, x: Array, classes: Any = None, *, xp: Any = None, combine: Combine | None = None):
        if not isinstance(plan, Tableau):
            raise ConfigError(f"plan must be what read_plan returns, got {type(plan).__name__}")
        self.plan, self.xp = plan, numpy if xp is None else xp
        self._combine = combine or self._plain_combine
        _check_latents(self.xp, plan, x)
        self._constants = [_constants(self.xp, e, x) for e in plan.evaluations]
        self._weights = None if plan.predictor is None else ArrayPredictor(self.xp, plan.predictor)
        self._mean = ArrayMean(self.xp, plan.mean, x)
        self._template = x
        self.restart(x, classes)

    def __repr__(self) -> str:
        at = f"evaluation {self._next} of {len(self.plan.evaluations)}"
        return f"Stepper({self.plan!r}, {'done' if self.done else at}, x {self._template.dtype} {self._template.shape})"

    def restart(self, x: Array, classes: Any = None) -> None:
        """Begin again from other latents of the same shape and dtype, with classes as above."""
        expect_array(self.xp, "x", x)
        if x.shape != self._template.shape or x.dtype != self._template.dtype:
            expected = f"{self._template.dtype} {tuple(self._template.shape)}"
            raise ConfigError(f"x must be {expected} as before, got {x.dtype} {tuple(x.shape)}; make a Stepper for it")
        mean = self._mean.of(classes)
        self._x, self._y, self._y_is_x, self._directions = x, x, True, ()
        self._next, self._basis, self._sigma = 0, None, None
        self._skip_analytic(mean)

    @property
    def done(self) -> bool:
        return self._next == len(self.plan.evaluations)

    @property
    def points(self) -> Array:
        """(K·B, ...): where to evaluate next, the first point of all samples first. Not a copy: leave it as it is."""
        self._expect(done=False)
        return self._y

    @property
    def sigma(self) -> Array:
        """(K·B,): the noise level of each, as told to the network."""
        self._expect(done=False)
        return self._sigma if self._evaluation.sigma_net is None else self._constants[self._next].sigma

    @property
    def result(self) -> Array:
        """(B, ...): the sample, once done."""
        self._expect(done=True)
        return self._y

    def advance(self, denoised: Array, features: Array | None = None) -> None:
        """Go on with the network's answer: denoised (K·B, ...) and, for a predictor, its bottleneck (B, C, h, w) or None.

        Both may be overwritten afterwards.
        """
        self._expect(done=False)
        expect_array(self.xp, "denoised", denoised)
        if denoised.shape != self._y.shape or denoised.dtype != self._y.dtype:
            expected = f"{self._y.dtype} {tuple(self._y.shape)}"
            raise ConfigError(f"denoised must be {expected} like points, got {denoised.dtype} {tuple(denoised.shape)}")
        self._apply(denoised, features)
        self._skip_analytic()

    @property
    def _evaluation(self) -> Evaluation:
        return self.plan.evaluations[self._next]

    def _expect(self, *, done: bool) -> None:
        if self.done is not done:
            raise ConfigError(
                "the trajectory is at its end; take .result"
                if self.done
                else "the trajectory has no result yet; `advance` it with the network's answers until .done is True"
            )

    def _skip_analytic(self, mean: Array | None = None) -> None:
        while not self.done and self._evaluation.analytic:
            self._apply(analytic_first_step(self._y, self._evaluation.sigma[0], mean), None)  # type: ignore[index]

    def _apply(self, denoised: Array, features: Array | None) -> None:
        e = self._evaluation
        if e.threshold:
            denoised = dynamic_thresholding(self.xp, denoised)
        elif e.keep and not e.new_directions:
            denoised = denoised.copy()  # a direction from now on, while engines write into the same memory again
        if e.predict is not None:
            self._predict(e.predict, features)
        answers = self._split(denoised, e.points)
        tensors = (self._x, *(() if self._y_is_x else self._split(self._y, e.points)), *answers, *self._directions)
        new = [self.xp.empty_like(self._x) for _ in range(e.new_directions)]
        x = self.xp.empty_like(self._x) if e.moves_x and not e.x_is_y else self._x
        y = self.xp.empty((e.next_points * len(x), *x.shape[1:]), dtype=x.dtype)
        outputs = (*new, *((x,) if x is not self._x else ()), *self._split(y, e.next_points))
        self._combine([tensors[j] for j in e.columns], self._coefficients(e), outputs)
        self._directions = (*(new or answers), *self._directions)[: e.keep]
        self._x, self._y, self._y_is_x = (y if e.x_is_y else x), y, e.x_is_y
        self._next += 1

    def _split(self, together: Array, count: int) -> tuple[Array, ...]:
        batch = len(together) // count
        return tuple(together[k * batch : (k + 1) * batch] for k in range(count))

    def _coefficients(self, e: Evaluation) -> Array:
        """(M, J, B), or (M, J, 1) where nothing is learned."""
        known = self._constants[self._next].coefficients
        return (known @ self._basis).astype(self._x.dtype) if e.learned else known

    def _predict(self, interval: tuple[float, float], features: Array | None) -> None:
        xp, batch = self.xp, len(self._x)
        r, c, time = self._weights.predict(features, batch, *interval)  # type: ignore[union-attr]
        m = interval[1] ** r * interval[0] ** (1 - r)
        basis = basis_at(xp.ones_like(r), m, r, c)
        self._basis = xp.broadcast_to(xp.stack(basis), (len(BASIS), batch))
        self._sigma = xp.broadcast_to(time * m, (batch,)).astype(self._x.dtype)

    def _plain_combine(self, sources: Sequence[Array], coeffs: Array, outputs: Sequence[Array]) -> None:
        for row, out in zip(coeffs.reshape(*coeffs.shape, *[1] * (sources[0].ndim - 1)), outputs, strict=True):
            out[...] = row[0] * sources[0]
            for c, source in zip(row[1:], sources[1:], strict=True):
                out += c * source


class Constants(NamedTuple):
    """What an evaluation needs on the device: (M, J, 1), or weights (M, J, 8) in float64; levels (K·B,) or None."""

    coefficients: Array
    sigma: Array | None


def _constants(xp: Any, e: Evaluation, x: Array) -> Constants:
    told = e.sigma_net and xp.repeat(xp.asarray(e.sigma_net, dtype=x.dtype), len(x))
    if not e.learned:
        return Constants(xp.asarray(e.coefficients, dtype=x.dtype)[:, :, None], told)
    zeros = (0.0,) * (len(BASIS) - 1)
    weights = [[c if isinstance(c, tuple) else (c, *zeros) for c in row] for row in e.coefficients]
    return Constants(xp.asarray(weights, dtype="float64"), told)


def expect_array(xp: Any, name: str, value: Any) -> None:
    """Raises ConfigError for an array of another library."""
    if not isinstance(value, getattr(xp, "ndarray", object)):
        library = xp.__name__
        raise ConfigError(
            f"{name} must be an array of {library}, got {type(value).__name__}; {library}.from_dlpack reads others in place"
        )


def _check_latents(xp: Any, plan: Tableau, x: Array) -> None:
    expect_array(xp, "x", x)
    if x.ndim < 2 or x.dtype not in (xp.dtype("float32"), xp.dtype("float64")):
        raise ConfigError(f"x must be float32 or float64 (B, ...), got {x.dtype} {tuple(x.shape)}")
    if plan.shape is not None and tuple(x.shape[1:]) != plan.shape:
        raise ConfigError(f"this plan is for samples of shape {plan.shape}, got {tuple(x.shape[1:])}")


def analytic_first_step(x: Array, sigma: float, mean: Array | None = None) -> Array:
    """AFS: D = x - c·(x - m), c = s / sqrt(1 + s²), m 0 unless given, rounded as the engine does. arXiv:2210.05475."""
    s = numpy.asarray(sigma, dtype=str(x.dtype))[()]  # on the host, in x's precision
    c = x.dtype.type(s * (1 / numpy.sqrt(1 + s * s)))
    return x - c * (x if mean is None else x - mean)


def dynamic_thresholding(xp: Any, x0: Array, quantile: float = 0.995, floor: float = 1.0) -> Array:
    """clamp(x0, -s, s) / s with s the per-sample quantile of |x0|, at least `floor`. Saharia et al. 2022 (arXiv:2205.11487)."""
    magnitude = xp.abs(x0).reshape(x0.shape[0], -1)
    rank = quantile * (magnitude.shape[1] - 1)
    low, high = int(rank), min(int(rank) + 1, magnitude.shape[1] - 1)
    part = xp.partition(magnitude, (low, high), axis=1)
    below, above = part[:, low], part[:, high]
    # The end that is nearer is the one to start from.
    weight = x0.dtype.type(rank - low)
    s = below + weight * (above - below) if rank - low < 0.5 else above - (above - below) * (1 - weight)
    s = xp.maximum(s, x0.dtype.type(floor)).reshape(-1, *[1] * (x0.ndim - 1))
    return xp.clip(x0, -s, s) / s


class ArrayMean:
    """The rows of a table's mean on a device, in x's dtype, and which of them is a sample's."""

    def __init__(self, xp: Any, source: MeanRows | None, x: Array):
        self.xp, self.source, self.batch = xp, source, len(x)
        if source is not None:
            rows = xp.asarray(numpy.asarray(source.rows, dtype="float32"), dtype=x.dtype).reshape(-1, *x.shape[1:])
            self._rows = xp.concatenate([rows, xp.full_like(rows[:1], math.nan)])  # the last for what is no class

    def of(self, classes: Any) -> Array | None:
        """(1 or B, ...), or None where the table has no mean. Raises ConfigError."""
        count = 0 if self.source is None else self.source.classes
        if count == 0:
            if classes is not None:
                raise ConfigError("this plan begins the same for every class; leave classes out")
            return None if self.source is None else self._rows[:1]
        chosen = self._checked(classes, count)
        rows = self.xp.minimum(chosen + 1, len(self._rows) - 2)
        return self._rows[self.xp.where((chosen >= -1) & (chosen < count), rows, len(self._rows) - 1)]

    def _checked(self, classes: Any, count: int) -> Array:
        if classes is None:
            raise ConfigError(
                f"this plan begins with the mean of a class; pass classes, ({self.batch},) integers, -1 for none"
            )
        foreign = self.xp is not numpy and isinstance(classes, self.xp.ndarray)
        chosen = classes if foreign else numpy.asarray(classes)
        if chosen.shape != (self.batch,) or chosen.dtype.kind not in "iu":
            raise ConfigError(
                f"classes must be integers ({self.batch},), got {chosen.dtype} {tuple(chosen.shape)}; -1 is no class"
            )
        if not foreign and not ((chosen >= -1) & (chosen < count)).all():
            raise ConfigError(f"classes must be -1 for none or 0 to {count - 1}, got {chosen.min()} to {chosen.max()}")
        return chosen.astype("int64") if foreign else self.xp.asarray(chosen.astype("int64"))


class ArrayPredictor:
    """An AMED predictor on arrays, in float64; formulas in `AMEDPredictor`."""

    def __init__(self, xp: Any, source: PredictorWeights):
        self.xp, self.source = xp, source
        shapes = source.shapes()
        self._arrays = {name: xp.asarray(source.parameters[name]).reshape(shape) for name, shape in shapes.items()}
        self._frequencies = xp.asarray(source.frequencies)

    def predict(self, features: Array | None, batch: int, *interval: float) -> tuple[Array, Array, Array]:
        """r, scale_dir and scale_time, (B,) or (1,) where there are no features."""
        xp, (h, w) = self.xp, self.source.bottleneck
        if features is not None:
            expect_array(xp, "features", features)
        if features is not None and (features.ndim != 4 or features.shape[0] != batch or features.shape[2:] != (h, w)):
            raise ConfigError(f"features must be ({batch}, C, {h}, {w}) or None, got {tuple(features.shape)}")
        mean = xp.zeros((1, h * w)) if features is None else features.astype("float64").mean(1).reshape(-1, h * w)
        code = self._linear("enc_layer1", self._silu(self._linear("enc_layer0", mean)))
        embedded = [xp.broadcast_to(self._embed(level), (len(code), self.source.noise_channels)) for level in interval]
        z = xp.concatenate([code, *embedded], axis=1)
        r = self._sigmoid(self._linear("fc_r", z)[:, 0])
        return r, self._scale("scale_dir", z), self._scale("scale_time", z)

    def _linear(self, name: str, values: Array) -> Array:
        return values @ self._arrays[f"{name}.weight"].T + self._arrays[f"{name}.bias"]

    def _scale(self, name: str, z: Array) -> Array:
        width = getattr(self.source, name)
        if not width:
            return self.xp.ones(len(z))
        return 1 + width * (2 * self._sigmoid(self._linear(f"fc_{name}", z)[:, 0]) - 1)

    def _embed(self, sigma: float) -> Array:
        angles = sigma * self._frequencies
        waves = self.xp.concatenate([self.xp.sin(angles), self.xp.cos(angles)])
        return self._silu(self._linear("map_layer0", waves[None]))

    def _sigmoid(self, x: Array) -> Array:
        return 1 / (1 + self.xp.exp(-x))

    def _silu(self, x: Array) -> Array:
        return x * self._sigmoid(x)
