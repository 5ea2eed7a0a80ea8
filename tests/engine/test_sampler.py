"""`Sampler(model).run(batch)`: the same seed is the same image, whatever the batch, the thread or the form of the model."""

import copy
import logging
import random
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from amed_engine import (
    AMEDPredictor,
    ConfigError,
    ConstantPredictor,
    NonFiniteError,
    Sampler,
    load_predictor,
    make_plan,
    make_schedule,
    sample,
    save_predictor,
)
from amed_engine.adapters.fingerprint import fingerprint
from amed_engine.checkpoints import save_model
from amed_engine.engine.seeds import draw

SHAPE = (1, 8, 8)
SOLVERS = {
    "euler": {},
    "heun": {},
    "dpm": {"r": 0.5},
    "ipndm": {"max_order": 3},
    "deis": {"max_order": 3},
    "dpmpp": {"max_order": 2},
    "unipc": {"max_order": 3},
}


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Equal up to rounding, relative to the largest element or 1: images are of that size."""
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * max(1.0, expected.abs().max().item()))


def trained_for(model: nn.Module | None, **plan) -> AMEDPredictor:
    """A predictor with random weights that claims to be trained for this model and plan."""
    plan = {"nfe": 5, "solver": "amed", "midpoint": True} | plan
    predictor = AMEDPredictor(0.05, 0.05, bottleneck=(4, 4), hidden_dim=16)
    generator = torch.Generator().manual_seed(1)
    for parameter in predictor.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    predictor.plan = replace(make_plan(plan.pop("nfe"), **plan), model=fingerprint(model))
    return predictor


def plain_sampler(model, **options) -> Sampler:
    return Sampler(model, **{"solver": "ipndm", "nfe": 4, "solver_options": {"max_order": 2}} | options)


@pytest.fixture
def plain(tiny_model) -> Sampler:
    return plain_sampler(tiny_model)


@pytest.fixture
def conditional(tiny_conditional) -> Sampler:
    return plain_sampler(tiny_conditional)


@pytest.fixture
def learned(tiny_conditional) -> Sampler:
    return Sampler(tiny_conditional, trained_for(tiny_conditional))


def latents(batch: int, shape=SHAPE, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(9), dtype=dtype)


# ---- seeds


def test_an_image_belongs_to_its_seed_in_any_batch_and_order(learned):
    seeds = [4, 0, 2**32 - 1, 17, 4]
    together = learned.run(seeds)
    assert together.seeds == seeds
    close(together.images[0], together.images[4])
    backwards = learned.run(seeds[::-1])
    close(backwards.images.flip(0), together.images)
    assert torch.equal(backwards.labels.flip(0), together.labels)
    for i, seed in enumerate(seeds):
        alone = learned.run([seed])
        close(alone.images[0], together.images[i])
        assert alone.labels[0] == together.labels[i]


def test_seeds_stand_for_the_noise_and_labels_that_draw_gives(learned):
    noise, labels = draw([3, 1], SHAPE, 10)
    by_seed, by_noise = learned.run([3, 1]), learned.run(noise, class_labels=labels)
    assert torch.equal(by_seed.images, by_noise.images)
    assert torch.equal(by_seed.labels, labels)


@pytest.mark.parametrize(
    "batch", [[5, 6, 7], (5, 6, 7), range(5, 8), torch.tensor([5, 6, 7]), np.arange(5, 8).tolist()]
)
def test_seeds_may_come_as_any_sequence(plain, batch):
    result = plain.run(batch)
    assert result.seeds == [5, 6, 7]
    assert torch.equal(result.images, plain.run([5, 6, 7]).images)


def test_a_number_draws_seeds_from_the_generator(plain):
    first = plain.run(3, generator=torch.Generator().manual_seed(0))
    again = plain.run(3, generator=torch.Generator().manual_seed(0))
    assert first.seeds == again.seeds
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.images, plain.run(first.seeds).images)
    generator = torch.Generator().manual_seed(0)
    assert plain.run(3, generator=generator).seeds != plain.run(3, generator=generator).seeds  # it moves on


def test_a_number_alone_draws_fresh_seeds(plain):
    first, second = plain.run(2), plain.run(2)
    assert first.seeds != second.seeds
    assert not torch.equal(first.images, second.images)
    assert torch.equal(plain.run(first.seeds).images, first.images)


def test_every_global_generator_is_left_alone(learned):
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    learned.run([1, 2])
    learned.run(2)
    learned.run(2, generator=torch.Generator().manual_seed(0))
    learned.run(latents(2))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
    assert random.getstate() == before[2]


def test_the_global_generators_do_not_matter(plain):
    torch.manual_seed(1)
    first = plain.run([1, 2]).images
    torch.manual_seed(2)
    assert torch.equal(plain.run([1, 2]).images, first)


# ---- the result


def test_the_result_says_what_was_done(tiny_conditional):
    predictor = trained_for(tiny_conditional)
    result = Sampler(tiny_conditional, predictor).run([1, 2], class_labels=[3, 4])
    assert result.images.shape == (2, *SHAPE)
    assert result.images.dtype == torch.float32
    assert not result.images.requires_grad
    assert (result.nfe, result.seeds, result.labels.tolist()) == (5, [1, 2], [3, 4])
    assert (result.plan, result.chunks) == (predictor.plan, 1)
    assert result.backend == "eager"
    assert result.seconds > 0


def test_latents_have_no_seeds_and_an_unconditional_model_no_labels(plain):
    result = plain.run(latents(2))
    assert result.seeds is None
    assert result.labels is None


def test_latents_for_a_conditional_model_get_the_labels_of_their_row_numbers(conditional):
    one, many = conditional.run(latents(1)), conditional.run(latents(6))
    assert many.labels[0] == one.labels[0]
    assert torch.equal(conditional.run(latents(6)).labels, many.labels)
    assert 0 <= many.labels.min() <= many.labels.max() < 10


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("nfe", [4, 5])
def test_nfe_counts_the_calls_of_the_network(gaussian_denoiser, solver, nfe):
    calls = []

    def counted(x, sigma):
        calls.append(len(x))
        return gaussian_denoiser(x, sigma)

    result = Sampler(counted, solver=solver, nfe=nfe, shape=SHAPE).run(3)
    assert calls == [3] * nfe
    assert result.nfe == nfe


@pytest.mark.parametrize("solver", ["euler", "dpm", "ipndm", "deis", "dpmpp", "unipc", "amed"])
def test_nfe_counts_the_calls_under_a_predictor(tiny_model, solver):
    calls = []
    tiny_model.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    result = Sampler(tiny_model, trained_for(tiny_model, solver=solver)).run(2)
    assert calls == [2] * 5
    assert result.nfe == 5


# ---- what it computes


@pytest.mark.parametrize("solver", SOLVERS)
def test_latents_take_the_path_of_the_plain_loop(tiny_model, solver):
    sampler = Sampler(tiny_model, solver=solver, solver_options=SOLVERS[solver], nfe=5)
    plan = sampler.plan
    with torch.no_grad():
        expected = sample(
            tiny_model, latents(3) * plan.levels[0].float(), plan.levels, plan.make_solver(), afs=plan.afs
        )
    close(sampler.run(latents(3)).images, expected)


@pytest.mark.parametrize("changes", [{}, {"denoise_to_zero": True}, {"afs": False}], ids=str)
@pytest.mark.parametrize("solver", ["amed", "ipndm", "unipc"])
def test_a_predictors_plan_is_followed_to_the_letter(tiny_model, solver, changes):
    predictor = trained_for(tiny_model, solver=solver)
    plan = predictor.plan = replace(predictor.plan, **changes)
    calls = []
    tiny_model.register_forward_hook(lambda *_: calls.append(1))
    result = Sampler(tiny_model, predictor).run(latents(3))
    assert len(calls) == result.nfe == plan.nfe
    x = latents(3) * plan.levels[0].float()
    with torch.no_grad():
        expected = sample(
            tiny_model,
            x,
            plan.levels,
            plan.make_solver(),
            predictor.float(),
            afs=plan.afs,
            denoise_to_zero=plan.denoise_to_zero,
        )
    close(result.images, expected)


def test_many_evaluations_reach_the_exact_solution(gaussian_denoiser):
    """x - mean shrinks like sqrt(sd² + sigma²) along the flow of a Gaussian."""
    sampler = Sampler(gaussian_denoiser, solver="heun", nfe=400, afs=False, shape=SHAPE, dtype=torch.float64)
    z = latents(4, dtype=torch.float64)
    high, low = sampler.plan.sigmas[0], sampler.plan.sigmas[-1]
    expected = 0.25 + (z * high - 0.25) * ((0.25 + low**2) / (0.25 + high**2)) ** 0.5
    close(sampler.run(z).images, expected, tolerance=1e-3)


def test_float64_runs_in_float64(tiny_model):
    single = plain_sampler(tiny_model).run([1, 2]).images
    double_model = copy.deepcopy(tiny_model).double()
    sampler = plain_sampler(double_model, dtype=torch.float64)
    double = sampler.run([1, 2]).images
    assert double.dtype == torch.float64
    error = (double - single).abs().max()
    assert 1e-9 < error < 1e-4
    plan, noise = sampler.plan, draw([1, 2], SHAPE, 0)[0].double()
    with torch.no_grad():
        expected = sample(double_model, noise * plan.levels[0], plan.levels, plan.make_solver(), afs=plan.afs)
    close(double, expected, tolerance=1e-12)


class LabelledMLP(nn.Module):
    """A network of someone else's, that leaves its inputs' precision to the caller."""

    def __init__(self):
        super().__init__()
        self.inner, self.embed = nn.Linear(16, 16), nn.Linear(3, 16)

    def forward(self, x, sigma, labels):
        return (self.inner(x.flatten(1)) + self.embed(labels)).reshape(x.shape) / sigma.reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("state", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("weights", [torch.float32, torch.float64], ids=str)
def test_a_network_gets_all_its_inputs_in_its_own_precision(state, weights):
    sampler = plain_sampler(LabelledMLP().to(weights), shape=(1, 4, 4), label_dim=3, dtype=state)
    assert sampler.run([1, 2]).images.dtype == state
    assert sampler.run([1, 2], guidance_scale=2.0).images.dtype == state


def test_strided_latents_are_latents(plain):
    z = latents(3)
    strided = z.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)
    assert not strided.is_contiguous()
    close(plain.run(strided).images, plain.run(z).images)
    assert torch.equal(strided, z)


def test_latents_are_left_as_they_were(learned):
    z = latents(3)
    learned.run(z)
    assert torch.equal(z, latents(3))


def test_trailing_zero_noise_level_is_dropped_with_a_note(tiny_model, caplog):
    levels = torch.tensor([80.0, 10.0, 1.0, 0.1])
    expected = Sampler(tiny_model, solver="euler", schedule=levels).run([1, 2])
    with caplog.at_level(logging.WARNING, logger="amed_engine"):
        result = Sampler(tiny_model, solver="euler", schedule=torch.cat([levels, torch.zeros(1)])).run([1, 2])
    assert torch.equal(result.images, expected.images)
    assert result.nfe == expected.nfe == 3
    assert [r.message for r in caplog.records] == ["dropped the trailing sigma = 0; sampling ends at sigmas[-2] = 0.1"]


# ---- conditions


def test_labels_may_be_given_in_every_way(conditional):
    expected = conditional.run([1, 2], class_labels=[3, 3]).images
    one_hot = torch.eye(10)[[3, 3]]
    for labels in (
        3,
        (3, 3),
        torch.tensor([3, 3]),
        one_hot,
        one_hot.long(),
        one_hot.bool(),
        one_hot.tolist(),
        np.int64(3),
    ):
        assert torch.equal(conditional.run([1, 2], class_labels=labels).images, expected), labels
    assert torch.equal(conditional.run([1, 2], class_labels=torch.tensor(3)).images, expected)
    assert not torch.equal(conditional.run([1, 2], class_labels=[3, 4]).images, expected)


def test_a_given_label_leaves_the_noise_as_it_is(conditional):
    drawn = conditional.run([1, 2])
    given = conditional.run([1, 2], class_labels=drawn.labels)
    assert torch.equal(given.images, drawn.images)
    assert torch.equal(given.labels, drawn.labels)


def test_vectors_between_classes_are_passed_on(conditional):
    vectors = torch.full((2, 10), 0.1)
    result = conditional.run([1, 2], class_labels=vectors)
    assert torch.equal(result.labels, vectors)
    assert not torch.equal(result.images, conditional.run([1, 2], class_labels=3).images)


@pytest.mark.parametrize("scale", [0.0, 2.5])
def test_guidance_is_the_published_formula(conditional, tiny_conditional, scale):
    """D = D_u + g (D_c - D_u), the unconditional answer being that without a label."""
    labels = torch.tensor([3, 8])

    def guided(x, sigma):
        unconditional, conditioned = tiny_conditional(x, sigma).x0, tiny_conditional(x, sigma, labels).x0
        return unconditional + scale * (conditioned - unconditional)

    plan, z = conditional.plan, latents(2)
    with torch.no_grad():
        expected = sample(guided, z * plan.levels[0].float(), plan.levels, plan.make_solver(), afs=plan.afs)
    result = conditional.run(z, class_labels=labels, guidance_scale=scale)
    close(result.images, expected)
    assert result.nfe == conditional.nfe
    assert not torch.allclose(result.images, conditional.run(z, class_labels=labels).images)


def test_under_guidance_the_predictor_reads_the_features_with_the_label(tiny_conditional):
    labels, predictor = torch.tensor([3, 8]), trained_for(tiny_conditional, guidance_scale=2.0)

    def guided(x, sigma):
        unconditional, (x0, features) = tiny_conditional(x, sigma).x0, tiny_conditional(x, sigma, labels)
        return unconditional + 2.0 * (x0 - unconditional), features

    plan, z = predictor.plan, latents(2)
    with torch.no_grad():
        x = z * plan.levels[0].float()
        expected = sample(guided, x, plan.levels, plan.make_solver(), predictor, afs=plan.afs)
    close(Sampler(tiny_conditional, predictor).run(z, class_labels=labels, guidance_scale=2.0).images, expected)


def test_guidance_of_one_is_none(conditional):
    plain = conditional.run([1, 2], class_labels=3).images
    assert torch.equal(conditional.run([1, 2], class_labels=3, guidance_scale=1).images, plain)
    assert torch.equal(conditional.run([1, 2], class_labels=3, guidance_scale=1.0).images, plain)


def test_guidance_of_one_is_none_for_a_predictor_too(learned):
    assert torch.equal(learned.run([1, 2], guidance_scale=1.0).images, learned.run([1, 2]).images)


def test_a_predictor_trained_under_guidance_runs_under_it(tiny_conditional):
    sampler = Sampler(tiny_conditional, trained_for(tiny_conditional, guidance_scale=2.0))
    guided = sampler.run([1, 2], class_labels=3, guidance_scale=2)
    unguided = Sampler(tiny_conditional, trained_for(tiny_conditional)).run([1, 2], class_labels=3)
    assert guided.nfe == 5
    assert not torch.allclose(guided.images, unguided.images)


# ---- callback, progress bar, out


def test_the_callback_follows_the_noise_levels(learned):
    seen = []
    result = learned.run([1, 2], callback=lambda info: seen.append((*info[:3], info.x.clone())))
    steps, totals, sigmas, states = zip(*seen, strict=True)
    n = learned.plan.intervals
    assert steps == tuple(range(1, n + 1))
    assert totals == (n,) * n
    assert list(sigmas) == list(learned.plan.sigmas[1:])
    assert list(sigmas) == sorted(sigmas, reverse=True)
    assert torch.equal(states[-1], result.images)
    assert all(state.shape == result.images.shape for state in states)


def test_watching_changes_nothing(learned, capsys):
    expected = learned.run([1, 2]).images
    assert capsys.readouterr().err == ""
    assert torch.equal(learned.run([1, 2], callback=lambda info: None, progress=True).images, expected)
    assert "sampling" in capsys.readouterr().err


def test_an_exception_in_the_callback_comes_through_and_does_no_harm(learned):
    def stop(info):
        raise KeyError("stop")

    expected = learned.run([1, 2]).images
    with pytest.raises(KeyError, match="stop"):
        learned.run([1, 2], callback=stop)
    assert torch.equal(learned.run([1, 2]).images, expected)


def test_out_receives_the_images(plain):
    expected = plain.run([1, 2]).images
    out = torch.full((2, *SHAPE), float("nan"))
    assert plain.run([1, 2], out=out).images is out
    assert torch.equal(out, expected)


def test_the_latents_themselves_may_be_out(plain):
    z = latents(2)
    plain.run(z, out=z)
    assert torch.equal(z, plain.run(latents(2)).images)


def test_results_of_two_runs_are_two_tensors(plain):
    first = plain.run([1]).images
    kept = first.clone()
    plain.run([2])
    assert torch.equal(first, kept)


# ---- forms of a model


def traced(model: nn.Module) -> torch.jit.ScriptModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, on tracing
        return torch.jit.trace(model, (torch.zeros(2, *SHAPE), torch.ones(2)))


def exported(model: nn.Module) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=64)
    args = torch.zeros(2, *SHAPE), torch.ones(2)
    return torch.export.export(model, args, dynamic_shapes=[{0: batch}, {0: batch}])


def script_path(model, tmp_path):
    traced(model).save(tmp_path / "model.pt")
    return tmp_path / "model.pt"


def exported_path(model, tmp_path):
    torch.export.save(exported(model), tmp_path / "model.pt2")
    return tmp_path / "model.pt2"


def saved_path(model, tmp_path):
    save_model(model, tmp_path / "saved")
    return str(tmp_path / "saved")


FORMS = {
    "compiled": lambda model, tmp_path: torch.compile(model, backend="eager"),
    "traced": lambda model, tmp_path: traced(model),
    "script file": script_path,
    "exported": lambda model, tmp_path: exported(model),
    "exported module": lambda model, tmp_path: exported(model).module(),
    "exported file": exported_path,
    "saved": saved_path,
    "pair": lambda model, tmp_path: lambda x, sigma: tuple(model(x, sigma)),
    "list": lambda model, tmp_path: lambda x, sigma: list(model(x, sigma)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_model_gives_the_same_images(tiny_model, tmp_path, form):
    """Both with a training-free solver and with a predictor that reads the network's bottleneck."""
    predictor = trained_for(tiny_model)
    expected = Sampler(tiny_model, predictor).run(latents(3)).images
    expected_plain = plain_sampler(tiny_model).run(latents(3)).images
    given = FORMS[form](tiny_model, tmp_path)
    for other_batch in (1, 3):
        result = Sampler(given, predictor, shape=SHAPE).run(latents(3)[:other_batch])
        close(result.images, expected[:other_batch])
    close(plain_sampler(given, sigma_min=0.002, sigma_max=80).run(latents(3)).images, expected_plain)


