"""What a graph records must not come from the host: run the loop on the meta device and look at every operator."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

from amed_engine import AMEDPredictor, make_plan
from amed_engine.denoiser import Denoised
from amed_engine.loop import Program, integrate

PLUGINS = ("amed", "euler", "dpm", "ipndm", "deis", "dpmpp", "unipc")
FREE = ("euler", "heun", "dpm", "ipndm", "deis", "dpmpp", "unipc")


HOST = (
    torch.tensor,
    torch.as_tensor,
    torch.Tensor.new_tensor,
    torch.Tensor.item,
    torch.Tensor.tolist,
    torch.Tensor.__bool__,
)


class NoHost(TorchFunctionMode):
    """Refuses what copies numbers from the host (which waits for it, and cannot be captured) or reads a value."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        assert func not in HOST or all(t.device.type == "cpu" for t in tensors), f"{func.__name__}{args[1:]}"
        return func(*args, **(kwargs or {}))


def denoise(x, sigma):
    return Denoised(x * 0.5, x.new_empty(x.shape[0], 8, 4, 4))


@pytest.mark.parametrize(("solver", "learned"), [(s, True) for s in PLUGINS] + [(s, False) for s in FREE])
def test_the_loop_takes_nothing_from_the_host(solver, learned):
    plan = make_plan(5 if learned else 4, solver=solver, midpoint=learned)
    predictor = AMEDPredictor(0.05, 0.2, bottleneck=(4, 4)).to("meta") if learned else None
    program = Program.build(plan.make_solver(), plan.levels, predictor, afs=plan.afs)
    program = program.on(torch.device("meta"), torch.float32)
    with torch.no_grad(), NoHost():
        integrate(program, denoise, torch.empty(2, 1, 8, 8, device="meta"))
