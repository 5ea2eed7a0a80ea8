"""`amed sample` as to files: what an image says of itself, what it does not replace, and bytes on standard output."""

import functools
import hashlib
import io
import os
import re
import subprocess
import sys

import numpy as np
import onnx_graphs
import pytest
from PIL import Image
from torch import nn

import amed_engine
from amed_engine.adapters.fingerprint import fingerprint
from amed_engine.checkpoints import save_model
from amed_engine.engine import images
from amed_engine.engine.images import save_each, to_uint8
from amed_engine.engine.origin import Origin


@pytest.fixture
def run(amed, tiny_conditional, tmp_path):
    """Runs `amed sample` on a small network with classes."""
    save_model(tiny_conditional, tmp_path / "m.safetensors")
    common = ("sample", "--model", tmp_path / "m.safetensors", "--device", "cpu", "--solver", "euler")
    return lambda *args: amed(*common, *args)


@pytest.fixture
def other(tiny_conditional, tmp_path):
    """The same network with one weight changed."""
    with_other = {name: tensor.clone() for name, tensor in tiny_conditional.state_dict().items()}
    name = next(name for name, tensor in with_other.items() if tensor.dim() > 1)
    with_other[name].view(-1)[0] += 1e-3
    tiny_conditional.load_state_dict(with_other)
    save_model(tiny_conditional, tmp_path / "other.safetensors")
    return tmp_path / "other.safetensors"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- what an image says ----


def test_each_image_says_its_seed_class_and_plan(run, tmp_path, tiny_conditional):
    code, out, err = run("--nfe", 3, "--seeds", "4-6", "--batch", 2, "--outdir", tmp_path / "o")
    assert code == 0, err
    result = amed_engine.Sampler(tiny_conditional, solver="euler", nfe=3).run([4, 5, 6])
    for seed, label, picture in zip([4, 5, 6], result.labels.tolist(), to_uint8(result.images), strict=True):
        with Image.open(tmp_path / "o" / f"{seed:06d}.png") as image:
            said, pixels = dict(image.text), np.asarray(image)
        assert (said["seed"], said["class"], said["plan"]) == (str(seed), str(label), out.splitlines()[0])
        assert said["model"] == fingerprint(tiny_conditional)
        assert np.abs(pixels.astype(int) - picture[..., 0]).max() <= 1


def test_the_sheet_says_its_seeds(run, tmp_path):
    assert run("--nfe", 3, "--seeds", "0-2,7", "--class", 2, "--out", tmp_path / "s.png")[0] == 0
    with Image.open(tmp_path / "s.png") as image:
        assert (image.text["seeds"], image.text["class"]) == ("0-2,7", "2")
        assert "euler" in image.text["plan"]


# ---- what it replaces ----

JOB = ("--nfe", 3, "--seeds", "0-3", "--class", 2, "--guidance", 2.0)
OTHERS = {
    "plan": ((*JOB, "--nfe", 4), "plan: euler.*NFE 3 there, euler.*NFE 4 here"),
    "levels": ((*JOB, "--rho", 2), "plan: "),
    "guidance": ((*JOB, "--guidance", 3.0), "guidance: 2 there, 3 here"),
    "class": ((*JOB, "--class", 1), "class: 2 there, 1 here"),
    "no class": (JOB[:4], "guidance: 2 there, none here"),
    "dtype": ((*JOB, "--dtype", "float64"), "dtype: float32 there, float64 here"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_images_of_something_else_are_not_replaced(run, tmp_path, monkeypatch, what):
    args, message = OTHERS[what]
    assert run(*JOB, "--outdir", tmp_path / "o")[0] == 0
    before = contents(tmp_path / "o")
    with monkeypatch.context() as patch:
        patch.setattr(amed_engine.Sampler, "run", lambda *_, **__: pytest.fail("it drew first"))
        code, out, err = run(*args, "--seeds", "2-5", "--outdir", tmp_path / "o")
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith(f"amed: error: {tmp_path}/o/000002.png is another image: ")
    assert re.search(message, line)
    assert contents(tmp_path / "o") == before
    assert run(*args, "--seeds", "2-5", "--outdir", tmp_path / "o", "--overwrite")[0] == 0
    after = contents(tmp_path / "o")
    assert {name for name in before if after[name] != before[name]} == {"000002.png", "000003.png"}
    assert len(after) == 6


def test_another_model_is_told(run, tmp_path, other):
    assert run(*JOB, "--outdir", tmp_path / "o")[0] == 0
    code, _, err = run(*JOB, "--model", other, "--outdir", tmp_path / "o")
    assert code == 2
    assert "is another image: model: " in err


def test_the_same_job_by_other_words_replaces_its_images(run, tmp_path):
    own = ("--nfe", 4, "--seeds", "0-1", "--outdir", tmp_path / "o")
    for words in (("--class", 2), ("--class", "2,2", "--rho", 1), ("--class", 2, "--schedule", "time_uniform")):
        assert run(*own, *words)[0] == 0
    pixels = np.asarray(Image.open(tmp_path / "o" / "000001.png"))
    code, _, err = run(*own, "--class", 2, "--rho", 2)
    assert code == 2
    assert "plan: euler, time_uniform, 4 intervals, " in err
    assert np.array_equal(np.asarray(Image.open(tmp_path / "o" / "000001.png")), pixels)


def test_models_without_readable_weights_are_told_by_their_files(amed, tmp_path):
    inputs = {"x": ("float32", ("B", 1, 4, 4)), "sigma": ("float32", ("B",))}
    common = ("--seeds", "0-1", "--solver", "euler", "--nfe", 2, "--sigma-max", 80, "--device", "cpu", "--no-verify")
    drawn = ("sample", *common, "--outdir", tmp_path / "o", "--model")
    for name in ("one", "other"):
        onnx_graphs.network(tmp_path / f"{name}.onnx", inputs, answer="denoised", metadata={"name": name})
    for _ in range(2):
        assert amed(*drawn, tmp_path / "one.onnx")[0] == 0
    own = hashlib.sha256((tmp_path / "one.onnx").read_bytes()).hexdigest()
    assert Image.open(tmp_path / "o" / "000001.png").text["model"] == own
    code, _, err = amed(*drawn, tmp_path / "other.onnx")
    assert code == 2
    assert f"is another image: model: {own} there" in err


def test_of_a_function_the_pixels_are_compared(tmp_path):
    def drawn(scale):
        sampler = amed_engine.Sampler(
            lambda x, sigma: scale * x, shape=(1, 4, 4), nfe=2, solver="euler", sigma_max=80.0
        )
        origin, result = Origin.of(sampler, [0, 1]), sampler.run([0, 1])
        origin.check(tmp_path, [0, 1], subdirs=False, overwrite=False)
        save_each(tmp_path, to_uint8(result.images), [0, 1], notes=origin.notes([0, 1]))

    drawn(0.5)
    drawn(0.5)
    with pytest.raises(amed_engine.errors.ConfigError, match=r"000000.png is another image: its pixels differ"):
        drawn(-0.25)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)).eval()

    def forward(self, x, sigma):
        return self.layers(x)


