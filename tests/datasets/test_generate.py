"""A dataset is a function of its job: each sample once, whoever draws it, and nothing half or left behind."""

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from dataset_folders import contents

from amed_engine import AmedError, ConfigError, FileFormatError, Sampler, generate_dataset
from amed_engine.datasets import formats
from amed_engine.datasets.claims import Claims
from amed_engine.datasets.formats.npz import NpzWriter
from amed_engine.datasets.job import fitting_batch
from amed_engine.datasets.ledger import Ledger

SMALL = {"format": "npz", "shard": 20, "batch": 8}


def bytes_of(folder: Path) -> dict[str, bytes]:
    files = (
        path for path in folder.rglob("*") if path.is_file() and path.name not in ("manifest.json", "ledger.jsonl")
    )
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, sampler):
    """90 samples, drawn by one process in one go."""
    folder = tmp_path_factory.mktemp("whole") / "data"
    return folder, generate_dataset(sampler, "0-89", folder, **SMALL)


def test_a_dataset_holds_what_the_sampler_draws(whole, sampler):
    folder, report = whole
    assert (report.samples, report.wanted, report.drawn, report.in_other_hands) == (90, 90, 90, 0)
    found = contents(folder)
    assert sorted(found) == list(range(90))
    result = sampler.run(list(range(8)))
    pictures = (result.images * 127.5 + 128).clip(0, 255).byte().permute(0, 2, 3, 1).numpy()
    for seed in range(8):
        assert found[seed] == (pictures[seed].tobytes(), int(result.labels[seed]))
    assert sorted(path.name for path in folder.iterdir()) == [
        "ledger.jsonl",
        "manifest.json",
        *(f"shard-{shard:06d}.npz" for shard in range(5)),
    ]


def test_the_same_call_again_draws_nothing(whole, sampler):
    folder, report = whole
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    again = generate_dataset(sampler, range(90), folder, **SMALL, verify=3)
    assert (again.samples, again.drawn, again.verified, again.set_hash) == (90, 0, 3, report.set_hash)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_source_is_made_with_the_threads_it_is_to_draw_with(making, tmp_path):
    seen = []

    def made():
        seen.append(torch.get_num_threads())
        return making()

    before = torch.get_num_threads()
    generate_dataset(made, "0-3", tmp_path / "data", **{**SMALL, "shard": 4, "batch": 4}, threads=before + 1)
    assert (seen, torch.get_num_threads()) == ([before + 1], before)


def test_workers_draw_the_same_files(whole, making, tmp_path):
    folder, report = whole
    found = generate_dataset(making, "0-89", tmp_path / "data", **SMALL, workers=2)
    assert (found.drawn, found.set_hash) == (90, report.set_hash)
    assert bytes_of(tmp_path / "data") == bytes_of(folder)
    assert contents(tmp_path / "data") == contents(folder)


@pytest.mark.parametrize("kind", sorted(formats.FORMATS))
def test_the_set_hash_is_that_of_the_samples_in_every_format_and_shard_size(whole, sampler, tmp_path, kind):
    found = generate_dataset(
        sampler, [*range(89, 40, -1), *range(41)], tmp_path / "data", format=kind, shard=32, batch=8
    )
    assert found.set_hash == whole[1].set_hash
    assert contents(tmp_path / "data") == contents(whole[0])


def test_other_labels_or_seeds_have_another_set_hash(whole, sampler, tmp_path):
    of_class = generate_dataset(sampler, "0-89", tmp_path / "a", class_labels=3, **SMALL)
    assert {label for _, label in contents(tmp_path / "a").values()} == {3}
    each = generate_dataset(sampler, "0-89", tmp_path / "b", class_labels=[3] * 90, **SMALL)
    fewer = generate_dataset(sampler, "0-88", tmp_path / "c", **SMALL)
    assert each.set_hash == of_class.set_hash
    assert len({of_class.set_hash, fewer.set_hash, whole[1].set_hash}) == 3


def test_labels_of_each_sample_go_with_their_seeds(sampler, tmp_path):
    labels = [seed % 10 for seed in range(30)]
    generate_dataset(sampler, "100-129", tmp_path / "a", class_labels=labels, **SMALL)
    assert {seed: label for seed, (_, label) in contents(tmp_path / "a").items()} == {
        100 + row: label for row, label in enumerate(labels)
    }


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"seeds": "0-90"}, 'seeds is "0-89" there, "0-90" here'),
        ({"shard": 40}, "shard is 20 there, 40 here"),
        ({"batch": 4}, "batch is 8 there, 4 here"),
        ({"threads": 2}, "threads is 1 there, 2 here"),
        ({"format": "png"}, 'format is "npz" there, "png" here'),
        ({"class_labels": 3}, "labels is null there, 3 here"),
        ({"guidance_scale": 2.0}, "guidance_scale is null there, 2.0 here"),
        ({"stored": "float32"}, 'stored is "uint8" there, "float32" here'),
    ],
)
def test_another_job_is_refused_with_the_difference(whole, sampler, changed, says):
    folder, _ = whole
    before = bytes_of(folder)
    with pytest.raises(ConfigError, match="holds another dataset") as caught:
        generate_dataset(sampler, changed.pop("seeds", "0-89"), folder, **{**SMALL, **changed})
    assert says in str(caught.value)
    assert bytes_of(folder) == before


