"""A recipe: a plan in a file, a sampler made by it, and `--plan`; what contradicts it is refused."""

import json
import os
from dataclasses import replace

import pytest
import torch

from amed_engine import (
    AMEDPredictor,
    ConfigError,
    ConstantPredictor,
    FileFormatError,
    Plan,
    Sampler,
    make_plan,
    write_plan,
)
from amed_engine.adapters.fingerprint import fingerprint
from amed_engine.checkpoints import save_model, save_predictor
from amed_engine.checkpoints.levels import write_levels

LEVELS = (40.0, 8.0, 1.0, 0.1)


@pytest.fixture
def free() -> Plan:
    """Training-free, away from every default."""
    grid = {"schedule": "polynomial", "rho": 5.0, "sigma_min": 0.01, "sigma_max": 40.0}
    return make_plan(4, solver="ipndm", options={"max_order": 3}, afs=True, **grid)


@pytest.fixture
def learned() -> Plan:
    return make_plan(5, solver="amed")


# ---- files


def test_what_search_schedule_writes_is_a_recipe_too(free, tmp_path):
    write_levels(free, tmp_path / "levels.json")
    assert Plan.load(tmp_path / "levels.json") == free


def test_a_failing_write_leaves_the_old_file_and_nothing_else(free, tmp_path, monkeypatch):
    free.save(tmp_path / "recipe.json")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        replace(free, afs=not free.afs).save(tmp_path / "recipe.json")
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.json"]
    assert Plan.load(tmp_path / "recipe.json") == free


@pytest.mark.parametrize(
    "changes",
    [{"solver": "rk4"}, {"sigmas": (1.0, 2.0)}, {"rho": float("nan")}, {"options": (("max_order", 9),)}],
    ids=str,
)
def test_what_could_not_be_read_is_not_written(free, changes, tmp_path):
    with pytest.raises(ConfigError):
        replace(free, **changes).save(tmp_path / "recipe.json")
    assert not list(tmp_path.iterdir())


PLAN = '"solver": "euler", "sigmas": [2, 1]'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no plan: Expecting value"),
        ("\x00", "holds no plan"),
        (b"\xff\xfe", "is no text; write one with"),
        ("[" * 100_000, "holds no plan"),
        ("[]", "a plan must be a JSON object, got list"),
        (f"{{{PLAN}", "holds no plan: Expecting"),
        (f"{{{PLAN}, {PLAN}}}", "names an entry twice"),
        (f'{{{PLAN}, "options": {{"r": 1, "r": 1}}}}', "names an entry twice"),
        ('{"solver": "euler", "sigmas": [2, NaN]}', "NaN is not a finite number"),
        (f'{{{PLAN}, "rho": -Infinity}}', "-Infinity is not a finite number"),
        ('{"solver": "euler", "sigmas": [1e999, 1]}', r"sigmas must be finite, got sigmas\[0\]=inf"),
        (f'{{{PLAN}, "colour": 1}}', "unknown entries colour"),
        (f'{{{PLAN}, "version": 3}}', "plan of version 3 is not known here.*update this one"),
        ('{"version": 3, "stages": []}', "plan of version 3 is not known here.*update this one"),
        ('{"solver": "euler"}', "plan lacks sigmas"),
        ('{"format": "amed_levels", "version": 3}', "expected format 'amed_levels', version 1"),
        ('{"format": "amed_levels", "version": true}', "expected format 'amed_levels', version 1"),
        (
            f'{{"format": "amed_levels", "version": 1, "afs": "mean", "plan": {{{PLAN}}}}}',
            "noise levels have unknown entries afs; the plan says everything",
        ),
        *(
            (
                f'{{{PLAN}, "version": {version}}}',
                f"'version' must be the number 2, got {said}; plans of the first have none",
            )
            for version, said in (("1", "'1'"), ("0", "'0'"), ("null", "'None'"), ("true", "'True'"), ('"2"', "'2'"))
        ),
        (f'{{"format": "amed_levels", "version": 1, "plan": {{{PLAN}, "version": 3}}}}', "plan of version 3"),
        (
            '{"format": "amed_plan", "version": 1}',
            "its format is 'amed_plan', .*a table of `write_plan` is for Stepper",
        ),
        (f'{{"format": [], {PLAN}}}', r"its format is '\[\]', expected what Plan\.save"),
    ],
)
def test_a_file_of_anything_else_is_named_and_refused(text, message, tmp_path):
    file = tmp_path / "recipe.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(FileFormatError, match=f"recipe.json .*{message}"):
        Plan.load(file)