def test_statistics_of_a_network_make_another_job():
    sampler = amed_engine.Sampler(Normed().eval(), shape=(1, 4, 4), nfe=1, solver="euler", sigma_max=80.0)
    before = Origin.of(sampler, [0]).facts["job"]
    assert Origin.of(sampler, [0]).facts["job"] == before
    sampler.model.module.layers[1].running_mean += 1
    assert Origin.of(sampler, [0]).facts["job"] != before


def test_the_same_job_writes_the_same_bytes_again(run, tmp_path):
    assert run(*JOB, "--outdir", tmp_path / "o")[0] == 0
    before = contents(tmp_path / "o")
    (tmp_path / "o" / "000001.png").unlink()
    assert run(*JOB, "--outdir", tmp_path / "o")[0] == 0
    assert contents(tmp_path / "o") == before


@pytest.mark.parametrize("data", [b"", b"not a picture", "png", "cut"])
def test_files_that_say_nothing_are_not_replaced(run, tmp_path, data):
    (tmp_path / "o").mkdir()
    path = tmp_path / "o" / "000003.png"
    plain = images.png(np.zeros((8, 8, 1), np.uint8))
    path.write_bytes({"png": plain, "cut": plain[:20]}.get(data, data))
    before = contents(tmp_path / "o")
    code, _, err = run(*JOB, "--outdir", tmp_path / "o")
    assert code == 2
    assert "000003.png is another image: seed: not said there, 3 here" in err
    assert contents(tmp_path / "o") == before
    assert run(*JOB, "--outdir", tmp_path / "o", "--overwrite")[0] == 0
    assert Image.open(path).text["seed"] == "3"


def test_a_fitted_predictor_is_told_from_another_of_the_same_plan(amed, tiny_conditional, tmp_path):
    save_model(tiny_conditional, tmp_path / "m.safetensors")
    where = ("--model", tmp_path / "m.safetensors", "--device", "cpu")
    small = ("--samples", 8, "--batch", 8, "--starts", 1, "--early", 0, "--late", 1, "--teacher-nfe", 4, "--nfe", 2)
    for seed in (0, 1):
        made = ("--seed", seed, "--out", tmp_path / f"{seed}.safetensors")
        assert amed("fit", *where, *small, *made)[0] == 0
    drawn = ("sample", *where, "--seeds", "0-1", "--outdir", tmp_path / "o")
    assert amed(*drawn, "--predictor", tmp_path / "0.safetensors")[0] == 0
    assert amed(*drawn, "--predictor", tmp_path / "0.safetensors")[0] == 0
    code, _, err = amed(*drawn, "--predictor", tmp_path / "1.safetensors")
    assert code == 2
    assert "another image: " in err


