"""`--weights` of the commands that take a published model by its name."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from amed_engine import Sampler
from amed_engine.engine import images

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


@pytest.mark.parametrize("command", ["sample", "compare", "distill", "evaluate", "export", "fit", "search-schedule"])
def test_every_command_that_takes_a_model_by_name_has_it(amed, command):
    code, out, _ = amed(command, "--help")
    assert code == 0
    assert "--weights" in out
