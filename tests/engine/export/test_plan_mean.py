"""Tables that begin with the mean of the data, in Python and in C; tables of version 1, which begin about zero."""

import copy
import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from tables import SOLVERS
from torch import nn

from amed_engine import ConstantPredictor, Sampler, make_plan, make_solver
from amed_engine.engine.export.read_plan import loads, read_plan
from amed_engine.engine.export.stepper import Stepper
from amed_engine.engine.export.tableau import MAX_MEAN, MeanRows, Tableau
from amed_engine.engine.export.write_plan import make_tableau
from amed_engine.engine.export.write_schedule import write_schedule
from amed_engine.engine.request import make_request
from amed_engine.errors import ConfigError, FileFormatError
from amed_engine.sampling.denoiser import as_denoised, bind_labels
from amed_engine.solvers.program import Program

SHAPE = (2, 5, 7)
# iPNDM of order 2 on 8, 4, 2, 1 with an analytic first step, as version 1 wrote it, and what it then drew.
VERSION_1 = """{"format": "amed_plan", "version": 1, "nfe": 2, "sigmas": [8.0, 4.0, 2.0, 1.0], "evaluations": [
{"sigma": [8.0], "sigma_net": [8.0], "columns": [0, 1], "coefficients": [[0.125, -0.125], [0.5, 0.5]],
"new_directions": 1, "keep": 1, "moves_x": true, "x_is_y": true, "analytic": true, "threshold": false, "predict": null},
{"sigma": [4.0], "sigma_net": [4.0], "columns": [0, 1, 2], "coefficients": [[0.25, -0.25, 0.0], [0.25, 0.75, 1.0]],
"new_directions": 1, "keep": 1, "moves_x": true, "x_is_y": true, "analytic": false, "threshold": false, "predict": null},
{"sigma": [2.0], "sigma_net": [2.0], "columns": [0, 1, 2], "coefficients": [[0.5, -0.5, 0.0], [0.25, 0.75, 0.5]],
"new_directions": 1, "keep": 1, "moves_x": true, "x_is_y": true, "analytic": false, "threshold": false, "predict": null}],
"shape": null, "description": "", "guidance_scale": null, "predictor": null}"""
X = np.array([[8.0, -4.0, 1.0], [2.0, 0.5, -16.0]], np.float32)
DRAWN = [
    [1.34535551071167, -0.672677755355835, 0.16816943883895874],
    [0.3363388776779175, 0.08408471941947937, -2.69071102142334],
]


def run(plan: Tableau, x: np.ndarray, denoise, classes=None, **options) -> np.ndarray:
    stepper = Stepper(plan, x, classes, **options)
    while not stepper.done:
        stepper.advance(denoise(stepper.points, stepper.sigma))
    return stepper.result


def with_mean(plan: Tableau, classes: int = 0, rows: int = 1, shape: tuple[int, ...] = SHAPE) -> Tableau:
    values = np.random.default_rng(7).normal(size=(rows, int(np.prod(shape)))) * 3
    return replace(plan, shape=shape, mean=MeanRows.of(classes, values.astype(np.float32).tolist()))


@pytest.fixture
def plan(tools) -> Tableau:
    return make_tableau(tools.program("ipndm", afs=True))


# ---- version 1


def test_version_1_is_read_with_the_meaning_it_had(library):
    def denoise(points, sigma):
        return points / (1 + sigma[:, None] ** 2)

    plan = loads(VERSION_1)
    assert plan.mean is None
    assert json.loads(plan.dumps()) == {**json.loads(VERSION_1), "version": 2, "mean": None}
    np.testing.assert_array_equal(run(plan, X, denoise), np.float32(DRAWN))
    # Two values are rounded otherwise by the fused sums of the kernels.
    drawn = library.sample(VERSION_1, X, lambda points, sigma: (denoise(points, sigma), None))
    np.testing.assert_allclose(drawn, np.float32(DRAWN), rtol=2.4e-7, atol=0)
    np.testing.assert_array_equal(library.sample(plan.dumps(), X, lambda y, s: (denoise(y, s), None)), drawn)