def test_a_file_that_is_none_or_too_large_is_refused(tmp_path):
    (tmp_path / "large.json").write_text(" " * (8 << 20) + "{}")
    for path in (tmp_path / "none.json", tmp_path, tmp_path / "large.json"):
        with pytest.raises(FileFormatError, match=r"is no file of at most 8388608 bytes; write one with Plan\.save"):
            Plan.load(path)
    with pytest.raises(FileFormatError, match=r"a{100} cannot be read: .*; write one with Plan\.save"):
        Plan.load("a" * 5000)


# ---- a sampler by a plan


def test_a_predictor_of_another_kind_is_refused_before_sampling(tiny_model):
    predictor = AMEDPredictor(bottleneck=(4, 4))
    for solver in ("amed", "ipndm"):
        Sampler(tiny_model, predictor, plan=make_plan(4, solver=solver, midpoint=True))
    with pytest.raises(
        ConfigError, match="'nonstationary' asks for a Row for every interval, which AMEDPredictor does not"
    ):
        Sampler(tiny_model, predictor, plan=make_plan(4, solver="nonstationary"))


def test_a_sampler_does_what_the_plan_says(tiny_model, free, tmp_path):
    free = replace(free, denoise_to_zero=True)
    free.save(tmp_path / "recipe.json")
    asked = {"solver": "ipndm", "solver_options": {"max_order": 3}, "schedule": free.levels, "afs": free.afs}
    own = Sampler(tiny_model, **asked)
    for plan in (free, str(tmp_path / "recipe.json"), tmp_path / "recipe.json"):
        sampler = Sampler(tiny_model, plan=plan)
        assert (sampler.plan, sampler.nfe, sampler.program.denoise_to_zero) == (free, 5, True)
        assert sampler.run([0]).nfe == 5
        assert not torch.equal(sampler.run([0]).images, own.run([0]).images)
        again = Sampler(tiny_model, plan=replace(free, denoise_to_zero=False)).run([0, 1])
        assert torch.equal(again.images, own.run([0, 1]).images)


def test_levels_that_were_searched_are_a_plan(tiny_model, free, tmp_path):
    write_levels(free, tmp_path / "levels.json")
    assert Sampler(tiny_model, plan=tmp_path / "levels.json").plan == free


def test_what_says_the_same_passes(tiny_model, free):
    same = {"solver": "ipndm", "solver_options": {"max_order": 3}, "schedule": "polynomial", "rho": 5.0, "nfe": 4}
    same |= {"afs": free.afs, "sigma_min": 0.01, "sigma_max": 40.0}
    assert Sampler(tiny_model, plan=free, **same).plan == free
    assert Sampler(tiny_model, plan=free, schedule=free.levels.float()).plan == free


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"solver": "euler"},
            "this plan was made for solver=ipndm, got solver=euler; leave solver out, or pass another plan",
        ),
        ({"solver_options": {"max_order": 2}}, r"made for solver options \{'max_order': 3\}, got \{'max_order': 2\}"),
        ({"solver_options": ["max_order"]}, r"got \['max_order'\]"),
        ({"nfe": 5}, "made for nfe=4, got nfe=5"),
        ({"schedule": "logsnr"}, "made for schedule=polynomial, got schedule=logsnr"),
        ({"schedule": torch.tensor(LEVELS)}, "made for other noise levels than the schedule given"),
        ({"rho": 7.0}, "made for rho=5.0, got rho=7.0"),
        ({"afs": False}, "made for afs=True, got afs=False"),
        ({"sigma_min": 0.1}, "made for sigma_min=0.01, got sigma_min=0.1; leave sigma_min out"),
        ({"sigma_max": 80.0}, "made for sigma_max=40, got sigma_max=80"),
    ],
    ids=str,
)
def test_what_contradicts_it_is_refused(tiny_model, free, options, message):
    with pytest.raises(ConfigError, match=message):
        Sampler(tiny_model, plan=free, **options)


