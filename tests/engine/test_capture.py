"""What a graph records must not come from the host: run the loop on the meta device and look at every operator."""

import numpy as np
import pytest
import torch

from amed_engine import AMEDPredictor, make_plan
from amed_engine.sampling.denoiser import Denoised
from amed_engine.sampling.loop import integrate
from amed_engine.solvers.program import Program

PLUGINS = ("amed", "euler", "dpm", "ipndm", "deis", "dpmpp", "unipc")
FREE = ("euler", "heun", "dpm", "ipndm", "deis", "dpmpp", "unipc")


def denoise(x, sigma):
    return Denoised(x * 0.5, x.new_empty(x.shape[0], 8, 4, 4))


@pytest.mark.parametrize(("solver", "learned"), [(s, True) for s in PLUGINS] + [(s, False) for s in FREE])
def test_the_loop_takes_nothing_from_the_host(no_host, solver, learned):
    plan = make_plan(5 if learned else 4, solver=solver, midpoint=learned)
    predictor = AMEDPredictor(0.05, 0.2, bottleneck=(4, 4)).to("meta") if learned else None
    program = Program.build(plan.make_solver(), plan.levels, predictor, afs=plan.afs)
    program = program.on(torch.device("meta"), torch.float32)
    with torch.no_grad(), no_host() as watch:
        integrate(program, denoise, torch.empty(2, 1, 8, 8, device="meta"))
    assert watch.seen > 10


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (lambda x: x.sum().item(), "item"),
        (lambda x: x.tolist(), "tolist"),
        (lambda x: bool((x > 0).all()), "__bool__|is_nonzero"),
        (lambda x: float(x.sum()), "_local_scalar_dense"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x[x > 0], "waits for the device"),
        (lambda x: torch.equal(x, x), "equal"),
        (lambda x: x.cpu(), "between|copy out of meta"),
        (lambda x: x.copy_(torch.empty(2, 2)), "between"),
        (lambda x: torch.zeros(2, 2).to(x), "between|cpu"),
        (lambda x: x * torch.tensor(2.0), "cpu"),
        (lambda x: torch.where(x > 0, torch.ones(()), x), "cpu|between"),
        (lambda x: torch.from_numpy(np.ones(2)).to(x.device), "between|cpu"),
    ],
)  # fmt: skip
def test_the_guard_sees_what_a_capture_forbids(no_host, work, message):
    with pytest.raises((AssertionError, NotImplementedError, RuntimeError), match=message), no_host():
        work(torch.empty(2, 2, device="meta"))
