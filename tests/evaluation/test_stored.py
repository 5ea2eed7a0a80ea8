"""Samples that are there, judged: the same numbers as of those that are drawn, from every format, one batch at a time."""

import json
import weakref

import numpy as np
import pytest
import torch

import amed_engine
from amed_engine.cli import app
from amed_engine.datasets.formats import FORMATS
from amed_engine.datasets.generate import generate_dataset
from amed_engine.engine.images import save_each, to_uint8
from amed_engine.errors import ConfigError, FileFormatError
from amed_engine.evaluation import evaluate, evaluate_samples
from amed_engine.evaluation.metrics import Statistics, batches, frechet, gather

SEEDS = range(40)


@pytest.fixture(scope="module")
def sampler():
    return amed_engine.Sampler("digits", nfe=3)


@pytest.fixture(scope="module")
def folders(sampler, tmp_path_factory):
    """Name of a format -> a dataset of it."""
    root = tmp_path_factory.mktemp("datasets")
    for name, format in FORMATS.items():
        if format.library:
            pytest.importorskip(format.library)
        generate_dataset(sampler, SEEDS, root / name, format=name, shard=16, batch=8)
    return root


@pytest.fixture(scope="module")
def drawn(sampler):
    return evaluate(sampler, SEEDS, reference="deis-fine", features="digits", classifier="digits")


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_is_judged_as_what_is_drawn(format, folders, drawn):
    found = evaluate_samples(folders / format, features="digits", classifier="digits", batch=7)
    assert (found.plan, found.nfe, found.samples) == (drawn.plan, drawn.nfe, 40)
    assert found.class_accuracy == pytest.approx(drawn.class_accuracy, abs=0.03)
    # Bytes are half a grey level away from what was drawn.
    torch.testing.assert_close(found.statistics.mu, drawn.statistics.mu, atol=0.02, rtol=0.02)
    assert (found.distance, found.reference, found.to_reference, found.data, found.to_data) == (None,) * 5
    assert "class accuracy" in found.table()


def test_a_dataset_is_a_source_of_images_wherever_a_folder_is(folders, tmp_path):
    pictures = torch.cat(list(batches(folders / "npz", 7)))
    assert pictures.dtype == torch.uint8
    assert pictures.shape == (40, 1, 8, 8)
    shard = folders / "zarr" / "shard-000001.zarr"
    assert torch.equal(torch.cat(list(batches(shard))), pictures[16:32])
    for format in FORMATS:
        assert frechet(folders / format, pictures, features="pixels") == pytest.approx(0, abs=1e-6)
    found = evaluate_samples(folders / "npz", reference=folders / "parquet", data=folders / "webdataset")
    assert found.to_reference.frechet == found.to_data.frechet == pytest.approx(0, abs=1e-6)
    assert found.to_data.precision == 1


def test_an_npz_is_images_or_statistics_by_what_it_holds(folders, tmp_path):
    shard = folders / "npz" / "shard-000000.npz"
    assert gather(shard, "pixels").count == 16
    with np.load(shard) as file:
        pictures = file["arr_0"]
    np.savez(tmp_path / "evaluators.npz", pictures)
    torch.testing.assert_close(gather(tmp_path / "evaluators.npz", "pixels").mu, gather(shard, "pixels").mu)
    statistics = {"mu": np.zeros(64), "sigma": np.eye(64)}
    np.savez(tmp_path / "statistics.npz", **statistics)
    np.savez(tmp_path / "both.npz", arr_0=pictures, **statistics)
    for name in ("statistics.npz", "both.npz"):
        assert gather(tmp_path / name, "pixels").count is None
    np.savez(tmp_path / "neither.npz", other=pictures)
    with pytest.raises(FileFormatError, match="lacks mu"):
        gather(tmp_path / "neither.npz", "pixels")


def test_pictures_that_say_nothing_are_judged_too(sampler, tmp_path):
    images = sampler.run(SEEDS).images
    save_each(tmp_path / "folder", list(to_uint8(images)), SEEDS)
    found = evaluate_samples(tmp_path / "folder")
    assert (found.samples, found.nfe, found.class_accuracy) == (40, None, None)
    with pytest.raises(ConfigError, match="no classes"):
        evaluate_samples(tmp_path / "folder", classifier="digits")