def test_a_callable_that_returns_the_image_alone_will_do(tiny_model):
    expected = plain_sampler(tiny_model).run([1, 2]).images
    alone = plain_sampler(lambda x, sigma: tiny_model(x, sigma).x0, shape=SHAPE, sigma_min=0.002, sigma_max=80)
    assert torch.equal(alone.run([1, 2]).images, expected)


def test_without_features_a_predictor_sees_zeros(tiny_model):
    predictor = trained_for(None)

    def silent(x, sigma):
        x0, features = tiny_model(x, sigma)
        return x0, torch.zeros_like(features)

    with_zeros = Sampler(silent, predictor, shape=SHAPE).run([1, 2]).images
    without = Sampler(lambda x, sigma: tiny_model(x, sigma).x0, predictor, shape=SHAPE).run([1, 2]).images
    close(without, with_zeros)
    assert not torch.allclose(without, Sampler(tiny_model, predictor).run([1, 2]).images)


def test_a_model_is_put_into_evaluation_mode():
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Dropout(0.9)).train()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x, sigma):
            return self.inner(x)

    sampler = plain_sampler(Net().train(), shape=SHAPE)
    assert not model[1].training
    assert torch.equal(sampler.run([1]).images, sampler.run([1]).images)


# ---- predictors


def test_a_predictor_file_is_as_good_as_the_predictor(tiny_conditional, tmp_path):
    predictor = trained_for(tiny_conditional)
    save_predictor(predictor, tmp_path / "p.safetensors")
    expected = Sampler(tiny_conditional, predictor).run([1, 2])
    for given in (
        tmp_path / "p.safetensors",
        str(tmp_path / "p.safetensors"),
        load_predictor(tmp_path / "p.safetensors"),
    ):
        result = Sampler(tiny_conditional, given).run([1, 2])
        assert torch.equal(result.images, expected.images)
        assert result.plan == expected.plan


