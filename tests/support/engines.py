"""What tests of one engine share: networks that can be stopped or spoiled, a clock that stands still, requests of both
routes."""

import threading
import time

from mixed import Classes, plan_of

from amed_engine import ConstantPredictor, Sampler

SAID = {"solver": "ipndm", "nfe": 3}
PATIENCE = 20  # seconds, after which something waits for ever
# No table: what the loop of a Sampler draws beside the rows.
BESIDE = {
    "thresholding": {"solver": "dpmpp", "solver_options": {"thresholding": True}, "nfe": 4},
    "history": {"solver": "ipndm", "nfe": 6},
}


class Network(Classes):
    """Counts its calls, stands still at a gate, and fails when it is told to."""

    def __init__(self):
        super().__init__()
        self.calls, self.sizes, self.trouble = 0, [], None
        self.stops_at = 0  # the call that stands still, 0 for none
        self.gate, self.reached = threading.Event(), threading.Event()
        self.gate.set()

    def forward(self, x, sigma, labels):
        self.calls += 1
        if self.calls == self.stops_at:
            self.stop()
        self.sizes.append(len(x))
        self.reached.set()
        assert self.gate.wait(PATIENCE)
        if self.trouble is not None:
            trouble, self.trouble = self.trouble, None
            raise trouble
        return super().forward(x, sigma, labels)

    def stop(self):
        """The next call stands still."""
        self.reached.clear()
        self.gate.clear()

    def wait_for_a_call(self):
        assert self.reached.wait(PATIENCE)


class Spoiled(Classes):
    """NaN for class 3 from noise level 1 on."""

    def forward(self, x, sigma, labels):
        d, features = super().forward(x, sigma, labels)
        bad = (labels[:, 3] == 1) & (sigma < 1)
        return d.masked_fill(bad[:, None, None, None], float("nan")), features


class Clock:
    """Stands still until somebody moves it."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def until(condition):
    """Wait for what another thread brings about."""
    for _ in range(PATIENCE * 200):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("it never came to be")


def alone(network, *arguments, guidance_scale=None, **said):
    return Sampler(network, **(said or SAID), verify=False).run(*arguments, guidance_scale=guidance_scale)


def is_empty(engine):
    loop = engine._loop
    return not len(loop.scheduler) and not loop._orders and not any(loop._at)


def parallel_points():
    """Three points of evaluation at once, twice."""
    predictor = ConstantPredictor(2, points=3)
    predictor.plan = plan_of(
        {"solver": "amed", "nfe": 8, "afs": False, "schedule": "polynomial"}, {"points": 3}, midpoint=True
    )
    return {"predictor": predictor}