def test_samples_of_one_class_are_compared_with_that_class(sampler, tmp_path):
    pytest.importorskip("sklearn")
    generate_dataset(sampler, range(12), tmp_path / "threes", class_labels=3, format="npz")
    found = evaluate_samples(tmp_path / "threes", data="digits")
    same = evaluate(
        sampler, range(12), data="digits", setting=amed_engine.evaluation.comparison.Setting(class_labels=3)
    )
    assert found.to_data.frechet == pytest.approx(same.to_data.frechet, rel=0.05)


def test_a_dataset_to_compare_with_says_its_classes(sampler, tmp_path, caplog):
    labels = [seed % 2 + 3 for seed in range(24)]
    generate_dataset(sampler, range(24), tmp_path / "both", class_labels=labels, format="npz", batch=4, shard=8)
    generate_dataset(sampler, range(1, 24, 2), tmp_path / "fours", class_labels=4, format="npz", batch=4, shard=8)
    found = evaluate_samples(tmp_path / "fours", reference=tmp_path / "both")
    assert found.to_reference.frechet == pytest.approx(0, abs=1e-9)
    assert frechet(tmp_path / "fours", tmp_path / "both", features="pixels") > 0.1
    assert "samples are of class 4: compared with the 12 images of that class" in caplog.text
    assert "no labels" not in caplog.text
    generate_dataset(sampler, range(4), tmp_path / "fives", class_labels=5, format="npz", batch=4, shard=8)
    with pytest.raises(ConfigError, match="fives has no images of class 4"):
        evaluate_samples(tmp_path / "fours", reference=tmp_path / "fives")
    images = torch.cat(list(batches(tmp_path / "both")))[1::2]
    save_each(tmp_path / "unnamed", list(images.permute(0, 2, 3, 1).numpy()), range(12))
    evaluate_samples(tmp_path / "fours", reference=tmp_path / "unnamed")
    assert "have no labels" in caplog.text


@pytest.mark.parametrize("kind", ["folder", "arrays"])
def test_what_amed_sample_wrote_says_its_plan_and_classes(kind, sampler, tmp_path):
    given = ["--out", str(tmp_path / "data.npz")] if kind == "arrays" else ["--outdir", str(tmp_path / "data")]
    told = ["--nfe", "3", "--seeds", "0-39", "--device", "cpu", *given]
    app.main(["sample", *told], standalone_mode=False)
    path = tmp_path / ("data.npz" if kind == "arrays" else "data")
    found, same = (evaluate_samples(each, classifier="digits") for each in (path, drawn_again(sampler, tmp_path)))
    assert (found.plan, found.class_accuracy) == (sampler.plan.describe(), same.class_accuracy)


def drawn_again(sampler, folder):
    generate_dataset(sampler, SEEDS, folder / "again", format="npz", batch=8, shard=8)
    return folder / "again"


@pytest.mark.parametrize("count", [2, 4])
def test_labels_beside_pictures_are_as_many(count, tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((3, 8, 8, 1), np.uint8), labels=np.zeros(count, np.uint16))
    with pytest.raises(FileFormatError, match=f"has {count} labels"):
        evaluate_samples(tmp_path / "a.npz", batch=2)


def test_damaged_labels_beside_pictures_are_refused(tmp_path):
    arrays = {"arr_0": np.zeros((3, 8, 8, 1), np.uint8), "labels": np.array([{}], dtype=object)}
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(FileFormatError, match="its plan or labels cannot be read"):
        evaluate_samples(tmp_path / "a.npz")


def test_samples_that_are_not_there_are_named(tmp_path):
    with pytest.raises(FileFormatError, match="nowhere is not there; pass a dataset"):
        evaluate_samples(tmp_path / "nowhere")


def test_a_reference_that_has_to_be_drawn_is_refused(folders):
    with pytest.raises(ConfigError, match="drawn from the samples' latents"):
        evaluate_samples(folders / "npz", reference="deis-fine")