@pytest.mark.parametrize("version", [True, 0, 1.5, "1", None, 3])
def test_no_other_version_is_read(version, library):
    text = json.dumps({**json.loads(VERSION_1), "version": version})
    with pytest.raises(FileFormatError):
        loads(text)
    with pytest.raises(Exception, match="plan entry") as caught:
        library.parse(text)
    assert caught.value.status == 2


@pytest.mark.parametrize(("version", "entries"), [(1, {"mean": None}), (2, {})])
def test_a_version_has_its_own_entries(version, entries, library):
    text = json.dumps({**json.loads(VERSION_1), "version": version, **entries})
    with pytest.raises(FileFormatError, match="mean"):
        loads(text)
    with pytest.raises(Exception, match="entries of this version"):
        library.parse(text)


# ---- the file


@pytest.mark.parametrize(("classes", "rows"), [(0, 1), (1, 2), (4, 5), (4, 2)])
def test_a_table_reads_back_as_it_was_written(plan, classes, rows, library):
    written = with_mean(plan, classes, rows)
    assert loads(written.dumps()) == written
    handle = library.parse(written.dumps())
    assert library.raw.amed_plan_classes(handle) == classes
    library.raw.amed_plan_free(handle)
    assert library.raw.amed_plan_classes(None) == 0


def test_numbers_are_the_shortest_that_give_the_float32_back(plan):
    values = np.random.default_rng(0).normal(size=(1, 4000)) * 10.0 ** np.arange(-20, 20).repeat(100)
    values = values.astype(np.float32)
    values[0, :4] = 0.1, -0.0, 1 / 3, 2**-126
    rows = MeanRows.of(0, values.tolist()).to_json()["rows"]
    np.testing.assert_array_equal(np.float32(rows), values)
    assert rows == [[float(str(value)) for value in values[0]]]
    assert json.dumps(rows[0][:3]) == "[0.1, -0.0, 0.33333334]"


BAD = {
    "text": lambda d: d.update(mean="x"),
    "an entry more": lambda d: d["mean"].update(extra=1),
    "an entry less": lambda d: d["mean"].pop("classes"),
    "no rows": lambda d: d["mean"].update(rows=[]),
    "a row that is a number": lambda d: d["mean"]["rows"].__setitem__(0, 1.0),
    "a row too many": lambda d: d["mean"]["rows"].append(d["mean"]["rows"][0]),
    "a row too few": lambda d: d["mean"]["rows"].__delitem__(slice(1, None)),
    "rows without classes": lambda d: d["mean"].update(classes=0),
    "fewer rows than classes": lambda d: d["mean"].update(classes=5),
    "a class and a half": lambda d: d["mean"].update(classes=4.5),
    "a number too few": lambda d: d["mean"]["rows"][2].pop(),
    "a number of text": lambda d: d["mean"]["rows"][2].__setitem__(3, "1"),
    "a huge number": lambda d: d["mean"]["rows"][2].__setitem__(3, 1e31),
    "samples of another shape": lambda d: d.update(shape=[2, 5, 8]),
    "samples of any shape": lambda d: d.update(shape=None),
    "no analytic evaluation": lambda d: d["evaluations"][0].update(analytic=False) or d.update(nfe=3),
    "two analytic evaluations": lambda d: d["evaluations"][1].update(analytic=True) or d.update(nfe=1),
    "a later analytic evaluation": lambda d: [e.update(analytic=bool(k)) for k, e in enumerate(d["evaluations"][:2])],
}


@pytest.mark.parametrize("name", BAD)
def test_bad_means_are_refused_by_both_readers(plan, name, library):
    data = with_mean(plan, 4, 5).to_json()
    loads(json.dumps(data))
    BAD[name](data)
    with pytest.raises(FileFormatError, match="expected"):
        loads(json.dumps(data))
    with pytest.raises(Exception, match="plan entry") as caught:
        library.parse(json.dumps(data))
    assert caught.value.status == 2