def test_python_saves_as_carefully(tmp_path):
    pictures = np.arange(2 * 64, dtype=np.uint8).reshape(2, 8, 8, 1)
    save_each(tmp_path, pictures, [3, 4])
    save_each(tmp_path, pictures, [3, 4])  # the same bytes
    before = contents(tmp_path)
    with pytest.raises(amed_engine.errors.ConfigError, match=r"000004.png is another image: its pixels differ"):
        save_each(tmp_path, pictures[::-1], [5, 4])
    with pytest.raises(amed_engine.errors.ConfigError, match="named twice: 7"):
        save_each(tmp_path, pictures, [7, 7])
    assert contents(tmp_path) == before
    save_each(tmp_path, pictures[::-1], [3, 4], overwrite=True)
    assert contents(tmp_path)["000003.png"] != before["000003.png"]
    assert Image.open(tmp_path / "000003.png").text == {"seed": "3"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--seeds", "1,2,2", "--out", "a.png"), "seeds are named twice: 2; "),
        (("--seeds", "0-9,5,7-12", "--out", "a.png"), "seeds are named twice: 5, 7, 8, 9; "),
        (("--overwrite", "--out", "a.png"), "--overwrite needs --outdir"),
        (("--format", "npz", "--outdir", "o"), "--format is of --out"),
        (("--out", "new/"), "new/ names a folder, expected a file"),
        (("--out", "", "--outdir", "o"), "--out is empty"),
        (("--seeds", "1-3", "--out", "o/../o/000002.png", "--outdir", "o"), "is the image of a seed in --outdir"),
        (("--format", "png", "--out", "a.npz"), "written as PNG, got a.npz; name it a.png"),
        (
            ("--format", "npz", "--out", "a.png"),
            "--format npz is written to a name with .npz, got a.png; name it a.npz",
        ),
    ],
)
def test_bad_usage_is_told(run, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run("--nfe", 3, *args)
    assert (code, out) == (2, "")
    assert message in err
    assert {path.name for path in tmp_path.iterdir()} == {"m.safetensors"}


# ---- arrays, and standard output ----


def test_npz_holds_arrays_seeds_and_labels(run, tmp_path, tiny_conditional):
    code, out, err = run("--nfe", 3, "--seeds", "4-6", "--batch", 2, "--out", tmp_path / "x.npz")
    assert code == 0, err
    result = amed_engine.Sampler(tiny_conditional, solver="euler", nfe=3).run([4, 5, 6])
    with np.load(tmp_path / "x.npz", allow_pickle=False) as found:
        assert (found["arr_0"].dtype, found["arr_0"].shape) == (np.uint8, (3, 8, 8, 1))
        assert np.abs(found["arr_0"].astype(int) - to_uint8(result.images)).max() <= 1
        assert (found["seeds"].tolist(), found["labels"].tolist()) == ([4, 5, 6], result.labels.tolist())
        assert str(found["plan"]) == out.splitlines()[0]
    first = (tmp_path / "x.npz").read_bytes()
    assert run("--nfe", 3, "--seeds", "4-6", "--batch", 2, "--out", tmp_path / "x.npz")[0] == 0
    assert (tmp_path / "x.npz").read_bytes() == first


def started(tmp_path, tiny_model, *args, **how):
    save_model(tiny_model, tmp_path / "m.safetensors")
    line = [
        sys.executable,
        "-P",
        "-m",
        "amed_engine",
        "sample",
        "--model",
        tmp_path / "m.safetensors",
        "--seeds",
        "0-1",
    ]
    line += ["--device", "cpu", "--nfe", "2", "--solver", "euler", *args]
    return subprocess.run(list(map(str, line)), capture_output=not how, check=False, **how)


@pytest.mark.parametrize("kind", ["png", "npz"])
def test_standard_output_is_the_bytes_alone(tmp_path, tiny_model, kind):
    done = started(tmp_path, tiny_model, "--out", "-", "--format", kind)
    named = started(tmp_path, tiny_model, "--out", tmp_path / f"a.{kind}", preexec_fn=functools.partial(os.close, 2))
    assert (done.returncode, named.returncode) == (0, 0)
    assert done.stdout == (tmp_path / f"a.{kind}").read_bytes()
    assert b"wrote standard output" in done.stderr
    if kind == "png":
        assert Image.open(io.BytesIO(done.stdout)).format == "PNG"


@pytest.mark.parametrize("name", ["-", "/dev/stdout"])
def test_a_terminal_gets_no_bytes(tmp_path, tiny_model, name):
    ours, theirs = os.openpty()
    try:
        done = started(tmp_path, tiny_model, "--out", name, stdout=theirs, stderr=subprocess.PIPE)
    finally:
        os.close(theirs)
        os.close(ours)
    assert done.returncode == 2
    assert b"standard output is a terminal; pipe it, or name a file" in done.stderr


def test_a_reader_that_left_is_one_line(tmp_path, tiny_model):
    ours, theirs = os.pipe()
    os.close(ours)
    done = started(tmp_path, tiny_model, "--out", "-", stdout=theirs, stderr=subprocess.PIPE)
    os.close(theirs)
    assert (done.returncode, done.stderr.splitlines()) == (1, [b"amed: error: Broken pipe: standard output"])
