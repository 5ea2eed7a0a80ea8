"""Datasets and shards as streams: every sample once, in order; what is missing, damaged or not of the dataset is named."""

import json
import os
import shutil

import numpy as np
import pytest
from shards import ABOUT, assert_same, in_order_of_seeds, samples, shard, write

import amed_engine
from amed_engine.datasets.formats import FORMATS
from amed_engine.datasets.generate import generate_dataset
from amed_engine.datasets.reading import format_of, is_dataset, open_samples, read_arrays
from amed_engine.datasets.samples import Samples
from amed_engine.errors import FileFormatError


@pytest.fixture(params=list(FORMATS))
def format(request):
    if library := FORMATS[request.param].library:
        pytest.importorskip(library)
    return request.param


@pytest.fixture
def sampler(tiny_conditional):
    return amed_engine.Sampler(tiny_conditional, solver="euler", nfe=2)


def joined(parts):
    parts = list(parts)
    labels = [part.labels for part in parts if part.labels is not None]
    seeds = [seed for part in parts for seed in part.seeds]
    return Samples(seeds, np.concatenate([p.arrays for p in parts]), np.concatenate(labels) if labels else None)


def dataset(sampler, folder, format="npz", seeds="0-10", **options):
    generate_dataset(sampler, seeds, folder, format=format, shard=4, batch=4, **options)
    return folder


def test_a_dataset_is_read_in_the_order_of_its_shards(format, sampler, tmp_path):
    stored = open_samples(dataset(sampler, tmp_path / "data", format))
    assert stored.count == 11
    assert stored.about["plan"]["solver"] == "euler"
    found = joined(stored.batches(3))
    assert found.seeds == list(range(11))
    expected = sampler.run(list(range(8)), None).images
    shown = amed_engine.engine.images.to_uint8(expected)
    assert np.abs(found.arrays[:8].astype(int) - shown.astype(int)).max() <= 1


def test_every_format_holds_the_same(sampler, tmp_path):
    pytest.importorskip("zarr")
    pytest.importorskip("pyarrow")
    pytest.importorskip("webdataset")
    found = [joined(open_samples(dataset(sampler, tmp_path / name, name)).batches(100)) for name in FORMATS]
    for other in found[1:]:
        assert_same(other, found[0])


def test_a_shard_alone_is_read_by_its_suffix(format, tmp_path):
    given = in_order_of_seeds(samples(labels="class"))
    path = write(format, shard(format, tmp_path), given)
    stored = open_samples(path)
    assert (stored.count, stored.about) == (len(given), ABOUT)
    assert_same(joined(stored.batches(2)), given)
    assert format_of(path).name == format


def test_what_is_not_there_yet_is_left_out_and_said(sampler, tmp_path, caplog):
    folder = dataset(sampler, tmp_path / "data")
    (folder / "shard-000001.npz").unlink()
    (folder / ".amed-tmp.0-0.shard-000001.npz").write_bytes(b"half of it")
    stored = open_samples(folder)
    assert "7 of its 11 samples" in caplog.text
    assert joined(stored.batches(3)).seeds == [0, 1, 2, 3, 8, 9, 10]
    for path in folder.glob("shard-*"):
        path.unlink()
    with pytest.raises(FileFormatError, match="no finished shards"):
        open_samples(folder)


def test_a_shard_in_the_place_of_another_is_refused(sampler, tmp_path):
    folder = dataset(sampler, tmp_path / "data")
    shutil.copy(folder / "shard-000001.npz", folder / "shard-000000.npz")
    with pytest.raises(FileFormatError, match=r"shard-000000\.npz"):
        joined(open_samples(folder).batches(4))


def test_a_file_that_no_ledger_lists_is_not_read(sampler, tmp_path):
    folder = dataset(sampler, tmp_path / "data")
    shutil.copy(folder / "shard-000001.npz", folder / "shard-000003.npz")
    assert open_samples(folder).count == 11


@pytest.mark.parametrize("name", ["nothing", "x.txt", "x.npz", "folder"])
def test_what_holds_no_samples_is_named(name, tmp_path):
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
        (path / "manifest.json").write_text(json.dumps({"name": "a web application"}))
    elif name == "x.npz":
        np.savez(path, mu=np.zeros(2), sigma=np.eye(2))
    elif name != "nothing":
        path.write_text("text")
    assert not is_dataset(path)
    with pytest.raises(FileFormatError, match=f"{name} holds no samples"):
        open_samples(path)


@pytest.mark.parametrize("name", ["x.npz", "x.tar", "folder/manifest.json", "folder/about.json"])
def test_a_pipe_is_not_waited_for(name, tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / name)
    path = tmp_path / name.partition("/")[0]
    assert not is_dataset(path)
    with pytest.raises(FileFormatError, match=path.name):
        open_samples(path)


def test_a_damaged_manifest_is_refused(sampler, tmp_path):
    folder = dataset(sampler, tmp_path / "data")
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace("euler", "heun"))
    with pytest.raises(FileFormatError, match=r"manifest\.json"):
        open_samples(folder)


# ---- any .npz with pictures in arr_0


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_pictures_of_any_npz_are_streamed(save, tmp_path):
    given = samples(range(20), shape=(6, 5, 3))
    save(tmp_path / "x.npz", given.arrays, np.arange(20))
    parts = list(read_arrays(tmp_path / "x.npz", 7))
    assert [len(part) for part in parts] == [7, 7, 6]
    np.testing.assert_array_equal(np.concatenate(parts), given.arrays)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 4, 4, 3)),
        np.zeros((2, 4, 4), np.uint8),
        np.zeros((2, 4, 4, 4), np.uint8),
        np.array([None]),
        np.uint8(5),
        np.zeros((0, 4, 4, 3), np.uint8),
    ],
)
def test_what_is_no_picture_is_refused(array, tmp_path):
    np.savez(tmp_path / "x.npz", array)
    with pytest.raises(FileFormatError, match=r"x\.npz is no .*(shape|dtype|float64|object)"):
        list(read_arrays(tmp_path / "x.npz", 7))


def test_an_array_that_ends_early_is_refused(tmp_path):
    import zipfile

    from amed_engine.datasets.formats.npz import _head

    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("arr_0.npy", _head((1 << 40, 64, 64, 3), np.dtype(np.uint8)) + bytes(3 * 64 * 64))
    with pytest.raises(FileFormatError, match=r"x\.npz"):
        list(read_arrays(tmp_path / "x.npz", 7))