def test_other_things_are_no_plan(tiny_model, free, tmp_path):
    table = write_plan(Sampler(tiny_model, plan=free), tmp_path / "table.json")
    for other, kind in ((table, "Tableau"), ({"solver": "euler"}, "dict"), (5, "int")):
        with pytest.raises(ConfigError, match=f"plan must be a Plan, or the path of a file .*got {kind}"):
            Sampler(tiny_model, plan=other)
    with pytest.raises(FileFormatError, match=r"table\.json holds no plan: its format is 'amed_plan'"):
        Sampler(tiny_model, plan=tmp_path / "table.json")


# ---- with a predictor


def test_a_predictor_without_a_plan_takes_it(tiny_model, learned):
    constants = ConstantPredictor(learned.intervals)
    sampler = Sampler(tiny_model, constants, plan=learned)
    assert sampler.plan == learned
    constants.plan = learned
    assert torch.equal(sampler.run([3]).images, Sampler(tiny_model, constants).run([3]).images)
    with pytest.raises(ConfigError, match="got a predictor of 2 intervals for 3 intervals"):
        Sampler(tiny_model, ConstantPredictor(2), plan=learned)


def test_a_predictor_with_a_plan_takes_only_its_own(tiny_model, learned):
    predictor = AMEDPredictor(bottleneck=(4, 4))
    predictor.plan = replace(learned, model=fingerprint(tiny_model), dtype="float32")
    assert Sampler(tiny_model, predictor, plan=learned).plan == predictor.plan  # without the notes of the model
    for changes in (
        {"afs": False},
        {"guidance_scale": 2.0},
        {"solver": "euler", "options": ()},
        {"schedule": "custom"},
        {"midpoint": False},
    ):
        with pytest.raises(ConfigError, match=rf"the plan given .* differ in {', '.join(changes)}; leave the plan out"):
            Sampler(tiny_model, predictor, plan=replace(learned, **changes))


def test_a_plan_and_a_predictor_that_have_no_use_for_each_other_are_refused(tiny_model, free, learned):
    with pytest.raises(
        ConfigError, match=r"this plan needs a predictor \(amed \+ predictor, .*pass predictor= as well"
    ):
        Sampler(tiny_model, plan=learned)
    with pytest.raises(ConfigError, match=r"this plan has no use for a predictor \(ipndm .*leave the predictor out"):
        Sampler(tiny_model, ConstantPredictor(free.intervals), plan=free)
    with pytest.raises(ConfigError, match="this plan needs a predictor"):
        Sampler("digits", plan=learned)  # its bundled predictors are for other plans


def test_the_plan_of_a_bundled_predictor_brings_it_back(tmp_path):
    sampler = Sampler("digits", nfe=4)
    sampler.plan.save(tmp_path / "recipe.json")
    again = Sampler("digits", plan=tmp_path / "recipe.json")
    assert torch.equal(again.run([0, 1]).images, sampler.run([0, 1]).images)
    with pytest.raises(ConfigError, match=r"trained with guidance_scale=None, got 2\.0"):
        again.run([0], guidance_scale=2.0)  # who names a plan gets no other


# ---- the model it was made for


def test_the_notes_of_the_model_are_compared(tiny_model, tiny_conditional, free):
    own = replace(free, model=fingerprint(tiny_model), dtype="float32")
    assert Sampler(tiny_model, plan=own).plan == own
    with pytest.raises(
        ConfigError, match=r"this plan was made for another model .*pass a plan of this model, or verify=False"
    ):
        Sampler(tiny_conditional, plan=own)
    with pytest.raises(ConfigError, match="this plan was made for a network in float32, got one in bfloat16"):
        Sampler(tiny_model, plan=own, autocast=torch.bfloat16)
    for model, options in ((tiny_conditional, {}), (tiny_model, {"autocast": torch.bfloat16})):
        assert Sampler(model, plan=own, verify=False, **options).plan == own


def test_noise_levels_beyond_the_model_are_refused(tiny_model, free):
    tiny_model.sigma_max = 20.0
    with pytest.raises(
        ConfigError, match=r"this plan was made for noise levels 40 to 0\.01, the model for 20 to 0\.002"
    ):
        Sampler(tiny_model, plan=free)
    assert Sampler(tiny_model, plan=free, verify=False).plan == free


def test_notes_of_the_plan_count_beside_those_of_the_predictor(tiny_model, tiny_conditional, learned):
    predictor = AMEDPredictor(bottleneck=(4, 4))
    predictor.plan = replace(learned, model=fingerprint(tiny_model))
    with pytest.raises(ConfigError, match="this plan was made for another model"):
        Sampler(tiny_model, predictor, plan=replace(learned, model=fingerprint(tiny_conditional)))