def test_a_predictor_serves_two_samplers_at_once(tiny_conditional):
    predictor = trained_for(tiny_conditional).train()
    single = Sampler(tiny_conditional, predictor)
    expected = single.run([1, 2]).images
    double = Sampler(tiny_conditional, predictor, dtype=torch.float64)
    assert torch.equal(single.run([1, 2]).images, expected)
    close(double.run([1, 2]).images.float(), expected)
    assert next(predictor.parameters()).dtype == torch.float32  # the caller's own is as it was


def test_verify_false_takes_a_predictor_of_other_weights(tiny_model):
    predictor = trained_for(tiny_model)
    with torch.no_grad():
        next(tiny_model.parameters()).add_(0.01)
    assert Sampler(tiny_model, predictor, verify=False).run(1).nfe == 5


def test_a_predictor_without_a_plan_takes_the_wishes_of_the_caller(tiny_model):
    predictor = AMEDPredictor(bottleneck=(4, 4))
    assert Sampler(tiny_model, predictor).plan == make_plan(5, solver="amed")
    assert Sampler(tiny_model, predictor, solver="ipndm", nfe=3).plan == make_plan(3, solver="ipndm", midpoint=True)
    assert predictor.plan is None


def test_agreeing_arguments_are_welcome(tiny_model):
    predictor = trained_for(tiny_model, options={"points": 1})
    plan = predictor.plan
    sampler = Sampler(
        tiny_model, predictor, nfe=5, solver="amed", solver_options={"points": 1}, schedule="time_uniform", afs=True
    )
    assert sampler.plan == plan
    assert Sampler(tiny_model, predictor, schedule=plan.levels.float()).plan == plan
    assert Sampler(tiny_model, predictor, schedule=torch.cat([plan.levels, torch.zeros(1)])).plan == plan


