"""Every format: what is written comes back, the same bytes each time, in files that other libraries open."""

import hashlib
import io
import json

import numpy as np
import pytest
from PIL import Image
from shards import ABOUT, SEEDS, assert_same, bytes_of, in_order_of_seeds, read, samples, shard, write

from amed_engine.datasets.formats import FORMATS
from amed_engine.datasets.formats.pictures import decoded, encoded, text_chunks
from amed_engine.datasets.samples import Samples
from amed_engine.errors import ConfigError, FileFormatError

KINDS = [
    ("uint8", (5, 4, 3)),
    ("uint8", (8, 8, 1)),
    ("uint8", (1, 1, 1)),
    ("float32", (2, 3, 4)),
    ("float16", (4, 2, 2, 2)),
    ("float32", (7,)),
]


@pytest.fixture(params=list(FORMATS))
def format(request):
    if library := FORMATS[request.param].library:
        pytest.importorskip(library)
    return request.param


@pytest.mark.parametrize("labels", [None, "class", "numbers"])
@pytest.mark.parametrize(("dtype", "shape"), KINDS)
def test_what_is_written_comes_back(format, dtype, shape, labels, tmp_path):
    if dtype != "uint8" and not FORMATS[format].floats:
        with pytest.raises(ConfigError, match="pictures of bytes alone"):
            FORMATS[format].open(shard(format, tmp_path), 5, shape, dtype, ABOUT)
        return
    given = samples(shape=shape, dtype=dtype, labels=labels)
    path = write(format, shard(format, tmp_path), given)
    expected = in_order_of_seeds(given) if format == "png" else given
    for batch in (1, 2, 5, 100):
        assert_same(read(format, path, batch), expected)
    header = FORMATS[format].header(path)
    assert header.about == ABOUT
    assert (header.count, header.shape, header.dtype) == (5, shape, dtype)


@pytest.mark.parametrize("labels", [None, "class", "numbers"])
def test_the_bytes_follow_from_the_samples(format, labels, tmp_path):
    given = samples(labels=labels)
    first, second = (write(format, shard(format, tmp_path, name), given) for name in ("shard-000003", "other"))
    assert bytes_of(first) == bytes_of(second)


def test_a_shard_replaces_the_file_that_a_temporary_name_made(format, tmp_path):
    path = shard(format, tmp_path, ".amed-tmp.0123.shard-000003")
    path.mkdir() if FORMATS[format].folder else path.touch()
    given = samples(sorted(SEEDS))
    assert_same(read(format, write(format, path, given)), given)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"shape": (5, 4, 1)}, "shape, dtype and labels"),
        ({"labels": "class"}, "shape, dtype and labels"),
        ({"seeds": range(4)}, "was to hold 5 samples, got 6"),
    ],
)
def test_a_writer_refuses_what_was_not_announced(format, change, said, tmp_path):
    writer = FORMATS[format].open(shard(format, tmp_path), 5, (5, 4, 3), "uint8", ABOUT)
    writer.add(samples([10, 11]))
    with pytest.raises(ConfigError, match=said):
        writer.add(samples(**{"seeds": [1, 2], **change}))
    with pytest.raises(ConfigError, match="was to hold 5 samples, got 2"):
        writer.close()
    writer.abort()


@pytest.mark.parametrize(
    ("count", "shape", "dtype", "about"),
    [
        (0, (5, 4, 3), "uint8", {}),
        (1, (5, 4, 2), "uint8", {}),
        (1, (5, 0, 3), "uint8", {}),
        (1, (1 << 20, 1 << 20, 3), "uint8", {}),
        (1, (5, 4, 3), "int32", {}),
        (1, (5, 4, 3), "uint8", {"level": float("nan")}),
        (1, (5, 4, 3), "uint8", {"plan": "x" * (9 << 20)}),
        (1, (5, 4, 3), "uint8", {"plan": object()}),
    ],
)
def test_what_no_shard_holds_is_refused(format, count, shape, dtype, about, tmp_path):
    with pytest.raises(ConfigError):
        FORMATS[format].open(shard(format, tmp_path), count, shape, dtype, about)