def test_the_same_levels_by_other_words_are_the_same_job(tmp_path):
    small = {"solver": "ipndm", "nfe": 3, "schedule": "time_uniform"}
    generate_dataset(Sampler("digits", **small), "0-39", tmp_path, **SMALL)
    (tmp_path / "shard-000001.npz").unlink()
    before = bytes_of(tmp_path)
    assert generate_dataset(Sampler("digits", **small, rho=1), "0-39", tmp_path, **SMALL).drawn == 20
    assert generate_dataset(Sampler("digits", **small), "0-39", tmp_path, **SMALL, check=True).drawn == 0
    assert before.items() < bytes_of(tmp_path).items()


def test_another_plan_or_network_is_refused(whole, tmp_path):
    with pytest.raises(ConfigError, match=r"source\.nfe is 3 there, 5 here"):
        generate_dataset(Sampler("digits", nfe=5), "0-89", whole[0], **SMALL)


def test_damaged_shards_are_drawn_again(whole, sampler, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(whole[0], folder)
    (folder / "shard-000000.npz").unlink()
    with open(folder / "shard-000002.npz", "ab") as file:
        file.write(b"more")
    flipped = bytearray((folder / "shard-000004.npz").read_bytes())
    flipped[300] ^= 1
    (folder / "shard-000004.npz").write_bytes(flipped)
    assert generate_dataset(sampler, "0-89", folder, **SMALL).drawn == 40  # what sizes tell
    assert generate_dataset(sampler, "0-89", folder, **SMALL, check=True).drawn == 10
    assert bytes_of(folder) == bytes_of(whole[0])


@pytest.mark.parametrize("damage", ["missing", "other", "more"])
def test_damaged_folders_of_pictures(sampler, tmp_path, damage):
    folder = tmp_path / "data"
    generate_dataset(sampler, "0-39", folder, format="png", shard=20)
    before, shard = bytes_of(folder), folder / "shard-000001"
    if damage == "missing":
        (shard / "000025.png").unlink()
    elif damage == "other":
        (shard / "000025.png").write_bytes(b"x")
    else:
        (shard / "000025.png").write_bytes(b"x")
        (shard / "mine.txt").write_text("mine")
        with pytest.raises(AmedError, match=r"holds mine\.txt, which is not of this dataset"):
            generate_dataset(sampler, "0-39", folder, format="png", shard=20)
        (shard / "mine.txt").unlink()
    assert generate_dataset(sampler, "0-39", folder, format="png", shard=20).drawn == 20
    assert bytes_of(folder) == before


def test_overwriting_removes_what_the_ledger_lists_alone(sampler, tmp_path, caplog):
    folder = tmp_path / "data"
    generate_dataset(sampler, "0-39", folder, **SMALL)
    (folder / "notes.txt").write_text("mine")
    (folder / "shard-000009.npz").write_text("mine too")
    before = bytes_of(folder)
    with pytest.raises(ConfigError, match=r"shard-000009\.npz is not in the ledger"):
        generate_dataset(sampler, "7-16", folder, **SMALL, overwrite=True)
    assert bytes_of(folder) == before
    (folder / "shard-000009.npz").rename(folder / "mine.npz")
    report = generate_dataset(Sampler("digits", nfe=5), "7-16", folder, **SMALL, overwrite=True)
    assert "removing 2 shard(s), 40 samples" in caplog.text
    assert (report.samples, report.drawn) == (10, 10)
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "mine.npz").read_text() == "mine too"
    assert len(list(folder.glob("shard-*"))) == 1


def test_a_folder_that_is_drawn_into_is_not_overwritten(sampler, tmp_path):
    generate_dataset(sampler, "0-39", tmp_path, **SMALL)
    claim = Claims(tmp_path).take(1)
    with pytest.raises(ConfigError, match=rf"being drawn into: shard 1 by process {os.getpid()}"):
        generate_dataset(sampler, "0-39", tmp_path, **SMALL, overwrite=True)
    claim.release()