def test_without_a_predictor_one_line_says_so_and_how_to_train_one(tiny_model, caplog):
    with caplog.at_level(logging.INFO, logger="amed_engine"):
        sampler = Sampler(tiny_model, nfe=6)
        sampler.run(1)
        sampler.run(2)
    (record,) = caplog.records
    assert "no predictor for this model at NFE 6: sampling with deis" in record.message
    assert "amed_engine.fit(model, nfe=6)" in record.message
    assert "\n" not in record.message


def test_whoever_chose_a_solver_is_not_lectured(tiny_model, caplog):
    with caplog.at_level(logging.WARNING, logger="amed_engine"):
        Sampler(tiny_model, solver="euler").run(1)
        Sampler(tiny_model, trained_for(tiny_model)).run(1)
    assert caplog.records == []


# ---- bundled models


@pytest.fixture
def zoo(tmp_path, monkeypatch, tiny_conditional):
    """A zoo of one model, 'toy', with a predictor for 5 evaluations."""
    monkeypatch.setattr("amed_engine.zoo.ROOT", tmp_path)
    save_model(tiny_conditional, tmp_path / "toy")
    save_predictor(trained_for(tiny_conditional), tmp_path / "toy/predictors/nfe5.safetensors")
    return tmp_path


def test_a_bundled_model_brings_its_predictor(zoo, caplog):
    with caplog.at_level(logging.INFO, logger="amed_engine"):
        by_name, by_default = Sampler("toy", nfe=5), Sampler("toy")
    assert by_name.plan == by_default.plan == load_predictor(zoo / "toy/predictors/nfe5.safetensors").plan
    assert caplog.records == []