@pytest.mark.parametrize("extra", [0, 1])
def test_a_mean_has_a_largest_size(plan, library, extra):
    """Five rows of 3 x 256 x 256 and one of 3 x 512 x 512 are within it."""
    assert 5 * 3 * 256**2 <= MAX_MEAN < 6 * 3 * 256**2
    size = MAX_MEAN // 32 + extra
    data = {**plan.to_json(), "shape": [size], "mean": {"classes": 31, "rows": [[-1.2345678e-05] * size] * 32}}
    text = json.dumps(data)
    if not extra:
        assert loads(text).shape == (size,)
        return library.raw.amed_plan_free(library.parse(text))
    with pytest.raises(FileFormatError, match=f"at most {MAX_MEAN} numbers"):
        loads(text)
    with pytest.raises(Exception, match=f"at most {MAX_MEAN} numbers"):
        library.parse(text)


def test_both_readers_accept_the_same_means(plan, library):
    """One entry of the mean, or what it hangs on, becomes another value."""
    rng, good = random.Random(1), with_mean(plan, 2, 3, (3,)).to_json()
    values = [0, 1, 2, 3, -1, 0.5, 1e30, 1e31, None, True, "x", [], [1], {}, [1, 2, 3], [[1, 2, 3]], [[0.5] * 3] * 2]
    accepted = 0
    for k in range(600):
        data = copy.deepcopy(good)
        row, number = rng.randrange(3), rng.randrange(3)
        place, key = rng.choice(
            [
                (data, "mean"), (data, "version"), (data, "shape"), (data["evaluations"][row], "analytic"),
                (data["mean"], "classes"), (data["mean"], "rows"), (data["mean"]["rows"], row),
                (data["mean"]["rows"][row], number),
            ]
        )  # fmt: skip
        place[key] = copy.deepcopy(rng.choice(values))
        text = json.dumps(data)
        verdicts = []
        for read, free in ((loads, lambda plan: None), (library.parse, library.raw.amed_plan_free)):
            try:
                free(read(text))
                verdicts.append("accepted")
            except Exception as error:
                verdicts.append(f"refused: {error}")
        assert verdicts[0].partition(":")[0] == verdicts[1].partition(":")[0], (k, verdicts, text)
        accepted += verdicts[0] == "accepted"
    assert 30 < accepted < 500


# ---- whose mean


CLASSES = np.array([-1, 3, 0, 3, 1], np.int32)


@pytest.mark.parametrize(("rows", "chosen"), [(5, [0, 4, 1, 4, 2]), (2, [0, 1, 1, 1, 1])])
def test_a_sample_begins_with_the_mean_of_its_class(plan, rows, chosen, library):
    """Every sample of a batch against a table of its own mean alone; two rows are for a class and for none."""
    table = with_mean(plan, 4, rows)
    x = np.random.default_rng(3).normal(size=(5, *SHAPE)).astype(np.float32) * np.float32(80)

    def denoise(points, sigma):
        return points / (1 + sigma.reshape(-1, 1, 1, 1) ** 2)

    alone = [replace(table, mean=MeanRows.of(0, [table.mean.rows[row]])) for row in chosen]
    own = np.concatenate([run(one, x[b : b + 1], denoise) for b, one in enumerate(alone)])
    np.testing.assert_array_equal(run(table, x, denoise, CLASSES), own)
    np.testing.assert_array_equal(run(table, x, denoise, CLASSES.tolist()), own)
    c_own = [
        library.sample(one.dumps(), x[b : b + 1], lambda y, s: (denoise(y, s), None)) for b, one in enumerate(alone)
    ]
    got = library.sample(table.dumps(), x, lambda y, s: (denoise(y, s), None), CLASSES)
    np.testing.assert_array_equal(got, np.concatenate(c_own))
    assert np.ptp([np.abs(sample).max() for sample in own]) > 0


