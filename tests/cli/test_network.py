"""What the command line is told of a network in a file: raw ones are wrapped, missing facts are given, the rest is refused."""

import json
import re
import warnings

import numpy
import pytest
import torch
from PIL import Image
from torch import nn

import amed_engine
from amed_engine import cli
from amed_engine.adapters import alphas_cumprod, wrap
from amed_engine.engine import images

BATCH = {0: torch.export.Dim("batch", min=1, max=64)}
X, TIME, LABELS = torch.zeros(2, 3, 8, 8), torch.ones(2), torch.eye(4)[:2]


class Raw(nn.Module):
    """A network told steps and, with classes, one-hot rows."""

    def __init__(self, classes=0):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1)
        self.classes = nn.Linear(classes, 4) if classes else None

    def forward(self, x, step, labels=None):
        hidden = self.first(x) * (1 + step.reshape(-1, 1, 1, 1) / 1000)
        if labels is not None:
            hidden = hidden + self.classes(labels)[:, :, None, None]
        return self.last(hidden)


@pytest.fixture
def amed(capsys, monkeypatch):
    def run(*args):
        with pytest.raises(SystemExit) as left:
            cli.main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return left.value.code, out, err

    return run


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Raw networks as files of every kind, and a denoiser of TorchScript, which tells nothing of itself."""
    folder = tmp_path_factory.mktemp("raw")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(Raw(), (X, TIME)).save(str(folder / "raw.pt"))
        torch.jit.trace(Raw(4), (X, TIME, LABELS)).save(str(folder / "classes.pt"))
        torch.export.save(torch.export.export(Raw(), (X, TIME), dynamic_shapes=(BATCH,) * 2), folder / "raw.pt2")
        made = torch.export.export(Raw(4), (X, TIME, LABELS), dynamic_shapes=(BATCH,) * 3)
        torch.export.save(made, folder / "classes.pt2")
    return folder


WRAPPED = ("--prediction", "epsilon", "--betas", "scaled_linear", "--shape", "3x8x8")


def drawn(denoiser, path, **run):
    sampler = amed_engine.Sampler(denoiser, solver="ipndm", nfe=3)
    pictures = images.to_uint8(sampler.run([0, 1], **run).images)
    images.save_grid(path, list(pictures))
    return numpy.asarray(Image.open(path))


@pytest.mark.parametrize("name", ["raw.pt", "raw.pt2"])
def test_a_raw_network_is_wrapped(amed, files, name, tmp_path):
    where = ("--model", files / name, *WRAPPED, "--device", "cpu")
    options = ("--solver", "ipndm", "--nfe", 3, "--seeds", "0-1", "--out", tmp_path / "a.png")
    code, _, err = amed("sample", *where, *options)
    assert code == 0, err
    expected = drawn(wrap(Raw(), "epsilon", betas="scaled_linear", shape=(3, 8, 8)), tmp_path / "b.png")
    assert numpy.array_equal(numpy.asarray(Image.open(tmp_path / "a.png")), expected)


@pytest.mark.parametrize("name", ["classes.pt", "classes.pt2"])
def test_a_raw_network_with_classes_is_told_them(amed, files, name, tmp_path):
    where = ("--model", files / name, *WRAPPED, "--label-dim", 4, "--device", "cpu")
    options = ("--solver", "ipndm", "--nfe", 3, "--seeds", "0-1", "--class", 2, "--guidance", 2.0)
    code, _, err = amed("sample", *where, *options, "--out", tmp_path / "a.png")
    assert code == 0, err
    denoiser = wrap(Raw(4), "epsilon", betas="scaled_linear", shape=(3, 8, 8), label_dim=4)
    expected = drawn(denoiser, tmp_path / "b.png", class_labels=2, guidance_scale=2.0)
    assert numpy.array_equal(numpy.asarray(Image.open(tmp_path / "a.png")), expected)


def test_every_command_takes_a_raw_network(amed, files, tmp_path):
    facts = (*WRAPPED, "--sigma-min", 0.1, "--sigma-max", 50)
    where = ("--model", files / "raw.pt2", *facts, "--device", "cpu")
    free = ("--solver", "ipndm", "--nfe", 2)
    asked = {
        "export": (*free, "--format", "exported", "--max-batch", 8, "--out", tmp_path / "loop.pt2"),
        "compare": ("--nfe", 2, "--samples", 2, "--curve-samples", 0, "--seeds", 0, "--json", tmp_path / "c.json"),
        "evaluate": (*free, "--seeds", "0-3", "--json", tmp_path / "e.json"),
        "calibrate": ("--nfe", 1, "--out", tmp_path / "plan.json"),
        "search-schedule": ("--nfe", 2, "--samples", 4, "--grid", 9, "--out", tmp_path / "levels.json"),
        "distill": ("--nfe", 3, "--kimg", 0.008, "--batch", 8, "--out", tmp_path / "p.safetensors"),
    }
    for command, options in asked.items():
        code, out, err = amed(command, *where, *options)
        assert code == 0, (command, out, err)
    assert json.loads((tmp_path / "c.json").read_text())["model"] == str(files / "raw.pt2")
    for plan in (amed_engine.Plan.load(tmp_path / "plan.json"), amed_engine.Plan.load(tmp_path / "levels.json")):
        assert (plan.sigmas[0], plan.sigmas[-1]) == (pytest.approx(50), pytest.approx(0.1))
    assert amed_engine.load_package(tmp_path / "loop.pt2").facts.plan.sigmas[0] == pytest.approx(50)
    code, out, err = amed("info", "--measure", files / "raw.pt", *WRAPPED, "--sigma-max", 50)
    assert (code, out.splitlines()[0]) == (0, f"mean answer of {files / 'raw.pt'} at sigma 50"), err


def test_the_schedule_of_training_steps(amed, files, tmp_path):
    where = ("--model", files / "raw.pt", *WRAPPED, "--device", "cpu", "--solver", "ipndm", "--nfe", 4)
    code, _, err = amed("export", *where, "--schedule", "discrete", "--format", "plan", "--out", tmp_path / "p.json")
    assert code == 0, err
    levels = json.loads((tmp_path / "p.json").read_text())
    table = alphas_cumprod("scaled_linear")
    denoiser = wrap(Raw(), "epsilon", betas="scaled_linear", shape=(3, 8, 8))
    ends = denoiser.sigma_min, denoiser.sigma_max
    expected = amed_engine.make_schedule("discrete", 5, *ends, alphas_cumprod=table)
    assert levels["sigmas"][:4] == pytest.approx(expected[:4].tolist(), rel=1e-6)


def test_facts_that_a_denoisers_file_does_not_say(amed, files, tmp_path):
    out = ("--solver", "euler", "--nfe", 2, "--seeds", "0-1", "--sigma-max", 2.0, "--out", tmp_path / "a.png")
    code, _, err = amed("sample", "--model", files / "raw.pt", "--device", "cpu", *out)
    assert code == 2
    assert "does not say what shape" in err
    code, _, err = amed("sample", "--model", files / "raw.pt", "--shape", "3,8,8", "--device", "cpu", *out)
    assert code == 0, err
    asked = ("--shape", "3x8x8", "--label-dim", 4, "--class", 1, "--device", "cpu")
    code, _, err = amed("sample", "--model", files / "classes.pt", *asked, *out)
    assert code == 0, err


def test_a_plan_of_another_model_is_taken_with_no_verify(amed, files, tmp_path):
    amed_engine.Sampler(lambda x, sigma: x, solver="euler", nfe=2, shape=(3, 8, 8)).plan.save(tmp_path / "plan.json")
    plan = json.loads((tmp_path / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps(plan | {"model": "0" * 64}))
    asked = ("--model", files / "raw.pt", *WRAPPED, "--plan", tmp_path / "plan.json", "--device", "cpu", "--seeds", 0)
    for command, more in (("sample", ("--out", tmp_path / "a.png")), ("evaluate", ("--json", tmp_path / "e.json"))):
        code, _, err = amed(command, *asked, *more)
        assert (code, "fingerprints differ" in err) == (2, True)
        seeds = () if command == "sample" else ("--seeds", "0-1")
        code, _, err = amed(command, *asked, *more, *seeds, "--no-verify")
        assert code == 0, err


def test_no_verify_spares_the_look_at_a_network(amed, files, tmp_path):
    where = ("--model", files / "raw.pt", "--prediction", "v", "--shape", "3x8x8", "--device", "cpu", "--nfe", 1)
    assert amed("calibrate", *where, "--out", tmp_path / "plan.json", "--no-verify")[0] == 0


REFUSED = {
    "a shape that is none": (("sample", "--shape", "3x", "--out", "a.png"), "'3x' is no shape of a sample"),
    "a shape of a name": (
        ("sample", "--shape", "3x8x8", "--out", "a.png"),
        "in a file that does not say them, got the model digits",
    ),
    "classes of a name": (("fit", "--label-dim", "3", "--out", "a.safetensors"), "got the model digits"),
    "another channel": (
        ("sample", "--model", "{tmp}/raw.pt2", "--shape", "1x8x8", "--out", "a.png"),
        "the model takes 3 channels",
    ),
    "betas of a denoiser": (("sample", "--betas", "linear", "--out", "a.png"), "--betas is of a raw network"),
    "no class of a denoiser": (("sample", "--null-class", "3", "--out", "a.png"), "--null-class is of a raw network"),
    "betas of a flow": (
        ("sample", "--model", "{tmp}/raw.pt", "--prediction", "flow", "--betas", "linear", "--out", "a.png"),
        "betas are for epsilon, v, x0",
    ),
    "a loop round TorchScript": (
        ("export", "--model", "{tmp}/raw.pt", *WRAPPED, "--out", "{tmp}/a.pt2"),
        "a TorchScript network is a graph of its own kind, which torch.export does not read",
    ),
    "an unknown prediction": (
        ("sample", "--model", "{tmp}/raw.pt", "--prediction", "noise", "--out", "a.png"),
        "prediction must be one of epsilon",
    ),
    "a denoiser that is wrapped": (("sample", "--prediction", "epsilon", "--out", "a.png"), "is a denoiser already"),
    "no verification of nothing": (("calibrate", "--no-verify", "--out", "a.json"), "--no-verify is for the look"),
    "facts of no model": (("info", "--shape", "3x8x8"), "for --measure MODEL"),
    "a range that is none": (
        ("sample", "--model", "{tmp}/raw.pt", *WRAPPED, "--sigma-min", "9", "--sigma-max", "3", "--out", "a.png"),
        "need sigma_min < sigma_max",
    ),
    "steps of a network without": (
        (
            "sample",
            "--model",
            "{tmp}/raw.pt",
            "--prediction",
            "flow",
            "--shape",
            "3x8x8",
            "--schedule",
            "discrete",
            "--out",
            "a.png",
        ),
        "this one is known to have none",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_means_nothing_is_refused(case, amed, files):
    args, message = REFUSED[case]
    code, _, err = amed(*(arg.format(tmp=files) for arg in args))
    assert code == 2
    assert re.search(rf"amed: error: .*{re.escape(message)}", err)


class Tables(nn.Module):
    """A network that looks its step and its class up: 1000 steps, three classes and one that means none."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.conv, self.steps, self.classes = nn.Conv2d(3, 3, 1), nn.Embedding(1000, 3), nn.Embedding(4, 3)

    def forward(self, x, step, y):
        return self.conv(x) + (self.steps(step) + self.classes(y))[:, :, None, None]


def test_a_raw_network_with_tables_is_guided(amed, tmp_path):
    """--steps, --labels and --null-class are what `wrap` takes."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(Tables(), (X, torch.tensor([1, 2]), torch.tensor([0, 1]))).save(str(tmp_path / "tables.pt"))
    where = ("--model", tmp_path / "tables.pt", *WRAPPED, "--device", "cpu", "--steps", "integer", "--label-dim", 3)
    told = (*where, "--labels", "index", "--null-class", 3, "--class", 2, "--guidance", 2)
    options = ("--solver", "ipndm", "--nfe", 3, "--seeds", "0-1", "--out", tmp_path / "a.png")
    code, _, err = amed("sample", *told, *options)
    assert code == 0, err
    known = {"label_dim": 3, "labels": "index", "null_class": 3, "steps": "integer"}
    denoiser = wrap(Tables(), "epsilon", betas="scaled_linear", shape=(3, 8, 8), **known)
    expected = drawn(denoiser, tmp_path / "b.png", class_labels=2, guidance_scale=2.0)
    assert numpy.array_equal(numpy.asarray(Image.open(tmp_path / "a.png")), expected)
