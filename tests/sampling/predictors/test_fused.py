"""The captured loop of AMED is the network, one `midpoint` and two `combine` per interval, and a few copies."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from amed_engine import AMEDPredictor, Sampler, kernels, make_plan, make_solver
from amed_engine.kernels import native
from amed_engine.sampling.denoiser import Denoised, classifier_free, conditioned
from amed_engine.sampling.loop import integrate
from amed_engine.solvers.program import Program

pytestmark = pytest.mark.skipif(not native.available(), reason="no compiled extension stands in for the GPU's kernels")


class Counting(TorchDispatchMode):
    """Counts operators that compute; views and questions about dtypes cost nothing on a device."""

    VIEWS = (
        "promote_types",
        "view",
        "expand",
        "slice",
        "select",
        "unsqueeze",
        "split",
        "unbind",
        "reshape",
        "alias",
        "detach",
    )

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        if not name.startswith(self.VIEWS):
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


def predictor(dtype=torch.float32, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = AMEDPredictor(**({"scale_dir": 0.05, "scale_time": 0.2, "bottleneck": (4, 4)} | options))
    return made.to(dtype)


def denoise(x, sigma, labels=None):
    shift = 0 if labels is None else labels.sum(1).view(-1, 1, 1, 1)
    variance = 1 + sigma.view(-1, 1, 1, 1) ** 2
    # Features of order one, as networks have them: far larger ones drive r to 0 or 1, where dpm and unipc have no step.
    return Denoised(x / variance + 0.1 * shift, x[:, :1, ::2, ::2] / variance.sqrt() + shift)


LABELS = torch.nn.functional.one_hot(torch.arange(3), 5).double()
DENOISERS = {
    "plain": denoise,
    "labels": conditioned(denoise, LABELS),
    "guided": classifier_free(denoise, LABELS, 2.0),
}


@pytest.mark.parametrize("solver", ["amed", "euler", "dpm", "ipndm", "deis", "dpmpp", "unipc"])
@pytest.mark.parametrize("network", DENOISERS)
@pytest.mark.parametrize("afs", [False, True])
def test_the_fused_step_is_the_plain_one(solver, network, afs):
    """In float64, with the plain definition forced for comparison."""
    plan = make_plan(5 if afs else 6, solver=solver, midpoint=True, afs=afs)
    program = Program.build(plan.make_solver(), plan.levels, predictor(torch.float64), afs=afs)
    x = 80 * torch.randn(3, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with Counting() as fused:
            images = integrate(program, DENOISERS[network], x)[-1]
        with kernels.use("reference"), Counting() as plain:
            expected = integrate(program, DENOISERS[network], x)[-1]
    torch.testing.assert_close(images, expected, rtol=1e-9, atol=1e-9)
    assert fused.seen["midpoint"] == plan.intervals
    assert plain.seen["midpoint"] == 0


def test_an_interval_of_amed_is_one_midpoint_and_two_combines():
    plan = make_plan(5, solver="amed")
    program = Program.build(plan.make_solver(), plan.levels, predictor(), afs=True).on(
        torch.device("cpu"), torch.float32
    )
    x = torch.randn(3, 1, 8, 8)

    # A network that costs nothing.
    with torch.no_grad(), Counting() as counted:
        integrate(program, lambda y, sigma: Denoised(y, y[:, :, :4, :4]), x)
    intervals = plan.intervals
    assert counted.seen.pop("midpoint") == intervals
    assert counted.seen.pop("combine") == 2 * intervals
    # The noise level of each evaluation as a tensor of its own, and the analytic first step's few operators.
    assert counted.seen.pop("cat") == 2 * intervals
    assert counted.seen.total() <= 8, counted.seen


def test_training_takes_the_plain_definition():
    plan = make_plan(3, solver="amed")
    learning = predictor()
    program = Program.build(plan.make_solver(), plan.levels, learning, afs=True).on(torch.device("cpu"), torch.float32)
    integrate(program, denoise, torch.randn(2, 1, 8, 8))[-1].sum().backward()
    assert all(parameter.grad is not None for parameter in learning.fc_r.parameters())


def test_wide_scales_and_other_precisions_take_the_plain_definition():
    one = torch.ones(2)
    with torch.no_grad():
        midpoint, updates = predictor().fused(make_solver("amed"), None, 2 * one, one)
        assert midpoint is not None
        assert updates is not None
        assert predictor().fused(make_solver("ipndm"), None, 2 * one, one)[1] is None
        assert predictor().fused(make_solver("amed", points=2), None, 2 * one, one)[1] is None
        assert predictor(scales="wide").fused(make_solver("amed"), None, 2 * one, one) == (None, None)
        assert predictor().fused(make_solver("amed"), None, 2 * one.double(), one.double()) == (None, None)
    assert predictor().fused(make_solver("amed"), None, 2 * one, one) == (None, None)


def test_the_plain_definition_of_the_predictor_is_that_of_the_kernel():
    """To the last bit: there is one."""
    made, features = predictor(), torch.randn(3, 5, 4, 4)
    sigma, sigma_next = torch.rand(2, 3) + torch.tensor([[1.0], [0.1]])
    with torch.no_grad(), kernels.use("reference"):
        for told in (features, None):
            plain = kernels.midpoint(told, sigma, sigma_next, made._weights(), made.scale_dir, made.scale_time)
            for answer, expected in zip(made(told, sigma, sigma_next), plain[:3], strict=True):
                assert torch.equal(answer, expected)


def test_a_sampler_draws_by_the_fused_kernel(tiny_conditional):
    sampler = Sampler(tiny_conditional, predictor(), nfe=5)
    with Counting() as counted:
        images = sampler.run([1, 2, 3], class_labels=4, guidance_scale=None).images
    assert counted.seen["midpoint"] == sampler.plan.intervals
    with kernels.use("reference"):
        torch.testing.assert_close(images, sampler.run([1, 2, 3], class_labels=4).images, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scales", ["bounded", "wide"])
def test_the_autocast_of_a_caller_does_not_narrow_the_predictor(tiny_model, scales):
    sampler, x = Sampler(tiny_model, predictor(scales=scales), nfe=5), torch.randn(2, 1, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        images = sampler.run(x).images
    assert torch.equal(images, sampler.run(x).images)
