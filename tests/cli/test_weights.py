"""`--weights` of the commands that take a published model by its name."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from amed_engine import ConfigError, Sampler, zoo
from amed_engine.engine import images
from amed_engine.engine.resolve import resolve
from amed_engine.evaluation import compare

NAME = "edm-cifar10-32x32-uncond-vp"
SAMPLING = ("--solver", "ipndm", "--nfe", 3, "--seeds", "0-1", "--device", "cpu")


@pytest.fixture
def published(publish, small, tmp_path) -> Path:
    """The file of a published model, in no folder that the environment names."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    return publish.edm(small, folder / f"{NAME}.pkl")


def sample(amed, out: Path, *options) -> tuple[int, str, str]:
    return amed("sample", "--model", NAME, *SAMPLING, "--outdir", out, *options)


@pytest.mark.parametrize("place", ["file", "folder"])
def test_a_published_name_is_sampled_with_these_weights(amed, published, small, tmp_path, place):
    code, _, error = sample(amed, tmp_path / "o", "--weights", published if place == "file" else published.parent)
    assert code == 0, error
    expected = images.to_uint8(Sampler(small, solver="ipndm", nfe=3, device="cpu").run([0, 1]).images)
    for seed, pixels in enumerate(expected):
        drawn = np.asarray(Image.open(tmp_path / "o" / f"{seed:06d}.png"))
        np.testing.assert_array_equal(drawn.reshape(np.shape(pixels)), pixels)


@pytest.mark.parametrize("before", ["a folder", None])
@pytest.mark.parametrize("works", [True, False])
def test_the_environment_is_as_before_when_the_command_ends(amed, published, tmp_path, monkeypatch, before, works):
    if before is None:
        monkeypatch.delenv("AMED_WEIGHTS")
    else:
        monkeypatch.setenv("AMED_WEIGHTS", before)
    code, _, _ = sample(amed, tmp_path / "o", "--weights", published if works else tmp_path)
    assert (code == 0) is works
    assert os.environ.get("AMED_WEIGHTS") == before


def test_no_option_travels_through_the_environment(amed, published, small, tmp_path, monkeypatch):
    """While the weights are looked for, the environment says what it said before."""
    seen, load = [], zoo.load_weights

    def looked(name, weights):
        seen.append((os.environ["AMED_WEIGHTS"], weights))
        return load(name, weights)

    monkeypatch.setattr(zoo, "load_weights", looked)
    assert sample(amed, tmp_path / "o", "--weights", published)[0] == 0
    assert seen == [(str(tmp_path / "weights"), str(published))]


# What each command needs beside a model and its weights, to end early.
BRIEF = {
    "calibrate": ("--nfe", 1, "--out", "{}/recipe.json"),
    "compare": ("--nfe", 3, "--seeds", 0, "--samples", 1, "--curve-samples", 0),
    "evaluate": ("--nfe", 3, "--solver", "euler", "--seeds", "0-4", "--reference", "heun-fine"),
    "export": ("--nfe", 3, "--solver", "euler", "--format", "schedule", "--out", "{}/schedule.json"),
    "distill": ("--nfe", 3, "--kimg", 0.008, "--batch", 8, "--out", "{}/p.safetensors"),
    "fit": ("--nfe", 3, "--samples", 8, "--starts", 1, "--early", 0, "--late", 1, "--out", "{}/f.safetensors"),
    "search-schedule": ("--nfe", 3, "--grid", 9, "--samples", 2, "--out", "{}/levels.json"),
}


@pytest.mark.parametrize("command", BRIEF)
def test_every_other_command_honours_them(amed, published, tmp_path, command):
    options = [option.format(tmp_path) if isinstance(option, str) else option for option in BRIEF[command]]
    assert amed(command, "--model", NAME, "--device", "cpu", *options)[0] == 2  # tmp_path/weights is empty
    code, out, error = amed(command, "--model", NAME, "--device", "cpu", "--weights", published, *options)
    assert code == 0, error
    assert out


def test_samplers_and_comparisons_take_weights(published, small):
    expected = Sampler(small, solver="ipndm", nfe=3).run([0, 1]).images
    for weights in (published, str(published), published.parent):
        assert torch.equal(Sampler(NAME, weights=weights, solver="ipndm", nfe=3).run([0, 1]).images, expected)
    assert resolve(NAME, weights=published).shape == (1, 8, 8)
    assert compare(NAME, 3, [0], weights=published, samples=1, curve_samples=0).model == NAME


def test_the_environment_is_the_default(published, small, monkeypatch):
    monkeypatch.setenv("AMED_WEIGHTS", str(published.parent))
    assert resolve(NAME).shape == (1, 8, 8)
    with pytest.raises(ConfigError, match="nowhere has none of"):
        resolve(NAME, weights="nowhere")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("digits", "digits is bundled and has its weights; leave weights out"),
        ("{}/m.safetensors", r"published model's name \(.*sd-v1-5\), got the model '.*m.safetensors'; leave them out"),
        ("edm-cifar", "got the model 'edm-cifar'; leave them out"),
        (lambda x, sigma: x, "got the model function; leave them out"),
    ],
)
def test_weights_of_anything_else_are_refused(published, amed, tmp_path, model, message):
    model = model.format(tmp_path) if isinstance(model, str) else model
    with pytest.raises(ConfigError, match=message):
        Sampler(model, weights=published)
    if isinstance(model, str):
        code, _, error = amed("sample", "--model", model, "--weights", published, "--out", tmp_path / "o.png")
        assert (code, "leave" in error) == (2, True)


def test_it_goes_before_the_environment(amed, published, tmp_path, monkeypatch):
    """tmp_path/weights, which the environment names, is empty."""
    assert sample(amed, tmp_path / "o")[0] == 2
    assert sample(amed, tmp_path / "o", "--weights", published)[0] == 0


def test_a_place_that_is_not_there_is_named(amed, small, tmp_path):
    code, out, error = sample(amed, tmp_path / "o", "--weights", tmp_path / "no.pkl")
    assert (code, out) == (2, "")
    assert "--weights" in error
    assert "no.pkl" in error
    assert "does not exist" in error


def test_a_folder_without_the_model_says_what_to_fetch(amed, small, tmp_path):
    code, out, error = sample(amed, tmp_path / "o", "--weights", tmp_path)
    assert (code, out) == (2, "")
    assert f"{tmp_path} has none of" in error
    assert f"{NAME}.pkl" in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize("command", ["sample", *BRIEF])
def test_every_command_that_takes_a_model_by_name_has_it(amed, command):
    code, out, _ = amed(command, "--help")
    assert code == 0
    assert "--weights" in out