def test_what_is_no_shard_is_named(format, tmp_path):
    path = shard(format, tmp_path)
    with pytest.raises(FileFormatError, match=path.name):
        next(FORMATS[format].read(path, 1))
    path.mkdir() if FORMATS[format].folder else path.write_bytes(b"PK" * 500)
    with pytest.raises(FileFormatError, match=path.name):
        next(FORMATS[format].read(path, 1))


def test_hashes_are_of_the_bytes():
    given = samples(dtype="float32", shape=(2, 3))
    assert given.hashes() == [hashlib.sha256(array.tobytes()).hexdigest() for array in given.arrays]
    turned = Samples(given.seeds, np.asfortranarray(given.arrays))
    assert turned.hashes() == given.hashes()


@pytest.mark.parametrize(
    ("seeds", "arrays", "labels"),
    [
        ([1], np.zeros((2, 4), np.float32), None),
        ([1], np.zeros((1, 4), np.float64), None),
        ([1], np.zeros((1, 4), np.float32), np.zeros(1, np.int32)),
        ([1], np.zeros((1, 4), np.float32), np.zeros(2, np.int64)),
        ([1], np.zeros((1, 4), np.float32), np.zeros((1, 2), np.float64)),
    ],
)
def test_samples_of_other_kinds_are_refused(seeds, arrays, labels):
    with pytest.raises(ConfigError):
        Samples(seeds, arrays, labels)


# ---- what other libraries see


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 3), (3, 1, 3), (1, 7, 1), (8, 8, 1), (64, 48, 3)])
def test_pictures_are_those_that_others_read(shape):
    random = np.random.default_rng(0)
    given = np.stack(
        [random.integers(0, 256, shape).astype(np.uint8), np.zeros(shape, np.uint8), np.full(shape, 255, np.uint8)]
    )
    for data, picture in zip(encoded(given, [text_chunks({"seed": "1"})] * 3), given, strict=True):
        with Image.open(io.BytesIO(data)) as opened:
            assert opened.mode == ("RGB" if shape[2] == 3 else "L")
            np.testing.assert_array_equal(np.array(opened).reshape(shape), picture)
            assert opened.text == {"seed": "1"}
        np.testing.assert_array_equal(decoded(data, shape, "it"), picture)
        with pytest.raises(FileFormatError, match="it is no picture of shape"):
            decoded(data, (shape[0] + 1, *shape[1:]), "it")


def test_pictures_with_other_filters_are_refused():
    data = io.BytesIO()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(data, "PNG")
    with pytest.raises(FileFormatError, match="no shard's pictures have"):
        decoded(data.getvalue(), (8, 8, 1), "it")


def test_pictures_say_what_they_are(tmp_path):
    given = samples(labels="class")
    path = write("png", tmp_path / "shard-000003", given)
    names = ["000007.png", "000008.png", "000042.png", "1000000.png", "4294967295.png", "about.json"]
    assert sorted(file.name for file in path.iterdir()) == sorted(names)
    with Image.open(path / "000042.png") as picture:
        np.testing.assert_array_equal(np.array(picture), given.arrays[0])
        text = dict(picture.text)
    assert text["seed"] == "42"
    assert text["class"] == str(given.labels[0])
    assert text["sha256"] == given.hashes()[0]
    assert text["plan"] == ABOUT["plan"]
    assert json.loads((path / "about.json").read_text())["about"] == ABOUT


