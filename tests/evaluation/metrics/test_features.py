"""Feature extractors: what they make of bytes and floats, the bundled classifier, and Inception through its library."""

import sys
import types

import pytest
import torch
from click.testing import CliRunner

from amed_engine.errors import AmedError, ConfigError, FileFormatError
from amed_engine.evaluation.metrics import class_accuracy, extractor
from amed_engine.evaluation.metrics.classifier import FILE, DigitClassifier, load_classifier, save_classifier
from amed_engine.evaluation.metrics.features import as_bytes, as_floats


def test_bytes_and_floats_are_inverse_to_each_other():
    levels = torch.arange(256, dtype=torch.uint8).view(4, 1, 8, 8)
    assert as_floats(levels).min() == -1
    assert as_floats(levels).max() == 1
    assert torch.equal(as_bytes(as_floats(levels)), levels)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_picture_has_one_channel_or_three(dtype):
    with pytest.raises(ConfigError, match="1 or 3"):
        as_bytes(torch.zeros(1, 2, 4, 4, dtype=dtype))


def test_pixels_are_the_values_not_quantised():
    images = torch.tensor([-1.25, 0.1]).view(1, 1, 1, 2)
    assert torch.equal(extractor("pixels")(images), torch.tensor([[-1.25, 0.1]]))
    assert extractor("pixels")(torch.zeros(2, 3, 4, 4, dtype=torch.uint8)).tolist() == [[-1.0] * 48] * 2


def test_a_callable_is_an_extractor():
    assert extractor(len) is len


@pytest.mark.parametrize(
    ("given", "message"), [("vgg", "valid names: pixels, digits, inception"), (3, "name or a call")]
)
def test_unknown_features_are_named(given, message):
    with pytest.raises(ConfigError, match=message):
        extractor(given)


# ---- the digit classifier


def test_the_classifier_is_small_and_says_how_good_it_is():
    classifier, report = load_classifier()
    assert FILE.stat().st_size < 200_000
    assert report["accuracy_held_out"] > 0.97
    assert not any(parameter.requires_grad for parameter in classifier.parameters())


def test_held_out_digits_are_recognised_as_reported():
    pytest.importorskip("sklearn")
    from amed_engine.evaluation.metrics.train_classifier import Recipe, split
    from amed_engine.zoo.train_digits import load_digits

    classifier, report = load_classifier()
    recipe = Recipe(**{name: report[name] for name in Recipe.__dataclass_fields__})
    training, held_out = split(load_digits(torch.device("cpu")), recipe)
    assert len(training.images) + len(held_out.images) == 1797
    seen = {image.numpy().tobytes() for image in training.images}
    assert sum(image.numpy().tobytes() in seen for image in held_out.images) == 0
    assert class_accuracy(held_out.images, held_out.labels, classifier) == pytest.approx(
        report["accuracy_held_out"], abs=1e-4
    )
    assert class_accuracy(held_out.images, (held_out.labels + 1) % 10) < 0.02


def test_training_learns_is_repeatable_and_leaves_the_generators_alone():
    pytest.importorskip("sklearn")
    from amed_engine.evaluation.metrics.train_classifier import Recipe, split, train
    from amed_engine.zoo.train_digits import load_digits

    recipe = Recipe(epochs=4)
    training, held_out = split(load_digits(torch.device("cpu")), recipe)
    before = torch.get_rng_state()
    first, second = train(recipe, training), train(recipe, training)
    assert torch.equal(torch.get_rng_state(), before)
    assert class_accuracy(held_out.images, held_out.labels, first) > 0.9
    assert torch.equal(first.head.weight, second.head.weight)


def test_the_script_writes_what_is_loaded(tmp_path):
    pytest.importorskip("sklearn")
    from amed_engine.evaluation.metrics.train_classifier import main

    done = CliRunner().invoke(main, ["--epochs", "1", "--seed", "3", "--out", str(tmp_path / "c.safetensors")])
    assert done.exit_code == 0, done.output
    _, report = load_classifier(tmp_path / "c.safetensors")
    assert (report["epochs"], report["seed"], report["images_held_out"]) == (1, 3, 359)
    assert done.output.startswith(f"{report['accuracy_held_out']:.4f} of 359 held-out digits recognised")


def test_features_decide_the_class():
    """The last layer is linear in them."""
    images = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    classifier, _ = load_classifier()
    features = extractor("digits")(images)
    assert features.shape == (5, 64)
    torch.testing.assert_close(classifier.head(features), classifier(images)[0])
    torch.testing.assert_close(extractor("digits")(as_bytes(images)), features, atol=0.05, rtol=0.05)


def test_other_images_are_refused():
    with pytest.raises(ConfigError, match=r"takes images \(B, 1, 8, 8\), got \(1, 3, 32, 32\)"):
        extractor("digits")(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ConfigError, match=r"one class number per image \(2,\)"):
        class_accuracy(torch.zeros(2, 1, 8, 8), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ConfigError, match=r"one class number per image \(2,\), got NoneType"):
        class_accuracy(torch.zeros(2, 1, 8, 8), None)


def test_a_classifier_file_is_checked(tmp_path):
    save_classifier(DigitClassifier(), tmp_path / "c.safetensors", {"seed": 1})
    assert load_classifier(tmp_path / "c.safetensors")[1] == {"seed": 1}
    from amed_engine.checkpoints import write

    write(tmp_path / "other.safetensors", {}, {"kind": "amed_predictor"})
    with pytest.raises(FileFormatError, match="expected 'digit_classifier'"):
        load_classifier(tmp_path / "other.safetensors")
    write(tmp_path / "short.safetensors", {"head.bias": torch.zeros(10)}, {"kind": "digit_classifier", "training": {}})
    with pytest.raises(FileFormatError, match="lacks tensor"):
        load_classifier(tmp_path / "short.safetensors")


# ---- Inception

MODULE = "torch_fidelity.feature_extractor_inceptionv3"


def test_without_the_library_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, MODULE, None)
    with pytest.raises(AmedError, match=r"pip install 'amed-engine\[inception\]'"):
        extractor("inception")


def test_inception_gets_colour_bytes_and_gives_pool_features(monkeypatch):
    """The library's contract, kept by a stand-in: (B, 3, H, W) bytes in, a tuple of the features asked for out."""
    seen = {}

    class Network(torch.nn.Module):
        def __init__(self, name, features_list):
            super().__init__()
            assert features_list == ["2048"]

        def forward(self, x):
            seen["images"] = x
            return (x.float().flatten(1)[:, :1].expand(-1, 2048),)

    stand_in = types.ModuleType(MODULE)
    stand_in.FeatureExtractorInceptionV3 = Network  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, MODULE, stand_in)
    grey = torch.tensor([-3.0, 0.0, 3.0]).view(3, 1, 1, 1).expand(3, 1, 4, 4)
    features = extractor("inception")(grey)
    assert features.shape == (3, 2048)
    assert seen["images"].dtype == torch.uint8
    assert seen["images"].shape == (3, 3, 4, 4)
    assert features[:, 0].tolist() == [0, 128, 255]


def test_inception_of_the_library_runs(monkeypatch):
    """The library itself with random weights: its own are fetched from the net."""
    library = pytest.importorskip(MODULE)
    monkeypatch.setattr(library, "load_state_dict_from_url", lambda *_, **__: {})
    monkeypatch.setattr(library.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
    features = extractor("inception")(torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert features.shape == (2, 2048)
    assert features.isfinite().all()