def test_starting_again_takes_classes_again(plan, library):
    table, x = with_mean(plan, 4, 5), np.ones((2, *SHAPE), np.float32)
    stepper = Stepper(table, x, [0, 1])
    first = stepper.points
    stepper.restart(x, [2, -1])
    assert not np.array_equal(stepper.points, first)
    stepper.restart(x, np.array([0, 1], np.uint8))
    np.testing.assert_array_equal(stepper.points, first)
    with pytest.raises(ConfigError, match="pass classes"):
        stepper.restart(x)
    np.testing.assert_array_equal(stepper.points, first)
    handle = library.parse(table.dumps())
    sampler, seen = library.create(handle, 2, x[0].size), []
    for classes in ([0, 1], [2, -1], [0, 1], [0, 4]):
        if max(classes) < 4:
            library.start(sampler, x, np.array(classes, np.int32))
        else:
            with pytest.raises(Exception, match="class 4 of sample 1 must be -1 for none or 0 to 3") as caught:
                library.start(sampler, x, np.array(classes, np.int32))
            assert caught.value.status == 1
        seen.append(np.ctypeslib.as_array(library.next(sampler).points, x.shape).copy())
    assert not np.array_equal(seen[1], seen[0])
    np.testing.assert_array_equal(seen[2:], [seen[0]] * 2)
    library.raw.amed_sampler_free(sampler)
    library.raw.amed_plan_free(handle)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (None, r"pass classes, \(2,\) integers, -1 for none"),
        ([0, 4], "-1 for none or 0 to 3, got 0 to 4"),
        ([-2, 0], "-1 for none or 0 to 3, got -2 to 0"),
        ([0], r"integers \(2,\), got int64 \(1,\)"),
        (2, r"integers \(2,\), got int64 \(\)"),
        ([0.0, 1.0], r"integers \(2,\), got float64"),
        ([True, False], r"integers \(2,\), got bool"),
    ],
)
@pytest.mark.parametrize("rows", [2, 5])
def test_classes_that_are_none_are_refused(plan, classes, message, rows):
    with pytest.raises(ConfigError, match=message):
        Stepper(with_mean(plan, 4, rows), np.ones((2, *SHAPE), np.float32), classes)


def test_classes_are_for_tables_that_have_them(plan, library):
    x, classes = np.ones((2, *SHAPE), np.float32), np.zeros(2, np.int32)
    for table in (plan, with_mean(plan)):
        with pytest.raises(ConfigError, match="leave classes out"):
            Stepper(table, x, classes)
        handle = library.parse(table.dumps())
        sampler = library.create(handle, 2, x[0].size)
        with pytest.raises(Exception, match=r"the same for every class; call amed_sampler_start$") as caught:
            library.start(sampler, x, classes)
        assert caught.value.status == 1
        library.raw.amed_sampler_free(sampler)
        library.raw.amed_plan_free(handle)
    handle = library.parse(with_mean(plan, 1, 2).dumps())
    sampler = library.create(handle, 2, x[0].size)
    with pytest.raises(Exception, match="mean of a class; call amed_sampler_start_classes") as caught:
        library.start(sampler, x)
    assert caught.value.status == 1
    with pytest.raises(Exception, match="start the sampler first"):
        library.next(sampler)
    with pytest.raises(Exception, match="classes must not be NULL"):
        library.call("sampler_start_classes", sampler, x.ctypes.data, None)
    library.raw.amed_sampler_free(sampler)
    library.raw.amed_plan_free(handle)


def test_an_array_of_another_library_is_not_looked_at(plan):
    """As on a device, where looking would wait: a class that is none shows in its own sample."""

    class Elsewhere(np.ndarray):
        def __bool__(self):
            raise AssertionError("the host looked at it")

    class Library:
        ndarray = Elsewhere

        def __getattr__(self, name):
            return getattr(np, name)

    table, x = with_mean(plan, 4, 5), np.ones((4, *SHAPE), np.float32)
    classes = np.array([3, 4, -1, -2]).view(Elsewhere)
    lazy = Stepper(table, x.view(Elsewhere), classes, xp=Library()).points
    assert np.isnan(lazy).reshape(4, -1).all(1).tolist() == [False, True, False, True]
    np.testing.assert_array_equal(lazy[::2], Stepper(table, x[::2], [3, -1]).points)


# ---- written of samplers


class Network(nn.Module):
    """A conditional denoiser with a mean of its own for every class: linear in x, so that it shows every error."""

    img_channels, img_resolution, sigma_min, sigma_max = 2, 6, 0.002, 80.0

    def __init__(self, label_dim: int):
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.label_dim = label_dim
        self.about = nn.Parameter(torch.randn(1 + label_dim, 2, 6, 6, generator=generator), requires_grad=False)

    def forward(self, x, sigma, labels=None):
        sigma = sigma.view(-1, 1, 1, 1)
        offset = 0 if labels is None else (labels @ self.about[1:].flatten(1)).view(-1, 2, 6, 6)
        mean = self.about[0] + offset
        return mean + (x - mean) / (1 + sigma**2)


