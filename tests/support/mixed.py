"""For tests of many requests at once: a class-conditional denoiser with known answers, requests of every kind, and a capture
double that replays what was recorded, operation by operation."""

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from amed_engine import AMEDPredictor, ConfigError, ConstantPredictor, ContinuousSampler, Plan, Sampler, make_plan
from amed_engine.sampling.predictors import CoefficientPredictor
from amed_engine.solvers.mean import Mean
from amed_engine.solvers.stage import Midpoint

SHAPE, CLASSES, SIGMAS = (1, 4, 4), 4, (0.01, 20.0)
SCALES = (None, 1.0, 0.0, 0.5, 2.5)


class Classes(nn.Module):
    """Data near N(mean_k, 1/4) for class k, about 0 without class: D = g + tanh(g) / 10 of the Gaussian's exact answer g.

    Features (B, 2, 2, 2) depend on the state, the noise level and the class.
    """

    sample_shape, label_dim = SHAPE, CLASSES
    sigma_min, sigma_max = SIGMAS

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.means = nn.Parameter(torch.randn(CLASSES, *SHAPE, generator=generator).to(dtype))

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        variance = sigma.reshape(-1, 1, 1, 1) ** 2
        means = (labels[:, :, None, None, None] * self.means).sum(1)
        g = (x / 4 + means * variance) / (0.25 + variance)
        pooled = nn.functional.avg_pool2d(torch.cat([x / (1 + variance).sqrt(), g], 1), 2)
        return g + g.tanh() / 10, pooled + 0.1 * variance.log()


def mean_answer() -> Mean:
    """One for each class, about which an analytic first step may start."""
    rows = torch.randn(1 + CLASSES, *SHAPE, generator=torch.Generator().manual_seed(3)) / 2
    return Mean.of(rows, classes=CLASSES, sigma=SIGMAS[1], latents=1)


# ---- programs ----

TRAINING_FREE = [
    ("euler", {}),
    ("heun", {}),
    *(("dpm", {"r": r}) for r in (0.3, 0.5, 1.0)),
    *(("ipndm", {"max_order": order}) for order in (1, 2, 3, 4)),
    *(("deis", {"max_order": order, "deis_mode": mode}) for order in (2, 3, 4) for mode in ("tab", "rhoab")),
    *(
        (name, {"max_order": order, "predict_x0": data, "lower_order_final": lower})
        for name in ("dpmpp", "unipc")
        for order in (1, 2, 3)
        for data in (True, False)
        for lower in ((True, False) if order == 3 else (True,))
    ),
    ("unipc", {"variant": "bh1", "max_order": 3}),
]
LEARNED = [("amed", {}), ("euler", {}), ("dpm", {"r": 0.4}), ("ipndm", {"max_order": 3})]  # under an AMEDPredictor
FIXED = [*LEARNED, ("deis", {"max_order": 3}), ("dpmpp", {"max_order": 2}), ("unipc", {"max_order": 2})]