def test_for_another_nfe_it_goes_without_and_says_so(zoo, caplog):
    with caplog.at_level(logging.INFO, logger="amed_engine"):
        sampler = Sampler("toy", nfe=6)
    assert (sampler.plan.solver, sampler.nfe) == ("deis", 6)
    assert "no predictor for this model at NFE 6" in caplog.text


def test_a_chosen_solver_goes_before_the_bundled_predictor(zoo):
    assert Sampler("toy", solver="euler", nfe=5).plan == make_plan(5, solver="euler")


def test_none_keeps_the_bundled_predictor_away_without_a_word(zoo, tiny_conditional, caplog):
    assert Sampler("toy", "none", solver="heun", nfe=6).plan == make_plan(6, solver="heun")
    sampler = Sampler("toy", "none", nfe=5)
    assert caplog.records == []
    assert sampler.plan == Sampler(tiny_conditional, nfe=5).plan
    with pytest.raises(ConfigError, match="there is none; pass predictor="):
        Sampler("toy", "none", plan=load_predictor(zoo / "toy/predictors/nfe5.safetensors").plan)


@pytest.mark.parametrize("asked", [{"afs": False}, {"schedule": "logsnr"}, {"rho": 3.0}, {"sigma_max": 40.0}])
def test_levels_and_first_steps_that_keep_the_bundled_predictor_away_say_so(zoo, asked, caplog):
    assert Sampler("toy", **asked).plan.solver != "amed"
    (record,) = caplog.records
    assert "others are asked for: sampling without it" in record.message
    assert 'predictor="none"' in record.message
    caplog.clear()
    Sampler("toy", "none", **asked)
    Sampler("toy", nfe=6, solver="euler", **asked)
    assert [record for record in caplog.records if record.levelname != "INFO"] == []