def test_guidance_is_that_of_the_plan_where_it_names_one(tiny_conditional, free):
    guided = Sampler(tiny_conditional, plan=replace(free, guidance_scale=2.0))
    assert guided.run([0], guidance_scale=2.0).images.isfinite().all()
    for other in (None, 1.0, 3.0):
        with pytest.raises(ConfigError, match=f"this plan was made for guidance_scale=2.0, got {other}"):
            guided.run([0], guidance_scale=other)
    assert Sampler(tiny_conditional, plan=free).run([0], guidance_scale=3.0).plan == free


# ---- the command line


@pytest.fixture
def files(tiny_conditional, free, tmp_path) -> dict:
    save_model(tiny_conditional, tmp_path / "m.safetensors")
    free.save(tmp_path / "recipe.json")
    return {"--model": tmp_path / "m.safetensors", "--plan": tmp_path / "recipe.json", "--device": "cpu"}


def flat(options: dict) -> list:
    return [word for pair in options.items() for word in pair]


def test_sample_evaluate_and_export_take_a_plan(amed, files, free, tmp_path):
    code, out, err = amed("sample", *flat(files), "--seeds", "0-1", "--out", tmp_path / "s.png")
    assert (code, out.splitlines()[0]) == (0, free.describe())
    (warning,) = err.splitlines()
    assert "the model's noise levels are 80 to 0.002, this plan's 40 to 0.01: what lies outside is left out" in warning
    code, out, _ = amed("evaluate", *flat(files), "--seeds", "0-3", "--json", "-")
    assert (code, json.loads(out)["plan"]) == (0, free.describe())
    code, out, _ = amed("export", *flat(files), "--format", "schedule", "--out", tmp_path / "schedule.json")
    assert (code, out.splitlines()[0]) == (0, free.describe())
    # A plan of no predictor has no use for the bundled one either.
    code, out, _ = amed("sample", *flat(files), "--predictor", "none", "--nfe", 4, "--out", tmp_path / "s.png")
    assert (code, out.splitlines()[0]) == (0, free.describe())


@pytest.mark.parametrize("command", ["sample", "evaluate", "export"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--nfe", 7), "made for nfe=4, got nfe=7"),
        (("--solver", "euler"), "made for solver=ipndm, got solver=euler"),
        (("--solver-option", "max_order=2"), "got {'max_order': 2}"),
        (("--schedule", "logsnr"), "got schedule=logsnr"),
        (("--rho", 7), "got rho=7.0"),
        (("--no-afs",), "got afs=False"),
        (("--plan", "none.json"), "'none.json' does not exist"),
    ],
    ids=str,
)
def test_commands_say_what_contradicts_the_plan(amed, files, command, options, message, tmp_path):
    out = () if command == "evaluate" else ("--out", tmp_path / ("s.png" if command == "sample" else "loop.pt2"))
    code, printed, err = amed(command, *flat(files), *options, *out)
    assert (code, printed) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1


def test_levels_beside_a_plan_must_be_its_own(amed, files, free, tmp_path):
    write_levels(free, tmp_path / "levels.json")
    write_levels(make_plan(4, solver="ipndm"), tmp_path / "other.json")
    options = (*flat(files), "--seeds", 0, "--out", tmp_path / "s.png")
    assert amed("sample", *options, "--schedule", tmp_path / "levels.json")[0] == 0
    assert amed("sample", *options, "--schedule", tmp_path / "other.json")[0] == 2


def test_a_plan_for_a_predictor_goes_with_one(amed, files, learned, tmp_path):
    learned.save(tmp_path / "recipe.json")
    save_predictor(ConstantPredictor(learned.intervals), tmp_path / "p.safetensors")
    options = (*flat(files), "--seeds", 0, "--out", tmp_path / "s.png")
    code, out, err = amed("sample", *options, "--predictor", tmp_path / "p.safetensors")
    assert (code, err, out.splitlines()[0]) == (0, "", learned.describe())
    code, _, err = amed("sample", *options)
    assert (code, "this plan needs a predictor" in err) == (2, True)
    code, _, err = amed("sample", *options, "--predictor", "none")
    assert code == 2
    assert "and there is none; pass predictor= as well" in err