def learned(seed: int = 0, **options: Any) -> AMEDPredictor:
    """An AMED predictor with random weights, so large that samples differ in what it says of them, r far from 0 and 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        predictor = AMEDPredictor(**({"scale_dir": 0.1, "scale_time": 0.2, "bottleneck": (2, 2)} | options)).eval()
    with torch.no_grad():
        for parameter in predictor.parameters():
            parameter.mul_(1.5)
    return predictor


def fixed(intervals: int) -> ConstantPredictor:
    """Midpoints that are numbers, another in every interval."""
    return ConstantPredictor.of([Midpoint(0.3 + 0.05 * i, 1.02, 0.97) for i in range(intervals)])


def coefficients(levels: Tensor, afs: bool = False) -> CoefficientPredictor:
    """Every row a convex combination of the answers so far, at the noise level where it leads."""
    n, sigma = len(levels) - 1, float(levels[0])
    predictor = CoefficientPredictor(n, sigma, afs=afs)
    with torch.no_grad():
        for i in range(n):
            share = float(levels[i + 1]) / sigma
            count = predictor.width(i) - 1
            weights = torch.tensor([2.0**-j for j in range(count)], dtype=torch.float64)
            predictor.coefficients[i, 0] = share * sigma
            if count:
                predictor.coefficients[i, 1 : 1 + count] = (1 - share) * weights / weights.sum()
    return predictor


# ---- requests ----


@dataclass
class Ask:
    """Arguments of a request, which a `Sampler` and its `run` take too, apart from each other. name: of what was chosen."""

    program: dict[str, Any]
    guidance: float | None
    name: str
    _samplers: dict[torch.dtype, Sampler] = field(default_factory=dict)

    def alone(self, model: nn.Module, dtype: torch.dtype, *arguments: Any):
        """What `Sampler.run` makes of it."""
        if dtype not in self._samplers:
            self._samplers[dtype] = Sampler(model, **self.program, dtype=dtype, verify=False)
        return self._samplers[dtype].run(*arguments, guidance_scale=self.guidance)


def asks(generator: random.Random) -> Iterator[Ask]:
    """Programs of every kind without end: solvers, options, first steps, schedules, numbers of evaluations, predictors."""
    makers = [_training_free, _training_free, _training_free, _learned, _fixed, _coefficients, _consistency]
    while True:
        try:
            yield generator.choice(makers)(generator)
        except ConfigError:  # no whole number of intervals spends that
            continue


def _schedule(generator: random.Random) -> dict[str, Any]:
    choice = generator.randrange(4)
    if choice == 3:
        return {"schedule": "polynomial", "rho": generator.choice([3.0, 7.0, 9.5])}
    return {"schedule": ("polynomial", "logsnr", "time_uniform")[choice]}


def _training_free(generator: random.Random) -> Ask:
    solver, options = generator.choice(TRAINING_FREE)
    afs = generator.choice([None, False, True, "mean"])
    said = {"solver": solver, "nfe": generator.randint(1, 10), "afs": afs, **_schedule(generator)}
    plan = plan_of(said, options)
    own = afs == "mean" or generator.random() < 0.3  # a mean comes with its plan
    asked = {"plan": plan} if own else {**said, "solver_options": options}
    return Ask(asked, generator.choice(SCALES), f"{plan.describe()}{' by plan' if own else ''}")


def plan_of(said: dict[str, Any], options: dict[str, Any], **more: Any) -> Plan:
    mean = mean_answer() if said["afs"] == "mean" else None
    low, high = SIGMAS
    return make_plan(**said, options=options, mean=mean, sigma_min=low, sigma_max=high, **more)


def _refined(generator: random.Random, solvers: list) -> Plan:
    solver, options = generator.choice(solvers)
    afs = generator.choice([False, True, "mean"])
    said = {"solver": solver, "nfe": generator.randint(1, 10), "afs": afs, **_schedule(generator)}
    return plan_of(said, options, midpoint=True, guidance_scale=generator.choice(SCALES))


def _learned(generator: random.Random) -> Ask:
    plan = _refined(generator, LEARNED)
    scale_dir, scale_time = generator.choice([(0.1, 0.2), (0.1, 0.0), (0.0, 0.3)])
    predictor = learned(generator.randrange(5), scale_dir=scale_dir, scale_time=scale_time)
    predictor.plan = plan
    return Ask({"predictor": predictor}, plan.guidance_scale, f"AMED {plan.describe()}")


def _fixed(generator: random.Random) -> Ask:
    plan = _refined(generator, FIXED)
    predictor = fixed(plan.intervals)
    predictor.plan = plan
    return Ask({"predictor": predictor}, plan.guidance_scale, f"constant {plan.describe()}")


def _consistency(generator: random.Random) -> Ask:
    said = {"solver": "consistency", "nfe": generator.randint(1, 8), **_schedule(generator)}
    return Ask(said, generator.choice(SCALES), f"consistency {said}")


def _coefficients(generator: random.Random) -> Ask:
    afs = generator.random() < 0.5
    said = {"solver": "nonstationary", "nfe": generator.randint(1, 8), "afs": afs, **_schedule(generator)}
    plan = plan_of(said, {}, midpoint=True, guidance_scale=generator.choice(SCALES))
    predictor = coefficients(plan.levels, afs)
    predictor.plan = plan
    return Ask({"predictor": predictor}, plan.guidance_scale, plan.describe())


@contextmanager
def held(engine: ContinuousSampler) -> Iterator[None]:
    """No tick meanwhile: what is submitted waits, and all of it is there when the first row is given."""
    reached, go_on = threading.Event(), threading.Event()

    def stand_still() -> None:
        reached.set()
        assert go_on.wait(120)

    thread = threading.Thread(target=engine._loop.between_ticks, args=(stand_still,))
    thread.start()
    assert reached.wait(120)
    try:
        yield
    finally:
        go_on.set()
        thread.join()


# ---- CUDA's capture without a GPU ----

# Operations that wait for a GPU, or whose results have sizes that only it knows.
WAITS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique", "item"}


class Tape(TorchDispatchMode):
    """Every operation of a block on its tensors, to be done again on the same memory. Raises for one that waits."""

    def __init__(self):
        super().__init__()
        self.operations: list[tuple[Callable, tuple, dict, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name.partition("::")[2] in WAITS:
            raise RuntimeError(f"{func} waits for the device, which a capture forbids")
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, result in self.operations:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():  # else a view, or written in place
                    old.copy_(new)


class Taped:
    """A recording that knows nothing but its tape: what the host has changed since is not seen, as by a graph."""

    def __init__(self, tape: Tape):
        self.tape, self.alive, self.replays = tape, True, 0

    def replay(self) -> None:
        assert self.alive, "replayed after reset"
        self.replays += 1
        with torch.no_grad():
            self.tape.replay()

    def reset(self) -> None:
        self.alive = False


def taping(double: Any) -> Any:
    """The double of CUDA's capture, with recordings that replay a tape."""

    def record(work: Callable[[], Tensor]) -> tuple[Taped, Tensor]:
        if double.fail_at == len(double.recordings):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        with Tape() as tape:
            output = work()
        double.recordings.append(Taped(tape))
        double.log.append(("record", len(output)))
        return double.recordings[-1], output

    double.record = record
    return double