def test_levels_alone_are_stepped_by_the_best_training_free_solver(tiny_model):
    for count, afs, solver, nfe in (
        (6, None, "deis", 5),
        (6, "mean", "unipc", 4),
        (9, None, "ipndm", 8),
        (9, True, "deis", 7),
    ):
        levels = make_schedule("polynomial", count, 0.002, 80.0)
        sampler = Sampler(tiny_model, schedule=levels, afs=afs)
        assert (sampler.plan.solver, sampler.nfe) == (solver, nfe)
        assert sampler.plan == Sampler(tiny_model, schedule=levels, afs=afs, nfe=nfe).plan


def test_a_first_step_about_zero_that_the_nfe_forces_is_said(tiny_model, caplog):
    assert Sampler(tiny_model, solver="heun", nfe=5).plan.afs is True
    (record,) = caplog.records
    assert "heun spends 5 evaluations only where the first step is analytic" in record.message
    caplog.clear()
    for asked in ({"afs": True}, {"afs": "mean"}, {"nfe": 6}):
        Sampler(tiny_model, solver="heun", **({"nfe": 5} | asked))
    assert caplog.records == []
    Sampler(tiny_model, ConstantPredictor(3), nfe=5)  # two evaluations an interval
    (record,) = caplog.records
    assert "amed spends 5 evaluations only where the first step is analytic" in record.message