def make_sampler(name: str, label_dim: int, guidance: float | None) -> Sampler:
    solver, options = SOLVERS[name]
    keywords = {"solver": solver, "options": options, "afs": "mean", "guidance_scale": guidance}
    points = options.get("points", 1)
    if make_solver(solver, **options).takes_predictor != "required":
        return Sampler(Network(label_dim), plan=make_plan(5, **keywords))
    predictor = ConstantPredictor(2, points)
    predictor.plan = make_plan(2 * (1 + points) - 1, midpoint=True, **keywords)
    return Sampler(Network(label_dim), predictor)


NO_CLASS = torch.zeros(4, 3)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize(
    ("label_dim", "guidance", "labels"),
    [
        (0, None, None), (3, None, [2, 0, 1, 1]), (3, None, NO_CLASS), (3, 2.5, [2, 0, 1, 1]), (40, None, [39, 0, 7, 7]),
        (40, 2.5, [39, 0, 7, 7]),
    ],
)  # fmt: skip
def test_hosts_draw_what_the_sampler_draws(name, label_dim, guidance, labels, tmp_path, library, same_kernels):
    """Bit for bit, in Python and in C."""
    sampler = make_sampler(name, label_dim, guidance)
    written = sampler.export(tmp_path / "plan.json", "plan", guidance_scale=guidance)
    table = read_plan(written.path)
    assert (table.nfe, table.shape, table.mean.classes) == (sampler.nfe, (2, 6, 6), label_dim)
    assert len(table.mean.rows) == {0: 1, 3: 4, 40: 2}[label_dim]
    request = make_request(sampler.model, range(4), labels, None, dtype=torch.float32, device=torch.device("cpu"))

    def denoise(points, sigma):
        rows = None if request.labels is None else request.labels.expand(4, -1).repeat(len(points) // 4, 1)
        denoiser = bind_labels(sampler.model.denoise, rows, guidance)
        answer = as_denoised(denoiser(torch.from_numpy(points), torch.from_numpy(np.ascontiguousarray(sigma))))
        return answer.x0.numpy()

    x = (request.latents * np.float32(table.sigmas[0])).numpy()
    classes = None if label_dim == 0 else np.int32([-1] * 4 if labels is NO_CLASS else labels)
    truth = sampler.run(range(4), labels, guidance_scale=guidance).images.numpy()
    np.testing.assert_array_equal(run(table, x, denoise, classes, combine=same_kernels), truth)
    drawn = library.sample(written.path.read_text(), x, lambda y, s: (denoise(y, s), None), classes)
    np.testing.assert_array_equal(drawn, truth)


def test_a_program_s_rows_are_for_a_class_each(tools):
    program = Program.build(make_solver("euler"), tools.SIGMAS, afs="mean", mean=tools.means(3))
    table = make_tableau(program)
    assert (table.shape, table.mean.classes) == (SHAPE, 2)
    np.testing.assert_array_equal(np.float32(table.mean.rows).reshape(3, *SHAPE), tools.means(3).numpy())
    assert make_tableau(tools.program("ipndm", afs=True)).mean is None


def test_a_predictor_begins_about_the_mean_too(tools):
    """Weights go along, or its answers: the first evaluation is the same."""
    predictor, mean = tools.predictor(), tools.means(1)
    program = Program.build(make_solver("ipndm"), tools.SIGMAS, predictor, afs="mean", mean=mean)
    for freeze in (False, True):
        table = make_tableau(program, freeze=freeze)
        assert table.mean == make_tableau(tools.program("euler", afs="mean")).mean
        assert [e.analytic for e in table.evaluations][:2] == [True, False]


def test_a_schedule_cannot_carry_a_mean(tmp_path, tools):
    with pytest.raises(ConfigError, match=r"cannot carry the mean answer .* export format='plan'"):
        write_schedule(tools.program("euler", afs="mean"), tmp_path / "s.json")
    assert list(tmp_path.iterdir()) == []
    assert write_schedule(tools.program("euler", afs=True), tmp_path / "s.json")["version"] == 1