def test_a_damaged_shard_ends_it_with_its_name(sampler, tmp_path):
    generate_dataset(sampler, range(12), tmp_path / "data", format="npz")
    shard = tmp_path / "data" / "shard-000000.npz"
    data = bytearray(shard.read_bytes())
    data[300] ^= 1
    shard.write_bytes(data)
    with pytest.raises(FileFormatError, match=r"shard-000000\.npz"):
        evaluate_samples(tmp_path / "data")


@pytest.mark.parametrize("data", [None, "images", "statistics"])
def test_memory_does_not_grow_with_the_samples(data, folders, tmp_path):
    """Of features that are parts of larger tensors these are let go; beside no images features are too."""
    seen = []

    def features(images):
        large = images.float().flatten(1).numpy().copy()
        seen.append(weakref.ref(large))
        assert sum(ref() is not None for ref in seen) < 3
        return torch.from_numpy(large)[:, :4]

    np.savez(tmp_path / "s.npz", mu=np.zeros(4), sigma=np.eye(4))
    other = {"images": folders / "png", "statistics": tmp_path / "s.npz"}.get(data)
    whole = evaluate_samples(folders / "npz", features=lambda images: images.float().flatten(1)[:, :4]).statistics
    found = evaluate_samples(folders / "npz", features=features, data=other, batch=3)
    torch.testing.assert_close(found.statistics.sigma, whole.sigma)
    assert len(seen) >= 14


def test_what_is_compared_with_is_looked_for_before_the_samples_are_read(folders):
    with pytest.raises(FileFormatError, match="nowhere is not there"):
        evaluate_samples(folders / "npz", data="nowhere", features=lambda images: pytest.fail("it read first"))


# ---- the command


def call(*arguments):
    return app(["evaluate", *map(str, arguments)], standalone_mode=False)


def test_the_command_reads_a_dataset(folders, tmp_path, capsys):
    pytest.importorskip("sklearn")
    call("--samples", folders / "webdataset", "--features", "digits", "--json", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["samples"] == 40
    assert found["plan"] in capsys.readouterr().out
    assert (found["data"], found["reference"], found["distance"]) == ("digits", None, None)
    assert found["class_accuracy"] > 0.5


def test_the_command_saves_statistics_and_compares_with_what_is_asked_for(folders, tmp_path):
    call("--samples", folders / "npz", "--data", "none", "--save-statistics", tmp_path / "s.npz")
    call(
        "--samples",
        folders / "npz",
        "--data",
        tmp_path / "s.npz",
        "--reference",
        folders / "zarr",
        "--json",
        tmp_path / "f",
    )
    found = json.loads((tmp_path / "f").read_text())
    assert found["to_data"]["frechet"] == pytest.approx(0, abs=1e-6)
    assert found["to_reference"]["frechet"] == pytest.approx(0, abs=1e-6)
    assert Statistics.load(tmp_path / "s.npz").mu.shape == (64,)


@pytest.mark.parametrize(
    "options",
    [
        ("--seeds", "0-3"),
        ("--nfe", "5"),
        ("--model", "digits"),
        ("--class", "3"),
        ("--guidance", "2"),
        ("--no-verify",),
        ("--no-afs",),
        ("--afs",),
        ("--prediction", "epsilon"),
        ("--dtype", "float32"),
        ("--solver", "euler"),
        ("--sigma-max", "80"),
    ],
)
def test_the_command_refuses_what_is_for_drawing(options, folders):
    import click

    with pytest.raises(click.UsageError, match=f"draws nothing; leave {options[0]} out") as refused:
        call("--samples", folders / "npz", *options)
    assert "--samples judges what is there" in str(refused.value)


def test_the_command_takes_no_empty_name(folders, monkeypatch):
    import click

    monkeypatch.chdir(folders)
    with pytest.raises(click.UsageError, match="--samples is empty"):
        call("--samples", "")


def test_a_device_that_is_not_there_is_named(folders):
    with pytest.raises(ConfigError, match="unknown device 'gpu'"):
        evaluate_samples(folders / "npz", device="gpu")