def test_guidance_that_the_bundled_predictor_was_not_trained_for_goes_without_it(zoo, tiny_conditional, caplog):
    sampler = Sampler("toy")
    with caplog.at_level(logging.INFO, logger="amed_engine"):
        result = sampler.run([1, 2], class_labels=3, guidance_scale=2.0)
    assert "the model's own predictor is not for guidance_scale=2.0: sampling with deis" in caplog.text
    assert (result.plan.solver, result.nfe) == ("deis", 5)
    expected = Sampler(tiny_conditional, nfe=5).run([1, 2], class_labels=3, guidance_scale=2.0)
    close(result.images, expected.images)
    assert sampler.run([1, 2]).plan.solver == "amed"  # and the next run is as before


# ---- no state


def test_two_runs_are_equal(learned):
    assert torch.equal(learned.run([1, 2, 3]).images, learned.run([1, 2, 3]).images)


def test_a_run_leaves_nothing_behind(learned):
    expected = learned.run([1, 2]).images
    learned.run(5, class_labels=3)
    learned.run(latents(1))
    assert torch.equal(learned.run([1, 2]).images, expected)


@pytest.mark.parametrize("kind", ["learned", "plugin", "static"])
def test_eight_threads_give_what_one_thread_gives(tiny_conditional, gaussian_denoiser, kind):
    """200 runs of one Sampler at once, in another order in every thread, bit by bit."""
    if kind == "learned":
        sampler = Sampler(tiny_conditional, trained_for(tiny_conditional))
    elif kind == "plugin":
        network = lambda x, sigma, labels: (gaussian_denoiser(x + labels[:, :1, None, None], sigma), x)  # noqa: E731
        predictor = AMEDPredictor(0.1, 0.1)
        sampler = Sampler(network, predictor, solver="unipc", nfe=5, shape=SHAPE, label_dim=10)
    else:
        sampler = plain_sampler(lambda x, sigma, labels: gaussian_denoiser(x, sigma), shape=SHAPE, label_dim=10)
    seeds = [[100 * k + j for j in range(4)] for k in range(25)]
    expected = [sampler.run(s, class_labels=k % 10) for k, s in enumerate(seeds)]

    def work(thread: int) -> int:
        order = list(range(25))
        random.Random(thread).shuffle(order)
        results = {k: sampler.run(seeds[k], class_labels=k % 10) for k in order}
        return sum(
            torch.equal(results[k].images, expected[k].images) and results[k].seeds == seeds[k] for k in range(25)
        )

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == [25] * 8


# ---- what goes wrong on the way


def broken_at(gaussian_denoiser, level: float, row: int, value: float):
    """A denoiser that spoils one row of the batch from a noise level on."""

    def denoise(x, sigma):
        x0 = gaussian_denoiser(x, sigma)
        if sigma[0] <= level * 1.0001:
            x0[row] = value
        return x0

    return denoise


@pytest.mark.parametrize("step", [1, 2, 3, 4])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_sample_is_named_by_step_and_seed(gaussian_denoiser, step, value):
    levels = make_schedule("polynomial", 5, 0.1, 80.0)
    denoiser = broken_at(gaussian_denoiser, levels[step - 1], 1, value)
    sampler = Sampler(denoiser, solver="euler", schedule=levels, shape=SHAPE)
    with pytest.raises(NonFiniteError, match=rf"became NaN or infinite in step {step} of 4, seeds \[22\]") as caught:
        sampler.run([11, 22, 33])
    assert (caught.value.step, caught.value.seeds) == (step, [22])
    with pytest.raises(NonFiniteError, match=rf"step {step} of 4, rows \[1\]"):
        sampler.run(latents(3))


def test_all_broken_samples_are_named(gaussian_denoiser):
    def denoise(x, sigma):
        x0 = gaussian_denoiser(x, sigma)
        if sigma[0] < 10:
            x0[0] = float("nan")
        if sigma[0] < 1:
            x0[2] = float("nan")
        return x0

    sampler = Sampler(denoise, solver="heun", nfe=8, shape=SHAPE)
    with pytest.raises(NonFiniteError, match=r"seeds \[5, 7\]"):
        sampler.run([5, 6, 7])


def test_nothing_is_written_to_out_when_a_sample_breaks(gaussian_denoiser):
    out = torch.zeros(2, *SHAPE)
    sampler = Sampler(broken_at(gaussian_denoiser, 80, 1, float("nan")), solver="euler", nfe=3, shape=SHAPE)
    with pytest.raises(NonFiniteError, match=r"seeds \[2\]"):
        sampler.run([1, 2], out=out)
    assert torch.equal(out, torch.zeros(2, *SHAPE))