def test_numpy_opens_an_npz(tmp_path):
    given = samples(labels="numbers")
    with np.load(write("npz", tmp_path / "s.npz", given), allow_pickle=False) as file:
        assert file.files == ["arr_0", "seeds", "labels", "sha256", "about"]
        assert file["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(file["arr_0"], given.arrays)
        np.testing.assert_array_equal(file["seeds"], given.seeds)
        np.testing.assert_array_equal(file["labels"], given.labels)
        assert [digest.decode() for digest in file["sha256"]] == given.hashes()
        assert json.loads(str(file["about"]))["about"] == ABOUT


@pytest.mark.parametrize(("labels", "kind"), [("class", "cls"), ("numbers", "json"), (None, "json")])
def test_webdataset_iterates_over_the_samples_alone(labels, kind, tmp_path):
    library = pytest.importorskip("webdataset")
    given = samples(labels=labels)
    path = str(write("webdataset", tmp_path / "s.tar", given))
    raw = list(library.WebDataset(path, shardshuffle=False))
    assert [sample["__key__"] for sample in raw] == given.names
    assert all(set(sample) - {"__key__", "__url__", "__local_path__"} == {"png", "json", kind} for sample in raw)
    told = [json.loads(sample["json"]) for sample in raw]
    assert [(data["seed"], data["sha256"]) for data in told] == list(zip(given.seeds, given.hashes(), strict=True))
    for sample, (picture, label) in zip(
        range(5), library.WebDataset(path, shardshuffle=False).decode("rgb8").to_tuple("png", kind), strict=True
    ):
        np.testing.assert_array_equal(picture, given.arrays[sample])
        if labels == "class":
            assert label == given.labels[sample]
        elif labels:
            np.testing.assert_array_equal(np.float32(label["labels"]), given.labels[sample])


def test_webdataset_reads_floats(tmp_path):
    library = pytest.importorskip("webdataset")
    given = samples(shape=(2, 3, 4), dtype="float16")
    path = str(write("webdataset", tmp_path / "s.tar", given))
    arrays = [array for (array,) in library.WebDataset(path, shardshuffle=False).decode().to_tuple("npy")]
    np.testing.assert_array_equal(np.stack(arrays), given.arrays)


def opened(format, path):
    """The table and its metadata, as pyarrow gives them."""
    if format == "parquet":
        return pytest.importorskip("pyarrow.parquet").read_table(path)
    return pytest.importorskip("pyarrow").ipc.open_file(path).read_all()


@pytest.mark.parametrize("format", ["parquet", "arrow"])
def test_pyarrow_opens_tables(format, tmp_path):
    given = samples(labels="class")
    table = opened(format, write(format, shard(format, tmp_path), given))
    assert table.column_names == ["seed", "name", "image", "label", "sha256"]
    assert table["seed"].to_pylist() == given.seeds
    assert table["label"].to_pylist() == given.labels.tolist()
    assert table["sha256"].to_pylist() == given.hashes()
    for row, picture in zip(table["image"].to_pylist(), given.arrays, strict=True):
        np.testing.assert_array_equal(np.array(Image.open(io.BytesIO(row["bytes"]))), picture)
    assert [row["path"] for row in table["image"].to_pylist()] == [f"{name}.png" for name in given.names]
    assert json.loads(table.schema.metadata[b"amed"])["about"] == ABOUT
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert list(features) == table.column_names
    assert features["image"] == {"_type": "Image"}


@pytest.mark.parametrize("format", ["parquet", "arrow"])
def test_tables_hold_floats_as_lists(format, tmp_path):
    given = samples(shape=(2, 3, 4), dtype="float32", labels="numbers")
    table = opened(format, write(format, shard(format, tmp_path), given))
    assert table.column_names == ["seed", "name", "array", "label", "sha256"]
    np.testing.assert_array_equal(np.float32(table["array"].to_pylist()).reshape(5, 2, 3, 4), given.arrays)
    np.testing.assert_array_equal(np.float32(table["label"].to_pylist()), given.labels)
    assert json.loads(table.schema.metadata[b"amed"])["shape"] == [2, 3, 4]


def test_zarr_opens_a_group(tmp_path):
    library = pytest.importorskip("zarr")
    given = samples(labels="class")
    group = library.open_group(write("zarr", tmp_path / "s.zarr", given), mode="r")
    assert sorted(group.array_keys()) == ["images", "labels", "seeds", "sha256"]
    assert group["images"].chunks == (2, 5, 4, 3)
    for name, expected in (("images", given.arrays), ("seeds", given.seeds), ("labels", given.labels)):
        np.testing.assert_array_equal(group[name][:], expected)
    assert [digest.tobytes().hex() for digest in group["sha256"][:]] == given.hashes()
    assert group.attrs["about"] == ABOUT
