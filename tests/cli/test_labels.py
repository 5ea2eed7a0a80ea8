"""`--class`: classes, numbers that a model is told, and files of them."""

import json

import pytest
import torch
from onnx_graphs import network

import amed_engine

INPUTS = {"noisy": ("float32", ("B", 1, 8, 8)), "sigma": ("float32", ("B",)), "difficulty": ("float32", ("B",))}


@pytest.fixture
def model(tmp_path):
    levels = {"sigma_max": "20", "sigma_min": "0.01"}
    return network(tmp_path / "net.onnx", INPUTS, answer="denoised", metadata=levels)


def drawn(monkeypatch, amed, *args):
    """What the images of a command are, before they are written."""
    kept = []
    monkeypatch.setattr("amed_engine.engine.images.to_uint8", lambda images: kept.append(images) or images)
    monkeypatch.setattr("amed_engine.engine.images.sheet", lambda pictures, notes: b"")
    code, _out, err = amed(*args)
    assert code == 0, err
    return torch.cat(kept)


@pytest.mark.parametrize("text", ["300", "0.3", "0.3,40,500", "file"])
def test_numbers_of_one_or_of_each_sample(amed, model, tmp_path, monkeypatch, text):
    expected = [float(part) for part in text.split(",")] if text != "file" else [0.5, 6.0, 70.0]
    (tmp_path / "numbers.txt").write_text("0.5\n6\n\n70.0\n")
    told = str(tmp_path / "numbers.txt") if text == "file" else text
    args = ("sample", "--model", model, "--seeds", "4-6", "--batch", 2, "--class", told, "--out", tmp_path / "a.png")
    images = drawn(monkeypatch, amed, *args, "--device", "cpu")
    labels = expected[0] if len(expected) == 1 else expected
    torch.testing.assert_close(images, amed_engine.Sampler(model).run([4, 5, 6], labels).images)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ("x", "'x' is neither a number, nor several"),
        ("0.1,0.2", "one number, 3 of them"),
        ("nan", "NaN or infinite"),
        (None, "class_labels are missing"),
    ],
)
def test_what_is_no_number_is_refused(amed, model, tmp_path, told, message):
    given = () if told is None else ("--class", told)
    code, _, err = amed("sample", "--model", model, "--seeds", "0-2", *given, "--out", tmp_path / "a.png")
    assert code != 0
    assert message in err


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0.5\n\n6,7\n", "line 3 has 2 numbers, those before have 1"),
        ("0.5\nhalf\n", "line 2 is 'half'"),
        ("\n", "it has none"),
    ],
)
def test_a_damaged_file_is_refused(amed, model, tmp_path, text, says):
    (tmp_path / "numbers.txt").write_text(text)
    code, _, err = amed("sample", "--model", model, "--class", tmp_path / "numbers.txt", "--out", tmp_path / "a.png")
    assert code == 2
    assert f"numbers.txt must hold a line of numbers per sample, as many in each: {says}" in err


def test_training_commands_take_them_in_turn(amed, model, tmp_path):
    where = ("--model", model, "--device", "cpu", "--nfe", 3, "--samples", 8)
    fit = ("fit", *where, "--starts", 1, "--early", 1, "--late", 1, "--out", tmp_path / "f.safetensors")
    code, _, err = amed(*fit)
    assert code != 0
    assert "`amed fit --class`" in err
    assert amed(*fit, "--class", "0.1,50,0.9")[0] == 0
    predictor = amed_engine.load_predictor(tmp_path / "f.safetensors")
    assert amed_engine.Sampler(model, predictor).run([1, 2], [0.1, 50]).images.isfinite().all()
    code, out, _ = amed("search-schedule", *where, "--class", 0.5, "--out", tmp_path / "levels.json")
    assert code == 0
    assert "noise levels 20" in out


def test_comparisons_are_at_one_number(amed, model):
    args = ("--model", model, "--nfe", 4, "--seeds", "0-1", "--samples", 2, "--curve-samples", 0, "--device", "cpu")
    code, out, err = amed("compare", *args, "--class", 0.5, "--json", "-")
    assert code == 0, err
    assert json.loads(out)