def limited(model, most: int, error: Exception):
    """The model on a machine that has memory for a batch of `most`."""
    seen = []

    def denoise(x, sigma, *labels):
        seen.append(len(x))
        if len(x) > most:
            raise type(error)(*error.args)
        return model(x, sigma, *labels)

    return denoise, seen


MEMORY_ERRORS = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"),
    # What the TorchScript interpreter makes of the first: it does not keep the type.
    "torchscript": RuntimeError(
        "The following operation failed in the TorchScript interpreter.\n"
        "RuntimeError: CUDA out of memory. Tried to allocate 2.00 GiB."
    ),
}


@pytest.mark.parametrize("kind", MEMORY_ERRORS)
@pytest.mark.parametrize(("most", "chunks"), [(3, 4), (5, 2), (1, 10), (10, 1)])
def test_short_memory_means_smaller_chunks_and_the_same_images(tiny_conditional, kind, most, chunks):
    expected = plain_sampler(tiny_conditional).run(range(10), class_labels=list(range(10)))
    denoiser, _ = limited(tiny_conditional, most, MEMORY_ERRORS[kind])
    sampler = plain_sampler(denoiser, shape=SHAPE, label_dim=10, sigma_min=0.002, sigma_max=80)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = sampler.run(range(10), class_labels=list(range(10)))
    close(result.images, expected.images)
    assert (result.seeds, result.chunks) == (list(range(10)), chunks)
    assert torch.equal(result.labels, expected.labels)
    messages = [str(w.message) for w in caught]
    assert messages == (["out of memory for a batch of 10: sampling in smaller chunks"] if chunks > 1 else [])


def test_the_warning_points_at_the_caller(gaussian_denoiser):
    denoiser, _ = limited(gaussian_denoiser, 2, MEMORY_ERRORS["cuda"])
    with pytest.warns(RuntimeWarning, match="out of memory") as caught:
        plain_sampler(denoiser, shape=SHAPE).run(4)
    assert caught[0].filename == __file__


def test_guidance_doubles_the_batch_and_still_fits_after_all(tiny_conditional):
    expected = plain_sampler(tiny_conditional).run(range(6), guidance_scale=2.0)
    denoiser, seen = limited(tiny_conditional, 6, MEMORY_ERRORS["cuda"])
    sampler = plain_sampler(denoiser, shape=SHAPE, label_dim=10, sigma_min=0.002, sigma_max=80)
    with pytest.warns(RuntimeWarning, match="out of memory for a batch of 6"):
        result = sampler.run(range(6), guidance_scale=2.0)
    close(result.images, expected.images)
    assert result.chunks == 2
    assert seen[0] == 12


def test_out_of_memory_for_a_single_sample_is_raised(gaussian_denoiser):
    denoiser, _ = limited(gaussian_denoiser, 0, MEMORY_ERRORS["cuda"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
            plain_sampler(denoiser, shape=SHAPE).run(4)


def test_other_errors_of_the_network_are_not_taken_for_short_memory(gaussian_denoiser):
    denoiser, seen = limited(gaussian_denoiser, 1, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        plain_sampler(denoiser, shape=SHAPE).run(4)
    assert seen == [4]


def test_rows_of_latents_are_counted_over_all_chunks(gaussian_denoiser):
    marked = latents(4)
    marked[3] = 50.0

    def denoise(x, sigma):
        x0 = gaussian_denoiser(x, sigma)
        x0[(x / sigma.reshape(-1, 1, 1, 1) > 20).flatten(1).all(1)] = float("nan")
        return x0

    denoiser, _ = limited(denoise, 2, MEMORY_ERRORS["cuda"])
    sampler = plain_sampler(denoiser, shape=SHAPE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(NonFiniteError, match=r"rows \[3\]") as caught:
            sampler.run(marked)
    assert caught.value.seeds == [3]


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_a_device_gets_its_noise_from_the_host(tiny_conditional, device):
    on_host = plain_sampler(tiny_conditional).run([1, 2])
    before = torch.cuda.get_rng_state()
    sampler = plain_sampler(tiny_conditional, device=device)
    on_device = sampler.run([1, 2])
    assert on_device.images.is_cuda
    assert torch.equal(on_device.labels, on_host.labels)
    close(on_device.images.cpu(), on_host.images, tolerance=1e-3)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    close(sampler.run(draw([1, 2], SHAPE, 10)[0].to(device), on_host.labels).images, on_device.images)
