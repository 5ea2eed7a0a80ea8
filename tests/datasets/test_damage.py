"""Damaged shards: refused with a sentence that names the file, or what was written; never other content, nothing run."""

import io
import json
import os
import resource
import shutil
import tarfile
import zlib

import numpy as np
import pytest
from shards import ABOUT, assert_same, bytes_of, read, samples, shard, write

from amed_engine.datasets.formats import FORMATS, tables
from amed_engine.datasets.formats.shard import Header
from amed_engine.datasets.formats.tar import Tar
from amed_engine.errors import FileFormatError

MUTATIONS = 500
MOST = 500 << 10  # KiB of memory that reading a damaged shard of a few KiB may add


def mutated(data: bytes, random: np.random.Generator) -> bytes:
    """Some bits turned, the end cut off, or bytes taken out, put in or copied from elsewhere."""
    at, length = int(random.integers(len(data))), int(random.integers(1, 32))
    kind = random.integers(6)
    if kind < 2:
        changed = bytearray(data)
        for i in random.integers(len(data), size=1 + 3 * int(kind)):
            changed[i] ^= 1 << int(random.integers(8))
        return bytes(changed)
    other = int(random.integers(len(data)))
    return {
        2: data[:at],
        3: data[:at] + data[at + length :],
        4: data[:at] + random.bytes(length) + data[at + (length if length % 2 else 0) :],
        5: data[:at] + data[other : other + length] + data[at + length :],
    }[int(kind)]


@pytest.fixture(params=list(FORMATS))
def format(request):
    if library := FORMATS[request.param].library:
        pytest.importorskip(library)
    return request.param


@pytest.fixture(params=["pictures", "floats"])
def original(request, format, tmp_path):
    """(samples, shard)"""
    if request.param == "floats" and not FORMATS[format].floats:
        pytest.skip("pictures alone")
    kind = (
        {"shape": (2, 3, 4), "dtype": "float32", "labels": "numbers"}
        if request.param == "floats"
        else {"labels": "class"}
    )
    given = samples(sorted([42, 7, 8, 1000000, 11]), **kind)
    return given, write(format, shard(format, tmp_path), given)


def read_or_refusal(format, path):
    try:
        return read(format, path)
    except FileFormatError as error:
        return str(error)


def test_a_damaged_shard_is_refused_or_what_was_written(format, original):
    given, path = original
    whole = bytes_of(path)
    random = np.random.default_rng(0)
    before, refused = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
    for _ in range(MUTATIONS):
        name = list(whole)[random.integers(len(whole))]
        file = path / name if path.is_dir() else path
        file.write_bytes(mutated(whole[name], random))
        said = read_or_refusal(format, path)
        if isinstance(said, str):
            assert str(path) in said
            refused += 1
        else:
            assert_same(said, given)
            assert FORMATS[format].header(path).about == ABOUT
        file.write_bytes(whole[name])
    assert refused > MUTATIONS / 4
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST
    assert_same(read(format, path), given)


def test_a_file_more_or_less_is_refused(format, original):
    _, path = original
    if not path.is_dir():
        pytest.skip("one file")
    whole = bytes_of(path)
    for name in whole:
        (path / name).unlink()
        with pytest.raises(FileFormatError, match=path.name):
            read(format, path)
        (path / name).write_bytes(whole[name])


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/dev/zero", path)])
def test_what_is_no_regular_file_is_refused_and_not_waited_for(make, format, original):
    _, path = original
    for name in list(bytes_of(path))[:3]:
        file = path / name if path.is_dir() else path
        data = file.read_bytes()
        file.unlink()
        make(file)
        with pytest.raises(FileFormatError, match=path.name):
            read(format, path)
        file.unlink()
        file.write_bytes(data)


def test_samples_of_another_shard_are_refused(format, tmp_path):
    """Each of two shards is sound; a file of the one in the place of the other's is not."""
    one, other = samples([1, 2, 3]), samples([1, 2, 4])
    first, second = (write(format, shard(format, tmp_path, name), s) for name, s in (("a", one), ("b", other)))
    if not first.is_dir():
        pytest.skip("one file")
    for name in bytes_of(second):
        copy = shard(format, tmp_path, "copy")
        shutil.copytree(first, copy)
        (copy / name).write_bytes((second / name).read_bytes())
        if (copy / name).read_bytes() != bytes_of(first).get(name):
            with pytest.raises(FileFormatError, match="copy"):
                read(format, copy)
        shutil.rmtree(copy)


# ---- what random damage does not make: files that claim more than they hold, or ask for something to be run