def test_what_another_draws_is_left_to_it(sampler, tmp_path):
    generate_dataset(sampler, "0-39", tmp_path, **SMALL)
    (tmp_path / "shard-000001.npz").unlink()
    claim = Claims(tmp_path).take(1)
    report = generate_dataset(sampler, "0-39", tmp_path, **SMALL)
    assert (report.samples, report.drawn, report.in_other_hands) == (20, 0, 1)
    claim.release()
    assert generate_dataset(sampler, "0-39", tmp_path, **SMALL).drawn == 20


@pytest.mark.parametrize(
    ("seeds", "times"), [("0-39", None), ("7-40", None), (range(0, 160, 8), "8.0"), ([3, 11, 4], None)]
)
def test_seeds_that_contend_for_rows_are_told_of(sampler, tmp_path, caplog, seeds, times):
    generate_dataset(sampler, seeds, tmp_path, **SMALL)
    assert ("consecutive" in caplog.text) is bool(times)
    assert times is None or f"these seeds take {float(times) * 20 / 24:.1f} times the runs" in caplog.text


@pytest.mark.parametrize("kind", ["npz", "png"])
def test_who_comes_second_leaves_the_firsts_shard(sampler, tmp_path, kind):
    """Where a claim was taken for left although its writer lived, two draw one shard."""
    job = {"format": kind, "shard": 20, "batch": 10}
    generate_dataset(sampler, "0-39", tmp_path / "other", **job)
    calls, real = [], sampler.run

    def slow(*arguments, **keywords):
        calls.append(arguments)
        if len(calls) == 2:  # the other finishes shard 0 now
            shutil.copytree(tmp_path / "other", tmp_path / "data", dirs_exist_ok=True)
        return real(*arguments, **keywords)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sampler, "run", slow)
        assert generate_dataset(sampler, "0-39", tmp_path / "data", **job).samples == 40
    assert len(Ledger(tmp_path / "data").path.read_text().splitlines()) == 2
    assert contents(tmp_path / "data") == contents(tmp_path / "other")


@pytest.mark.parametrize("name", ["shard-000000.npz", "ledger.jsonl"])
def test_files_that_nobody_can_tell_anything_of_are_refused(sampler, tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match=rf"has {name} but no manifest\.json"):
        generate_dataset(sampler, "0-39", tmp_path, **SMALL)
    assert (tmp_path / name).read_text() == "mine"


def test_a_file_in_a_shards_place_is_not_overwritten(sampler, tmp_path):
    generate_dataset(sampler, "0-39", tmp_path / "a", **SMALL)
    (tmp_path / "b").mkdir()
    shutil.copy(tmp_path / "a" / "manifest.json", tmp_path / "b")
    (tmp_path / "b" / "shard-000001.npz").write_text("mine")
    with pytest.raises(ConfigError, match="is there and not in the ledger"):
        generate_dataset(sampler, "0-39", tmp_path / "b", **SMALL)
    assert (tmp_path / "b" / "shard-000001.npz").read_text() == "mine"
    assert not list((tmp_path / "b").glob(".amed*"))


@pytest.mark.parametrize("field", ["seeds", "shard", "sha256", "format"])
def test_a_changed_manifest_is_refused(whole, sampler, tmp_path, field):
    shutil.copytree(whole[0], tmp_path / "data")
    path = tmp_path / "data" / "manifest.json"
    data = json.loads(path.read_text())
    data[field] = "png" if field == "format" else 40 if field == "shard" else "0-1"
    path.write_text(json.dumps(data))
    with pytest.raises(
        FileFormatError, match=r"manifest\.json holds no dataset's manifest: it is not what was written"
    ):
        generate_dataset(sampler, "0-89", tmp_path / "data", **SMALL)


def test_a_full_disk_names_the_file_and_leaves_a_folder_to_go_on_with(whole, sampler, tmp_path, monkeypatch):
    writes, real = [], NpzWriter._write

    def full(self, samples):
        writes.append(samples)
        if len(writes) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, samples)

    folder = tmp_path / "data"
    with monkeypatch.context() as patched:
        patched.setattr(NpzWriter, "_write", full)
        with pytest.raises(OSError, match="No space left on device") as caught:
            generate_dataset(sampler, "0-89", folder, **SMALL)
    assert caught.value.filename == str(folder / "shard-000001.npz")
    assert sorted(path.name for path in folder.iterdir()) == ["ledger.jsonl", "manifest.json", "shard-000000.npz"]
    assert generate_dataset(sampler, "0-89", folder, **SMALL).drawn == 70
    assert bytes_of(folder) == bytes_of(whole[0])