def test_compressed_tables_are_refused(tmp_path):
    """A page of a few bytes may unpack to any number."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    given = samples([1, 2, 3])
    columns = tables.schema(Header(3, (5, 4, 3), "uint8", ABOUT))
    batch = tables.table(given, columns)
    for codec in ("snappy", "gzip", "zstd"):
        parquet.write_table(pa.Table.from_batches([batch]), tmp_path / "x.parquet", compression=codec)
        with pytest.raises(FileFormatError, match=r"x\.parquet .* compressed"):
            read("parquet", tmp_path / "x.parquet")
    for codec in ("lz4", "zstd"):
        options = pa.ipc.IpcWriteOptions(compression=codec)
        with pa.ipc.new_file(tmp_path / "x.arrow", columns, options=options) as writer:
            writer.write_batch(batch)
        with pytest.raises(FileFormatError, match=r"x\.arrow .* compressed"):
            read("arrow", tmp_path / "x.arrow")


def test_a_codec_that_the_library_does_not_know_is_refused(tmp_path):
    """pyarrow ends the process where it is asked for the name of one."""
    pytest.importorskip("pyarrow")
    path = write("parquet", tmp_path / "x.parquet", samples([1, 2, 3]))
    whole = path.read_bytes()
    codec = whole.index(b"\x19\x18\x04seed\x15\x00") + 7  # after the path of the first column: field 4, UNCOMPRESSED
    path.write_bytes(whole[: codec + 1] + b"\x20" + whole[codec + 2 :])
    with pytest.raises(FileFormatError, match=r"x\.parquet .* compressed"):
        read("parquet", path)


def test_more_samples_than_the_file_can_hold_are_refused(format, tmp_path):
    path = shard(format, tmp_path)
    writer = FORMATS[format].open(path, 10**12, (5, 4, 3), "uint8", ABOUT)
    writer.add(samples([1, 2, 3]))
    writer._added = 10**12
    writer.close()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(FileFormatError, match=path.name):
        read(format, path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST / 10


def npz(path, **changes):
    """A shard with members exchanged; None leaves one out."""
    given = samples([1, 2, 3])
    write("npz", path, given)
    with np.load(path) as file:
        members = {name: file[name] for name in file.files}
    changed = {name: value for name, value in {**members, **changes}.items() if value is not None}
    np.savez(path, **changed)
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {"seeds": np.array([1, 2, None], object)},
        {"arr_0": np.array([None] * 3, object)},
        {"about": np.array({"plan": 1}, object)},
        {"about": np.array("{}")},
        {"sha256": np.zeros((3, 32), np.uint8)},
        {"sha256": None},
        {"labels": np.zeros(3, np.int64)},
        {"seeds": np.array([1, 2, 3], np.float64)},
        {"seeds": np.array([1, 2, 4])},
        {"seeds": np.array([[1, 2, 3]])},
        {"arr_0": np.zeros((3, 5, 4, 3), np.uint8)},
        {"arr_0": np.zeros((2, 5, 4, 3), np.uint8)},
        {"arr_0": np.zeros((3, 5, 4, 3), np.float32)},
        {"more": np.zeros(3)},
    ],
)
def test_an_npz_with_other_members_is_refused(changes, tmp_path):
    path = npz(tmp_path / "x.npz", **changes)
    with pytest.raises(FileFormatError, match=r"x\.npz"):
        read("npz", path)


def test_a_compressed_npz_is_refused(tmp_path):
    path = npz(tmp_path / "x.npz")
    with np.load(path) as file:
        np.savez_compressed(path, **{name: file[name] for name in file.files})
    with pytest.raises(FileFormatError, match="compressed"):
        read("npz", path)


def tar(path, members):
    with path.open("wb") as file:
        made = Tar(file)
        for name, data in members:
            made.addfile(tarfile.TarInfo(name), io.BytesIO(data))
        made.close()


@pytest.mark.parametrize(
    "change",
    [
        lambda members: [("000001.pyd", b"x"), *members],
        lambda members: [(name.replace(".png", ".pickle"), data) for name, data in members],
        lambda members: [(f"../{name}", data) for name, data in members],
        lambda members: members[:-1],
        lambda members: members[2:],
        lambda members: [*members, members[0]],
        lambda members: [(name, data.replace(b'"seed": 2', b'"seed": 3')) for name, data in members],
        lambda members: [(name, b"5" if name == "000002.cls" else data) for name, data in members],
        lambda members: [(name, b"[" * 100_000 if name == "000002.json" else data) for name, data in members],
    ],
)
def test_a_tar_with_other_members_is_refused(change, tmp_path):
    pytest.importorskip("webdataset")
    path = write("webdataset", tmp_path / "x.tar", samples([1, 2, 3], labels="class"))
    with tarfile.open(path) as opened:
        members = [(info.name, opened.extractfile(info).read()) for info in opened]
    tar(path, members)
    assert len(read("webdataset", path)) == 3
    tar(path, change(members))
    with pytest.raises(FileFormatError, match=r"x\.tar"):
        read("webdataset", path)


def test_a_picture_that_claims_to_be_vast_is_refused(tmp_path):
    path = write("png", tmp_path / "x", samples([1, 2, 3], shape=(8, 8, 1)))
    file = path / "000002.png"
    data = bytearray(file.read_bytes())
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    file.write_bytes(data)
    with pytest.raises(FileFormatError, match=r"000002\.png"):
        read("png", path)


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [10**12, 5, 4, 3]},
        {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [10**9, 5, 4, 3]}}},
        {"codecs": [{"name": "bytes"}, {"name": "zstd", "configuration": {"level": 0, "checksum": False}}]},
        {"data_type": "float64"},
        {"data_type": "string"},
    ],
)
def test_a_zarr_array_of_another_kind_is_refused(change, tmp_path):
    pytest.importorskip("zarr")
    path = write("zarr", tmp_path / "x.zarr", samples([1, 2, 3]))
    metadata = path / "images" / "zarr.json"
    metadata.write_text(json.dumps({**json.loads(metadata.read_text()), **change}))
    with pytest.raises(FileFormatError, match=r"x\.zarr"):
        read("zarr", path)