def test_a_network_that_fails_costs_the_open_shard_alone(whole, tmp_path):
    calls = []

    def denoiser(x, sigma):
        calls.append(len(x))
        if len(calls) == 16:
            raise ValueError("out of order")
        return x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2)

    sampler = Sampler(denoiser, solver="ipndm", nfe=3, shape=(1, 4, 4), sigma_min=0.002, sigma_max=80.0)
    with pytest.raises(ValueError, match="out of order"):
        generate_dataset(sampler, "0-89", tmp_path, **SMALL)
    assert set(calls) == {8}  # every batch has one size
    assert Ledger(tmp_path).refresh().keys() == {0}
    assert not list(tmp_path.glob(".amed*"))
    report = generate_dataset(sampler, "0-89", tmp_path, **SMALL)
    assert (report.samples, report.drawn) == (90, 70)


def test_another_function_of_the_same_name_is_told_by_its_samples(tmp_path):
    def make(scale):
        def denoiser(x, sigma):
            return scale * x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2)

        return Sampler(denoiser, solver="ipndm", nfe=3, shape=(1, 4, 4), sigma_min=0.002, sigma_max=80.0)

    generate_dataset(make(1.0), "0-39", tmp_path, **SMALL)
    (tmp_path / "shard-000001.npz").unlink()
    with pytest.raises(AmedError, match="come out otherwise now: seeds"):
        generate_dataset(make(0.5), "0-39", tmp_path, **SMALL)
    assert generate_dataset(make(1.0), "0-39", tmp_path, **SMALL).drawn == 20


def test_samples_that_differ_are_found_by_drawing_them_again(whole, sampler, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(whole[0], folder)
    arrays = dict(np.load(folder / "shard-000000.npz"))
    written = formats.FORMATS["npz"].open(tmp_path / "x.npz", 20, (8, 8, 1), "uint8", {})
    for samples in formats.FORMATS["npz"].read(folder / "shard-000000.npz", 8):
        other = samples.arrays.copy()
        other[:, 0, 0, 0] ^= 1
        written.add(type(samples)(samples.seeds, other, samples.labels))
    written.close()
    assert len(arrays["arr_0"]) == 20
    shutil.copy(tmp_path / "x.npz", folder / "shard-000000.npz")
    lines = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    entry = Ledger(folder).refresh()[0]
    (folder / "ledger.jsonl").unlink()
    ledger = Ledger(folder)
    for line in lines:
        del line["crc32"]
        size = (folder / line["name"]).stat().st_size
        ledger.append(type(entry)(**{**line, "size": size}))
    with pytest.raises(AmedError, match="come out otherwise now: seeds"):
        generate_dataset(sampler, "0-89", folder, **SMALL, verify=90)


def test_going_on_elsewhere_says_so(whole, sampler, tmp_path, monkeypatch, caplog):
    folder = tmp_path / "data"
    shutil.copytree(whole[0], folder)
    (folder / "shard-000003.npz").unlink()
    monkeypatch.setattr("amed_engine.engine.identity.device_name", lambda device: "cpu: Other")
    report = generate_dataset(Sampler("digits", nfe=3), "0-89", folder, **SMALL, verify=30)
    assert "begun elsewhere (device cpu:" in caplog.text
    assert "a batch drawn again is the same to the byte" in caplog.text
    assert report.verified == 30
    assert {entry.device for entry in Ledger(folder).refresh().values()} == {"cpu: Other", device_of(whole[0])}


def device_of(folder):
    return Ledger(folder).refresh()[0].device


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"format": "gif"}, "format must be one of png, npz"),
        ({"shard": 0}, "shard must be a whole number"),
        ({"batch": 2.5}, "batch must be a whole number"),
        ({"threads": True}, "threads must be a whole number"),
        ({"workers": 0}, "workers must be a whole number"),
        ({"workers": 2}, "2 workers need a function"),
        ({"verify": -1}, "verify must be a whole number"),
        ({"seeds": "1,1"}, "named twice: 1"),
        ({"class_labels": [1, 2]}, "class_labels"),
        ({"class_labels": 10}, "class_labels"),
        ({"stored": "int8"}, "stored must be one of"),
        ({"stored": "float32", "format": "png"}, "png holds pictures"),
        ({"prompt": "a"}, "takes no prompt"),
    ],
)
def test_what_cannot_be(sampler, tmp_path, changed, says):
    with pytest.raises(ConfigError, match=says):
        generate_dataset(sampler, changed.pop("seeds", "0-39"), tmp_path / "data", **{**SMALL, **changed})
    assert not (tmp_path / "data").exists()


def test_a_function_that_cannot_be_handed_to_workers(tmp_path):
    with pytest.raises(ConfigError, match="pass a function of a module"):
        generate_dataset(lambda: Sampler("digits", nfe=3), "0-39", tmp_path, **SMALL, workers=2)


@pytest.mark.parametrize(
    ("shard", "batch"), [(1000, 50), (1024, 64), (7, 7), (997, 64), (64, 64), (65, 64), (90, 45), (1, 1)]
)
def test_the_batch_fits_the_shard(shard, batch):
    assert fitting_batch(shard) == batch
